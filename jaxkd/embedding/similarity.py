"""How similar two embeddings are: row with row, in float32 or better."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.logits.array_ops import logits_dtype


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Rows of length 1 in float32 (float64 for float64); rows of zeros, and their gradient, stay 0.

    A row that holds NaN or inf is NaN and gets no gradient, so that nothing of it is left when it is masked afterwards.
    """
    x = widened(x)  # once, so that its gradient is rounded once
    is_finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    x = jnp.where(is_finite, x, 0)
    return jnp.where(is_finite, x * inverse_length(x)[..., None], jnp.nan)


def cosine_similarity(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Row by row, in float32 (float64 for float64); 0 with a row of zeros."""
    return jnp.sum(unit(x) * unit(y), axis=-1)


def dot(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
    """The dot product, row by row, in float32 (float64 for float64)."""
    return jnp.sum(widened(x) * widened(y), axis=-1)


def angle_similarity(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
    """``|Re z + Im z|`` of ``z = sum_d x_d conj(y_d)``, rows of length 1, their second half the imaginary part.

    A last component without a partner has an imaginary part of 0. The gradient is 0 where the similarity is.
    """
    x, y = unit(x), unit(y)
    half = -(-x.shape[-1] // 2)
    filling = [(0, 0)] * (x.ndim - 1) + [(0, 2 * half - x.shape[-1])]
    (real_x, imaginary_x), (real_y, imaginary_y) = (jnp.split(jnp.pad(z, filling), 2, axis=-1) for z in (x, y))
    sines = jnp.sum(imaginary_x * real_y - real_x * imaginary_y, axis=-1)
    return jnp.abs(jnp.sum(x * y, axis=-1) + sines)


def inverse_length(x: Float[Array, "... D"]) -> Float[Array, "..."]:
    square = jnp.sum(jnp.square(widened(x)), axis=-1)
    return jnp.where(square == 0, 0, jax.lax.rsqrt(jnp.where(square == 0, 1, square)))


def widened(x: jax.Array) -> jax.Array:
    """float32, or float64 for float64."""
    return x.astype(logits_dtype(x))
