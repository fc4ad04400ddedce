"""Losses of pairs that need no reference model.

The reward of an answer is ``beta`` times its log-probability, summed in `cpo`, averaged over its tokens in the others
(``jaxkd.sequence_log_probs(..., average=True)``). Arguments that are not described, the result and the errors are those
of `jaxkd.preference.dpo`.

The negative log-likelihood (NLL) that three of them add is that of the chosen tokens of the batch: its sum over all of
them divided by their number, ``sum_i weights_i nll_i / sum_i weights_i chosen_lengths_i`` of each answer's sum over
tokens ``nll_i``, as TRL and Liger Kernel have it. Long answers weigh more in it than short ones.
`jaxkd.preference.irpo` has the mean over answers of each one's mean. Parts of a batch that are given the ``normalizer``
of the whole are given its chosen tokens too, as ``nll_normalizer``: then losses and gradients add up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn import log1mexp, log_sigmoid
from jax.typing import ArrayLike

from jaxkd.preference.counted_answers import Mean, Result, checked_rows, result
from jaxkd.preference.pairs import Pairs, lengths_of, smoothed


def cpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    *,
    chosen_lengths: ArrayLike,
    beta: ArrayLike = 0.1,
    alpha: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    nll_normalizer: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Contrastive preference optimisation: DPO without a reference, and the likelihood of the chosen answer.

    The mean of ``-log sigmoid(margin)``, plus ``alpha`` (at least 0) times ``-sum policy_chosen / sum chosen_lengths``,
    the NLL a token of the batch. ``metrics`` has ``nll`` besides.

    Args:
      policy_chosen, policy_rejected: (B,) log-probabilities summed over tokens.
      chosen_lengths: (B,) or a number: the tokens of each chosen answer. 1 leaves the NLL a mean of sums, as the paper.
      label_smoothing: in [0, 0.5), as in `jaxkd.preference.cdpo`.
      nll_normalizer: what divides the sum of the chosen tokens' NLL; None is their weighted number. With a
        ``normalizer`` and lengths (B,) it must be given: the chosen tokens of the whole batch.

    Source: Xu et al., "Contrastive Preference Optimization" (arXiv 2401.08417).

    >>> pair = jnp.array([-1.0]), jnp.array([-3.0])
    >>> print(f"{cpo(*pair, chosen_lengths=2, beta=0.5)[0]:.4f}")
    0.8133
    """
    pairs = Pairs.without_reference(policy_chosen, policy_rejected, beta, weights, normalizer)
    alpha = pairs.number("alpha", alpha, at_least=0)
    wrong = pairs.wrong_share(label_smoothing)
    nll = pairs.nll_of_tokens(chosen_lengths, nll_normalizer, normalizer, averaged=False)
    return pairs.result(smoothed(pairs.margin, wrong), nll=nll, alpha=alpha)


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
    chosen_lengths: ArrayLike | None = None,
    beta: ArrayLike = 0.1,
    gamma: ArrayLike = 0.5,
    alpha: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    nll_normalizer: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """SimPO and the likelihood of the chosen answer: -log sigmoid(margin - gamma) + alpha NLL.

    The likelihood keeps SimPO from making both answers unlikely. ``metrics`` has ``nll`` besides.

    Args:
      policy_chosen, policy_rejected: (B,) log-probabilities averaged over tokens.
      chosen_lengths: (B,) or a number: the tokens of each chosen answer. With them the NLL is that of TRL and Liger
        Kernel, ``-sum (chosen_lengths policy_chosen) / sum chosen_lengths``; None is the mean of ``-policy_chosen``.
      gamma, label_smoothing: as in `simpo`.
      alpha: at least 0.
      nll_normalizer: as in `cpo`; only with ``chosen_lengths``.

    Source: Meng et al., "SimPO" (arXiv 2405.14734) with the likelihood of CPO (arXiv 2401.08417), as in TRL's
    ``CPOTrainer`` with ``loss_type="simpo"``.

    >>> pair = jnp.array([-1.0]), jnp.array([-3.0])
    >>> print(f"{cpo_simpo(*pair, beta=0.5, gamma=0.5, alpha=0.5)[0]:.4f}")
    0.9741
    """
    pairs = Pairs.without_reference(policy_chosen, policy_rejected, beta, weights, normalizer)
    gamma = pairs.number("gamma", gamma)
    alpha = pairs.number("alpha", alpha, at_least=0)
    wrong = pairs.wrong_share(label_smoothing)
    nll = pairs.nll_of_tokens(chosen_lengths, nll_normalizer, normalizer, averaged=True)
    return pairs.result(smoothed(pairs.margin - gamma, wrong), nll=nll, alpha=alpha)


def orpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    *,
    chosen_lengths: ArrayLike | None = None,
    beta: ArrayLike = 0.1,
    nll_normalizer: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Odds-ratio preference optimisation: the likelihood of the chosen answer, and beta times its odds.

    The NLL, plus the mean of ``-beta log sigmoid(log_odds(policy_chosen) - log_odds(policy_rejected))`` with
    ``log_odds(x) = x - log(1 - exp(x))`` of the per-token probability exp(x). Above minus the type's rounding (-1.2e-7
    in float32), near where the odds are infinite, their tangent is taken: it goes on to push a certain answer.
    ``metrics`` has ``nll`` and ``log_odds_ratio`` besides.

    Args:
      policy_chosen, policy_rejected: (B,) log-probabilities averaged over tokens.
      chosen_lengths, nll_normalizer: as in `cpo_simpo`: with lengths the NLL is that of TRL and Liger Kernel, a mean
        over the chosen tokens of the batch; without, the mean of ``-policy_chosen``.

    Source: Hong et al., "ORPO" (arXiv 2403.07691).

    >>> pair = jnp.array([-1.0]), jnp.array([-3.0])
    >>> print(f"{orpo(*pair, beta=0.5)[0]:.4f}")
    1.0431
    """
    pairs = Pairs.without_reference(policy_chosen, policy_rejected, beta, weights, normalizer)
    nll = pairs.nll_of_tokens(chosen_lengths, nll_normalizer, normalizer, averaged=True)
    log_odds_ratio = _log_odds(pairs.policy_chosen) - _log_odds(pairs.policy_rejected)
    return pairs.result(-pairs.beta * log_sigmoid(log_odds_ratio), nll=nll, log_odds_ratio=log_odds_ratio)


def sft(
    policy_chosen: ArrayLike,
    *,
    chosen_lengths: ArrayLike,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """The likelihood of the chosen answers alone: the NLL of their tokens over the number of these.

    To be added to other losses: ``dpo(...)[0] + bco_pair(...)[0] + sft(...)[0]``, each times its factor, is mixed
    preference optimisation (MPO, arXiv 2411.10442). `jaxkd.cross_entropy` has the same number and forms its gradient in
    the forward pass, where no other loss asks for the log-probabilities.

    Args:
      policy_chosen: (B,) log-probabilities summed over tokens.
      chosen_lengths: (B,) or a number: the tokens of each answer.
      normalizer: what divides the sum; None is the weighted number of tokens.

    ``metrics`` are ``chosen_log_probs``, the mean over answers, weighted, and ``num_sequences``.

    >>> print(f"{sft(jnp.array([-2.0, -3.0]), chosen_lengths=jnp.array([1, 3]))[0]:.4f}")
    1.2500
    """
    (log_probs,), row_weights = checked_rows({"policy_chosen": policy_chosen}, weights, normalizer)
    lengths = lengths_of(chosen_lengths, row_weights)
    mean = Mean.of(row_weights, normalizer, counts=lengths)
    return result(
        mean(jnp.where(lengths == 0, 0, -log_probs)),
        {"chosen_log_probs": Mean.of(row_weights)(log_probs), "num_sequences": jnp.sum(row_weights != 0)},
    )


def _log_odds(log_prob: jax.Array) -> jax.Array:
    certain = -jnp.finfo(log_prob.dtype).eps
    below = jnp.where(log_prob < certain, log_prob, certain)
    beyond = jnp.where(log_prob < certain, 0, log_prob - certain) / -jnp.expm1(certain)
    return below - log1mexp(-below) + beyond
