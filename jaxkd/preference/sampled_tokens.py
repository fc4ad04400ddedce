"""Reverse KL from sampled tokens: distillation of what the student itself has said, without a vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.preference.counted_answers import Result
from jaxkd.preference.kl_estimates import KLEstimate, bias_corrected, k3
from jaxkd.preference.token_terms import Tokens


def sampled_kl(
    policy: ArrayLike,
    old: ArrayLike | None,
    reference: ArrayLike,
    mask: ArrayLike,
    *,
    kl_estimate: KLEstimate = bias_corrected(k3),  # noqa: B008
    max_ratio: ArrayLike | None = None,
    importance_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """KL(policy‖reference) estimated from the tokens that the policy sampled: the mean over all tokens of the batch.

    A token's loss is ``min(r, max_ratio)``, a constant to differentiation, times its estimate. On-policy distillation
    is this loss with the teacher as reference: the student says something, and both score each token of it by
    `jaxkd.token_log_probs`. `jaxkd.token_divergences` with `jaxkd.reverse_kl` is the same in the mean, from the whole
    vocabulary, and varies less.

    Args:
      policy: (B, T) log-probabilities of the sampled tokens; gradients reach these alone.
      old: (B, T) those of the policy that sampled, or None for the policy itself: r is exp(policy - old), or 1.
      reference: (B, T) those of the reference.
      mask: (B, T) booleans or 0 and 1: the tokens that count. What the others hold is never read.
      kl_estimate: ``bias_corrected(k3)`` has the policy gradient of reverse KL, r (policy - reference) times that of
        ``policy``, as `k2` has. ``bias_corrected(k1)`` has it with more variance near the reference. `k1` has no
        gradient in the mean, and `k3` that of the forward KL.
      max_ratio: the largest factor, above 0; None for no bound.
      importance_weights: (B,) or (B, T) further factors, constants to differentiation.
      weights: (B,) non-negative factors of the answers, or None for 1. One of weight 0 adds exactly nothing.
      normalizer: what divides the sum over tokens; None is the sum over answers of weight times length.

    Returns:
      The loss, and metrics: ``num_tokens``, and means over the tokens that count of ``kl``, the estimate times its
      factor, of ``clip_fraction``, the share whose ratio was cut off, and of the policy's ``log_probs``.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    With ``reference - policy`` as advantages (B, T), and their gradient stopped, `jaxkd.preference.dapo` and others
    take the same steps within their clips. Source: Schulman, "Approximating KL Divergence", 2020; Gu et al., "MiniLLM"
    (arXiv 2306.08543).

    >>> policy, reference = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.5]]))
    >>> print(f"{sampled_kl(policy, None, reference, jnp.array([[True, True]]))[0]:.4f}")
    0.0966
    """
    if reference is None:
        raise TypeError("`reference` is None; give its log-probabilities, (B, T)")
    advantages = jnp.zeros(jnp.shape(policy)[:1])
    given = policy, old, reference, advantages, mask, 1.0, kl_estimate
    tokens = Tokens.of(*given, importance_weights, None, 0.0, weights, normalizer)
    bound = jnp.inf if max_ratio is None else tokens.number("max_ratio", max_ratio, above=0)
    factor = jax.lax.stop_gradient(jnp.minimum(tokens.ratio, bound))
    kl = factor * kl_estimate.with_slope(tokens.above_reference, tokens.log_ratio)
    mean = tokens.mean_of_tokens(normalizer)
    return tokens.result(tokens.sums(tokens.by_importance(kl)), mean, tokens.ratio > bound, kl=kl)
