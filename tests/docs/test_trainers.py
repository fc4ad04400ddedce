"""What the snippets of docs/trainers.md compute: each takes the step that the model's dense logits would."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxkd

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
D, V = 8, 13
TOKENS = jax.random.randint(jax.random.key(0), (3, 6), 0, V)
LABELS = jaxkd.shift_labels(TOKENS)


def sections():
    """Each heading of the page, and the text below it."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def run(heading):
    """What the snippet below the heading defines."""
    (code,) = re.findall(r"```python\n(.*?)```", sections()[heading], flags=re.DOTALL)
    namespace = {}
    exec(compile(code, f"docs/trainers.md, {heading}", "exec"), namespace)
    return SimpleNamespace(**namespace)


def dense_loss(logits, teacher_logits):
    """KL and half of the cross-entropy, of the rows that have a label."""
    counts = LABELS != -100
    log_q, log_p = (jax.nn.log_softmax(x) for x in (logits, teacher_logits))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    hard = -jnp.take_along_axis(log_q, jnp.maximum(LABELS, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(counts, kl + 0.5 * hard, 0)) / jnp.sum(counts)


def same(actual, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), actual, expected)


def test_where_each_has_run():
    """A section says that the tests run it, or with which versions it was run, or that it was not."""
    by_tests = {heading for heading, text in sections().items() if "Run by the tests" in text}
    assert by_tests == {"Flax NNX", "Flax Linen, `TrainState`", "optax `MultiSteps`", "equinox", "tunix"}
    for heading in sections().keys() - by_tests:
        assert re.search(r"Run on \S+ [\d.]+.*, jax [\d.]+|Not run", sections()[heading]), heading


def test_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, seed):
            rngs = nnx.Rngs(seed)
            self.tokens, self.head = nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, V, rngs=rngs)

        def hidden(self, tokens):
            return jnp.tanh(self.tokens(tokens))

        def __call__(self, tokens):
            return self.head(self.hidden(tokens))

    student, teacher = Model(0), Model(1)
    loss, gradients = nnx.value_and_grad(lambda model: dense_loss(model(TOKENS), teacher(TOKENS)))(student)
    expected = jax.tree.map(lambda x, g: x - 0.1 * g, nnx.state(student, nnx.Param), gradients)
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    actual, metrics = run("Flax NNX").step(student, teacher, optimizer, TOKENS)
    same(actual, loss)
    same(nnx.state(student, nnx.Param), expected)
    assert metrics["num_rows"] == 3 * 5


def test_linen():
    linen = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    class Model(linen.Module):
        def setup(self):
            self.tokens, self.head = linen.Embed(V, D), linen.Dense(V)

        def hidden(self, tokens):
            return jnp.tanh(self.tokens(tokens))

        def __call__(self, tokens):
            return self.head(self.hidden(tokens))

    model = Model()
    params = model.init(jax.random.key(1), TOKENS)["params"]
    hidden, weight = jax.random.normal(jax.random.key(2), (3, 6, D)), jax.random.normal(jax.random.key(3), (V, D))
    loss, gradients = jax.value_and_grad(
        lambda params: dense_loss(model.apply({"params": params}, TOKENS), hidden @ weight.T)
    )(params)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
    teacher = jaxkd.LinearLogits(hidden, weight)
    state, actual, _ = run("Flax Linen, `TrainState`").step(state, teacher, TOKENS)
    same(actual, loss)
    same(state.params, jax.tree.map(lambda x, g: x - 0.1 * g, params, gradients))


def test_multi_steps():
    hidden = jax.random.normal(jax.random.key(4), (2, 12, D))
    labels = jax.random.randint(jax.random.key(5), (2, 12), 0, V).at[1, 4:].set(-100)
    weight = jax.random.normal(jax.random.key(6), (V, D))

    def loss_of(weight, hidden, labels, normalizer=None):
        return jaxkd.cross_entropy(jaxkd.LinearLogits(hidden, weight), labels, normalizer=normalizer)[0]

    accumulate, batches = run("optax `MultiSteps`").accumulate, list(zip(hidden, labels, strict=True))
    whole = -0.1 * jax.grad(loss_of)(weight, hidden, labels)
    same(accumulate(loss_of, weight, optax.sgd(0.1), batches) - weight, whole)
    without = accumulate(lambda *arguments: loss_of(*arguments[:3]), weight, optax.sgd(0.1), batches) - weight
    off = 100 * jnp.linalg.norm(without - whole) / jnp.linalg.norm(whole)
    assert f"{off:.0f} %" in sections()["optax `MultiSteps`"]


def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        tokens: jax.Array
        head: eqx.nn.Linear

        def hidden(self, tokens):
            return jnp.tanh(self.tokens[tokens])

        def __call__(self, tokens):
            return jax.vmap(self.head)(self.hidden(tokens))

    def make(seed):
        return Model(jax.random.normal(jax.random.key(seed), (V, D)), eqx.nn.Linear(D, V, key=jax.random.key(seed)))

    student, teacher = make(0), make(1)
    loss, gradients = eqx.filter_value_and_grad(
        lambda model: dense_loss(jax.vmap(model)(TOKENS), jax.vmap(teacher)(TOKENS))
    )(student)
    optimizer = optax.sgd(0.1)
    state = optimizer.init(eqx.filter(student, eqx.is_inexact_array))
    trained, _, actual, _ = run("equinox").step(student, teacher, optimizer, state, TOKENS)
    same(actual, loss)
    arrays = [eqx.filter(x, eqx.is_inexact_array) for x in (trained, student, gradients)]
    same(arrays[0], jax.tree.map(lambda x, g: x - 0.1 * g, *arrays[1:]))
