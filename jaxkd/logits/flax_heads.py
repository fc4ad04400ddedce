"""The head of a Flax model, NNX or Linen, as `LinearLogits` takes it. Flax itself is not imported."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.logits.sources import LinearLogits


def flax_logits(hidden: jax.Array, head: Any, *, scale: Any = None, softcap: Any = None) -> LinearLogits:
    """What a Flax head would make of hidden states, not formed: ``head(hidden)``, or ``embed.attend(hidden)`` if tied.

        z = softcap * tanh(scale * (hidden @ kernel + bias) / softcap)

    Args:
      hidden: (..., D) floating: what the model hands its head, after the last norm.
      head: an ``nnx.Linear`` or ``nnx.Embed``, or the Linen parameters of a ``Dense`` or an ``Embed``: anything with a
        ``kernel`` (D, V) and perhaps a ``bias`` (V,), or with an ``embedding`` (V, D), as attributes or by these names.
      scale, softcap: as in `LinearLogits`.

    Student or teacher; as a student, gradients reach the head's parameters and the hidden states.

    Raises:
      TypeError: `head` has neither a kernel nor an embedding.
      ValueError: it has more than two dimensions (``LinearGeneral``).

    >>> logits = flax_logits(jnp.ones((3, 2)), {"kernel": jnp.ones((2, 5)), "bias": jnp.zeros(5)})
    >>> logits.weight.shape, logits.bias.shape
    ((5, 2), (5,))
    """

    def parameter(name: str) -> jax.Array | None:
        value = head.get(name) if isinstance(head, Mapping) else getattr(head, name, None)
        return None if value is None else jnp.asarray(value)

    kernel = parameter("kernel")
    weight = parameter("embedding") if kernel is None else kernel.T
    if weight is None:
        raise TypeError(f"`head` is a {type(head).__name__} without `kernel` and `embedding`; give the model's head")
    if weight.ndim != 2:
        raise ValueError(f"`head` has a kernel of {weight.ndim} dimensions; give one of (D, V)")
    return LinearLogits(hidden, weight, parameter("bias"), scale=scale, softcap=softcap)
