"""The GRPO family: policy gradients of sampled answers, from the log-probabilities of their tokens.

Each loss is a surrogate of the token's ratio ``r = exp(policy - old)`` and its advantage A, plus ``beta`` times an
estimate of the KL divergence from the reference, less an entropy bonus. They differ in the surrogate and in what the
sum over tokens is divided by. `jaxkd.preference.gspo` and others have one ratio an answer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.preference.counted_answers import Result
from jaxkd.preference.kl_estimates import KLEstimate, k3
from jaxkd.preference.token_terms import Tokens


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
    delta: ArrayLike | None = None,
    kl_estimate: KLEstimate = k3,
    importance_weights: ArrayLike | None = None,
    entropies: ArrayLike | None = None,
    entropy_weight: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Group relative policy optimisation: the mean over answers of the mean over their tokens.

    A token's loss is ``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta kl - entropy_weight entropy``.

    Args:
      policy: (B, T) log-probabilities of the sampled tokens, as `jaxkd.token_log_probs` returns them; gradients reach
        these, and ``entropies``, alone.
      old: (B, T) those of the policy that sampled, or None for the policy itself: a ratio of 1.
      reference: (B, T) those of the reference, or None for no KL term.
      advantages: (B,) of the answers, as `jaxkd.preference.group_advantages` makes them, or (B, T) of the tokens.
      mask: (B, T) booleans or 0 and 1: the tokens that count. What the others hold is never read.
      beta: the factor of the KL term, at least 0. It may be traced, like every number here.
      epsilon_low, epsilon_high: how far the ratio may move before the gradient stops, at least 0.
      delta: where the ratio of a negative advantage is cut off too, above ``1 + epsilon_high``; None for nowhere
        (INTELLECT-2, arXiv 2505.07291).
      kl_estimate: of the KL term: `k3`, or `k1`, `k2`, or ``bias_corrected(k3)``, all of `jaxkd.preference`.
      importance_weights: (B,) or (B, T) factors of the surrogate, constants to differentiation: such as the truncated
        ratio of the policy that is trained to the one that an inference server has, or 0 for a token that is left out
        of the surrogate. They change neither the KL term nor what is divided by.
      entropies: (B, T), as `jaxkd.token_entropies` returns them, or None.
      entropy_weight: the factor of the entropy bonus, which is averaged as the tokens' losses are.
      weights: (B,) non-negative factors of the answers, or None for 1. One of weight 0 adds exactly nothing.
      normalizer: what divides the sum over answers; None is the sum of the weights. An answer without tokens adds 0 and
        counts; a batch whose weights are all 0 has loss 0.

    Returns:
      The loss, and metrics: ``num_tokens``, how many count, in answers of a weight above 0, and means over these, each
      the same whatever its answer's weight is: of the KL estimate ``kl``, of ``clip_fraction`` (where the gradient
      stopped), of the policy's ``log_probs``, and of ``entropy`` where entropies are given. They carry no gradient.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Source: Shao et al., "DeepSeekMath" (arXiv 2402.03300).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> loss, metrics = grpo(policy, old, None, jnp.array([1.0]), jnp.array([[True, True]]), epsilon_high=0.1)
    >>> print(f"{loss:.3f} with {metrics['clip_fraction']:.1f} clipped")
    -1.050 with 0.5 clipped
    """
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, importance_weights, entropies, entropy_weight, weights, normalizer)
    surrogate, clipped = tokens.clipped_surrogate(epsilon_low, epsilon_high, delta)
    losses = tokens.sums(tokens.losses(surrogate)) / tokens.lengths
    return tokens.result(losses, tokens.mean_of_answers(normalizer), clipped)


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
    delta: ArrayLike | None = None,
    kl_estimate: KLEstimate = k3,
    importance_weights: ArrayLike | None = None,
    entropies: ArrayLike | None = None,
    entropy_weight: ArrayLike = 0.0,
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
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, importance_weights, entropies, entropy_weight, weights, normalizer)
    max_length = tokens.number("max_length", max_length, above=0)
    surrogate, clipped = tokens.clipped_surrogate(epsilon_low, epsilon_high, delta)
    losses = tokens.sums(tokens.losses(surrogate)) / max_length
    return tokens.result(losses, tokens.mean_of_answers(normalizer), clipped)


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
    delta: ArrayLike | None = None,
    kl_estimate: KLEstimate = k3,
    importance_weights: ArrayLike | None = None,
    entropies: ArrayLike | None = None,
    entropy_weight: ArrayLike = 0.0,
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
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, importance_weights, entropies, entropy_weight, weights, normalizer)
    surrogate, clipped = tokens.clipped_surrogate(epsilon_low, epsilon_high, delta)
    losses = tokens.sums(tokens.losses(surrogate))
    return tokens.result(losses, tokens.mean_of_tokens(normalizer), clipped)


def cispo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.04,
    max_ratio: ArrayLike = 5.0,
    kl_estimate: KLEstimate = k3,
    importance_weights: ArrayLike | None = None,
    entropies: ArrayLike | None = None,
    entropy_weight: ArrayLike = 0.0,
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
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, importance_weights, entropies, entropy_weight, weights, normalizer)
    max_ratio = tokens.number("max_ratio", max_ratio, above=0)
    factor = jax.lax.stop_gradient(jnp.minimum(tokens.ratio, max_ratio))
    losses = tokens.sums(tokens.losses(-factor * tokens.advantages * tokens.policy))
    return tokens.result(losses, tokens.mean_of_tokens(normalizer), tokens.ratio > max_ratio)


def sapo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.04,
    gain_temperature: ArrayLike = 1.0,
    loss_temperature: ArrayLike = 1.05,
    kl_estimate: KLEstimate = k3,
    importance_weights: ArrayLike | None = None,
    entropies: ArrayLike | None = None,
    entropy_weight: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Soft adaptive policy optimisation: a gate closes by and by instead of a clip at once.

    ``-4 / k sigmoid(k (r - 1)) A``, k the temperature of the advantage's sign: at r = 1 the slope is that of r A, and
    it fades on both sides. The mean is that of `grpo`.

    Args:
      gain_temperature: k where A is above 0, above 0; TRL's ``sapo_temperature_pos``.
      loss_temperature: k elsewhere; larger, so that bad answers are forgotten sooner.

    The other arguments, the result and the errors are those of `grpo`; no gradient stops, so there is no
    ``clip_fraction``. Source: Gao et al., "Soft Adaptive Policy Optimization" (arXiv 2511.20347).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{sapo(policy, old, None, jnp.array([1.0]), jnp.array([[True, False]]))[0]:.4f}")
    -2.1993
    """
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, importance_weights, entropies, entropy_weight, weights, normalizer)
    gain_temperature = tokens.number("gain_temperature", gain_temperature, above=0)
    loss_temperature = tokens.number("loss_temperature", loss_temperature, above=0)
    temperature = jnp.where(tokens.advantages > 0, gain_temperature, loss_temperature)
    gate = 4 / temperature * jax.nn.sigmoid(temperature * (tokens.ratio - 1))
    losses = tokens.sums(tokens.losses(-gate * tokens.advantages)) / tokens.lengths
    return tokens.result(losses, tokens.mean_of_answers(normalizer))
