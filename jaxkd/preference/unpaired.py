"""Losses of answers that are each marked as desirable or not, without pairs.

The reward of an answer is ``beta (log policy - log reference)``. Both losses compare it with a baseline of the whole
batch, which is a constant to differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jax.typing import ArrayLike, DTypeLike

from jaxkd.preference.counted_answers import Mean, Result, check_shape, checked_rows, number, result


def kto(
    policy: ArrayLike,
    reference: ArrayLike,
    is_desirable: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
    kl_log_ratios: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Kahneman-Tversky optimisation: what an answer loses against the policy's distance from the reference.

    ``desirable_weight sigmoid(beta (kl - log_ratio))`` of a desirable answer and ``undesirable_weight sigmoid(beta
    (log_ratio - kl))`` of another, with ``log_ratio = policy - reference`` and ``kl = max(0, mean(kl_log_ratios))``.

    Args:
      policy, reference: (B,) log-probabilities of the answers, summed over their tokens; gradients reach ``policy``.
      is_desirable: (B,) booleans, or integers 0 and 1.
      desirable_weight, undesirable_weight: factors of the two kinds, at least 0. They do not enter the normalizer.
      kl_log_ratios: ``policy - reference`` of answers (M,) to other prompts than their own, the paper's estimate of the
        KL divergence, or one number known already: 0, or M = 0, is no baseline (unpaired APO-zero). None takes the
        batch's own answers, weighted.
      beta, weights, normalizer: as in `jaxkd.preference.dpo`.

    Returns:
      The loss, and metrics: ``chosen_rewards`` and ``rejected_rewards``, the mean rewards of the desirable and of the
      other answers (0 where there is none), their difference ``margin``, ``chosen_log_probs``, ``rejected_log_probs``,
      ``accuracy`` (the share of answers whose reward is on their side of the baseline), ``num_sequences``, of which
      ``num_desirable``, and ``kl``.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Source: Ethayarajh et al., "KTO" (arXiv 2402.01306).

    >>> answers = jnp.array([-1.0, -2.0]), jnp.array([-3.0, -2.0]), jnp.array([True, False])
    >>> loss, metrics = kto(*answers, beta=0.5)
    >>> print(f"{loss:.4f} at a KL of {metrics['kl']:.1f}")
    0.3775 at a KL of 1.0
    """
    answers = _Answers.of(policy, reference, is_desirable, beta, weights, normalizer)
    dtype = answers.beta.dtype
    desirable_weight = number("desirable_weight", desirable_weight, dtype, at_least=0)
    undesirable_weight = number("undesirable_weight", undesirable_weight, dtype, at_least=0)
    if kl_log_ratios is None:
        mean = Mean.of(answers.mean.weights)(answers.log_ratio)
    else:
        mean = _mean_of_known(kl_log_ratios, dtype)
    kl = jax.lax.stop_gradient(jnp.maximum(mean, 0))
    losses = sigmoid(-answers.sign * (answers.reward - answers.beta * kl))
    factors = jnp.where(answers.is_desirable, desirable_weight, undesirable_weight)
    return answers.result(factors * losses, answers.beta * kl, kl=kl)


def bco(
    policy: ArrayLike,
    reference: ArrayLike,
    is_desirable: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    delta: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Binary classifier optimisation: logistic regression of desirability on the reward, shifted by ``delta``.

    ``-log sigmoid(reward - delta)`` of a desirable answer and ``-log sigmoid(delta - reward)`` of another.

    Args:
      delta: the reward shift; None is the paper's, half of the mean reward of the batch's desirable answers plus half
        of that of the others (of one kind alone, its mean). For a shift over many batches keep the mean reward of each
        kind: of the metrics, ``chosen_rewards`` over ``num_desirable`` answers, and ``rejected_rewards`` over
        ``num_sequences - num_desirable``, for weights of 0 and 1. A batch of one kind leaves the other's mean as it
        was, for its 0 is that of no answer. Half of the sum of both is the shift to hand in.

    The other arguments and the errors are those of `kto`; ``metrics`` has ``delta`` instead of ``kl``.

    Source: Jung et al., "Binary Classifier Optimization" (arXiv 2404.04656).

    >>> answers = jnp.array([-1.0, -2.0]), jnp.array([-3.0, -2.0]), jnp.array([True, False])
    >>> loss, metrics = bco(*answers, beta=0.5)
    >>> print(f"{loss:.4f} at a shift of {metrics['delta']:.1f}")
    0.4741 at a shift of 0.5
    """
    answers = _Answers.of(policy, reference, is_desirable, beta, weights, normalizer)
    if delta is None:
        kinds = answers.desirable, answers.undesirable
        present = sum((kind.total != 0).astype(answers.beta.dtype) for kind in kinds)
        shift = sum(kind(answers.reward) for kind in kinds) / jnp.maximum(present, 1)
    else:
        shift = number("delta", delta, answers.beta.dtype)
    shift = jax.lax.stop_gradient(shift)
    return answers.result(-log_sigmoid(answers.sign * (answers.reward - shift)), shift, delta=shift)


def _mean_of_known(kl_log_ratios: ArrayLike, dtype: DTypeLike) -> jax.Array:
    if jnp.ndim(kl_log_ratios) > 1:
        raise ValueError(f"`kl_log_ratios` has shape {jnp.shape(kl_log_ratios)}; give (M,) or one number")
    log_ratios = jnp.atleast_1d(jnp.asarray(kl_log_ratios, dtype))
    return Mean.of(jnp.ones_like(log_ratios))(log_ratios)


@dataclass(frozen=True)
class _Answers:
    """B answers, each desirable or not. An answer of weight 0 is all zeros."""

    policy: jax.Array  # (B,)
    log_ratio: jax.Array  # (B,)
    is_desirable: jax.Array  # (B,)
    beta: jax.Array  # ()
    mean: Mean

    @staticmethod
    def of(
        policy: ArrayLike,
        reference: ArrayLike,
        is_desirable: ArrayLike,
        beta: ArrayLike,
        weights: ArrayLike | None,
        normalizer: ArrayLike | None,
    ) -> "_Answers":
        (log_probs, references), row_weights = checked_rows(
            {"policy": policy, "reference": reference}, weights, normalizer
        )
        check_shape("is_desirable", is_desirable, log_probs.shape, "policy")
        kind = jnp.result_type(is_desirable)
        if not (jnp.issubdtype(kind, jnp.integer) or kind == jnp.bool_):
            raise TypeError(f"`is_desirable` is {kind.name}; give booleans")
        log_ratio = log_probs - jax.lax.stop_gradient(references)
        mean = Mean.of(row_weights, normalizer)
        beta = number("beta", beta, log_probs.dtype, above=0)
        return _Answers(log_probs, log_ratio, jnp.asarray(is_desirable, bool), beta, mean)

    @property
    def reward(self) -> jax.Array:
        return self.beta * self.log_ratio

    @property
    def sign(self) -> jax.Array:
        return jnp.where(self.is_desirable, 1, -1)

    @property
    def desirable(self) -> Mean:
        """The mean over the desirable answers."""
        return Mean.of(jnp.where(self.is_desirable, self.mean.weights, 0))

    @property
    def undesirable(self) -> Mean:
        return Mean.of(jnp.where(self.is_desirable, 0, self.mean.weights))

    def result(self, losses: jax.Array, baseline: jax.Array, **metrics: jax.Array) -> Result:
        desirable, undesirable = self.desirable, self.undesirable
        chosen, rejected = desirable(self.reward), undesirable(self.reward)
        everything = Mean.of(self.mean.weights)
        return result(
            self.mean(losses),
            {
                "chosen_rewards": chosen,
                "rejected_rewards": rejected,
                "margin": chosen - rejected,
                "accuracy": everything((self.sign * (self.reward - baseline) > 0).astype(losses.dtype)),
                "chosen_log_probs": desirable(self.policy),
                "rejected_log_probs": undesirable(self.policy),
                "num_sequences": jnp.sum(self.mean.weights != 0),
                "num_desirable": jnp.sum(desirable.weights != 0),
                **metrics,
            },
        )
