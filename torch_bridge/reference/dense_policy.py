"""The policy losses in plain PyTorch, from the log-probabilities of sampled tokens.

Names, arguments and defaults are those of `jaxkd.preference`; every function returns the loss alone. ``added`` are the
arguments that all have: ``kl_estimate``, ``importance_weights``, ``entropies``, ``entropy_weight``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_bridge.reference.dense_means import weighted_mean

Estimate = Callable[[Tensor, Tensor], Tensor]  # of policy - reference, and of the ratio


def k1(x: Tensor, ratio: Tensor) -> Tensor:
    return x


def k2(x: Tensor, ratio: Tensor) -> Tensor:
    return x**2 / 2


def k3(x: Tensor, ratio: Tensor) -> Tensor:
    return (-x).exp() - 1 + x


def bias_corrected(estimate: Estimate) -> Estimate:
    return lambda x, ratio: ratio * estimate(x, ratio)


def _by_token(x: Tensor) -> Tensor:
    return x[:, None] if x.ndim == 1 else x


def _token_losses(
    policy,
    old,
    reference,
    advantages,
    mask,
    surrogate,
    beta,
    ratio_of=torch.exp,
    kl_estimate=k3,
    importance_weights=None,
    entropies=None,
    entropy_weight=0.0,
) -> Tensor:
    """``surrogate(ratio, advantages)`` and all that is added to it, 0 where the mask is: (B, T).

    ``ratio_of`` makes the ratio of the log-ratios (B, T).
    """
    policy = policy.masked_fill(~mask, 0)
    old = policy.detach() if old is None else old.masked_fill(~mask, 0)
    ratio = ratio_of(policy - old.detach())
    losses = surrogate(ratio, _by_token(advantages)).expand_as(policy)
    if importance_weights is not None:
        losses = losses * _by_token(importance_weights)
    if reference is not None:
        losses = losses + beta * kl_estimate(policy - reference.detach().masked_fill(~mask, 0), ratio)
    if entropies is not None:
        losses = losses - entropy_weight * entropies
    return losses.masked_fill(~mask, 0)


def _clipped(epsilon_low, epsilon_high, delta):
    def surrogate(ratio, advantages):
        near = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        return -torch.minimum(ratio.clamp(max=delta) * advantages, near * advantages)

    return surrogate


def _one_ratio(mask, advantages):
    """The geometric mean of an answer's ratios; with advantages by token each ratio has its token's gradient."""

    def ratio_of(log_ratio):
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return mean.exp() if advantages.ndim == 1 else mean.exp().detach() * (log_ratio - log_ratio.detach()).exp()

    return ratio_of


def _lengths(mask):
    return mask.sum(1).clamp(min=1)


def grpo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    beta=0.04,
    epsilon_low=0.2,
    epsilon_high=0.2,
    delta=None,
    weights=None,
    normalizer=None,
    **added,
):
    surrogate = _clipped(epsilon_low, epsilon_high, float("inf") if delta is None else delta)
    losses = _token_losses(policy, old, reference, advantages, mask, surrogate, beta, **added)
    return weighted_mean(losses.sum(1) / _lengths(mask), weights, normalizer)


def dr_grpo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    max_length,
    beta=0.04,
    epsilon_low=0.2,
    epsilon_high=0.2,
    delta=None,
    weights=None,
    normalizer=None,
    **added,
):
    surrogate = _clipped(epsilon_low, epsilon_high, float("inf") if delta is None else delta)
    losses = _token_losses(policy, old, reference, advantages, mask, surrogate, beta, **added)
    return weighted_mean(losses.sum(1) / max_length, weights, normalizer)


def dapo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    beta=0.04,
    epsilon_low=0.2,
    epsilon_high=0.28,
    delta=None,
    weights=None,
    normalizer=None,
    **added,
):
    surrogate = _clipped(epsilon_low, epsilon_high, float("inf") if delta is None else delta)
    losses = _token_losses(policy, old, reference, advantages, mask, surrogate, beta, **added)
    return weighted_mean(losses.sum(1), weights, normalizer, counts=mask.sum(1))


def gspo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    beta=0.04,
    epsilon_low=3e-4,
    epsilon_high=4e-4,
    delta=None,
    weights=None,
    normalizer=None,
    **added,
):
    surrogate = _clipped(epsilon_low, epsilon_high, float("inf") if delta is None else delta)
    ratio_of = _one_ratio(mask, advantages)
    losses = _token_losses(policy, old, reference, advantages, mask, surrogate, beta, ratio_of, **added)
    return weighted_mean(losses.sum(1) / _lengths(mask), weights, normalizer)


def luspo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    beta=0.04,
    epsilon_low=3e-4,
    epsilon_high=4e-4,
    delta=None,
    weights=None,
    normalizer=None,
    **added,
):
    surrogate = _clipped(epsilon_low, epsilon_high, float("inf") if delta is None else delta)
    ratio_of = _one_ratio(mask, advantages)
    losses = _token_losses(policy, old, reference, advantages, mask, surrogate, beta, ratio_of, **added)
    return weighted_mean(losses.sum(1), weights, normalizer)


def cispo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    max_ratio=5.0,
    beta=0.04,
    weights=None,
    normalizer=None,
    **added,
):
    def surrogate(ratio, advantages):
        return -ratio.clamp(max=max_ratio).detach() * advantages * policy.masked_fill(~mask, 0)

    losses = _token_losses(policy, old, reference, advantages, mask, surrogate, beta, **added)
    return weighted_mean(losses.sum(1), weights, normalizer, counts=mask.sum(1))


def sapo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    gain_temperature=1.0,
    loss_temperature=1.05,
    beta=0.04,
    weights=None,
    normalizer=None,
    **added,
):
    def surrogate(ratio, advantages):
        temperatures = torch.where(advantages > 0, gain_temperature, loss_temperature)
        return -4 / (temperatures * (1 + torch.exp(temperatures * (1 - ratio)))) * advantages

    losses = _token_losses(policy, old, reference, advantages, mask, surrogate, beta, **added)
    return weighted_mean(losses.sum(1) / _lengths(mask), weights, normalizer)


def gmpo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    beta=0.04,
    epsilon_low=0.4,
    epsilon_high=0.4,
    weights=None,
    normalizer=None,
    **added,
):
    signs = torch.sign(advantages)[:, None]

    def surrogate(ratio, advantages):
        """As the paper has it: the sign of the advantage within the minimum, of logarithms."""
        log_ratio = ratio.log()
        clipped = torch.minimum(signs * log_ratio, signs * log_ratio.clamp(-epsilon_low, epsilon_high)) * signs
        return -torch.exp(clipped.sum(1, keepdim=True) / _lengths(mask)[:, None]) * advantages

    losses = _token_losses(policy, old, reference, advantages, mask, surrogate, beta, **added)
    return weighted_mean(losses.sum(1) / _lengths(mask), weights, normalizer)


def rloo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    beta=0.05,
    epsilon_low=0.2,
    epsilon_high=0.2,
    delta=None,
    weights=None,
    normalizer=None,
    **added,
):
    surrogate = _clipped(epsilon_low, epsilon_high, float("inf") if delta is None else delta)
    nothing = torch.zeros_like(advantages)
    penalties = _token_losses(policy, old, reference, nothing, mask, torch.mul, beta, **added).sum(1)
    before = policy.detach() if old is None else old.detach()
    ratio = (policy - before).masked_fill(~mask, 0).sum(1).exp()
    losses = surrogate(ratio, advantages) * mask.any(1)
    if added.get("importance_weights") is not None:
        losses = losses * added["importance_weights"]
    return weighted_mean(losses + penalties, weights, normalizer)


def vespo(
    policy,
    old,
    reference,
    advantages,
    mask,
    *,
    gain_power=2.0,
    gain_decay=3.0,
    loss_power=3.0,
    loss_decay=2.0,
    beta=0.04,
    weights=None,
    normalizer=None,
    **added,
):
    def surrogate(ratio, advantages):
        w = ratio.masked_fill(~mask, 1).prod(1, keepdim=True).clamp(1e-8, math.exp(20)).detach()
        gain, loss = (w**k * torch.exp(d - d * w) for k, d in ((gain_power, gain_decay), (loss_power, loss_decay)))
        return -torch.where(advantages >= 0, gain, loss) * advantages * policy.masked_fill(~mask, 0)

    losses = _token_losses(policy, old, reference, advantages, mask, surrogate, beta, **added)
    return weighted_mean(losses.sum(1), weights, normalizer, counts=mask.sum(1))


def sampled_kl(
    policy,
    old,
    reference,
    mask,
    *,
    kl_estimate=bias_corrected(k3),  # noqa: B008
    max_ratio=float("inf"),
    importance_weights=None,
    weights=None,
    normalizer=None,
):
    """The score function by hand: where an estimate is corrected, its value times the gradient of ``policy``."""
    policy, reference = policy.masked_fill(~mask, 0), reference.detach().masked_fill(~mask, 0)
    old = policy.detach() if old is None else old.detach().masked_fill(~mask, 0)
    factor = (policy - old).exp().clamp(max=max_ratio).detach()
    losses = factor * kl_estimate(policy - reference, (policy - policy.detach()).exp())
    if importance_weights is not None:
        losses = losses * _by_token(importance_weights)
    return weighted_mean(losses.masked_fill(~mask, 0).sum(1), weights, normalizer, counts=mask.sum(1))
