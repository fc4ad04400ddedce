"""A causal language model of Hugging Face as a live teacher: hidden states and head as `jaxkd.LinearLogits`."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch

import jaxkd
from torch_bridge.convert import borrow_as_jax, to_jax

PROBE_SIZE = 100.0  # of the probe's largest product: softcaps are 15 to 50, and must show
# Of the largest logit: what two orders of summation may differ by. Narrower types round each step of a softcap.
PROBE_BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class LiveTeacher:
    """A PyTorch causal language model that hands `jaxkd.LinearLogits` to JAX instead of forming its logits.

        teacher = LiveTeacher(AutoModelForCausalLM.from_pretrained(name).eval())
        loss, metrics = jaxkd.distillation_loss(student, teacher(tokens), labels)

    ``teacher(tokens)`` runs the model up to its head and stops there. What the head is given, after every norm and
    projection, becomes ``hidden``. The head crosses to JAX once, sharing PyTorch's memory: do not change it in place
    while the teacher lives. Any architecture will do whose logits are

        softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)

    with those parts that it has: a bias (Phi), a scale (Cohere, Granite, Falcon-H1), a softcap (Gemma 2,
    RecurrentGemma). That is not taken on trust: the head is fed random states, large enough for a softcap to show, and
    the model's logits are compared with the rebuilt ones.

    Args:
      model: a `transformers` causal language model in eval mode, or any module with ``config``, ``device`` and
        ``get_output_embeddings()`` that takes ``input_ids`` and returns an object with ``logits``.

    Raises:
      TypeError: it has no such head, or one of integers (quantized) or other than two dimensions.
      ValueError: it is in training mode (dropout would make each call another teacher), or its logits are another
        function of its head's input.
    """

    def __init__(self, model: Any):
        name = type(model).__name__
        if not callable(getattr(model, "get_output_embeddings", None)):
            raise TypeError(f"`model` is a {name}; give a causal language model of transformers")
        module = model.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.dtype not in PROBE_BOUNDS:
            raise TypeError(
                f"`model`, a {name}, has no floating-point head of shape (V, D): its weight is {_described(weight)}"
            )
        if model.training:
            raise ValueError(f"`model`, a {name}, is in training mode, where dropout acts: call model.eval() first")
        self.model = model
        self.head = _head(model, module)  # {"weight", "bias", "scale", "softcap"}, as LinearLogits takes them

    def __call__(self, tokens: Any, **inputs: Any) -> jaxkd.LinearLogits:
        """The next-token logits, not formed, for ``tokens`` (B, T): hidden states (B, T, D) and the head.

        Tokens and other inputs of the model, such as ``attention_mask``, are NumPy or JAX arrays or tensors on any
        device. Not for traced arrays: call it outside ``jax.jit`` and hand the result in.
        """
        hidden = self.hidden_states(tokens, **inputs)
        # PyTorch may reuse CUDA memory as soon as JAX lets it go, in the order of a stream that JAX does not wait for.
        return jaxkd.LinearLogits(to_jax(hidden) if hidden.is_cuda else borrow_as_jax(hidden), **self.head)

    @torch.inference_mode()
    def hidden_states(self, tokens: Any, **inputs: Any) -> torch.Tensor:
        """What the head is given, (B, T, D), as a tensor on the model's device. Arguments as in a call."""

        def stop(_, arguments):
            raise _HeadReached(arguments[0])

        try:
            with _before(self.model.get_output_embeddings(), stop):
                _run(self.model, tokens, **inputs)
        except _HeadReached as reached:
            return reached.hidden.contiguous()
        raise ValueError(f"`model`, a {type(self.model).__name__}, does not call the head it says it has")


class _HeadReached(Exception):
    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


@contextlib.contextmanager
def _before(module: torch.nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _run(model: Any, tokens: Any, **inputs: Any) -> Any:
    def tensor(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer):
            raise TypeError(f"the teacher's input is traced ({x.aval}): call it outside jax.jit and jax.grad")
        if isinstance(x, jax.Array | np.ndarray | torch.Tensor):
            x = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x))
            return x.to(model.device)
        return x

    tokens = tensor(tokens)
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        raise TypeError(f"`tokens` is {_described(tokens)}; give an array of token ids of shape (B, T)")
    if hasattr(model.config, "use_cache"):
        inputs = {"use_cache": False, **inputs}
    return model(input_ids=tokens.long(), **{name: tensor(x) for name, x in inputs.items()})


def _described(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__


@torch.inference_mode()
def _head(model: Any, module: Any) -> dict[str, Any]:
    """The parts of the model's logits, of all that its configuration allows the first that rebuild what it returns."""
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    probe = torch.randn((1, 4, weight.shape[1]), generator=torch.Generator().manual_seed(0)).to(weight)
    probe *= PROBE_SIZE / (probe @ weight.T).abs().max().clamp(min=1e-6)
    with _before(module, lambda *_: (probe,)):
        expected = _run(model, torch.arange(4)[None] % len(weight)).logits.float().cpu()

    arrays = {
        "weight": borrow_as_jax(weight.contiguous()),
        "bias": None if bias is None else borrow_as_jax(bias.detach().contiguous()),
    }
    smallest = float("inf")
    for scale, softcap in _transforms(model.config):
        head = arrays | {"scale": scale, "softcap": softcap}
        with jax.default_matmul_precision("highest"):
            logits = jaxkd.LinearLogits(borrow_as_jax(probe[0]), **head).logits()
        rebuilt = torch.from_numpy(np.array(logits, np.float32))[None]
        if rebuilt.shape != expected.shape:
            raise ValueError(
                f"`model`, a {type(model).__name__}, returns logits of shape {tuple(expected.shape)} where its head"
                f" gives {tuple(rebuilt.shape)}: hand its logits over as jaxkd.Logits instead"
            )
        error = float((rebuilt - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if error <= PROBE_BOUNDS[weight.dtype]:
            return head
        smallest = min(smallest, error)
    raise ValueError(
        f"`model`, a {type(model).__name__}, makes its logits from its head by more than a bias, a scale and a softcap:"
        f" on random states they differ by {smallest:.1g} of their size from those rebuilt. Hand its logits over as"
        " jaxkd.Logits instead"
    )


def _transforms(config: Any) -> Iterator[tuple[float | None, float | None]]:
    """The scales and softcaps that the configuration may mean, the likeliest first."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def declared(*names: str) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [float(x) for x in values if isinstance(x, int | float) and x]

    # Granite divides by what it calls `logits_scaling`, HyperCLOVA X multiplies by it.
    multipliers = declared("logit_scale", "lm_head_multiplier", "logits_scaling")
    scales = [x for multiplier in multipliers for x in (multiplier, 1 / multiplier)]
    softcaps = declared("final_logit_softcapping", "logits_soft_cap")
    yield from itertools.product([*scales, None], [*softcaps, None])
