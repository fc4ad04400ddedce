"""Losses of pairs that need no reference model.

The reward of an answer is ``beta`` times its log-probability, summed in `cpo`, averaged over its tokens in the others
(``jaxkd.sequence_log_probs(..., average=True)``). Arguments that are not described, the result and the errors are those
of `jaxkd.preference.dpo`.
"""

import jax
import jax.numpy as jnp
from jax.nn import log1mexp, log_sigmoid
from jax.typing import ArrayLike

from jaxkd.preference.counted_answers import Result
from jaxkd.preference.pairs import Pairs, negative_log_likelihood, smoothed


def cpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    *,
    chosen_lengths: ArrayLike,
    beta: ArrayLike = 0.1,
    alpha: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Contrastive preference optimisation: DPO without a reference, and the likelihood of the chosen answer.

    ``-log sigmoid(margin) - alpha policy_chosen / chosen_lengths``, alpha at least 0. ``metrics`` has ``nll`` besides.

    Args:
      policy_chosen, policy_rejected: (B,) log-probabilities summed over tokens.
      chosen_lengths: (B,) or a number: the tokens of each chosen answer. 1 leaves its likelihood a sum, as the paper.
      label_smoothing: in [0, 0.5), as in `jaxkd.preference.cdpo`.

    Source: Xu et al., "Contrastive Preference Optimization" (arXiv 2401.08417).

    >>> pair = jnp.array([-1.0]), jnp.array([-3.0])
    >>> print(f"{cpo(*pair, chosen_lengths=2, beta=0.5)[0]:.4f}")
    0.8133
    """
    pairs = Pairs.without_reference(policy_chosen, policy_rejected, beta, weights, normalizer)
    alpha = pairs.number("alpha", alpha, at_least=0)
    wrong = pairs.wrong_share(label_smoothing)
    nll = negative_log_likelihood(pairs, chosen_lengths)
    return pairs.result(smoothed(pairs.margin, wrong) + alpha * nll, nll=nll)


def simpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    gamma: ArrayLike = 0.5,
    label_smoothing: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Simple preference optimisation: -log sigmoid(margin - gamma).

    Args:
      policy_chosen, policy_rejected: (B,) log-probabilities averaged over tokens.
      beta: 0.1 for the sake of one default; the paper takes 2 to 2.5.
      gamma: the margin that is asked for.
      label_smoothing: in [0, 0.5), as in `jaxkd.preference.cdpo`.

    Source: Meng et al., "SimPO" (arXiv 2405.14734).

    >>> pair = jnp.array([-1.0]), jnp.array([-3.0])
    >>> print(f"{simpo(*pair, beta=0.5, gamma=0.5)[0]:.4f}")
    0.4741
    """
    pairs = Pairs.without_reference(policy_chosen, policy_rejected, beta, weights, normalizer)
    gamma = pairs.number("gamma", gamma)
    wrong = pairs.wrong_share(label_smoothing)
    return pairs.result(smoothed(pairs.margin - gamma, wrong))


def cpo_simpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    gamma: ArrayLike = 0.5,
    alpha: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """SimPO and the likelihood of the chosen answer: -log sigmoid(margin - gamma) - alpha policy_chosen.

    The likelihood keeps SimPO from making both answers unlikely. ``metrics`` has ``nll`` besides.

    Args:
      policy_chosen, policy_rejected: (B,) log-probabilities averaged over tokens.
      gamma, label_smoothing: as in `simpo`.
      alpha: at least 0.

    Source: Meng et al., "SimPO" (arXiv 2405.14734) with the likelihood of CPO (arXiv 2401.08417), as in TRL.

    >>> pair = jnp.array([-1.0]), jnp.array([-3.0])
    >>> print(f"{cpo_simpo(*pair, beta=0.5, gamma=0.5, alpha=0.5)[0]:.4f}")
    0.9741
    """
    pairs = Pairs.without_reference(policy_chosen, policy_rejected, beta, weights, normalizer)
    gamma = pairs.number("gamma", gamma)
    alpha = pairs.number("alpha", alpha, at_least=0)
    wrong = pairs.wrong_share(label_smoothing)
    nll = negative_log_likelihood(pairs, 1)
    return pairs.result(smoothed(pairs.margin - gamma, wrong) + alpha * nll, nll=nll)


def orpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Odds-ratio preference optimisation: the likelihood of the chosen answer, and beta times its odds.

    ``-policy_chosen - beta log sigmoid(log_odds(policy_chosen) - log_odds(policy_rejected))`` with ``log_odds(x) = x -
    log(1 - exp(x))`` of the per-token probability exp(x). A log-probability above minus the type's rounding (-1.2e-7 in
    float32), where the odds are infinite, is taken as that, with gradient 0. ``metrics`` has ``nll`` and
    ``log_odds_ratio`` besides.

    Args:
      policy_chosen, policy_rejected: (B,) log-probabilities averaged over tokens.

    Source: Hong et al., "ORPO" (arXiv 2403.07691).

    >>> pair = jnp.array([-1.0]), jnp.array([-3.0])
    >>> print(f"{orpo(*pair, beta=0.5)[0]:.4f}")
    1.0431
    """
    pairs = Pairs.without_reference(policy_chosen, policy_rejected, beta, weights, normalizer)
    nll = negative_log_likelihood(pairs, 1)
    log_odds_ratio = _log_odds(pairs.policy_chosen) - _log_odds(pairs.policy_rejected)
    return pairs.result(nll - pairs.beta * log_sigmoid(log_odds_ratio), nll=nll, log_odds_ratio=log_odds_ratio)


def _log_odds(log_prob: jax.Array) -> jax.Array:
    certain = -jnp.finfo(log_prob.dtype).eps
    log_prob = jnp.where(log_prob < certain, log_prob, certain)
    return log_prob - log1mexp(-log_prob)
