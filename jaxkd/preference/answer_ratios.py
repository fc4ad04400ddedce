"""Policy gradients whose ratio is one of the whole answer: a geometric mean of its tokens' ratios, or their product.

The arguments, the result and the errors are those of `jaxkd.preference.grpo`; what is added to a token's or an answer's
surrogate, ``beta kl - entropy_weight entropy``, is too.
"""

from __future__ import annotations

from dataclasses import replace
from math import log

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.preference.counted_answers import Result
from jaxkd.preference.kl_estimates import LARGEST_LOG_RATIO, KLEstimate, exp_of, k3
from jaxkd.preference.token_terms import Tokens


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
    delta: ArrayLike | None = None,
    kl_estimate: KLEstimate = k3,
    importance_weights: ArrayLike | None = None,
    entropies: ArrayLike | None = None,
    entropy_weight: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Group sequence policy optimisation: one ratio an answer, exp(mean of policy - old over its tokens).

    ``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`` of each answer, plus ``beta`` times the mean KL estimate
    of its tokens. Such a ratio moves less than a token's: hence the narrow clip. With advantages (B, T) it is the
    paper's GSPO-token: the ratio is the answer's, its gradient each token's own.

    The arguments, the result and the errors are those of `grpo`. Source: Zheng et al., "Group Sequence Policy
    Optimization" (arXiv 2507.18071).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{gspo(policy, old, None, jnp.array([-1.0]), jnp.array([[True, True]]))[0]:.3f}")
    1.095
    """
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, importance_weights, entropies, entropy_weight, weights, normalizer)
    tokens = tokens.with_one_ratio()
    surrogate, clipped = tokens.clipped_surrogate(epsilon_low, epsilon_high, delta)
    losses = tokens.sums(tokens.losses(surrogate)) / tokens.lengths
    return tokens.result(losses, tokens.mean_of_answers(normalizer), clipped)


def luspo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.04,
    epsilon_low: ArrayLike = 3e-4,
    epsilon_high: ArrayLike = 4e-4,
    delta: ArrayLike | None = None,
    kl_estimate: KLEstimate = k3,
    importance_weights: ArrayLike | None = None,
    entropies: ArrayLike | None = None,
    entropy_weight: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Length-unbiased sequence policy optimisation: `gspo` with each answer's loss times its length.

    So the gradient of a token is as large in a long answer as in a short one.

    Source: "Length-Unbiased Sequence Policy Optimization" (arXiv 2602.05261).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{luspo(policy, old, None, jnp.array([-1.0]), jnp.array([[True, True]]))[0]:.3f}")
    2.191
    """
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, importance_weights, entropies, entropy_weight, weights, normalizer)
    tokens = tokens.with_one_ratio()
    surrogate, clipped = tokens.clipped_surrogate(epsilon_low, epsilon_high, delta)
    losses = tokens.sums(tokens.losses(surrogate))
    return tokens.result(losses, tokens.mean_of_answers(normalizer), clipped)


def gmpo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.04,
    epsilon_low: ArrayLike = 0.4,
    epsilon_high: ArrayLike = 0.4,
    kl_estimate: KLEstimate = k3,
    importance_weights: ArrayLike | None = None,
    entropies: ArrayLike | None = None,
    entropy_weight: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Geometric-mean policy optimisation: the geometric mean of the tokens' ratios, each clipped in logarithms.

    ``-exp(mean of x) A`` with ``x = min(policy - old, epsilon_high)`` where A is above 0 and ``max(policy - old,
    -epsilon_low)`` elsewhere: one outlier moves it less than an arithmetic mean.

    Args:
      advantages, importance_weights: (B,), of answers.
      epsilon_low, epsilon_high: of the logarithm of a token's ratio, at least 0.

    The KL term is the mean over each answer's tokens. Source: Zhao et al., "Geometric-Mean Policy Optimization" (arXiv
    2507.20673).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{gmpo(policy, old, None, jnp.array([-1.0]), jnp.array([[True, True]]))[0]:.3f}")
    1.095
    """
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, importance_weights, entropies, entropy_weight, weights, normalizer)
    tokens.only_of_answers("gmpo", advantages=advantages, importance_weights=importance_weights)
    low = -tokens.number("epsilon_low", epsilon_low, at_least=0)
    high = tokens.number("epsilon_high", epsilon_high, at_least=0)
    gains, loses = tokens.advantages > 0, tokens.advantages < 0
    clipped = (gains & (tokens.log_ratio > high)) | (loses & (tokens.log_ratio < low))
    log_ratio = jnp.where(clipped, jnp.where(gains, high, low), tokens.log_ratio)
    ratio = exp_of(tokens.sums(log_ratio) / tokens.lengths)[:, None]
    losses = tokens.sums(tokens.losses(-ratio * tokens.advantages)) / tokens.lengths
    return tokens.result(losses, tokens.mean_of_answers(normalizer), clipped)


def rloo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.05,
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
    """REINFORCE leave-one-out, clipped: an answer is one action, its ratio the product of its tokens'.

    ``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`` with ``r = exp(sum of policy - old)``, plus ``beta``
    times the sum of the KL estimates of its tokens, less ``entropy_weight`` times that of their entropies. Where
    ``old`` is None its gradient is that of the paper, ``-A`` times that of the answer's log-probability.

    Args:
      advantages, importance_weights: (B,), of answers; `jaxkd.preference.leave_one_out_advantages` makes advantages.
        For a KL term in the reward, as the paper and TRL have it, subtract ``beta`` times the sum over tokens of ``old
        - reference`` from each reward first, and leave ``reference`` None here.

    Source: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization" (arXiv 2402.14740).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.6]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{rloo(policy, old, None, jnp.array([-1.0]), jnp.array([[True, True]]))[0]:.3f}")
    1.440
    """
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, importance_weights, entropies, entropy_weight, weights, normalizer)
    tokens.only_of_answers("rloo", advantages=advantages, importance_weights=importance_weights)
    of_answers = replace(tokens, log_ratio=tokens.sums(tokens.log_ratio)[:, None])
    surrogate, clipped = of_answers.clipped_surrogate(epsilon_low, epsilon_high, delta)
    losses = tokens.by_importance(surrogate)[:, 0] + tokens.sums(tokens.penalty)
    return tokens.result(losses, tokens.mean_of_answers(normalizer), clipped)


def vespo(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike = 0.04,
    gain_power: ArrayLike = 2.0,
    gain_decay: ArrayLike = 3.0,
    loss_power: ArrayLike = 3.0,
    loss_decay: ArrayLike = 2.0,
    kl_estimate: KLEstimate = k3,
    entropies: ArrayLike | None = None,
    entropy_weight: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Variational sequence-level soft policy optimisation: a gamma weight of the answer's ratio instead of a clip.

    ``-phi A policy`` of each token, with ``phi = exp(lambda + k log w - lambda w)``, a constant to differentiation, of
    the product w of the ratios of the answer's tokens: 1 at w = 1. The mean is that of `dapo`, over all tokens. Each
    log-ratio counts within ±20, and their sum between log(1e-8) and 20.

    Args:
      old: (B, T) log-probabilities of what sampled, an inference server's if it differs: this loss takes no
        ``importance_weights``.
      gain_power, gain_decay: k and lambda where A is at least 0; TRL's ``vespo_k_pos`` and ``vespo_lambda_pos``.
      loss_power, loss_decay: the same elsewhere; all four are at least 0.
      normalizer: as in `dapo`.

    No gradient stops, so there is no ``clip_fraction``. Source: "VESPO" (arXiv 2602.10693).

    >>> policy, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{vespo(policy, old, None, jnp.array([1.0]), jnp.array([[True, False]]))[0]:.4f}")
    0.4037
    """
    given = policy, old, reference, advantages, mask, beta, kl_estimate
    tokens = Tokens.of(*given, None, entropies, entropy_weight, weights, normalizer)
    gains = tokens.advantages >= 0
    by_name = {"gain_power": gain_power, "gain_decay": gain_decay}
    by_name |= {"loss_power": loss_power, "loss_decay": loss_decay}
    numbers = {name: tokens.number(name, value, at_least=0) for name, value in by_name.items()}
    power = jnp.where(gains, numbers["gain_power"], numbers["loss_power"])
    decay = jnp.where(gains, numbers["gain_decay"], numbers["loss_decay"])
    log_ratio = tokens.sums(jnp.clip(tokens.log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))[:, None]
    log_ratio = jnp.clip(log_ratio, log(1e-8), LARGEST_LOG_RATIO)
    factor = jax.lax.stop_gradient(jnp.exp(decay + power * log_ratio - decay * jnp.exp(log_ratio)))
    losses = tokens.sums(tokens.losses(-factor * tokens.advantages * tokens.policy))
    return tokens.result(losses, tokens.mean_of_tokens(normalizer))
