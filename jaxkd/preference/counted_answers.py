"""B answers, or pairs of them: what their arrays must be, which of them count and how much, and means over those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxkd.loop import Metrics, metrics_of
from jaxkd.loop.checks import check_floating, check_scalar, check_weights, known_value
from jaxkd.loop.row_weights import weighted

Result = tuple[jax.Array, Metrics]


@dataclass(frozen=True)
class Mean:
    """The weighted mean over the answers that count, 0 where none does: the one place that weighs and divides.

    What an answer of weight 0 has is never added, be it NaN, and a sum divided by 0 is 0.
    """

    weights: jax.Array  # (B,)
    total: jax.Array  # ()

    @staticmethod
    def of(weights: jax.Array, normalizer: Any = None, counts: ArrayLike = 1) -> "Mean":
        """``sum_i weights_i x_i / normalizer``, by default divided by ``sum_i weights_i counts_i``."""
        total = jnp.sum(weights * counts) if normalizer is None else jnp.asarray(normalizer, weights.dtype)
        return Mean(weights, total)

    def __call__(self, x: jax.Array) -> jax.Array:
        is_empty = self.total == 0
        return jnp.where(is_empty, 0, jnp.sum(weighted(self.weights, x)) / jnp.where(is_empty, 1, self.total))


def result(loss: jax.Array, metrics: Metrics) -> Result:
    """What every loss returns."""
    return loss, metrics_of(metrics)


def checked_rows(
    arrays: dict[str, Any], weights: ArrayLike | None, normalizer: ArrayLike | None, axes: str = "B"
) -> tuple[list[jax.Array], jax.Array]:
    """The arrays in float32 or better, and the weights of their B rows; a row of weight 0 is made of zeros."""
    first, shape = next((name, jnp.shape(x)) for name, x in arrays.items())
    for name, x in arrays.items():
        check_floating(name, x)
        if x.ndim != len(axes):
            raise ValueError(f"`{name}` has shape {x.shape}; give log-probabilities of shape ({', '.join(axes)})")
        check_shape(name, x, shape, first)
    if normalizer is not None:
        check_scalar("normalizer", normalizer, at_least=0)
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in arrays.values()) else jnp.float32
    if weights is None:
        row_weights = jnp.ones(shape[:1], dtype)
    else:
        check_weights(weights, shape[:1], first)
        row_weights = jnp.asarray(weights, dtype)
    counts = row_weights.reshape(-1, *(1 for _ in axes[1:])) != 0
    return [jnp.where(counts, jnp.asarray(x, dtype), 0) for x in arrays.values()], row_weights


def check_shape(name: str, value: Any, shape: tuple[int, ...], like: str) -> None:
    if jnp.shape(value) != shape:
        raise ValueError(f"`{name}` has shape {jnp.shape(value)} but `{like}` asks for {shape}; give that")


def number(
    name: str,
    value: ArrayLike,
    dtype: DTypeLike,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
) -> jax.Array:
    """``value`` in the type of the log-probabilities; an error for what is known and out of range."""
    check_scalar(name, value, above, at_least)
    known = known_value(value)
    if known is not None and below is not None and not known < below:
        raise ValueError(f"`{name}` is {known:g}; give a number below {below:g}")
    return jnp.asarray(value, dtype)
