"""Distances of embeddings: of row with row, of one with all by their order, and of all pairs as logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.embedding.all_pairs import CosineLogits, EuclideanLogits
from jaxkd.embedding.similarity import cosine_similarity, inverse_length, widened
from jaxkd.logits import LinearLogits
from jaxkd.logits.array_ops import ShownBriefly, is_own, logits_dtype

AllPairs = Callable[[jax.Array, jax.Array], LinearLogits]


@dataclass(frozen=True, repr=False)
class Distance(ShownBriefly):
    """A distance of embeddings.

    Args:
      between: the distance of each row of (..., D) from that of another such array: (...).
      order: of one embedding (D,) and all (B, D), numbers (B,) that grow with the distance, by way of a product.
      all_pairs: of rows (N, D) and all (B, D), a `jaxkd.LinearLogits` whose logits are the distances (N, B), for losses
        that take all pairs; or None.

    Called, it is ``between``.
    """

    between: Callable[[jax.Array, jax.Array], jax.Array]
    order: Callable[[jax.Array, jax.Array], jax.Array]
    all_pairs: AllPairs | None = None

    def __repr__(self) -> str:
        return self.between.__name__.strip("_") if is_own(self.between) else super().__repr__()

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
    return -_products(x, y) * inverse_length(y)


def _cosine_of_all(x: Float[Array, "N D"], y: Float[Array, "B D"]) -> CosineLogits:
    return CosineLogits(x, y, -jnp.ones(y.shape[0], logits_dtype(y)), scale=-1.0)


euclidean = Distance(_euclidean, _euclidean_order, EuclideanLogits)
"""``|x - y|``, with gradient 0 where x = y."""

cosine = Distance(_cosine, _cosine_order, _cosine_of_all)
"""``1 - cos(x, y)``; 1 where x or y is 0."""


def _products(x: Float[Array, " D"], y: Float[Array, "B D"]) -> Float[Array, " B"]:
    return jnp.matmul(y, x, preferred_element_type=logits_dtype(x))
