"""All rows with all candidates, as sources of logits: a chunk of rows by all candidates exists at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.embedding.similarity import inverse_length, unit, widened
from jaxkd.logits.array_ops import power_of_two_into_range
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
        return x * inverse_length(self.hidden)[:, None] * inverse_length(self.weight)


def _across(x: Float[Array, "N D"], g: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """The part of ``g`` at right angles to ``x``: a cosine does not change along a vector."""
    direction = unit(x)
    return g - direction * jnp.sum(direction * g, axis=-1, keepdims=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class PairedCosineLogits(CosineLogits):
    """Logits of rows that are two embeddings each, (N, 2, D): those of the first with all, then those of the second."""

    DIMS: ClassVar[dict[str, Any]] = CosineLogits.DIMS | {"hidden": ("rows", None, None)}

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.hidden.shape[:-2]

    @property
    def vocabulary(self) -> int:
        return 2 * self.weight.shape[0]

    def flat(self) -> "PairedCosineLogits":
        return replace(self, hidden=jnp.reshape(self.hidden, (-1, *self.hidden.shape[-2:])))

    def _product(self) -> Float[Array, "C V"]:
        return jnp.concatenate([side._product() for side in self._sides()], axis=1)

    def product_pullback(self, dproduct: Float[Array, "C V"], wanted: frozenset[str]) -> Gradients:
        of_sides = zip(self._sides(), jnp.split(dproduct, 2, axis=1), strict=True)
        first, second = (side.product_pullback(d, wanted) for side, d in of_sides)
        gradients = {"weight": first["weight"] + second["weight"]} if "weight" in wanted else {}
        if "hidden" in wanted:
            gradients["hidden"] = jnp.stack([first["hidden"], second["hidden"]], axis=1)
        return gradients

    def _sides(self) -> list[CosineLogits]:
        return [CosineLogits(self.hidden[:, i], self.weight) for i in range(2)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class EuclideanLogits(LinearLogits):
    """Logits ``z = |hidden_i - weight_j|``, by way of a product, with gradient 0 where it is 0."""

    @property
    def is_linear(self) -> bool:
        return False

    def logits(self) -> Float[Array, "C V"]:
        squares = [jnp.sum(jnp.square(widened(x)), axis=-1) for x in (self.hidden, self.weight)]
        square = squares[0][:, None] + squares[1] - 2 * self._product()
        return jnp.where(square <= 0, 0, jnp.sqrt(jnp.where(square <= 0, 1, square)))

    def logits_and_pullback(self) -> tuple[Float[Array, "C V"], Callable[..., Gradients]]:
        distances = self.logits()

        def pullback(dlogits: Float[Array, "C V"], wanted: frozenset[str]) -> Gradients:
            slopes = jnp.where(distances == 0, 0, dlogits / jnp.where(distances == 0, 1, distances))
            if self.hidden.dtype != self.dtype:  # the terms of hidden - weight shall have the very same factor
                scale = power_of_two_into_range(slopes)
                slopes = (slopes * scale).astype(self.hidden.dtype).astype(self.dtype) / scale
            gradients = self.product_pullback(-slopes, wanted)
            for name, axis in (("hidden", 1), ("weight", 0)):
                if name in wanted:
                    gradients[name] += widened(getattr(self, name)) * jnp.sum(slopes, axis)[:, None]
            return gradients

        return distances, pullback
