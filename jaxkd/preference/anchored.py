"""Losses that hold each answer of a pair to the reference on its own, not only the difference of the two.

Arguments, result and errors are those of `jaxkd.preference.dpo`; a reward is ``beta (log policy - log reference)``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jax.typing import ArrayLike

from jaxkd.preference.counted_answers import Result
from jaxkd.preference.pairs import Pairs


def nca_pair(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Noise contrastive alignment of a pair: it keeps the chosen answer likely.

    ``-log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-r)) / 2`` of the chosen reward c and the rejected one r.

    Source: Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards" (arXiv 2402.05369).

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{nca_pair(*pair, beta=0.5)[0]:.4f}")
    1.1982
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    chosen, rejected = pairs.chosen_reward, pairs.rejected_reward
    return pairs.result(-log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2)


def bco_pair(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Binary classifier optimisation of a pair, without a reward shift: -log sigmoid(c) - log sigmoid(-r).

    c and r are the rewards of the chosen and the rejected answer; `jaxkd.preference.bco` shifts them.

    Source: Jung et al., "Binary Classifier Optimization" (arXiv 2404.04656).

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{bco_pair(*pair, beta=0.5)[0]:.4f}")
    0.9482
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    return pairs.result(-log_sigmoid(pairs.chosen_reward) - log_sigmoid(-pairs.rejected_reward))


def sppo_hard(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Self-play preference optimisation with a certain winner: (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2.

    a and b are the log-ratios, rewards over beta, of the chosen and the rejected answer.

    Source: Wu et al., "Self-Play Preference Optimization" (arXiv 2405.00675), equation 4.7.

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{sppo_hard(*pair, beta=0.25)[0]:.4f}")
    2.0000
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    target = 0.5 / pairs.beta
    return pairs.result(jnp.square(pairs.chosen_log_ratio - target) + jnp.square(pairs.rejected_log_ratio + target))


def apo_zero(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Anchored preference optimisation towards the chosen answer: sigmoid(-c) + sigmoid(r).

    For chosen answers better than the policy's own; c and r are the rewards of the chosen and the rejected answer.

    Source: D'Oosterlinck et al., "Anchored Preference Optimization" (arXiv 2408.06266), equation 7.

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{apo_zero(*pair, beta=0.5)[0]:.4f}")
    0.7551
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    return pairs.result(sigmoid(-pairs.chosen_reward) + sigmoid(pairs.rejected_reward))


def apo_down(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Anchored preference optimisation away from both answers: sigmoid(c) + sigmoid(r - c).

    For chosen answers worse than the policy's own; c and r are the rewards of the chosen and the rejected answer.

    Source: D'Oosterlinck et al., "Anchored Preference Optimization" (arXiv 2408.06266), equation 8.

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{apo_down(*pair, beta=0.5)[0]:.4f}")
    0.8914
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    return pairs.result(sigmoid(pairs.chosen_reward) + sigmoid(-pairs.margin))
