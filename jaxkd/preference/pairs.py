"""Chosen and rejected answers to B prompts: their rewards, and the mean loss and metrics that losses of pairs have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import ArrayLike

from jaxkd.loop.checks import check_scalar
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

    def nll_of_answers(self, chosen_lengths: ArrayLike) -> jax.Array:
        """The mean over pairs of the chosen answer's negative log-likelihood a token, 0 for one without tokens: ()."""
        return self.mean(-self.policy_chosen / jnp.maximum(lengths_of(chosen_lengths, self.mean.weights), 1))

    def nll_of_tokens(
        self,
        chosen_lengths: ArrayLike | None,
        nll_normalizer: ArrayLike | None,
        normalizer: ArrayLike | None,
        *,
        averaged: bool,
    ) -> jax.Array:
        """The negative log-likelihoods of all chosen tokens over their number: ().

        ``averaged`` log-probabilities are per token already, and without lengths their mean over pairs is taken.
        """
        if chosen_lengths is None:
            if nll_normalizer is not None:
                raise ValueError("`nll_normalizer` is given but `chosen_lengths` is None; give both")
            return self.mean(-self.policy_chosen)
        lengths = lengths_of(chosen_lengths, self.mean.weights)
        if nll_normalizer is not None:
            check_scalar("nll_normalizer", nll_normalizer, at_least=0)
        elif normalizer is not None:
            if jnp.shape(chosen_lengths) != ():
                raise ValueError(
                    "`normalizer` is given but `nll_normalizer` is None; give the number of chosen tokens of the whole "
                    "batch, or else its parts would not add up"
                )
            nll_normalizer = self.mean.total * jnp.asarray(chosen_lengths, lengths.dtype)
        nll = -self.policy_chosen * lengths if averaged else jnp.where(lengths == 0, 0, -self.policy_chosen)
        return Mean.of(self.mean.weights, nll_normalizer, counts=lengths)(nll)

    def result(
        self,
        losses: jax.Array,
        *,
        mean: Mean | None = None,
        nll: jax.Array | None = None,
        alpha: ArrayLike = 1,
        **metrics: jax.Array,
    ) -> Result:
        """The mean of one loss a pair, plus ``alpha nll``; and the metrics of pairs, with ``metrics`` (B,) besides.

        ``mean`` is that of losses that are not one a pair.
        """
        loss = (mean or self.mean)(losses)
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
        if nll is not None:
            loss, means = loss + alpha * nll, means | {"nll": nll}
        return result(loss, means | {"num_pairs": jnp.sum(self.mean.weights != 0)})


def smoothed(margin: jax.Array, wrong: jax.Array) -> jax.Array:
    """Cross-entropy of sigmoid(margin) with labels of which the share ``wrong`` is the wrong way round."""
    return -(1 - wrong) * log_sigmoid(margin) - wrong * log_sigmoid(-margin)


def lengths_of(chosen_lengths: ArrayLike, weights: jax.Array) -> jax.Array:
    """The tokens of each chosen answer, 0 for one of weight 0: (B,)."""
    if jnp.shape(chosen_lengths) != ():
        check_shape("chosen_lengths", chosen_lengths, weights.shape, "policy_chosen")
    lengths = jnp.broadcast_to(jnp.asarray(chosen_lengths, weights.dtype), weights.shape)
    return jnp.where(weights == 0, 0, lengths)
