"""Embedding losses against dense NumPy in float64, numbers worked by hand, and laws."""

import math
from functools import cache, cached_property, partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    candidates = positives if negatives is None else np.concatenate([positives, negatives.reshape(-1, D)])

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
    """A loss, how many of the batch's arrays it takes, its labels and options."""

    def __init__(self, loss, arrays, labels=None, **options):
        self.name, self.arrays, self.options = loss, arrays, options
        self.labels = () if labels is None else (labels,)

    def inputs(self, dtype=np.float64):
        arrays = batch(dtype=dtype)[: self.arrays]
        return (*arrays[:2], arrays[2][:, 0]) if self.name == "triplet" else arrays

    def loss(self, inputs, labels=None, **options):
        options = self.options | options
        return getattr(embedding, self.name)(*inputs, *(self.labels if labels is None else labels), **options)

    @cached_property
    def value_and_grad(self):
        """Of the inputs and weights; compiled once for many tests."""
        return jax.jit(
            jax.value_and_grad(lambda inputs, weights=None: self.loss(inputs, weights=weights), has_aux=True)
        )

    def truth(self, inputs, **options):
        options = {k: v for k, v in (self.options | options).items() if k != "chunk_size"}
        if "distance" in options:
            options["distance"] = {embedding.cosine: cosine, embedding.euclidean: euclidean}[options["distance"]]
        return TRUTH[self.name](*inputs, *self.labels, **options)


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


def difference_quotients(function, inputs, step=1e-5):
    """Central differences in float64, entry by entry."""
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
    inputs = tuple(x.astype(np.float64) for x in CASES[name].inputs(dtype))
    return difference_quotients(partial(CASES[name].truth, weights=WEIGHTS if is_weighted else None), inputs)


def check(result, loss, gradients, tolerance, loss_tolerance):
    assert float(result[0][0]) == pytest.approx(loss, rel=loss_tolerance)
    for got, want in zip(result[1], gradients, strict=True):
        assert cases.relative_error(got, want) < tolerance


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_float64(name, x64):
    case = CASES[name]
    inputs = case.inputs()
    result = case.value_and_grad(inputs, WEIGHTS)
    check(result, case.truth(inputs, weights=WEIGHTS), exact_gradients(name, True), 1e-6, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    case = CASES[name]
    inputs = case.inputs(np.float32)
    result = case.value_and_grad(inputs)
    exact = exact_gradients(name, False, np.float32)
    check(result, case.truth([x.astype(np.float64) for x in inputs]), exact, 5e-6, 1e-6)
    (loss, metrics), gradients = result
    assert all(x.dtype == jnp.float32 for x in (loss, *metrics.values(), *gradients))
    assert all(x.shape == () for x in metrics.values())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16(name):
    """Inputs are rounded, similarities are not: the loss is that of float32, a gradient is rounded once or twice."""
    case = CASES[name]
    inputs = tuple(jnp.asarray(x, jnp.bfloat16) for x in case.inputs())
    result = case.value_and_grad(inputs)
    loss = case.truth([np.asarray(x).astype(np.float64) for x in inputs])
    check(result, loss, exact_gradients(name, False, jnp.bfloat16), 4e-3, 2e-6)
    assert result[0][0].dtype == jnp.float32
    assert all(g.dtype == jnp.bfloat16 for g in result[1])


@pytest.mark.parametrize("chunk_size", [1, B - 1, 1000])
@pytest.mark.parametrize("name", ["info_nce, hard negatives", "batch_hard_triplet"])
def test_any_chunk_gives_the_same(name, chunk_size):
    case = CASES[name]
    case = Case(case.name, case.arrays, *case.labels, **case.options | {"chunk_size": chunk_size})
    inputs = case.inputs(np.float32)
    result = case.value_and_grad(inputs)
    exact = exact_gradients(name, False, np.float32)
    check(result, case.truth([x.astype(np.float64) for x in inputs]), exact, 5e-6, 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_weight_0_is_not_there(name):
    """Not even as a candidate, whatever it holds: the truth leaves it out."""
    case = CASES[name]
    inputs = [x.copy() for x in case.inputs(np.float32)]
    loss = case.truth([x.astype(np.float64) for x in inputs], weights=WEIGHTS)
    for x, value in zip(inputs, (np.nan, np.inf, -np.inf), strict=False):
        x[WEIGHTS == 0] = value
    result = case.value_and_grad(tuple(inputs), WEIGHTS.astype(np.float32))
    check(result, loss, exact_gradients(name, True, np.float32), 5e-6, 1e-6)
    assert not any(np.asarray(g)[WEIGHTS == 0].any() for g in result[1])


@pytest.mark.parametrize("name", CASES)
def test_nothing_counts(name):
    case = CASES[name]
    inputs = tuple(np.full_like(x, np.nan) for x in case.inputs(np.float32))
    (loss, metrics), gradients = case.value_and_grad(inputs, np.zeros(B, np.float32))
    assert float(loss) == 0
    assert all(float(x) == 0 for x in metrics.values())
    assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_zeros_and_equal_rows_have_finite_gradients(name, value):
    case = CASES[name]
    inputs = tuple(np.full_like(x, value) for x in case.inputs(np.float32))
    (loss, _), gradients = case.value_and_grad(inputs, np.ones(B, np.float32))
    assert np.isfinite(float(loss))
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)
    if value == 0:
        assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name != "cosent"])
def test_normalizer(name):
    case = CASES[name]
    inputs = case.inputs(np.float32)
    (loss, metrics), _ = case.value_and_grad(inputs, WEIGHTS.astype(np.float32))
    doubled = jax.jit(lambda normalizer: case.loss(inputs, weights=WEIGHTS, normalizer=normalizer))
    doubled_loss, doubled_metrics = doubled(2 * metrics["num_rows"])
    ratio = WEIGHTS.sum() / (2 * (WEIGHTS != 0).sum())
    if name != "batch_hard_triplet":  # there rows without partners do not count either
        assert float(doubled_loss) == pytest.approx(ratio * float(loss), rel=1e-6)
        assert float(doubled_metrics["accuracy"]) == pytest.approx(ratio * float(metrics["accuracy"]), rel=1e-6)
    truth = case.truth(case.inputs(), weights=WEIGHTS, normalizer=2 * float(metrics["num_rows"]))
    assert float(doubled_loss) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_metrics_carry_no_gradient(name):
    case = CASES[name]
    inputs = case.inputs(np.float32)
    gradients = jax.jit(jax.grad(lambda x: sum(case.loss(x)[1].values())))(inputs)
    assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize("name", ["info_nce", "cosent"])
def test_scale_can_be_learned(name, x64):
    case = CASES[name]
    inputs = case.inputs()
    slope = jax.jit(jax.grad(lambda scale: case.loss(inputs, scale=scale)[0]))(9.0)
    quotient = (case.truth(inputs, scale=9 + 1e-5) - case.truth(inputs, scale=9 - 1e-5)) / 2e-5
    assert float(slope) == pytest.approx(quotient, rel=1e-6)


def test_weights_of_cosent_have_gradients(x64):
    case, weights = CASES["cosent"], WEIGHTS.copy()
    inputs = case.inputs()
    got = jax.jit(jax.grad(lambda weights: case.loss(inputs, weights=weights)[0]))(weights)
    (quotients,) = difference_quotients(lambda x: case.truth(inputs, weights=x[0]), [weights])
    counts = WEIGHTS != 0
    assert cases.relative_error(got[counts], quotients[counts]) < 1e-6


def test_weights_of_info_nce_are_constants():
    case = CASES["info_nce"]
    with pytest.raises(TypeError, match="does not differentiate with respect to `weights`"):
        jax.grad(lambda weights: case.loss(case.inputs(np.float32), weights=weights)[0])(jnp.ones(B))


@pytest.mark.parametrize("name", CASES)
def test_strict_promotion(name):
    case = CASES[name]
    with jax.numpy_dtype_promotion("strict"):
        loss, _ = jax.eval_shape(case.loss, case.inputs(np.float32), weights=WEIGHTS.astype(np.float32))
    assert loss.dtype == jnp.float32


# Numbers worked by hand


def test_info_nce_by_hand():
    """Cosines 1, 0 | 0, 0.6 of the first anchor and 0, 1 | 1, 0.8 of the second; the columns after the bar are hard."""
    anchors, positives = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    negatives = jnp.array([[0.0, 1.0], [0.6, 0.8]])
    loss, metrics = embedding.info_nce(anchors, positives, negatives, scale=1.0)
    first = math.log(math.e + 1 + 1 + math.exp(0.6)) - 1  # 1.0185
    second = math.log(1 + math.e + math.e + math.exp(0.8)) - 1  # 1.1594
    assert float(loss) == pytest.approx((first + second) / 2, rel=1e-6)
    assert float(metrics["accuracy"]) == 1  # of two that are equally similar the positive comes first
    both, _ = embedding.info_nce(anchors, positives, negatives, scale=1.0, symmetric=True)
    backward = math.log(math.e + 1) - 1  # each positive sees cosines 1 and 0
    assert float(both) == pytest.approx((first + second) / 4 + backward / 2, rel=1e-6)


def test_cosent_by_hand():
    """Cosines 0.6, 0.8, 1 with labels 1, 0, 1: the second has a lower label than both others; equals do not compete."""
    first = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    second = jnp.array([[3.0, 4.0], [0.8, -0.6], [7.0, 0.0]])
    loss, metrics = embedding.cosent(first, second, jnp.array([1, 0, 1]), scale=10.0)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(2) + math.exp(-2)), rel=1e-6)
    assert float(metrics["num_pairs"]) == 2
    weighted, _ = embedding.cosent(first, second, jnp.array([1, 0, 1]), scale=10.0, weights=jnp.array([0.5, 3.0, 2.0]))
    assert float(weighted) == pytest.approx(math.log(1 + 1.5 * math.exp(2) + 6 * math.exp(-2)), rel=1e-6)
    equal, metrics = embedding.cosent(first, second, jnp.array([4, 4, 4]))
    assert float(equal) == float(metrics["num_pairs"]) == 0


def test_cosent_of_a_label_that_is_no_number():
    first, second, _ = batch(dtype=np.float32)
    grades = np.where(np.arange(B) == 3, np.nan, GRADES)
    assert np.isnan(float(embedding.cosent(first, second, grades)[0]))
    assert np.isfinite(float(embedding.cosent(first, second, grades, weights=(np.arange(B) != 3) * 1.0)[0]))


def test_triplet_by_hand():
    anchors = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    positives, negatives = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [1.0, 9.0]])
    loss, metrics = embedding.triplet(anchors, positives, negatives)
    assert float(loss) == (5 - 1 + 5 + 0) / 2
    assert {name: float(x) for name, x in metrics.items()} == {
        "positive_distance": 2.5,
        "negative_distance": 5.0,
        "accuracy": 0.5,
        "num_rows": 2.0,
    }
    own, _ = embedding.triplet(anchors, positives, negatives, distance=lambda x, y: jnp.abs(x - y).sum(1), margin=1)
    assert float(own) == (7 - 1 + 1 + 0) / 2


def test_batch_hard_by_hand():
    """On a line: 0 and 4 are of one class, 1 and 9 of another, 5 is alone in its class and so has no positive."""
    line, labels = jnp.array([[0.0], [4.0], [1.0], [9.0], [5.0]]), jnp.array([0, 0, 1, 1, 2])
    loss, metrics = embedding.batch_hard_triplet(line, labels, margin=1.0)
    assert float(loss) == ((4 - 1 + 1) + (4 - 1 + 1) + (8 - 1 + 1) + (8 - 4 + 1)) / 4
    assert float(metrics["num_rows"]) == 4
    gradient = jax.grad(lambda x: embedding.batch_hard_triplet(x, labels, margin=1.0)[0])(line)
    # Rows 0: p 4, n 1; 4: p 0, n 5; 1: p 9, n 0; 9: p 1, n 5. Each pulls its positive and pushes its negative.
    assert (4 * gradient[:, 0]).tolist() == [-1 + 1 - 1 + 1, 1 + 1 + 1, -1 - 1 - 1 - 1, 1 + 1 - 1, -1 + 1]


def test_batch_hard_of_one_class_or_of_none_twice():
    embeddings, _, _ = batch(dtype=np.float32)
    for labels in (np.zeros(B, int), np.arange(B)):
        loss, metrics = embedding.batch_hard_triplet(embeddings, labels)
        assert float(loss) == float(metrics["num_rows"]) == 0


def test_batch_hard_takes_the_first_of_several():
    """0 has positives at 2 and -2; the gradient goes to the first alone."""
    line, labels = jnp.array([[0.0], [2.0], [-2.0], [50.0], [90.0]]), jnp.array([0, 0, 0, 1, 2])
    weights = jnp.array([1.0, 1e-9, 1e-9, 1e-9, 1e-9])
    gradient = jax.grad(lambda x: embedding.batch_hard_triplet(x, labels, margin=99.0, weights=weights)[0])(line)
    assert gradient[:, 0].tolist() == pytest.approx([0, 1, 0, -1, 0], abs=1e-6)


# Matryoshka


def test_matryoshka_is_a_sum_over_sizes():
    arrays = batch(dtype=np.float32)
    function = embedding.matryoshka(embedding.info_nce, (D, 3), (1.0, 0.25))
    loss, metrics = function(*arrays[:2], negatives=arrays[2], scale=5.0)
    parts = [embedding.info_nce(*(x[..., :dim] for x in arrays), scale=5.0) for dim in (D, 3)]
    assert float(loss) == pytest.approx(float(parts[0][0]) + 0.25 * float(parts[1][0]), rel=1e-6)
    assert float(metrics["accuracy_3"]) == float(parts[1][1]["accuracy"])
    assert metrics.keys() == {f"{name}_{dim}" for name in ("loss", "accuracy", "num_rows") for dim in (D, 3)}


@pytest.mark.parametrize("normalize", [True, False])
def test_matryoshka_normalizes_what_it_cuts(normalize, x64):
    case = CASES["triplet"]
    inputs = case.inputs()

    def truth(inputs):
        cut = [x[:, :3] for x in inputs]
        return triplet(*(x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x for x in cut), margin=0.3)

    function = embedding.matryoshka(partial(embedding.triplet, margin=0.3), [3], normalize=normalize)
    (loss, _), gradients = jax.value_and_grad(lambda x: function(*x), has_aux=True)(inputs)
    assert float(loss) == pytest.approx(truth(inputs), rel=1e-12)
    for got, want in zip(gradients, difference_quotients(truth, inputs), strict=True):
        assert cases.relative_error(got, want) < 1e-6
        assert not np.asarray(got)[:, 3:].any()


def test_matryoshka_of_cosines_needs_no_normalization():
    anchors, positives, _ = (jnp.asarray(x, jnp.bfloat16) for x in batch())
    losses = [embedding.matryoshka(embedding.info_nce, (D, 2), normalize=n)(anchors, positives)[0] for n in (0, 1)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
