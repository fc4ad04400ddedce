"""A head's adapter of low rank: ``(hidden @ A) @ B`` and its gradients, for which nothing as large as a head is formed.

The products run in the type of ``hidden``, as the head's do, but what passes from one to the next is not rounded to it:
it goes on as a sum of two terms of that type. Else logits would be no better than bfloat16 ones.

Source: LoRA (arXiv 2106.09685).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.logits.array_ops import dot, power_of_two_into_range


def low_rank_product(
    hidden: Float[Array, "C D"], a: Float[Array, "D r"], b: Float[Array, "r V"], dtype: jnp.dtype
) -> Float[Array, "C V"]:
    """``(hidden @ a) @ b``, accumulated and returned in ``dtype``."""
    terms, scale = _terms(dot(hidden, a, (1, 0), dtype), hidden.dtype)  # (C, kr)
    return dot(terms, _repeated(b, 0, terms), (1, 0), dtype) / scale


def low_rank_pullback(
    hidden: Float[Array, "C D"],
    a: Float[Array, "D r"],
    b: Float[Array, "r V"],
    dproduct: Float[Array, "C V"],
    dtype: jnp.dtype,
) -> tuple[Float[Array, "C D"], Float[Array, "D r"], Float[Array, "r V"]]:
    """The gradients of ``hidden``, ``a`` and ``b`` in ``dtype``, from that of the product in the type of ``hidden``."""
    terms, scale = _terms(dot(hidden, a, (1, 0), dtype), hidden.dtype)  # (C, kr)
    db = _added(dot(terms, dproduct, (0, 0), dtype), b.shape[0]) / scale  # (r, V)
    terms, scale = _terms(dot(dproduct, b, (1, 1), dtype), hidden.dtype)  # (C, kr)
    dhidden = dot(terms, _repeated(a, 1, terms), (1, 1), dtype) / scale  # (C, D)
    da = _added(dot(terms, hidden, (0, 0), dtype), a.shape[1]).T / scale  # (D, r)
    return dhidden, da, db


def _terms(x: Float[Array, "C r"], dtype: jnp.dtype) -> tuple[Float[Array, "C kr"], Float[Array, ""]]:
    """Columns of type ``dtype`` whose sum, term by term, is ``x * scale``, and that power of two."""
    one = jnp.ones((), x.dtype)
    if x.dtype == dtype:
        return x, one
    scale = power_of_two_into_range(x) if dtype == jnp.float16 else one
    x = x * scale
    info = jnp.finfo(dtype)
    # XLA may leave out a cast there and back, by which the second term would be 0.
    first = jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return jnp.concatenate([first, x - first], axis=1).astype(dtype), scale


def _repeated(x: jax.Array, axis: int, terms: Float[Array, "C kr"]) -> jax.Array:
    """``x`` once for each term."""
    return jnp.concatenate([x] * (terms.shape[1] // x.shape[axis]), axis=axis)


def _added(x: Float[Array, "kr _"], rank: int) -> Float[Array, "r _"]:
    """The sum of what the terms gave."""
    return jnp.sum(jnp.reshape(x, (-1, rank, x.shape[1])), axis=0)
