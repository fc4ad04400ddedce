"""The GRPO family: policy gradients of sampled answers, from the log-probabilities of their tokens.

Each loss is a surrogate of the ratio ``r = exp(policy - old)`` and the advantage A of an answer, plus ``beta`` times an
estimate of the KL divergence from the reference, ``exp(d) - d - 1`` with ``d = reference - policy``. They differ in the
surrogate and in what the sum over tokens is divided by. Above a log-ratio of 20 every exponential is its tangent there.
"""

from dataclasses import dataclass
from math import exp, expm1
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.preference.counted_answers import Mean, Result, check_shape, checked_rows, number, result

# Above this, at a ratio of 4.9e8, the exponential of a log-ratio goes on as its tangent: it is finite, and its gradient
# neither ends nor turns.
LARGEST_LOG_RATIO = 20.0


def grpo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.04,
    epsilon_low: ArrayLike = 0.2,
    epsilon_high: ArrayLike = 0.2,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Group relative policy optimisation: the mean over answers of the mean over their tokens.

    A token's loss is ``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta kl``.

    Args:
      policy: (B, T) log-probabilities of the sampled tokens, as `jaxkd.token_log_probs` returns them; gradients reach
        these alone.
      old: (B, T) those of the policy that sampled, or None for the policy itself: a ratio of 1.
      reference: (B, T) those of the reference, or None for no KL term.
      advantages: (B,) of the answers, normalised within their groups by the caller.
      mask: (B, T) booleans or 0 and 1: the tokens that count. What the others hold is never read.
      beta: the factor of the KL term, at least 0. It may be traced, like every number here.
      epsilon_low, epsilon_high: how far the ratio may move before the gradient stops, at least 0.
      weights: (B,) non-negative factors of the answers, or None for 1. One of weight 0 adds exactly nothing.
      normalizer: what divides the sum over answers; None is the sum of the weights. An answer without tokens adds 0 and
        counts; a batch whose weights are all 0 has loss 0.

    Returns:
      The loss, and metrics: means over the tokens that count of the KL estimate ``kl``, of ``clip_fraction`` (where the
      gradient stopped) and of the policy's ``log_probs``; and ``num_tokens``. They carry no gradient.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Source: Shao et al., "DeepSeekMath" (arXiv 2402.03300).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> loss, metrics = grpo(policy, old, None, jnp.array([1.0]), jnp.array([[True, True]]), epsilon_high=0.1)
    >>> print(f"{loss:.3f} with {metrics['clip_fraction']:.1f} clipped")
    -1.050 with 0.5 clipped
    """
    tokens = _Tokens.of(policy, old, reference, advantages, mask, beta, weights, normalizer)
    surrogate, clipped = tokens.clipped_surrogate(tokens.ratio, epsilon_low, epsilon_high)
    losses = tokens.sums(surrogate + tokens.penalty) / tokens.lengths
    return tokens.result(losses, Mean.of(tokens.weights, normalizer), clipped)


def dr_grpo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    max_length: ArrayLike,
    beta: ArrayLike = 0.04,
    epsilon_low: ArrayLike = 0.2,
    epsilon_high: ArrayLike = 0.2,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """GRPO done right: every answer's sum over tokens is divided by the same ``max_length``, not by its length.

    So a long wrong answer is not punished less than a short one. The paper's advantages are not divided by their
    deviation, and it has no KL term (``reference=None``).

    Args:
      max_length: the number of tokens that an answer may have, above 0.

    The other arguments, the result and the errors are those of `grpo`. Source: Liu et al., "Understanding R1-Zero-Like
    Training" (arXiv 2503.20783).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> mask = jnp.array([[True, True]])
    >>> print(f"{dr_grpo(policy, old, None, jnp.array([1.0]), mask, max_length=4, epsilon_high=0.1)[0]:.3f}")
    -0.525
    """
    tokens = _Tokens.of(policy, old, reference, advantages, mask, beta, weights, normalizer)
    max_length = tokens.number("max_length", max_length, above=0)
    surrogate, clipped = tokens.clipped_surrogate(tokens.ratio, epsilon_low, epsilon_high)
    losses = tokens.sums(surrogate + tokens.penalty) / max_length
    return tokens.result(losses, Mean.of(tokens.weights, normalizer), clipped)


def dapo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.04,
    epsilon_low: ArrayLike = 0.2,
    epsilon_high: ArrayLike = 0.28,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Decoupled clip and dynamic sampling: the mean over all tokens of the batch, and more room upwards.

    The paper has no KL term (``reference=None``).

    Args:
      normalizer: what divides the sum over tokens; None is the sum over answers of weight times length. Give the token
        count of a global batch if this is a part of one.

    The other arguments, the result and the errors are those of `grpo`. Source: Yu et al., "DAPO" (arXiv 2503.14476).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{dapo(policy, old, None, jnp.array([1.0]), jnp.array([[True, False]]))[0]:.3f}")
    -1.200
    """
    tokens = _Tokens.of(policy, old, reference, advantages, mask, beta, weights, normalizer)
    surrogate, clipped = tokens.clipped_surrogate(tokens.ratio, epsilon_low, epsilon_high)
    losses = tokens.sums(surrogate + tokens.penalty)
    return tokens.result(losses, tokens.mean_of_tokens(normalizer), clipped)


def gspo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.04,
    epsilon_low: ArrayLike = 3e-4,
    epsilon_high: ArrayLike = 4e-4,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Group sequence policy optimisation: one ratio an answer, exp(mean of policy - old over its tokens).

    ``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`` of each answer, plus ``beta`` times the mean KL estimate
    of its tokens. Such a ratio moves less than a token's: hence the narrow clip.

    The arguments, the result and the errors are those of `grpo`. Source: Zheng et al., "Group Sequence Policy
    Optimization" (arXiv 2507.18071).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{gspo(policy, old, None, jnp.array([-1.0]), jnp.array([[True, True]]))[0]:.3f}")
    1.095
    """
    tokens = _Tokens.of(policy, old, reference, advantages, mask, beta, weights, normalizer)
    ratio = _exp(tokens.sums(tokens.log_ratio) / tokens.lengths)[:, None]  # (B, 1)
    surrogate, clipped = tokens.clipped_surrogate(ratio, epsilon_low, epsilon_high)
    losses = tokens.sums(surrogate + tokens.penalty) / tokens.lengths
    return tokens.result(losses, Mean.of(tokens.weights, normalizer), clipped)


def cispo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.04,
    max_ratio: ArrayLike = 5.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Clipped importance sampling: -min(r, max_ratio) A policy, the factor being a constant to differentiation.

    The ratio is cut off, not the gradient: no token stops learning. The mean is that of `dapo`, over all tokens.

    Args:
      max_ratio: the largest factor, above 0; what Liger and TRL call ``epsilon_high`` in this loss, and the paper ``1 +
        epsilon_high``.

    The other arguments, the result and the errors are those of `dapo`; ``clip_fraction`` is the share of tokens whose
    ratio was cut off. Source: MiniMax, "MiniMax-M1" (arXiv 2506.13585); the bound of 5 from "The Art of Scaling
    Reinforcement Learning Compute" (arXiv 2510.13786).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{cispo(policy, old, None, jnp.array([1.0]), jnp.array([[True, False]]), max_ratio=1.1)[0]:.4f}")
    0.5619
    """
    tokens = _Tokens.of(policy, old, reference, advantages, mask, beta, weights, normalizer)
    max_ratio = tokens.number("max_ratio", max_ratio, above=0)
    factor = jax.lax.stop_gradient(jnp.minimum(tokens.ratio, max_ratio))
    losses = tokens.sums(tokens.penalty - factor * tokens.advantages * tokens.policy)
    return tokens.result(losses, tokens.mean_of_tokens(normalizer), tokens.ratio > max_ratio)


def _exp(log_ratio: jax.Array) -> jax.Array:
    beyond = jnp.maximum(log_ratio - LARGEST_LOG_RATIO, 0)
    return jnp.exp(jnp.minimum(log_ratio, LARGEST_LOG_RATIO)) + exp(LARGEST_LOG_RATIO) * beyond


def _kl_estimate(d: jax.Array) -> jax.Array:
    """exp(d) - d - 1, never below 0, nor inf - inf."""
    below, beyond = jnp.minimum(d, LARGEST_LOG_RATIO), jnp.maximum(d - LARGEST_LOG_RATIO, 0)
    return jnp.expm1(below) - below + expm1(LARGEST_LOG_RATIO) * beyond


@dataclass(frozen=True)
class _Tokens:
    """B answers of T tokens. A token that does not count is all zeros, and so is an answer of weight 0."""

    policy: jax.Array  # (B, T)
    log_ratio: jax.Array  # (B, T), policy against old
    kl: jax.Array  # (B, T)
    penalty: jax.Array  # (B, T), beta kl
    advantages: jax.Array  # (B, 1)
    mask: jax.Array  # (B, T)
    weights: jax.Array  # (B,)

    @staticmethod
    def of(
        policy: ArrayLike,
        old: ArrayLike | None,
        reference: ArrayLike | None,
        advantages: ArrayLike,
        mask: ArrayLike,
        beta: ArrayLike,
        weights: ArrayLike | None,
        normalizer: ArrayLike | None,
    ) -> "_Tokens":
        given: dict[str, Any] = {"policy": policy, "old": old, "reference": reference}
        arrays = {name: x for name, x in given.items() if name == "policy" or x is not None}
        checked, row_weights = checked_rows(arrays, weights, normalizer, axes="BT")
        log_probs = dict(zip(arrays, checked, strict=True))
        shape, dtype = checked[0].shape, checked[0].dtype
        check_shape("advantages", advantages, shape[:1], "policy")
        check_shape("mask", mask, shape, "policy")
        beta = number("beta", beta, dtype, at_least=0)
        counts = jnp.asarray(mask, bool) & (row_weights != 0)[:, None]
        log_probs = {name: jnp.where(counts, x, 0) for name, x in log_probs.items()}
        new = log_probs["policy"]
        before, anchor = (jax.lax.stop_gradient(log_probs.get(name, new)) for name in ("old", "reference"))
        kl = jnp.zeros_like(new) if reference is None else _kl_estimate(anchor - new)
        advantage = jax.lax.stop_gradient(jnp.where(row_weights != 0, jnp.asarray(advantages, dtype), 0))
        return _Tokens(new, new - before, kl, beta * kl, advantage[:, None], counts, row_weights)

    @property
    def ratio(self) -> jax.Array:
        return _exp(self.log_ratio)

    @property
    def lengths(self) -> jax.Array:
        """The tokens of each answer, and 1 for an answer without: (B,)."""
        return jnp.maximum(self.sums(jnp.ones_like(self.policy)), 1)

    def number(self, name: str, value: ArrayLike, **bounds: float) -> jax.Array:
        return number(name, value, self.policy.dtype, **bounds)

    def clipped_surrogate(
        self, ratio: jax.Array, epsilon_low: ArrayLike, epsilon_high: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        """-min(r A, clip(r) A), and where the second is the smaller."""
        low = 1 - self.number("epsilon_low", epsilon_low, at_least=0)
        high = 1 + self.number("epsilon_high", epsilon_high, at_least=0)
        gains = self.advantages > 0
        clipped = jnp.where(gains, ratio > high, (self.advantages < 0) & (ratio < low))
        return -jnp.where(clipped, jnp.where(gains, high, low), ratio) * self.advantages, clipped

    def sums(self, x: jax.Array) -> jax.Array:
        """Over the tokens of each answer: (B,)."""
        return jnp.sum(jnp.where(self.mask, x, 0), axis=1)

    def mean_of_tokens(self, normalizer: ArrayLike | None = None) -> Mean:
        return Mean.of(self.weights, normalizer, counts=self.sums(jnp.ones_like(self.policy)))

    def result(self, losses: jax.Array, mean: Mean, clipped: jax.Array) -> Result:
        per_token = self.mean_of_tokens()
        metrics = {"kl": self.kl, "clip_fraction": clipped.astype(losses.dtype), "log_probs": self.policy}
        means = {name: per_token(self.sums(x)) for name, x in metrics.items()}
        return result(mean(losses), means | {"num_tokens": jnp.sum(self.mask)})
