"""The mean over answers that every preference loss ends in."""

import torch
from torch import Tensor

Weights = Tensor | None
Number = Tensor | float


def weighted_mean(losses: Tensor, weights: Weights, normalizer: Number | None, counts: Tensor | None = None) -> Tensor:
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    kept = weights != 0
    total = (weights if counts is None else weights * counts).sum() if normalizer is None else normalizer
    return (weights[kept] * losses[kept]).sum() / total if kept.any() else losses[kept].sum()
