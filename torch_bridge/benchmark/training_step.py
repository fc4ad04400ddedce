"""`python -m torch_bridge.benchmark --training-step`: what a loss adds to a whole step of training.

A step of AdamW on a student of Qwen3-0.6B's size (grouped-query attention with normalised queries and keys, rotary
positions, SwiGLU, embedding and head tied; all in bfloat16, every layer recomputed in the backward pass) that learns
from given hidden states and head of a teacher by the Jensen-Shannon divergence: with jaxkd, dense with exact and with
rounded logits, and the step without a loss, which takes the mean of the hidden states. Tokens, teacher and parameters
are random. The contenders train the same parameters in turn; memory is XLA's plan of temporaries, and a GPU's memory is
JAX's as it takes it by default.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.table import Table

from torch_bridge.benchmark.measurements import Result, ratio, rounded, values_of, versions
from torch_bridge.benchmark.measuring import failure_noted, release, run_in_turn
from torch_bridge.benchmark.tables import as_text, from_to, plain_table, shown
from torch_bridge.benchmark.tasks import TASKS
from torch_bridge.benchmark.two_heads import jax_dense, jaxkd_divergence

NO_LOSS = "no loss"
ROTARY_BASE = 1e6
EPSILON = 1e-6
Arrays = dict[str, Any]
Log = Callable[[str], None]


class Model(NamedTuple):
    """Sizes of a student, of its sequences, and of the teacher's hidden states."""

    layers: int
    width: int
    heads: int
    key_heads: int
    head_size: int
    feedforward: int
    vocabulary: int
    length: int
    teacher_width: int


QWEN3 = Model(28, 1024, 16, 8, 128, 3072, 151936, 2048, 4096)
TINY = Model(2, 32, 4, 2, 8, 64, 512, 16, 48)
MODELS = {"cuda": QWEN3, "cpu": TINY}
TOKENS = {"cuda": (8192, 32768), "cpu": (64,)}


class Data(NamedTuple):
    tokens: jax.Array  # (B, T) int32
    teacher_hidden: jax.Array  # (B T, Dt)
    teacher_weight: jax.Array  # (V, Dt)


LOSSES: dict[str, Callable[[Arrays], jax.Array]] = {
    NO_LOSS: lambda x: x["hidden"].astype(jnp.float32).mean(),
    "jaxkd": lambda x: jaxkd_divergence(None, None, TASKS["JSD"])(x, None),
    "JAX dense, exact logits": lambda x: jax_dense(True, TASKS["JSD"])(x, None),
    "JAX dense, rounded logits": lambda x: jax_dense(False, TASKS["JSD"])(x, None),
}


def normal(key: jax.Array, shape: Sequence[int], size: float) -> jax.Array:
    return (size * jax.random.normal(key, shape)).astype(jnp.bfloat16)


def make_parameters(model: Model, key: jax.Array) -> Arrays:
    queries, keys = model.heads * model.head_size, model.key_heads * model.head_size
    shapes = {
        "query": (model.width, queries),
        "key": (model.width, keys),
        "value": (model.width, keys),
        "attended": (queries, model.width),
        "gate": (model.width, model.feedforward),
        "up": (model.width, model.feedforward),
        "down": (model.feedforward, model.width),
    }
    scales = {
        "attention_scale": model.width,
        "query_scale": model.head_size,
        "key_scale": model.head_size,
        "feedforward_scale": model.width,
    }
    *drawn, last = jax.random.split(key, len(shapes) + 1)
    layers = {
        name: normal(k, (model.layers, *shape), 0.02) for k, (name, shape) in zip(drawn, shapes.items(), strict=True)
    }
    layers |= {name: jnp.ones((model.layers, size), jnp.bfloat16) for name, size in scales.items()}
    return {
        "embedding": normal(last, (model.vocabulary, model.width), 0.02),
        "layers": layers,
        "scale": jnp.ones(model.width, jnp.bfloat16),
    }


def make_data(model: Model, tokens: int, key: jax.Array) -> Data:
    words, states, head = jax.random.split(key, 3)
    return Data(
        jax.random.randint(words, (tokens // model.length, model.length), 0, model.vocabulary),
        normal(states, (tokens, model.teacher_width), 1.0),
        normal(head, (model.vocabulary, model.teacher_width), model.teacher_width**-0.5),
    )


def hidden_states(model: Model, attention: str, parameters: Arrays, tokens: jax.Array) -> jax.Array:
    """(B, T) -> (B, T, D)."""

    @jax.checkpoint
    def layer(x, weights):
        return _layer(model, attention, weights, x), None

    x, _ = jax.lax.scan(layer, parameters["embedding"][tokens], parameters["layers"])
    return _normalised(x, parameters["scale"])


def _layer(model: Model, attention: str, weights: Arrays, x: jax.Array) -> jax.Array:
    inner = _normalised(x, weights["attention_scale"])

    def heads(name: str) -> jax.Array:
        return (inner @ weights[name]).reshape(*x.shape[:2], -1, model.head_size)  # (B, T, heads, head_size)

    query = _rotated(_normalised(heads("query"), weights["query_scale"]))
    key = _rotated(_normalised(heads("key"), weights["key_scale"]))
    attend: Any = partial(jax.nn.dot_product_attention, is_causal=True, implementation=attention)
    x = x + attend(query, key, heads("value")).reshape(*x.shape[:2], -1) @ weights["attended"]
    inner = _normalised(x, weights["feedforward_scale"])
    return x + (jax.nn.silu(inner @ weights["gate"]) * (inner @ weights["up"])) @ weights["down"]


def _normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + EPSILON)).astype(x.dtype) * scale


def _rotated(x: jax.Array) -> jax.Array:
    """(B, T, heads, head_size), each head's halves turned by the position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * ROTARY_BASE ** (-jnp.arange(half) / half)  # (T, half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def loss_of(name: str, model: Model, attention: str, parameters: Arrays, data: Data) -> jax.Array:
    hidden = hidden_states(model, attention, parameters, data.tokens).reshape(-1, model.width)
    arrays = {"hidden": hidden, "weight": parameters["embedding"]}
    return LOSSES[name](arrays | {"teacher_hidden": data.teacher_hidden, "teacher_weight": data.teacher_weight})


class Training:
    """Parameters and the optimizer's state, which every contender's step takes and leaves."""

    def __init__(self, model: Model, attention: str):
        self.model, self.attention = model, attention
        self.optimizer = optax.adamw(1e-5)
        self.state: Any = self.start()

    def start(self) -> tuple[Arrays, Any]:
        @jax.jit
        def start(key):
            parameters = make_parameters(self.model, key)
            return parameters, self.optimizer.init(parameters)

        return start(jax.random.key(0))

    def step(self, name: str, state: tuple[Arrays, Any], data: Data) -> tuple[tuple[Arrays, Any], jax.Array]:
        parameters, moments = state
        loss, gradients = jax.value_and_grad(partial(loss_of, name, self.model, self.attention))(parameters, data)
        updates, moments = self.optimizer.update(gradients, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), loss

    def compiled(self, name: str, data: Data) -> Any:
        return jax.jit(partial(self.step, name), donate_argnums=0).lower(self.state, data).compile()

    def run(self, compiled: Any, data: Data) -> jax.Array:
        try:
            self.state, loss = jax.block_until_ready(compiled(self.state, data))
        except Exception:
            self.state = None
            self.state = self.start()  # the old one was given away
            raise
        return loss


def usable_attention(model: Model, device: str) -> str:
    """cuDNN's where it works, as a user of a GPU would have it; XLA's, which forms the (T, T) scores, elsewhere."""
    if device == "cuda":
        key, query = (
            jnp.zeros((1, model.length, heads, model.head_size), jnp.bfloat16)
            for heads in (model.key_heads, model.heads)
        )
        try:
            jax.block_until_ready(jax.nn.dot_product_attention(query, key, key, is_causal=True, implementation="cudnn"))
        except Exception:
            return "xla"
        return "cudnn"
    return "xla"


def measure_steps(
    model: Model, tokens: Sequence[int], device: str, repeats: int, seconds: float, only: Sequence[str], log: Log
) -> dict[str, Any]:
    """The steps at each number of tokens, as JSON values beside the `Result`s they are made of."""
    attention = usable_attention(model, device)
    training = Training(model, attention)
    results = []
    for count in tokens:
        data = make_data(model, count, jax.random.key(1))
        results += _measure_at(training, data, repeats, seconds, only, log)
        jax.clear_caches()
    return {"versions": versions(), "model": model._asdict(), "attention": attention, "results": results}


def _measure_at(
    training: Training, data: Data, repeats: int, seconds: float, only: Sequence[str], log: Log
) -> list[Result]:
    results: list[Result] = []
    runs: list[tuple[Result, Any]] = []
    for name in LOSSES:
        if only and not any(word in name for word in only):
            continue
        result = Result(f"{data.tokens.size} tokens", name)
        results.append(result)
        with failure_noted(result):
            compiled = training.compiled(name, data)
            result.memory = compiled.memory_analysis().temp_size_in_bytes
            run = partial(training.run, compiled, data)
            run()
            runs.append((result, run))
        log(f"{result.task}: {name}: {result.failure or 'ready'}")
    run_in_turn(runs, repeats, seconds)
    release()
    return results


def tokens_of(result: Result) -> int:
    return int(result.task.split()[0])


def training_table(title: str, results: Sequence[Result]) -> Table:
    view = plain_table(title, ("tokens", "loss"), ("ms", "min to max", "tokens/s", "× no loss", "temporary GiB"))
    view.add_column("")
    for result in results:
        view.add_row(
            result.task,
            result.contender,
            shown(result.median, ".1f", 1e3),
            from_to(result),
            shown(ratio(tokens_of(result), result.median), ",.0f"),
            shown(ratio(result.median, _bare(results, result))),
            shown(result.memory, scale=2**-30),
            as_text(result.failure),
        )
    return view


def _bare(results: Sequence[Result], result: Result) -> float | None:
    """The time of the step without a loss."""
    return next((r.median for r in results if r.task == result.task and r.contender == NO_LOSS), None)


def training_values(found: dict[str, Any]) -> dict[str, Any]:
    """What `measure_steps` found, as JSON values."""
    keep = ("task", "contender", "times", "median", "failure")
    return found | {
        "results": [
            {name: x for name, x in values_of(result).items() if name in keep}
            | {"temporary": result.memory, "tokens_per_second": rounded(ratio(tokens_of(result), result.median))}
            for result in found["results"]
        ]
    }
