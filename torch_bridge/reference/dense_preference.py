"""The preference losses in plain PyTorch, from log-probabilities, each written out as its paper has it.

Names, arguments and defaults are those of `jaxkd.preference`; every function returns the loss alone. The policy losses
are in `dense_policy`, and are had from here too.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from torch_bridge.reference.dense_means import Number, Weights, weighted_mean
from torch_bridge.reference.dense_policy import (  # noqa: F401
    bias_corrected,
    cispo,
    dapo,
    dr_grpo,
    gmpo,
    grpo,
    gspo,
    k1,
    k2,
    k3,
    luspo,
    rloo,
    sampled_kl,
    sapo,
    vespo,
)


def _pair_loss(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of (B,) log-probabilities from a formula of the log-ratios ``a`` (chosen) and ``b`` (rejected)."""

    def loss(
        policy_chosen: Tensor,
        policy_rejected: Tensor,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
        *,
        beta: Number = 0.1,
        weights: Weights = None,
        normalizer: Number | None = None,
        **parameters,
    ) -> Tensor:
        a, b = policy_chosen - reference_chosen.detach(), policy_rejected - reference_rejected.detach()
        if "chosen_lengths" in parameters:
            parameters["chosen_per_token"] = policy_chosen / parameters.pop("chosen_lengths")
        return weighted_mean(formula(a, b, beta, **parameters), weights, normalizer)

    return loss


@_pair_loss
def dpo(a, b, beta):
    return softplus(beta * b - beta * a)


@_pair_loss
def cdpo(a, b, beta, label_smoothing=0.1):
    h = beta * (a - b)
    return (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)


@_pair_loss
def robust(a, b, beta, label_smoothing=0.1):
    h = beta * (a - b)
    return (label_smoothing * logsigmoid(-h) - (1 - label_smoothing) * logsigmoid(h)) / (1 - 2 * label_smoothing)


@_pair_loss
def hinge(a, b, beta):
    return torch.relu(1 - beta * (a - b))


@_pair_loss
def ipo(a, b, beta):
    return (a - b - 1 / (2 * beta)) ** 2


@_pair_loss
def exo_pair(a, b, beta, label_smoothing=1e-3):
    policy = torch.stack([beta * a, beta * b], -1).log_softmax(-1)
    wanted = policy.new_tensor([1 - label_smoothing, label_smoothing])
    return (policy.exp() * (policy - wanted.log())).sum(-1)


@_pair_loss
def discopop(a, b, beta, tau=0.05):
    h = beta * (a - b)
    gate = torch.sigmoid(h / tau)
    return (1 - gate) * softplus(-h) + gate * torch.exp(-h)


@_pair_loss
def irpo(a, b, beta, chosen_per_token, alpha=1.0):
    return softplus(beta * (b - a)) - alpha * chosen_per_token


@_pair_loss
def f_po(a, b, beta, divergence, label_smoothing=1e-3):
    """``divergence`` is one of `torch_bridge.reference`, of (log_p, log_q)."""
    policy = torch.stack([beta * a, beta * b], -1).log_softmax(-1)
    wanted = policy.new_tensor([1 - label_smoothing, label_smoothing]).log().expand_as(policy)
    return divergence(wanted, policy)


@_pair_loss
def nca_pair(a, b, beta):
    return softplus(-beta * a) + 0.5 * softplus(beta * a) + 0.5 * softplus(beta * b)


@_pair_loss
def bco_pair(a, b, beta):
    return softplus(-beta * a) + softplus(beta * b)


@_pair_loss
def sppo_hard(a, b, beta):
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2


@_pair_loss
def apo_zero(a, b, beta):
    return 1 - torch.sigmoid(beta * a) + torch.sigmoid(beta * b)


@_pair_loss
def apo_down(a, b, beta):
    return torch.sigmoid(beta * a) + 1 - torch.sigmoid(beta * (a - b))


@_pair_loss
def f_dpo(a, b, beta, score):
    """``score`` is one of those below, of t = policy / reference: f' of the divergence."""
    return softplus(beta * score(b.exp()) - beta * score(a.exp()))


def forward_kl_score(t):
    return -1 / t


def jensen_shannon_score(t):
    return torch.log(2 * t / (1 + t))


def alpha_score(alpha):
    return lambda t: (t ** (alpha - 1) - 1) / (alpha - 1)


def _sorted_loss(is_paired: bool) -> Callable[..., Tensor]:
    def loss(
        policy_chosen: Tensor,
        policy_rejected: Tensor,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
        *,
        beta: Number = 0.1,
        label_smoothing: Number = 0.0,
        weights: Weights = None,
        normalizer: Number | None = None,
    ) -> Tensor:
        """Weights are whole numbers: every pair stands there so many times."""
        pairs = [policy_chosen, policy_rejected, reference_chosen.detach(), reference_rejected.detach()]
        if weights is not None:
            pairs = [x.repeat_interleave(weights.long()) for x in pairs]
        chosen, rejected, chosen_anchor, rejected_anchor = pairs
        above, below = (
            (chosen - rejected, chosen_anchor - rejected_anchor)
            if is_paired
            else (chosen - chosen_anchor, rejected - rejected_anchor)
        )
        h = beta * (above.sort().values - below.sort().values)
        losses = (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)
        return losses.sum() / (len(losses) if normalizer is None else normalizer)

    return loss


aot = _sorted_loss(is_paired=True)
aot_unpaired = _sorted_loss(is_paired=False)


def _nll_of_tokens(log_probs, lengths, nll_normalizer, weights, normalizer):
    """Of log-probabilities averaged over tokens: the sum over all tokens by their number; without lengths the mean."""
    if lengths is None:
        return weighted_mean(-log_probs, weights, normalizer)
    return weighted_mean(-log_probs * lengths, weights, nll_normalizer, counts=lengths)


def cpo(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths,
    beta=0.1,
    alpha=1.0,
    label_smoothing=0.0,
    nll_normalizer=None,
    weights=None,
    normalizer=None,
):
    h = beta * (policy_chosen - policy_rejected)
    preference = (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)
    nll = _nll_of_tokens(policy_chosen / chosen_lengths, chosen_lengths, nll_normalizer, weights, normalizer)
    return weighted_mean(preference, weights, normalizer) + alpha * nll


def simpo(policy_chosen, policy_rejected, *, beta=0.1, gamma=0.5, label_smoothing=0.0, weights=None, normalizer=None):
    return cpo_simpo(
        policy_chosen,
        policy_rejected,
        beta=beta,
        gamma=gamma,
        alpha=0.0,
        label_smoothing=label_smoothing,
        weights=weights,
        normalizer=normalizer,
    )


def cpo_simpo(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths=None,
    beta=0.1,
    gamma=0.5,
    alpha=1.0,
    label_smoothing=0.0,
    nll_normalizer=None,
    weights=None,
    normalizer=None,
):
    h = beta * (policy_chosen - policy_rejected) - gamma
    preference = (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)
    nll = _nll_of_tokens(policy_chosen, chosen_lengths, nll_normalizer, weights, normalizer)
    return weighted_mean(preference, weights, normalizer) + alpha * nll


def orpo(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths=None,
    beta=0.1,
    nll_normalizer=None,
    weights=None,
    normalizer=None,
):
    odds = [log_prob.exp() / -torch.expm1(log_prob) for log_prob in (policy_chosen, policy_rejected)]
    nll = _nll_of_tokens(policy_chosen, chosen_lengths, nll_normalizer, weights, normalizer)
    return nll + weighted_mean(-beta * torch.log(odds[0] / (odds[0] + odds[1])), weights, normalizer)


def sft(policy_chosen, *, chosen_lengths, weights=None, normalizer=None):
    return weighted_mean(-policy_chosen, weights, normalizer, counts=chosen_lengths)


def kto(
    policy,
    reference,
    is_desirable,
    *,
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    kl_log_ratios=None,
    weights=None,
    normalizer=None,
):
    log_ratio = policy - reference.detach()
    kl = weighted_mean(log_ratio, weights, None) if kl_log_ratios is None else torch.as_tensor(kl_log_ratios).mean()
    gain = beta * (log_ratio - kl.detach().clamp(min=0))
    desirable = desirable_weight * (1 - torch.sigmoid(gain))
    return weighted_mean(
        torch.where(is_desirable, desirable, undesirable_weight * (1 - torch.sigmoid(-gain))), weights, normalizer
    )


def bco(policy, reference, is_desirable, *, beta=0.1, delta=None, weights=None, normalizer=None):
    reward = beta * (policy - reference.detach())
    if delta is None:
        kinds = [is_desirable, ~is_desirable]
        kinds = [kind for kind in kinds if weights is None or (weights[kind] != 0).any()]
        delta = torch.stack(
            [
                weighted_mean(reward[kind], None if weights is None else weights[kind], None)
                for kind in kinds
                if kind.any()
            ]
        )
        delta = delta.mean().detach()
    return weighted_mean(
        torch.where(is_desirable, softplus(delta - reward), softplus(reward - delta)), weights, normalizer
    )
