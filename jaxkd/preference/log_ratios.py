"""What every preference loss shares: the checks, the weighted mean over what counts, and the metrics of pairs."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import ArrayLike, DTypeLike

from jaxkd.loop.checks import check_floating, check_scalar, check_weights, known_value
from jaxkd.loop.row_weights import Metrics, metrics_of

Result = tuple[jax.Array, Metrics]


@dataclass(frozen=True)
class Mean:
    """The weighted mean over the sequences that count, 0 where none does: the one place that weighs and divides."""

    weights: jax.Array  # (B,)
    total: jax.Array  # ()

    @staticmethod
    def of(weights: jax.Array, normalizer: Any = None, counts: ArrayLike = 1) -> "Mean":
        """``sum_i weights_i x_i / normalizer``, by default divided by ``sum_i weights_i counts_i``."""
        total = jnp.sum(weights * counts) if normalizer is None else jnp.asarray(normalizer, weights.dtype)
        return Mean(weights, total)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.sum(self.weights * x) / jnp.where(self.total == 0, 1, self.total)


def result(loss: jax.Array, metrics: Metrics) -> Result:
    """What every loss returns."""
    return loss, metrics_of(metrics)


@dataclass(frozen=True)
class Pairs:
    """Chosen and rejected answers to B prompts, by their log-probabilities. A pair of weight 0 is all zeros."""

    policy_chosen: jax.Array  # (B,), as all four
    policy_rejected: jax.Array
    chosen_log_ratio: jax.Array  # policy against reference; without a reference that of the policy alone
    rejected_log_ratio: jax.Array
    beta: jax.Array  # ()
    mean: Mean

    @staticmethod
    def of(
        policy_chosen: ArrayLike,
        policy_rejected: ArrayLike,
        reference_chosen: ArrayLike,
        reference_rejected: ArrayLike,
        beta: ArrayLike,
        weights: ArrayLike | None,
        normalizer: ArrayLike | None,
    ) -> "Pairs":
        arrays = {
            "policy_chosen": policy_chosen,
            "policy_rejected": policy_rejected,
            "reference_chosen": reference_chosen,
            "reference_rejected": reference_rejected,
        }
        (chosen, rejected, *references), row_weights = checked_rows(arrays, weights, normalizer)
        reference_chosen, reference_rejected = jax.lax.stop_gradient(references)
        return Pairs(
            chosen,
            rejected,
            chosen - reference_chosen,
            rejected - reference_rejected,
            number("beta", beta, chosen.dtype, above=0),
            Mean.of(row_weights, normalizer),
        )

    @staticmethod
    def without_reference(
        policy_chosen: ArrayLike,
        policy_rejected: ArrayLike,
        beta: ArrayLike,
        weights: ArrayLike | None,
        normalizer: ArrayLike | None,
    ) -> "Pairs":
        arrays = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
        (chosen, rejected), row_weights = checked_rows(arrays, weights, normalizer)
        beta = number("beta", beta, chosen.dtype, above=0)
        return Pairs(chosen, rejected, chosen, rejected, beta, Mean.of(row_weights, normalizer))

    def number(self, name: str, value: ArrayLike, **bounds: float) -> jax.Array:
        return number(name, value, self.beta.dtype, **bounds)

    @property
    def chosen_reward(self) -> jax.Array:
        return self.beta * self.chosen_log_ratio

    @property
    def rejected_reward(self) -> jax.Array:
        return self.beta * self.rejected_log_ratio

    @property
    def margin(self) -> jax.Array:
        return self.beta * (self.chosen_log_ratio - self.rejected_log_ratio)

    def result(self, losses: jax.Array, **metrics: jax.Array) -> Result:
        """The mean of one loss a pair, and the metrics that all losses of pairs have, with ``metrics`` (B,) besides."""
        rows = {
            "chosen_rewards": self.chosen_reward,
            "rejected_rewards": self.rejected_reward,
            "margin": self.margin,
            "accuracy": (self.margin > 0).astype(losses.dtype),
            "chosen_log_probs": self.policy_chosen,
            "rejected_log_probs": self.policy_rejected,
            **metrics,
        }
        means = {name: self.mean(x) for name, x in rows.items()}
        return result(self.mean(losses), means | {"num_pairs": jnp.sum(self.mean.weights != 0)})


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
        check_scalar("normalizer", normalizer, above=0)
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


def smoothed(margin: jax.Array, wrong: jax.Array) -> jax.Array:
    """Cross-entropy of sigmoid(margin) with labels of which the share ``wrong`` is the wrong way round."""
    return -(1 - wrong) * log_sigmoid(margin) - wrong * log_sigmoid(-margin)


def negative_log_likelihood(pairs: Pairs, chosen_lengths: ArrayLike) -> jax.Array:
    """That of each chosen sequence, per token: (B,); 0 for one without tokens."""
    if jnp.shape(chosen_lengths) != ():
        check_shape("chosen_lengths", chosen_lengths, pairs.policy_chosen.shape, "policy_chosen")
    return -pairs.policy_chosen / jnp.maximum(jnp.asarray(chosen_lengths, pairs.policy_chosen.dtype), 1)
