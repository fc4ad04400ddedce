"""Operations on the arrays of a source: their type, their rows, products of them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def logits_dtype(x: Any) -> jnp.dtype:
    """float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if jnp.result_type(x) == jnp.float64 else jnp.float32)


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """The product of two matrices over one axis of each, accumulated and returned in ``dtype``."""
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=dtype)


def take_rows(x: jax.Array, index: Int[Array, " C"]) -> jax.Array:
    """Rows of ``x``; zeros for an index beyond its last row. ``index`` is increasing."""
    return x.at[index].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)


def power_of_two_into_range(x: jax.Array) -> jax.Array:
    """A power of two that brings the largest finite magnitude of ``x`` to about 2**12: exact to multiply and divide by.

    float16 reaches from 6e-8 to 65504, and near convergence the gradient of most logits lies below.
    """
    largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0))
    exponent = jnp.clip(12 - jnp.ceil(jnp.log2(largest)), -100, 100)
    return jnp.ldexp(jnp.ones_like(largest), exponent.astype(jnp.int32))
