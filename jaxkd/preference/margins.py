"""DPO and the losses that see a pair only through its margin.

A reward is ``beta (log policy - log reference)`` of a sequence; the ``margin`` is the chosen reward less the rejected
one. Arguments that are not described, the result and the errors are those of `dpo`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid
from jax.typing import ArrayLike

from jaxkd.divergences import Divergence
from jaxkd.preference.counted_answers import Result
from jaxkd.preference.pairs import Pairs, smoothed


def dpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Direct preference optimisation: -log sigmoid(margin).

    ``loss = sum_i weights_i losses_i / normalizer`` over B pairs, in float32 (float64 for float64 inputs).

    Args:
      policy_chosen, policy_rejected: (B,) log-probabilities of the two answers, summed over their tokens, as
        `jaxkd.sequence_log_probs` returns them; gradients reach these.
      reference_chosen, reference_rejected: (B,) the same under the reference, computed now or beforehand; no gradient
        ever reaches them.
      beta: how strongly the policy is held to the reference, above 0. It may be traced, like every number here.
      weights: (B,) non-negative factors, or None for 1. A pair of weight 0 adds exactly nothing, even if it holds NaN.
      normalizer: what divides the sum; None is the sum of the weights, and a batch whose weights are all 0 has loss 0,
        as has one whose normalizer is 0. With the pair count of a global batch, the losses and gradients of its parts
        add up to those of the whole.

    Returns:
      The loss, and metrics, each normalised as the loss is: ``chosen_rewards``, ``rejected_rewards``, ``margin``,
      ``accuracy`` (the share of pairs with a margin above 0), ``chosen_log_probs``, ``rejected_log_probs``; and
      ``num_pairs``, how many count. Metrics are for reading and carry no gradient.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    The labels are taken as they are; `cdpo` and `robust` are the losses for labels of which some are wrong. Source:
    Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290).

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> loss, metrics = dpo(*pair, beta=0.5)
    >>> print(f"{loss:.4f} at a margin of {metrics['margin']:.1f}")
    0.3133 at a margin of 1.0
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    return pairs.result(-log_sigmoid(pairs.margin))


def cdpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Conservative DPO: cross-entropy of sigmoid(margin) with labels of which a share is the wrong way round.

    ``-(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)``, label_smoothing in [0, 0.5);
    its minimum is at a finite margin.

    Source: Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023.

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{cdpo(*pair, beta=0.5, label_smoothing=0.1)[0]:.4f}")
    0.4133
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    wrong = pairs.wrong_share(label_smoothing)
    return pairs.result(smoothed(pairs.margin, wrong))


def robust(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """DPO that is unbiased under labels of which a known share is the wrong way round.

    ``(-(1 - e) log sigmoid(margin) + e log sigmoid(-margin)) / (1 - 2 e)``, e = label_smoothing in [0, 0.5).

    Source: Chowdhury et al., "Provably Robust DPO" (arXiv 2403.00409).

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{robust(*pair, beta=0.5, label_smoothing=0.1)[0]:.4f}")
    0.1883
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    wrong = pairs.wrong_share(label_smoothing)
    clean, flipped = -log_sigmoid(pairs.margin), -log_sigmoid(-pairs.margin)
    return pairs.result(((1 - wrong) * clean - wrong * flipped) / (1 - 2 * wrong))


def hinge(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """SLiC's calibration against a reference: max(0, 1 - margin).

    Source: Zhao et al., "SLiC-HF" (arXiv 2305.10425), its reward as in RSO (arXiv 2309.06657).

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{hinge(*pair, beta=0.25)[0]:.4f}")
    0.5000
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    return pairs.result(relu(1 - pairs.margin))


def ipo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Identity preference optimisation: (margin / beta - 1 / (2 beta))^2.

    Give log-probabilities averaged over tokens (``sequence_log_probs(..., average=True)``), as TRL does on its authors'
    word: of sums, long answers rule the square.

    Source: Azar et al., "A General Theoretical Paradigm" (arXiv 2310.12036), equation 17.

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{ipo(*pair, beta=0.5)[0]:.4f}")
    1.0000
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    log_ratio = pairs.chosen_log_ratio - pairs.rejected_log_ratio
    return pairs.result(jnp.square(log_ratio - 0.5 / pairs.beta))


def exo_pair(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 1e-3,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Exact optimisation over a pair: KL(q‖p), q = (sigmoid(margin), sigmoid(-margin)), p = (1 - e, e).

    ``e`` is ``label_smoothing``, in (0, 0.5). It is `f_po` with `jaxkd.reverse_kl`.

    Source: Ji et al., "Towards Efficient Exact Optimization" (EXO, arXiv 2402.00856), equation 16.

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{exo_pair(*pair, beta=0.5)[0]:.4f}")
    1.2763
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    wrong = pairs.number("label_smoothing", label_smoothing, above=0, below=0.5)
    log_q, log_not_q = log_sigmoid(pairs.margin), log_sigmoid(-pairs.margin)
    chosen = sigmoid(pairs.margin) * (log_q - jnp.log1p(-wrong))
    rejected = sigmoid(-pairs.margin) * (log_not_q - jnp.log(wrong))
    return pairs.result(chosen + rejected)


def discopop(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    tau: ArrayLike = 0.05,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """DiscoPOP: the logistic loss where the margin is negative, the exponential loss where it is positive.

    ``-(1 - g) log sigmoid(margin) + g exp(-margin)`` with the gate ``g = sigmoid(margin / tau)``, tau above 0. The
    product of gate and exponential is formed in logarithms: 0 and not NaN where the margin is far below 0.

    Source: Lu et al., "Discovering Preference Optimization Algorithms" (arXiv 2406.08414), equation 5.

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{discopop(*pair, beta=0.5)[0]:.4f}")
    0.3679
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    gate = pairs.margin / pairs.number("tau", tau, above=0)
    exponential = jnp.exp(log_sigmoid(gate) - pairs.margin)
    return pairs.result(exponential - sigmoid(-gate) * log_sigmoid(pairs.margin))


def irpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    chosen_lengths: ArrayLike,
    beta: ArrayLike = 0.1,
    alpha: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """Iterative reasoning preference optimisation: DPO and the likelihood of the chosen answer.

    ``-log sigmoid(margin) - alpha policy_chosen / chosen_lengths``, alpha at least 0. Each answer's likelihood is taken
    per token, as in the paper, so that long answers weigh no more than short ones (in `jaxkd.preference.cpo` they do).
    ``metrics`` has ``nll`` besides.

    Args:
      chosen_lengths: (B,) or a number: the tokens of each chosen answer, with its prompt's if they are to count.

    Source: Pang et al., "Iterative Reasoning Preference Optimization" (arXiv 2404.19733), equation 1.

    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{irpo(*pair, chosen_lengths=2, beta=0.5, alpha=0.5)[0]:.4f}")
    0.5633
    """
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    alpha = pairs.number("alpha", alpha, at_least=0)
    return pairs.result(-log_sigmoid(pairs.margin), nll=pairs.nll_of_answers(chosen_lengths), alpha=alpha)


def f_po(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    divergence: Divergence,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 1e-3,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Result:
    """f-divergence preference optimisation: a divergence of the policy's preference from the wanted one.

    ``divergence(P, Q)`` with the wanted preference P = (1 - label_smoothing, label_smoothing) in the teacher's place,
    the policy's Q = (sigmoid(margin), sigmoid(-margin)) in the student's, and any divergence, of jaxkd or of your own.
    The paper writes the policy first, so its names of the two KL divergences are the other way round:

    * `jaxkd.forward_kl`, KL(P‖Q), is the paper's reverse KL: `dpo` at ``label_smoothing=0``, else `cdpo` less the
      entropy of P
    * `jaxkd.reverse_kl`, KL(Q‖P), is the paper's forward KL: `exo_pair`
    * ``jaxkd.symmetric_kl(0.5)`` is half of Jeffreys; ``jaxkd.jensen_shannon(0.5)``, ``jaxkd.alpha_divergence(alpha)``
      are what the paper calls so

    Args:
      divergence: a `jaxkd.Divergence`.
      label_smoothing: in [0, 0.5); at 0 a divergence that P = 0 makes infinite, such as `jaxkd.reverse_kl`, is.

    Source: Han et al., "f-PO" (arXiv 2410.21662).

    >>> from jaxkd import jensen_shannon
    >>> pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    >>> print(f"{f_po(*pair, divergence=jensen_shannon(0.5), beta=0.5)[0]:.4f}")
    0.1007
    """
    if not isinstance(divergence, Divergence):
        raise TypeError(f"`divergence` is {divergence!r}; give a jaxkd.Divergence such as jaxkd.jensen_shannon(0.5)")
    pairs = Pairs.of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, weights, normalizer)
    wrong = pairs.wrong_share(label_smoothing)
    log_p = jnp.stack([jnp.log1p(-wrong), jnp.log(wrong)])  # (2,)
    log_q = jnp.stack([log_sigmoid(pairs.margin), log_sigmoid(-pairs.margin)], axis=-1)  # (B, 2)
    return pairs.result(divergence(jnp.broadcast_to(log_p, log_q.shape), log_q))
