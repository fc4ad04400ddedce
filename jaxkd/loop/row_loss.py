"""What the loop is given: a loss of each row, of the logits of a chunk."""

from typing import Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkd.logits.gradient_place import Place

Sums: TypeAlias = dict[str, jax.Array]
Counted: TypeAlias = Bool[Array, " N"] | None  # which rows count, or None for all


@runtime_checkable
class RowLoss(Protocol):
    """A loss of each row, as a pytree: arrays with a row for each position, scalars, static choices."""

    @property
    def names(self) -> tuple[str, ...]:
        """What it sums: "loss", which is differentiated, and the metrics."""

    def take(self, index: Int[Array, " C"]) -> "RowLoss":
        """The rows ``index``; for an index beyond the last row, a row whose losses and gradient are 0."""

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: jnp.dtype | None, place: Place | None
    ) -> tuple[dict[str, Float[Array, " C"]], jax.Array | None]:
        """One number a row for each of ``names``, and, if its type is given, the gradient of the sum of "loss".

        If there is a ``place``, the gradient goes there and what comes back is ``place.rows`` with it.
        """


@runtime_checkable
class RowValues(RowLoss, Protocol):
    """A row loss for `map_rows`, which wants its gradient only after all values."""

    def saving(self) -> "RowValues":
        """The same with more ``names``: numbers of each row that the backward pass needs."""

    def weighted(self, weights: Float[Array, " N"], saved: dict[str, Float[Array, " N"]]) -> RowLoss:
        """For the backward pass: the sum of each row's number times its weight; ``saved`` is what `saving` added."""


@runtime_checkable
class RowReadings(RowLoss, Protocol):
    """Not a loss but what is read off each row, for `read_rows`: arrays (C, ...) of any type."""

    @property
    def kinds(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """By name, the shape of a row and the type."""
