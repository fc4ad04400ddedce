"""The embedding losses in plain PyTorch, with all B x B similarities formed: the truth that jaxkd is checked against.

Names and defaults are those of `jaxkd.embedding`; each function returns the loss alone. Rows of weight 0 are taken out
of the batch beforehand, so that a row that does not count is one that is not there.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Distance = Callable[[Tensor, Tensor], Tensor]  # (..., D) and (..., D), broadcast against each other -> (...)


class Guide(NamedTuple):
    """Another model's embeddings of the same texts, and how much nearer than the positive a negative may not be."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor | None = None
    margin: float = 0.0
    relative_margin: float = 0.0


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    symmetric: bool = False,
    directions: Collection[str] = ("query_to_doc",),
    negative_mask: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    guide: Guide | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each anchor's similarities to all candidates with its positive.

    All pairs are arrays (B, B, 1 + K): row, whose document, which of its documents.
    """
    counts = torch.ones(len(anchors), dtype=torch.bool, device=anchors.device) if weights is None else weights != 0
    documents = _documents(positives, negatives)[counts]  # (B, 1 + K, D)
    num_rows, num_documents, _ = documents.shape
    queries = anchors[counts]
    own = torch.eye(num_rows, dtype=torch.bool, device=anchors.device)[:, :, None]
    allowed = torch.ones(num_rows, num_rows, num_documents, dtype=torch.bool, device=anchors.device)
    if negative_mask is not None:
        allowed[:, :, 1:] &= negative_mask.reshape(len(anchors), -1)[counts]
    if candidate_mask is not None:
        blocks = candidate_mask.split([len(anchors), len(anchors) * (num_documents - 1)], dim=1)
        mask = torch.cat([x.reshape(len(anchors), len(anchors), -1) for x in blocks if x.shape[1]], dim=2)
        allowed &= mask[counts][:, counts]
    if document_ids is not None:
        ids = document_ids.reshape(len(anchors), -1)[counts]
        allowed &= ids[None] != ids[:, :1, None]
    everything = {"query": queries[:, None], "doc": documents}

    def logits(direction: str) -> Tensor:
        side, block = direction.split("_to_")
        cosines = _cosines(everything[side][:, 0], everything[block])
        kept = allowed[..., : cosines.shape[2]].clone()
        if guide is not None:
            kept &= _guided(guide, counts, side, block)
        if side == block:
            kept &= ~own
        else:
            kept[..., :1] |= own
        return (_scale(scale, temperature) * cosines).masked_fill(~kept, -torch.inf).flatten(1)

    def row_losses(directions: Collection[str]) -> Tensor:
        together = torch.cat([logits(direction) for direction in directions], dim=1)
        pairs = _scale(scale, temperature) * functional.cosine_similarity(queries, documents[:, 0], dim=-1)
        return torch.logsumexp(together, 1) - pairs

    rows = row_losses(directions)
    if symmetric:
        rows = (rows + row_losses(["doc_to_query"])) / 2
    return _mean(rows, None if weights is None else weights[counts], normalizer)


def _documents(positives: Tensor, negatives: Tensor | None) -> Tensor:
    """(B, 1 + K, D)."""
    if negatives is None:
        return positives[:, None]
    return torch.cat([positives[:, None], negatives.reshape(len(positives), -1, positives.shape[-1])], dim=1)


def _cosines(queries: Tensor, candidates: Tensor) -> Tensor:
    """Of (B, D) and (B, K, D): (B, B, K)."""
    return torch.einsum("id,jkd->ijk", functional.normalize(queries, dim=-1), functional.normalize(candidates, dim=-1))


def _guided(guide: Guide, counts: Tensor, side: str, block: str) -> Tensor:
    documents = _documents(guide.positives, guide.negatives)[counts]
    everything = {"query": guide.anchors[counts][:, None], "doc": documents}
    pairs = functional.cosine_similarity(guide.anchors[counts], documents[:, 0], dim=-1)
    bound = pairs - guide.margin - guide.relative_margin * pairs.abs()
    return _cosines(everything[side][:, 0], everything[block]) <= bound[:, None, None]


def _scale(scale: float | Tensor | None, temperature: float | Tensor | None) -> float | Tensor:
    if temperature is not None:
        return 1 / temperature
    return 20.0 if scale is None else scale


def nt_xent(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean over pairs of one label of the cross-entropy of one with the other among the rows of other labels."""
    weights, (embeddings, labels) = _counted(weights, embeddings, labels)
    scores = _cosines(embeddings, embeddings[:, None])[..., 0] / temperature
    anchors, positives, is_negative = _pairs(labels)
    own = scores[anchors, positives]
    rivals = torch.logsumexp(scores.masked_fill(~is_negative, -torch.inf)[anchors], 1)
    return _mean(torch.logaddexp(rivals, own) - own, None if weights is None else weights[anchors], normalizer)


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The indices of all (i, p) of one label, and (B, B) which rows are of different ones."""
    same = labels[:, None] == labels[None, :]
    anchors, positives = (same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)).nonzero(as_tuple=True)
    return anchors, positives, ~same


def cosent(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """log(1 + sum over labels_i < labels_j of w_i w_j exp(scale (s_i - s_j))), from all B x B differences."""
    similarities = functional.cosine_similarity(first, second, dim=-1)
    return _ranked(_scale(scale, temperature) * similarities, labels, weights)


def angle(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The same of ``|Re z + Im z|``, z the product of vectors whose second half is imaginary."""

    def as_complex(x: Tensor) -> Tensor:
        return torch.complex(*functional.pad(functional.normalize(x, dim=-1), (0, x.shape[-1] % 2)).chunk(2, dim=-1))

    z = (as_complex(first) * as_complex(second).conj()).sum(-1)
    return _ranked(_scale(scale, temperature) * (z.real + z.imag).abs(), labels, weights)


def _ranked(scores: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    differences = scores[:, None] - scores[None, :]
    if weights is not None:
        differences = differences + (weights[:, None] * weights[None, :]).log()
    chosen = differences[labels[:, None] < labels[None, :]]
    return torch.logsumexp(torch.cat([chosen.new_zeros(1), chosen]), 0)


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def cosine_similarity(x: Tensor, y: Tensor) -> Tensor:
    return functional.cosine_similarity(x, y, dim=-1)


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


def batch_semi_hard_triplet(
    embeddings: Tensor,
    labels: Tensor,
    *,
    distance: Distance = euclidean,
    margin: float | None = 5.0,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The triplet loss of each pair of one label with the nearest negative beyond it, or else the farthest."""
    weights, (embeddings, labels) = _counted(weights, embeddings, labels)
    distances = _all_distances(distance, embeddings)
    anchors, positives, is_negative = _pairs(labels)
    has_negative = is_negative.any(1)[anchors]
    anchors, positives = anchors[has_negative], positives[has_negative]
    near, negatives = distances[anchors, positives], is_negative[anchors]
    to_all = distances[anchors]
    beyond = to_all.masked_fill(~(negatives & (to_all > near[:, None])), torch.inf).amin(1)
    farthest = to_all.masked_fill(~negatives, -torch.inf).amax(1)
    far = torch.where(beyond.isfinite(), beyond, farthest)
    return _mean(_beyond(near - far, margin), None if weights is None else weights[anchors], normalizer)


def batch_all_triplet(
    embeddings: Tensor,
    labels: Tensor,
    *,
    distance: Distance = euclidean,
    margin: float = 5.0,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The mean over all triplets with a loss above 0, all of them formed."""
    weights, (embeddings, labels) = _counted(weights, embeddings, labels)
    distances = _all_distances(distance, embeddings)
    anchors, positives, is_negative = _pairs(labels)
    losses = functional.relu(distances[anchors, positives][:, None] - distances[anchors] + margin)  # (pairs, B)
    active = is_negative[anchors] & (losses > 0)
    of_triplets = None if weights is None else weights[anchors][:, None].expand_as(losses)[active]
    return _mean(losses[active], of_triplets, normalizer)


def _all_distances(distance: Distance, embeddings: Tensor) -> Tensor:
    """(B, B), without the gradient of a row's distance to itself, which is none at 0."""
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    others = embeddings[None, :].expand(len(embeddings), -1, -1)
    others = torch.where(itself[..., None], others.detach() + 1, others)
    return distance(embeddings[:, None], others).masked_fill(itself, 0.0)


def margin_mse(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    teacher_scores: Tensor,
    *,
    similarity: Distance = dot,
    negative_mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean square of how far the student's margins between positive and negatives are from the teacher's."""
    counts, scores = _own_scores(anchors, positives, negatives, similarity, negative_mask, weights)
    taught = teacher_scores.reshape(len(anchors), -1)[counts]
    margins = taught[:, :1] - taught[:, 1:] if taught.shape == scores.shape else taught
    is_there = ~scores[:, 1:].isinf()
    error = torch.where(is_there, scores[:, :1] - scores[:, 1:] - margins, 0)
    rows = error.square().sum(1) / is_there.sum(1)
    return _mean(rows, None if weights is None else weights[counts], normalizer)


def score_distillation(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    teacher_scores: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    similarity: Distance = dot,
    negative_mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """KL of the softmax of the student's scores from that of the teacher's, over each row's own documents."""
    counts, scores = _own_scores(anchors, positives, negatives, similarity, negative_mask, weights)
    is_there = ~scores.isinf()
    taught = teacher_scores[counts].masked_fill(~is_there, -torch.inf)
    log_p, log_q = (torch.log_softmax(x / temperature, 1).masked_fill(~is_there, 0) for x in (taught, scores))
    rows = (torch.where(is_there, log_p.exp(), 0) * (log_p - log_q)).sum(1)
    return _mean(rows, None if weights is None else weights[counts], normalizer)


def _own_scores(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    similarity: Distance,
    negative_mask: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rows that count, and their scores (N, 1 + K), -inf where there is no such negative."""
    documents = _documents(positives, negatives)
    is_there = torch.ones(documents.shape[:2], dtype=torch.bool, device=anchors.device)
    if negative_mask is not None:
        is_there[:, 1:] = negative_mask.reshape(len(anchors), -1)
    counts = is_there[:, 1:].any(1) if weights is None else is_there[:, 1:].any(1) & (weights != 0)
    is_there = is_there[counts]
    scores = similarity(anchors[counts][:, None], documents[counts].masked_fill(~is_there[..., None], 0))
    return counts, scores.masked_fill(~is_there, -torch.inf)


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
