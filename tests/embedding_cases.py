"""The embedding losses in dense NumPy, with loops and float64, and cases of each."""

import math
from functools import cache, cached_property, partial

import cases
import jax
import numpy as np
from quick_programs import QUICK

from jaxkd import embedding

B, D, K = 19, 5, 2
LABELS = np.random.default_rng(1).integers(4, size=B)
GRADES = np.random.default_rng(2).integers(5, size=B) / 4
WEIGHTS = np.random.default_rng(3).integers(3, size=B).astype(np.float64)


def batch(seed=0, dtype=np.float64):
    """Anchors, positives and K hard negatives each, with a direction in common and lengths that vary."""
    rng = np.random.default_rng(seed)
    anchors = (rng.normal(size=(B, D)) + rng.normal(size=D)) * rng.uniform(0.5, 2, size=(B, 1))
    positives = anchors + rng.normal(size=(B, D))
    negatives = anchors[:, None] + 1.5 * rng.normal(size=(B, K, D))
    return anchors.astype(dtype), positives.astype(dtype), negatives.astype(dtype)


# The truth: loops and dense arrays, rows of weight 0 taken out first.


def present(weights, *rows):
    if weights is None:
        return np.ones(len(rows[0])), rows
    return weights[weights != 0], [None if x is None else x[weights != 0] for x in rows]


def mean(rows, weights, normalizer):
    return np.sum(weights * rows) / (np.sum(weights) if normalizer is None else normalizer)


def cosines(x, y):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)) @ (y / np.linalg.norm(y, axis=-1, keepdims=True)).T


def info_nce(
    anchors,
    positives,
    negatives=None,
    *,
    scale=20.0,
    temperature=None,
    symmetric=False,
    directions=("query_to_doc",),
    weights=None,
    normalizer=None,
    **which,
):
    """With (B, B, 1 + K) arrays: row, whose document, which of them; an anchor is where its positive is."""
    scale = scale if temperature is None else 1 / temperature
    documents = positives[:, None] if negatives is None else np.concatenate([positives[:, None], negatives], axis=1)
    counts = np.ones(len(anchors), bool) if weights is None else weights != 0
    kept = {x: kept_pairs(x, documents.shape[1], **which)[counts][:, counts] for x in (*directions, "doc_to_query")}
    texts = {"query": anchors[counts][:, None], "doc": documents[counts]}
    own_cosines = np.diag(cosines(texts["query"][:, 0], texts["doc"][:, 0]))

    def losses(directions):
        sums = 0
        for direction in directions:
            side, block = (texts[x] for x in direction.split("_to_"))
            similarities = cosines(side[:, 0], block.reshape(-1, block.shape[2])).reshape(-1, *block.shape[:2])
            sums = sums + np.sum(np.exp(scale * similarities) * kept[direction], axis=(1, 2))
        return np.log(sums) - scale * own_cosines

    rows = (losses(directions) + losses(["doc_to_query"])) / 2 if symmetric else losses(directions)
    return mean(rows, np.ones(len(rows)) if weights is None else weights[counts], normalizer)


def kept_pairs(direction, num_documents, negative_mask=None, candidate_mask=None, document_ids=None, guide=None):
    side, block = direction.split("_to_")
    kept = np.ones((B, B, num_documents), bool)
    if negative_mask is not None:
        kept[:, :, 1:] &= negative_mask
    if candidate_mask is not None:
        kept[:, :, 0] &= candidate_mask[:, :B]
        kept[:, :, 1:] &= candidate_mask[:, B:].reshape(B, B, -1)
    if document_ids is not None:
        ids = document_ids.reshape(B, -1)
        kept &= ids[None] != ids[:, :1, None]
    kept = kept[:, :, :1] if block == "query" else kept
    if guide is not None:
        texts = {"query": guide.anchors[:, None], "doc": np.asarray(guide.positives)[:, None]}
        if guide.negatives is not None:
            texts["doc"] = np.concatenate([texts["doc"], guide.negatives], axis=1)
        of_pairs = np.diag(cosines(texts["query"][:, 0], texts["doc"][:, 0]))
        for k in range(kept.shape[2]):
            found = cosines(texts[side][:, 0], texts[block][:, k])
            kept[:, :, k] &= found <= (of_pairs - guide.margin - guide.relative_margin * abs(of_pairs))[:, None]
    for i in range(B):
        if side == block:
            kept[i, i] = False
        else:
            kept[i, i, 0] = True
    return kept


def nt_xent(embeddings, labels, *, temperature=0.07, weights=None, normalizer=None):
    weights, (embeddings, labels) = present(weights, embeddings, labels)
    scores = cosines(embeddings, embeddings) / temperature
    rows, kept = [], []
    for i, p in pairs(labels):
        rows.append(np.log1p(np.sum(np.exp(scores[i] - scores[i, p])[labels != labels[i]])))
        kept.append(weights[i])
    return mean(np.array(rows), np.array(kept), normalizer)


def pairs(labels):
    return [(i, p) for i in range(len(labels)) for p in range(len(labels)) if i != p and labels[i] == labels[p]]


def cosent(first, second, labels, **options):
    return in_order(np.diag(cosines(first, second)), labels, **options)


def angle(first, second, labels, **options):
    def as_complex(x):
        x = np.pad(x / np.linalg.norm(x, axis=1, keepdims=True), [(0, 0), (0, x.shape[1] % 2)])
        return x[:, : x.shape[1] // 2] + 1j * x[:, x.shape[1] // 2 :]

    z = np.sum(as_complex(first) * as_complex(second).conj(), axis=1)
    return in_order(abs(z.real + z.imag), labels, **options)


def in_order(similarities, labels, *, scale=20.0, weights=None):
    weights, (similarities, labels) = present(weights, similarities, labels)
    scores = scale * similarities
    terms = [
        weights[i] * weights[j] * math.exp(scores[i] - scores[j])
        for i in range(len(scores))
        for j in range(len(scores))
        if labels[i] < labels[j]
    ]
    return math.log(1 + sum(terms))


def euclidean(x, y):
    return np.linalg.norm(x - y, axis=-1)


def cosine(x, y):
    return 1 - np.sum(x * y, -1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def beyond(gap, margin):
    return np.log1p(np.exp(gap)) if margin is None else np.maximum(gap + margin, 0)


def triplet(anchors, positives, negatives, *, distance=euclidean, margin=5.0, weights=None, normalizer=None):
    weights, (anchors, positives, negatives) = present(weights, anchors, positives, negatives)
    return mean(beyond(distance(anchors, positives) - distance(anchors, negatives), margin), weights, normalizer)


def batch_hard_triplet(embeddings, labels, *, distance=euclidean, margin=5.0, weights=None, normalizer=None):
    weights, (embeddings, labels) = present(weights, embeddings, labels)
    distances = distance(embeddings[:, None], embeddings[None, :])
    rows, kept = [], []
    for i, row in enumerate(distances):
        same = labels == labels[i]
        others = same & (np.arange(len(labels)) != i)
        if others.any() and not same.all():
            rows.append(beyond(row[others].max() - row[~same].min(), margin))
            kept.append(weights[i])
    return mean(np.array(rows), np.array(kept), normalizer)


def batch_semi_hard_triplet(embeddings, labels, *, distance=euclidean, margin=5.0, weights=None, normalizer=None):
    weights, (embeddings, labels) = present(weights, embeddings, labels)
    distances = distance(embeddings[:, None], embeddings[None, :])
    rows, kept = [], []
    for i, p in pairs(labels):
        negatives = distances[i][labels != labels[i]]
        if negatives.size:
            farther = negatives[negatives > distances[i, p]]
            rows.append(beyond(distances[i, p] - (farther.min() if farther.size else negatives.max()), margin))
            kept.append(weights[i])
    return mean(np.array(rows), np.array(kept), normalizer)


def batch_all_triplet(embeddings, labels, *, distance=euclidean, margin=5.0, weights=None, normalizer=None):
    weights, (embeddings, labels) = present(weights, embeddings, labels)
    distances = distance(embeddings[:, None], embeddings[None, :])
    rows, kept = [], []
    for i, p in pairs(labels):
        losses = beyond(distances[i, p] - distances[i][labels != labels[i]], margin)
        rows += losses[losses > 0].tolist()
        kept += [weights[i]] * np.count_nonzero(losses)
    return mean(np.array(rows), np.array(kept), normalizer)


def dot(x, y):
    return np.sum(x * y, axis=-1)


def margin_mse(anchors, positives, negatives, teacher, *, weights=None, normalizer=None, **options):
    def loss(scores, taught):
        taught = taught[0] - taught[1:] if len(taught) == len(scores) else taught
        return np.mean((scores[0] - scores[1:] - taught) ** 2)

    return of_own_documents(loss, anchors, positives, negatives, teacher, weights, normalizer, **options)


def score_distillation(
    anchors, positives, negatives, teacher, *, temperature=1.0, weights=None, normalizer=None, **options
):
    def loss(scores, taught):
        log_q, log_p = (x / temperature - np.log(np.sum(np.exp(x / temperature))) for x in (scores, taught))
        return np.sum(np.exp(log_p) * (log_p - log_q))

    return of_own_documents(loss, anchors, positives, negatives, teacher, weights, normalizer, **options)


def of_own_documents(
    loss, anchors, positives, negatives, teacher, weights, normalizer, similarity=dot, negative_mask=None
):
    """Documents and scores that are not there are taken out of a row, and a row without negatives out of the batch."""
    rows, kept = [], []
    for i in range(len(anchors)):
        there = np.arange(negatives.shape[1]) if negative_mask is None else np.flatnonzero(negative_mask[i])
        if there.size and (weights is None or weights[i]):
            scores = similarity(anchors[i], np.concatenate([positives[i : i + 1], negatives[i, there]]))
            has_positive = teacher.shape[1] > negatives.shape[1]
            rows.append(loss(scores, teacher[i, np.concatenate([[0], there + 1]) if has_positive else there]))
            kept.append(1.0 if weights is None else weights[i])
    return mean(np.array(rows), np.array(kept), normalizer)


TRUTH = {
    f.__name__: f
    for f in (
        info_nce,
        nt_xent,
        cosent,
        angle,
        triplet,
        batch_hard_triplet,
        batch_semi_hard_triplet,
        batch_all_triplet,
        margin_mse,
        score_distillation,
    )
}


class Case:
    """A loss, how many of the batch's arrays it takes, its labels and options; cut to ``dims`` if they are given."""

    def __init__(self, loss, arrays, labels=None, dims=None, **options):
        self.name, self.arrays, self.dims, self.options = loss, arrays, dims, options
        self.labels = () if labels is None else (labels,)

    def inputs(self, dtype=np.float64):
        arrays = batch(dtype=dtype)[: self.arrays]
        return (*arrays[:2], arrays[2][:, 0]) if self.name == "triplet" else arrays

    def loss(self, inputs, labels=None, **options):
        options = self.options | options
        function = getattr(embedding, self.name)
        function = function if self.dims is None else embedding.matryoshka(function, self.dims)
        return function(*inputs, *(self.labels if labels is None else labels), **options)

    @cached_property
    def value_and_grad(self):
        """Of the inputs and weights; compiled once for many tests."""
        return jax.jit(
            jax.value_and_grad(lambda inputs, weights=None: self.loss(inputs, weights=weights), has_aux=True),
            compiler_options=QUICK,
        )

    def truth(self, inputs, **options):
        options = {k: v for k, v in (self.options | options).items() if k != "chunk_size"}
        if "distance" in options:
            options["distance"] = {embedding.cosine: cosine, embedding.euclidean: euclidean}[options["distance"]]
        if "similarity" in options:
            options["similarity"] = lambda x, y: 1 - cosine(x, y)
        if self.dims is None:
            return TRUTH[self.name](*inputs, *self.labels, **options)
        cut = [[x[..., :dim] for x in inputs] for dim in self.dims]
        cut = [[x / np.linalg.norm(x, axis=-1, keepdims=True) for x in arrays] for arrays in cut]
        return sum(TRUTH[self.name](*arrays, *self.labels, **options) for arrays in cut)


EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RNG = np.random.default_rng(4)
THERE = RNG.random((B, K)) > 0.4
PAIR_MASK = RNG.random((B, B * (1 + K))) > 0.3
IDS = RNG.integers(12, size=(B, 1 + K))
GUIDE = embedding.Guide(*(RNG.normal(size=shape) + 0.7 for shape in ((B, 4), (B, 4), (B, K, 4))), margin=0.1)
SCORES = RNG.normal(size=(B, 1 + K))

CASES = {
    "info_nce": Case("info_nce", 2, chunk_size=5),
    "info_nce, hard negatives": Case("info_nce", 3, scale=7.0, chunk_size=6),
    "info_nce, symmetric": Case("info_nce", 3, symmetric=True, scale=3.0, chunk_size=4),
    "info_nce, temperature": Case("info_nce", 2, temperature=0.4, chunk_size=9),
    "info_nce, anchors": Case("info_nce", 2, scale=4.0, directions=EVERY[:2], chunk_size=5),
    "info_nce, all directions": Case("info_nce", 3, scale=4.0, directions=EVERY, chunk_size=6),
    "info_nce, ragged negatives": Case("info_nce", 3, scale=4.0, negative_mask=THERE, chunk_size=5),
    "info_nce, mask": Case("info_nce", 3, scale=4.0, candidate_mask=PAIR_MASK, directions=EVERY[::3], chunk_size=5),
    "info_nce, duplicates": Case("info_nce", 2, scale=4.0, symmetric=True, document_ids=IDS[:, 0], chunk_size=7),
    "info_nce, guide": Case(
        "info_nce", 3, temperature=0.2, directions=EVERY[:2] + EVERY[3:], guide=GUIDE, document_ids=IDS, chunk_size=7
    ),
    "nt_xent": Case("nt_xent", 1, LABELS, chunk_size=5),
    "nt_xent, temperature": Case("nt_xent", 1, LABELS, temperature=0.7),
    "angle": Case("angle", 2, GRADES),
    "angle, scale": Case("angle", 2, LABELS, scale=1.5),
    "cosent": Case("cosent", 2, GRADES),
    "cosent, scale": Case("cosent", 2, LABELS, scale=1.5),
    "triplet": Case("triplet", 3),
    "triplet, cosine": Case("triplet", 3, distance=embedding.cosine, margin=0.1),
    "triplet, soft margin": Case("triplet", 3, margin=None),
    "batch_hard_triplet": Case("batch_hard_triplet", 1, LABELS, chunk_size=5),
    "batch_hard_triplet, cosine": Case("batch_hard_triplet", 1, LABELS, distance=embedding.cosine, margin=0.05),
    "batch_hard_triplet, soft margin": Case("batch_hard_triplet", 1, LABELS, margin=None, chunk_size=B),
    "batch_semi_hard_triplet": Case("batch_semi_hard_triplet", 1, LABELS, chunk_size=5),
    "batch_semi_hard_triplet, cosine": Case(
        "batch_semi_hard_triplet", 1, LABELS, distance=embedding.cosine, margin=None, chunk_size=B
    ),
    "batch_all_triplet": Case("batch_all_triplet", 1, LABELS, chunk_size=5),
    "batch_all_triplet, cosine": Case("batch_all_triplet", 1, LABELS, distance=embedding.cosine, margin=0.2),
    "margin_mse": Case("margin_mse", 3, SCORES),
    "margin_mse, ragged negatives": Case(
        "margin_mse", 3, SCORES[:, 1:], similarity=embedding.cosine_similarity, negative_mask=THERE
    ),
    "score_distillation": Case("score_distillation", 3, SCORES, temperature=3.0),
    "score_distillation, ragged negatives": Case(
        "score_distillation", 3, SCORES, similarity=embedding.cosine_similarity, negative_mask=THERE
    ),
}
ONE_OF_EACH = [name for name in CASES if "," not in name]
MATRYOSHKA = {
    "matryoshka of info_nce": Case("info_nce", 3, dims=(D, 3), chunk_size=5),
    "matryoshka of cosent": Case("cosent", 2, GRADES, dims=(D, 3)),
    "matryoshka of nt_xent": Case("nt_xent", 1, LABELS, dims=(D, 3), chunk_size=5),
    "matryoshka of triplet": Case("triplet", 3, dims=(D, 3), margin=0.3),
    "matryoshka of batch_hard_triplet": Case("batch_hard_triplet", 1, LABELS, dims=(D, 3), margin=0.3, chunk_size=5),
}


def difference_quotients(function, inputs, step=1e-5):
    """Central differences in float64, entry by entry."""
    inputs = [x.copy() for x in inputs]  # JAX may still be reading the caller's: it copies no array on a CPU
    gradients = [np.zeros_like(x) for x in inputs]
    for x, gradient in zip(inputs, gradients, strict=True):
        for index in np.ndindex(x.shape):
            value = x[index]
            x[index] = value + step
            above = function(inputs)
            x[index] = value - step
            gradient[index] = (above - function(inputs)) / (2 * step)
            x[index] = value
    return gradients


@cache
def exact_gradients(name, is_weighted, dtype=np.float64):
    """Of the truth, at the case's inputs rounded to ``dtype``."""
    inputs = tuple(x.astype(np.float64) for x in (CASES | MATRYOSHKA)[name].inputs(dtype))
    return difference_quotients(
        partial((CASES | MATRYOSHKA)[name].truth, weights=WEIGHTS if is_weighted else None), inputs
    )


def check(result, loss, gradients, tolerance, loss_tolerance):
    assert abs(float(result[0][0]) - loss) <= loss_tolerance * abs(loss)
    for got, want in zip(result[1], gradients, strict=True):
        assert cases.relative_error(got, want) < tolerance
