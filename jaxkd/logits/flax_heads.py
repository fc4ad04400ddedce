"""The head of a Flax model, NNX or Linen, as `LinearLogits` takes it. Flax itself is not imported."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.logits.array_ops import check_floating, unwrapped
from jaxkd.logits.sources import LinearLogits

# The modules that are reproduced, and the method whose output that is.
METHODS = {
    "flax.nnx": {"Linear": "__call__", "Embed": "attend", "LoRALinear": "__call__", "LoRA": "__call__"},
    "flax.linen": {"Dense": "__call__", "Embed": "attend"},
}
OPTIONS = ("precision", "dot_general", "dot_general_cls", "promote_dtype")  # of theirs that change the product
DEFAULTS = (None, "default", jax.lax.Precision.DEFAULT, jax.lax.dot_general)  # as good as leaving an option out
ADVICE = (
    "give an nnx.Linear, Embed or LoRALinear, an nnx.LoRA around a Linear, a bound linen.Dense or Embed, or parameters "
    "`kernel` and `bias`, or `embedding`; any other linear head is jaxkd.LinearLogits(hidden, weight, ...)"
)


class Head(NamedTuple):
    """The parameters of a head, and the type of its product."""

    weight: jax.Array  # (V, D)
    bias: jax.Array | None
    low_rank: tuple[jax.Array, jax.Array] | None
    dtype: jnp.dtype


def flax_logits(
    hidden: jax.Array, head: Any, *, dtype: Any = None, scale: Any = None, softcap: Any = None
) -> LinearLogits:
    """What a Flax head would make of hidden states, not formed: ``head(hidden)``, or ``embed.attend(hidden)`` if tied.

        z = softcap * tanh(scale * (hidden @ kernel + (hidden @ lora_a) @ lora_b + bias) / softcap)

    Args:
      hidden: (..., D) floating: what the model hands its head, after the last norm.
      head: an ``nnx.Linear``, ``nnx.Embed`` or ``nnx.LoRALinear``, an ``nnx.LoRA`` around an ``nnx.Linear``, a
        ``linen.Dense`` or ``linen.Embed`` that is bound (within its parent module it is), or the parameters of one
        without an adapter: a mapping with a ``kernel`` (D, V) and perhaps a ``bias`` (V,), or with an ``embedding``
        (V, D). Parameters may be in boxes, as an ``nnx.Param`` and a ``linen.Partitioned`` are.
      dtype: for a mapping, the ``dtype`` of the module whose parameters these are; a module says it itself.
      scale, softcap: as in `LinearLogits`.

    Student or teacher; as a student, gradients reach the head's parameters and the hidden states.

    The product runs in the type in which the module's own does: its ``dtype``, or without one what ``hidden`` and the
    parameters promote to: float32 for bfloat16 hidden states and a float32 kernel. Logits are float32 (float64 for
    float64) even where the module rounds its output to a narrower type.

    Raises:
      TypeError: `head` is anything else, has other parameters or a ``precision``, ``dot_general`` or ``promote_dtype``
        of its own, or rounds the hidden states differently for kernel and adapter.
      ValueError: it has a kernel of more than two dimensions.

    >>> logits = flax_logits(jnp.ones((3, 2)), {"kernel": jnp.ones((2, 5)), "bias": jnp.zeros(5)})
    >>> logits
    LinearLogits(hidden=float32[3,2], weight=float32[5,2], bias=float32[5])
    """
    hidden = unwrapped(hidden)
    check_floating("hidden", hidden)
    if isinstance(head, Mapping):
        found = _of_parameters(head, dtype, hidden.dtype)
    elif dtype is not None:
        raise TypeError(f"`dtype` is given, but `head` is a {type(head).__name__}, which has its own; leave it out")
    else:
        found = _of_module(head, hidden.dtype)
    if hidden.dtype != found.dtype:
        hidden = jnp.asarray(hidden).astype(found.dtype)
    return LinearLogits(hidden, found.weight, found.bias, low_rank=found.low_rank, scale=scale, softcap=softcap)


def _of_parameters(head: Mapping[str, Any], dtype: Any, hidden_dtype: Any) -> Head:
    names = {name for name, value in head.items() if value is not None}
    if names not in ({"kernel"}, {"kernel", "bias"}, {"embedding"}):
        raise TypeError(f"`head` is a {type(head).__name__} of {sorted(map(str, names))}; {ADVICE}")
    values = {name: _parameter(head[name], f"head[{name!r}]") for name in names}
    weight = values["embedding"] if "embedding" in values else values["kernel"].T
    bias = values.get("bias")
    return Head(weight, bias, None, _promoted(dtype, hidden_dtype, weight, bias))


def _of_module(head: Any, hidden_dtype: Any) -> Head:
    library, kind = _flax_kind(head)
    if library == "flax.linen":
        _check_options(head, kind)
        if head.scope is None:
            raise TypeError(
                f"`head` is a {type(head).__name__} without parameters; give these, or `head.bind(variables)`"
            )
        parameters = head.variables.get("params", {})
        if not parameters:
            raise TypeError(
                f"`head` is a {type(head).__name__} that has no parameters yet; call it once where the model "
                "`is_initializing()`"
            )
        return _of_parameters(parameters, head.dtype, hidden_dtype)
    if kind.__name__ == "Embed":
        _check_options(head, kind)
        return _of_parameters({"embedding": head.embedding}, head.dtype, hidden_dtype)
    if kind.__name__ == "Linear":
        return _of_linear(head, hidden_dtype)

    adapter, base = (head.lora, head) if kind.__name__ == "LoRALinear" else (head, head.base_module)
    _check_options(adapter, sys.modules["flax.nnx"].LoRA)
    a, b = (_parameter(getattr(adapter, name), f"head.{name}") for name in ("lora_a", "lora_b"))
    dtype = _promoted(adapter.dtype, hidden_dtype, a, b)
    if base is head:
        if adapter.base_module is not None:
            raise TypeError(f"`head.lora` is an adapter of a {type(adapter.base_module).__name__} too; {ADVICE}")
        found = _of_linear(base, hidden_dtype)
    else:
        if _flax_kind(base, "head.base_module")[1].__name__ != "Linear":
            raise TypeError(f"`head` is a LoRA around a {type(base).__name__}; {ADVICE}")
        found = _of_linear(base, dtype)  # which gets the hidden states as the adapter has them
    if found.dtype == dtype:
        return found._replace(low_rank=(a, b))
    if any(jnp.promote_types(hidden_dtype, x) != x for x in (found.dtype, dtype)):
        raise TypeError(
            f"`head` is a {type(head).__name__} whose kernel is multiplied in {found.dtype.name} and whose adapter in "
            f"{dtype.name}, and `hidden` is {jnp.dtype(hidden_dtype).name}; give both one dtype"
        )
    # Each has its parameters in its own type, and neither rounds the hidden states: the wider type is exact for both.
    return Head(
        weight=found.weight.astype(found.dtype),
        bias=None if found.bias is None else found.bias.astype(found.dtype),
        low_rank=(a.astype(dtype), b.astype(dtype)),
        dtype=jnp.promote_types(found.dtype, dtype),
    )


def _of_linear(head: Any, hidden_dtype: Any) -> Head:
    """An ``nnx.Linear``, or the part of a subclass that is one."""
    _check_options(head, sys.modules["flax.nnx"].Linear)
    found = _of_parameters({"kernel": head.kernel, "bias": head.bias}, head.dtype, hidden_dtype)
    wanted = head.preferred_element_type
    if wanted is not None and jnp.promote_types(wanted, found.dtype) != wanted:
        raise TypeError(
            f"`head` is a {type(head).__name__} with preferred_element_type={jnp.dtype(wanted).name}, narrower than "
            f"its product in {found.dtype.name}; leave that out"
        )
    return found


def _flax_kind(head: Any, name: str = "head") -> tuple[str, Any]:
    """The library and the class of `METHODS` whose method is the output of ``head``."""
    for library, methods in METHODS.items():
        module = sys.modules.get(library)  # of what was not imported there is no instance
        for kind in (getattr(module, name) for name in methods) if module is not None else ():
            method = methods[kind.__name__]
            if isinstance(head, kind) and getattr(type(head), method) is getattr(kind, method):
                return library, kind
    raise TypeError(f"`{name}` is a {type(head).__name__}; {ADVICE}")


def _check_options(head: Any, kind: Any) -> None:
    parameters = inspect.signature(kind.__init__).parameters
    for option in OPTIONS:
        if option in parameters and getattr(head, option) not in (parameters[option].default, *DEFAULTS):
            raise TypeError(
                f"`head` is a {type(head).__name__} with a `{option}` of its own, which flax_logits does not "
                "reproduce; leave that out"
            )


def _promoted(dtype: Any, hidden_dtype: Any, *parameters: jax.Array | None) -> jnp.dtype:
    """The type of the product, by Flax's rule."""
    return jnp.dtype(
        jnp.result_type(hidden_dtype, *(x.dtype for x in parameters if x is not None)) if dtype is None else dtype
    )


def _parameter(x: Any, name: str) -> jax.Array:
    x = _unboxed(x)
    check_floating(name, x)
    if x.ndim > 2:
        raise ValueError(f"`{name}` has {x.ndim} dimensions; give one of (D, V)")
    return jnp.asarray(x)


def _unboxed(x: Any) -> Any:
    """What is in a box of metadata, or in one in another."""
    x = unwrapped(x)
    if isinstance(x, jax.Array):
        return x
    if hasattr(x, "unbox"):
        return _unboxed(x.unbox())
    return _unboxed(x.value) if hasattr(x, "value") else x
