"""The embedding losses in plain PyTorch, with all B x B similarities formed: the truth that jaxkd is checked against.

Names and defaults are those of `jaxkd.embedding`; each function returns the loss alone. Rows of weight 0 are taken out
of the batch beforehand, so that a row that does not count is one that is not there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Distance = Callable[[Tensor, Tensor], Tensor]  # (..., D) and (..., D), broadcast against each other -> (...)


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    scale: float | Tensor = 20.0,
    symmetric: bool = False,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each anchor's similarities to all candidates with its positive."""
    if negatives is not None:
        _, (negatives,) = _counted(weights, negatives)
    weights, (anchors, positives) = _counted(weights, anchors, positives)
    candidates = positives if negatives is None else torch.cat([positives, negatives.reshape(-1, positives.shape[-1])])
    labels = torch.arange(len(anchors), device=anchors.device)

    def direction(queries: Tensor, among: Tensor) -> Tensor:
        similarities = functional.normalize(queries, dim=-1) @ functional.normalize(among, dim=-1).T
        return _mean(functional.cross_entropy(scale * similarities, labels, reduction="none"), weights, normalizer)

    if not symmetric:
        return direction(anchors, candidates)
    return (direction(anchors, candidates) + direction(positives, anchors)) / 2


def cosent(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 20.0,
    weights: Tensor | None = None,
) -> Tensor:
    """log(1 + sum over labels_i < labels_j of w_i w_j exp(scale (s_i - s_j))), from all B x B differences."""
    scores = scale * functional.cosine_similarity(first, second, dim=-1)
    differences = scores[:, None] - scores[None, :]
    if weights is not None:
        differences = differences + (weights[:, None] * weights[None, :]).log()
    chosen = differences[labels[:, None] < labels[None, :]]
    return torch.logsumexp(torch.cat([chosen.new_zeros(1), chosen]), 0)


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x - y, dim=-1)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(x, y, dim=-1)


def triplet(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    distance: Distance = euclidean,
    margin: float | None = 5.0,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean of max(d(a, p) - d(a, n) + margin, 0), or of softplus(d(a, p) - d(a, n)) without a margin."""
    weights, (anchors, positives, negatives) = _counted(weights, anchors, positives, negatives)
    gap = distance(anchors, positives) - distance(anchors, negatives)
    return _mean(_beyond(gap, margin), weights, normalizer)


def batch_hard_triplet(
    embeddings: Tensor,
    labels: Tensor,
    *,
    distance: Distance = euclidean,
    margin: float | None = 5.0,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The triplet loss with the farthest row of the same label and the nearest of another, by the B x B distances."""
    weights, (embeddings, labels) = _counted(weights, embeddings, labels)
    distances = distance(embeddings[:, None], embeddings[None, :])
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    counts = positive.any(1) & ~same.all(1)
    farthest = distances.masked_fill(~positive, -torch.inf)[counts].amax(1)
    nearest = distances.masked_fill(same, torch.inf)[counts].amin(1)
    return _mean(_beyond(farthest - nearest, margin), None if weights is None else weights[counts], normalizer)


def matryoshka(
    loss: Callable[..., Tensor], dims: Sequence[int], weights: Sequence[float] | None = None
) -> Callable[..., Tensor]:
    """The weighted sum of a loss over embeddings cut to each of ``dims`` and brought to length 1."""

    def cut(x: Any, dim: int) -> Any:
        is_embedding = isinstance(x, Tensor) and x.ndim > 1
        return functional.normalize(x[..., :dim], dim=-1) if is_embedding else x

    def total(*arguments: Any, **options: Any) -> Tensor:
        factors = [1.0] * len(dims) if weights is None else weights
        values = [
            factor * loss(*(cut(x, dim) for x in arguments), **{name: cut(x, dim) for name, x in options.items()})
            for dim, factor in zip(dims, factors, strict=True)
        ]
        return torch.stack(values).sum()

    return total


def _counted(weights: Tensor | None, *rows: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    if weights is None:
        return None, list(rows)
    return weights[weights != 0], [x[weights != 0] for x in rows]


def _beyond(gap: Tensor, margin: float | None) -> Tensor:
    return functional.softplus(gap) if margin is None else functional.relu(gap + margin)


def _mean(losses: Tensor, weights: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    total = weights.sum() if normalizer is None else normalizer
    return (weights * losses).sum() / total if len(losses) else losses.sum()
