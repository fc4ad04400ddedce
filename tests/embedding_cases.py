"""The embedding losses in dense NumPy, with loops and float64, and cases of each."""

import math
from functools import cache, cached_property, partial

import cases
import jax
import numpy as np
from quick_programs import QUICK

from jaxkd import embedding

B, D, K = 23, 7, 2
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


def info_nce(anchors, positives, negatives=None, *, scale=20.0, symmetric=False, weights=None, normalizer=None):
    weights, (anchors, positives, negatives) = present(weights, anchors, positives, negatives)
    candidates = positives if negatives is None else np.concatenate([positives, *np.moveaxis(negatives, 1, 0)])

    def direction(queries, among):
        return mean(-np.diag(cases.log_softmax(scale * cosines(queries, among))), weights, normalizer)

    forward = direction(anchors, candidates)
    return (forward + direction(positives, anchors)) / 2 if symmetric else forward


def cosent(first, second, labels, *, scale=20.0, weights=None):
    weights, (first, second, labels) = present(weights, first, second, labels)
    scores = scale * np.diag(cosines(first, second))
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


TRUTH = {f.__name__: f for f in (info_nce, cosent, triplet, batch_hard_triplet)}


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
        if self.dims is None:
            return TRUTH[self.name](*inputs, *self.labels, **options)
        cut = [[x[..., :dim] for x in inputs] for dim in self.dims]
        cut = [[x / np.linalg.norm(x, axis=-1, keepdims=True) for x in arrays] for arrays in cut]
        return sum(TRUTH[self.name](*arrays, *self.labels, **options) for arrays in cut)


CASES = {
    "info_nce": Case("info_nce", 2, chunk_size=5),
    "info_nce, hard negatives": Case("info_nce", 3, scale=7.0, chunk_size=6),
    "info_nce, symmetric": Case("info_nce", 3, symmetric=True, scale=3.0, chunk_size=4),
    "cosent": Case("cosent", 2, GRADES),
    "cosent, scale": Case("cosent", 2, LABELS, scale=1.5),
    "triplet": Case("triplet", 3),
    "triplet, cosine": Case("triplet", 3, distance=embedding.cosine, margin=0.1),
    "triplet, soft margin": Case("triplet", 3, margin=None),
    "batch_hard_triplet": Case("batch_hard_triplet", 1, LABELS, chunk_size=5),
    "batch_hard_triplet, cosine": Case("batch_hard_triplet", 1, LABELS, distance=embedding.cosine, margin=0.05),
    "batch_hard_triplet, soft margin": Case("batch_hard_triplet", 1, LABELS, margin=None, chunk_size=B),
}
ONE_OF_EACH = [name for name in CASES if "," not in name]
MATRYOSHKA = {
    "matryoshka of info_nce": Case("info_nce", 3, dims=(D, 3), chunk_size=5),
    "matryoshka of cosent": Case("cosent", 2, GRADES, dims=(D, 3)),
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
