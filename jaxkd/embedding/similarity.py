"""Similarities and distances of embeddings: of row with row, and of all rows with all candidates as logits."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.logits.array_ops import logits_dtype
from jaxkd.logits.sources import Gradients, LinearLogits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class CosineLogits(LinearLogits):
    """Logits ``z = scale * cos(hidden_i, weight_j)``: the linear ones with both lengths divided out.

    The lengths are divided out of the float32 product, so bfloat16 embeddings are never rounded again. A vector of
    zeros has cosine 0 with every other, and gradient 0.
    """

    @property
    def gradient_dtype(self) -> jnp.dtype:
        return self.dtype  # the lengths come in before rounding

    def _product(self) -> Float[Array, "C V"]:
        return self._divided(super()._product())

    def product_pullback(self, dproduct: Float[Array, "C V"], wanted: frozenset[str]) -> Gradients:
        gradients = super().product_pullback(self._divided(dproduct), wanted)
        return {name: _across(getattr(self, name), g) for name, g in gradients.items()}

    def _divided(self, x: Float[Array, "C V"]) -> Float[Array, "C V"]:
        return x * _inverse_length(self.hidden)[:, None] * _inverse_length(self.weight)


def _across(x: Float[Array, "N D"], g: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """The part of ``g`` at right angles to ``x``: a cosine does not change along a vector."""
    direction = unit(x)
    return g - direction * jnp.sum(direction * g, axis=-1, keepdims=True)


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Rows of length 1 in float32 (float64 for float64); rows of zeros, and their gradient, stay 0.

    A row that holds NaN or inf is NaN and gets no gradient, so that nothing of it is left when it is masked afterwards.
    """
    x = widened(x)  # once, so that its gradient is rounded once
    is_finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    x = jnp.where(is_finite, x, 0)
    return jnp.where(is_finite, x * _inverse_length(x)[..., None], jnp.nan)


def cosine_similarity(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Row by row, in float32 (float64 for float64); 0 with a row of zeros."""
    return jnp.sum(unit(x) * unit(y), axis=-1)


@dataclass(frozen=True)
class Distance:
    """A distance of embeddings.

    Args:
      between: the distance of each row of (..., D) from that of another such array: (...).
      order: of one embedding (D,) and all (B, D), numbers (B,) that grow with the distance, by way of a product.

    Called, it is ``between``.
    """

    between: Callable[[jax.Array, jax.Array], jax.Array]
    order: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return self.between(x, y)


def _euclidean(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
    square = jnp.sum(jnp.square(widened(x) - widened(y)), axis=-1)
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _euclidean_order(x: Float[Array, " D"], y: Float[Array, "B D"]) -> Float[Array, " B"]:
    return jnp.sum(jnp.square(widened(y)), axis=-1) - 2 * _products(x, y)


def _cosine(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
    return 1 - cosine_similarity(x, y)


def _cosine_order(x: Float[Array, " D"], y: Float[Array, "B D"]) -> Float[Array, " B"]:
    return -_products(x, y) * _inverse_length(y)


euclidean = Distance(_euclidean, _euclidean_order)
"""``|x - y|``, with gradient 0 where x = y."""

cosine = Distance(_cosine, _cosine_order)
"""``1 - cos(x, y)``; 1 where x or y is 0."""


def _products(x: Float[Array, " D"], y: Float[Array, "B D"]) -> Float[Array, " B"]:
    return jnp.matmul(y, x, preferred_element_type=logits_dtype(x))


def _inverse_length(x: Float[Array, "... D"]) -> Float[Array, "..."]:
    square = jnp.sum(jnp.square(widened(x)), axis=-1)
    return jnp.where(square == 0, 0, jax.lax.rsqrt(jnp.where(square == 0, 1, square)))


def widened(x: jax.Array) -> jax.Array:
    """float32, or float64 for float64."""
    return x.astype(logits_dtype(x))
