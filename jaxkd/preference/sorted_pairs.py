"""Alignment via optimal transport: chosen answers as a whole are to be better than rejected ones, not each of its own.

Log-ratios of the batch are sorted, and compared rank by rank. A weight is a number of repetitions: of weighted answers
the quantiles are compared, at every share of the total weight. Arguments that are not described, the result and the
errors are those of `jaxkd.preference.dpo`; the metrics are of the pairs as they are given. Parts of a batch do not add
up to the whole, for each is sorted alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxkd.preference.counted_answers import Mean, Result
from jaxkd.preference.pairs import Pairs, smoothed


def aot(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Of pairs: the policy's log-ratios of chosen to rejected answer are to exceed the reference's, rank by rank.

    ``-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)`` of the differences d between the sorted ``policy_chosen -
    policy_rejected`` and the sorted ``reference_chosen - reference_rejected``, e = label_smoothing in [0, 0.5).

    Source: Melnyk et al., "Distributional Preference Alignment of LLMs via Optimal Transport" (arXiv 2406.05882).

    >>> pairs = [jnp.array(x) for x in ([-1.0, -2.0], [-3.0, -2.0], [-2.0, -1.0], [-2.0, -3.0])]
    >>> print(f"{aot(*pairs, beta=0.5)[0]:.4f}")
    0.6931
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    policy = pairs.policy_chosen - pairs.policy_rejected
    reference = policy - (pairs.chosen_log_ratio - pairs.rejected_log_ratio)
    return _compared(pairs, policy, jax.lax.stop_gradient(reference), label_smoothing)


def aot_unpaired(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """The chosen answers' log-ratios to the reference are to exceed the rejected ones', rank by rank.

    The loss of `aot`, d being the differences between the sorted ``policy_chosen - reference_chosen`` and the sorted
    ``policy_rejected - reference_rejected``: which chosen answer stands beside which rejected one has no meaning.

    Source: Melnyk et al., "Distributional Preference Alignment of LLMs via Optimal Transport" (arXiv 2406.05882).

    >>> pairs = [jnp.array(x) for x in ([-1.0, -2.0], [-3.0, -2.0], [-2.0, -1.0], [-2.0, -3.0])]
    >>> print(f"{aot_unpaired(*pairs, beta=0.5)[0]:.4f}")
    0.6931
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    return _compared(pairs, pairs.chosen_log_ratio, pairs.rejected_log_ratio, label_smoothing)


def _compared(pairs: Pairs, better: jax.Array, worse: jax.Array, label_smoothing: ArrayLike) -> Result:
    """Between two marks that follow each other, neither side's quantile changes: a weight of its own, (2 B,)."""
    wrong = pairs.wrong_share(label_smoothing)
    weights = _whole(pairs.mean.weights)
    sides = [_sorted(_whole(x), weights) for x in (better, worse)]
    marks = jnp.sort(jnp.concatenate([upper for _, upper in sides]))
    before = jnp.concatenate([jnp.zeros_like(marks[:1]), marks[:-1]])
    quantiles = [x[jnp.searchsorted(upper, (before + marks) / 2).clip(0, x.size - 1)] for x, upper in sides]
    losses = smoothed(pairs.beta * (quantiles[0] - quantiles[1]), wrong)
    return pairs.result(losses, mean=Mean(marks - before, pairs.mean.total))


def _whole(x: jax.Array) -> jax.Array:
    """On every device, where its type says how it is split: JAX sorts no axis that is."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def _sorted(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In rising order, and where on the line of weights each one ends."""
    order = jnp.argsort(x)
    return x[order], jnp.cumsum(weights[order])
