"""f-DPO: DPO whose regularizer is another f-divergence of the policy from the reference than KL(policy‖reference).

``f'(exp(x))`` of a log-ratio x stands where DPO has x. Here it is a *score*, a rising function of x; a constant in it
cancels. Above an exponent of 20 an exponential is its tangent there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import ArrayLike

from jaxkd.loop.checks import check_scalar
from jaxkd.preference.counted_answers import Result
from jaxkd.preference.kl_estimates import expm1_of
from jaxkd.preference.pairs import Pairs

Score = Callable[[jax.Array], jax.Array]


def f_dpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    score: Score,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """-log sigmoid(beta (score(a) - score(b))) of the log-ratios a of the chosen and b of the rejected answer.

    Args:
      score: f' of the divergence, as a function of a log-ratio: `forward_kl_score`, `jensen_shannon_score`,
        ``alpha_score(alpha)``, all of `jaxkd.preference`, or your own, elementwise. With ``lambda x: x`` it is `dpo`,
        the reverse KL.

    The other arguments, the result and the errors are those of `dpo`; rewards and margins in ``metrics`` are beta times
    scores. Another loss of pairs is had with such a divergence by giving it scores for the policy's log-probabilities
    and zeros for the reference's. `jaxkd.preference.f_po` is something else: there the divergence is one of
    preferences.

    Source: Wang et al., "Beyond Reverse KL" (arXiv 2309.16240).

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{f_dpo(*pair, score=jensen_shannon_score, beta=0.5)[0]:.4f}")
    0.4741
    """
    if not callable(score):
        raise TypeError(f"`score` is {score!r}; give a function such as jaxkd.preference.jensen_shannon_score")
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    pairs = replace(
        pairs, chosen_log_ratio=score(pairs.chosen_log_ratio), rejected_log_ratio=score(pairs.rejected_log_ratio)
    )
    return pairs.result(-log_sigmoid(pairs.margin))


def forward_kl_score(log_ratio: jax.Array) -> jax.Array:
    """``1 - exp(-x)``, of f(t) = -log t: KL(reference‖policy).

    >>> print(f"{forward_kl_score(jnp.array(1.0)):.4f}")
    0.6321
    """
    return -expm1_of(-log_ratio)


def jensen_shannon_score(log_ratio: jax.Array) -> jax.Array:
    """``log 2 + log sigmoid(x)``, of f(t) = t log t - (t + 1) log((t + 1) / 2): twice the Jensen-Shannon divergence.

    >>> print(f"{jensen_shannon_score(jnp.array(1.0)):.4f}")
    0.3799
    """
    return log(2) + log_sigmoid(log_ratio)


def alpha_score(alpha: ArrayLike) -> Score:
    """``(exp((alpha - 1) x) - 1) / (alpha - 1)`` of TRL's alpha-divergence; at alpha = 1, x.

    The paper has alpha between 0, which is `forward_kl_score`, and 1; `jaxkd.alpha_divergence` writes 1 - alpha for it.

    Raises:
      TypeError: ``alpha`` is no number.

    >>> print(f"{alpha_score(0.5)(jnp.array(1.0)):.4f}")
    0.7869
    """
    check_scalar("alpha", alpha)

    def score(log_ratio: jax.Array) -> jax.Array:
        power = jnp.asarray(alpha, jnp.result_type(log_ratio)) - 1
        is_limit = power == 0
        power = jnp.where(is_limit, 1, power)
        return jnp.where(is_limit, log_ratio, expm1_of(power * log_ratio) / power)

    return score
