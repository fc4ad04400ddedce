"""Chosen and rejected answers to B prompts: their rewards, and the mean loss and metrics that losses of pairs have."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import ArrayLike

from jaxkd.preference.counted_answers import Mean, Result, check_shape, checked_rows, number, result


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
        return Pairs._checked(arrays, beta, weights, normalizer)

    @staticmethod
    def without_reference(
        policy_chosen: ArrayLike,
        policy_rejected: ArrayLike,
        beta: ArrayLike,
        weights: ArrayLike | None,
        normalizer: ArrayLike | None,
    ) -> "Pairs":
        arrays = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
        return Pairs._checked(arrays, beta, weights, normalizer)

    @staticmethod
    def _checked(
        arrays: dict[str, Any], beta: ArrayLike, weights: ArrayLike | None, normalizer: ArrayLike | None
    ) -> "Pairs":
        (chosen, rejected, *references), row_weights = checked_rows(arrays, weights, normalizer)
        beta = number("beta", beta, chosen.dtype, above=0)
        of_reference = jax.lax.stop_gradient(references) or (0, 0)
        ratios = chosen - of_reference[0], rejected - of_reference[1]
        return Pairs(chosen, rejected, *ratios, beta, Mean.of(row_weights, normalizer))

    def number(self, name: str, value: ArrayLike, **bounds: float) -> jax.Array:
        return number(name, value, self.beta.dtype, **bounds)

    def wrong_share(self, label_smoothing: ArrayLike) -> jax.Array:
        """``label_smoothing``: the share of labels that are the wrong way round."""
        return self.number("label_smoothing", label_smoothing, at_least=0, below=0.5)

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


def smoothed(margin: jax.Array, wrong: jax.Array) -> jax.Array:
    """Cross-entropy of sigmoid(margin) with labels of which the share ``wrong`` is the wrong way round."""
    return -(1 - wrong) * log_sigmoid(margin) - wrong * log_sigmoid(-margin)


def negative_log_likelihood(pairs: Pairs, chosen_lengths: ArrayLike) -> jax.Array:
    """That of each chosen sequence, per token: (B,); 0 for one without tokens."""
    if jnp.shape(chosen_lengths) != ():
        check_shape("chosen_lengths", chosen_lengths, pairs.policy_chosen.shape, "policy_chosen")
    return -pairs.policy_chosen / jnp.maximum(jnp.asarray(chosen_lengths, pairs.policy_chosen.dtype), 1)
