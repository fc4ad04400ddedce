"""Embedding losses in numbers worked by hand, and what `matryoshka` makes of them."""

import math
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedding_cases import CASES, GRADES, B, D, batch, difference_quotients, triplet
from quick_programs import at_once

from jaxkd import embedding


def quickly(function, *args, **options):
    return at_once({"it": partial(function, *args, **options)})["it"]


def test_info_nce_by_hand():
    """Cosines 1, 0 | 0, 0.6 of the first anchor and 0, 1 | 1, 0.8 of the second; the columns after the bar are hard."""
    anchors, positives = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    negatives = jnp.array([[0.0, 1.0], [0.6, 0.8]])
    loss, metrics = quickly(embedding.info_nce, anchors, positives, negatives, scale=1.0)
    first = math.log(math.e + 1 + 1 + math.exp(0.6)) - 1  # 1.0185
    second = math.log(1 + math.e + math.e + math.exp(0.8)) - 1  # 1.1594
    assert float(loss) == pytest.approx((first + second) / 2, rel=1e-6)
    assert float(metrics["accuracy"]) == 1  # of two that are equally similar the positive comes first
    both, _ = quickly(embedding.info_nce, anchors, positives, negatives, scale=1.0, symmetric=True)
    backward = math.log(math.e + 1) - 1  # each positive sees cosines 1 and 0
    assert float(both) == pytest.approx((first + second) / 4 + backward / 2, rel=1e-6)


def test_cosent_by_hand():
    """Cosines 0.6, 0.8, 1 with labels 1, 0, 1: the second has a lower label than both others; equals do not compete."""
    first = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    second = jnp.array([[3.0, 4.0], [0.8, -0.6], [7.0, 0.0]])
    loss, metrics = quickly(embedding.cosent, first, second, jnp.array([1, 0, 1]), scale=10.0)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(2) + math.exp(-2)), rel=1e-6)
    assert float(metrics["num_pairs"]) == 2
    weighted, _ = quickly(
        embedding.cosent, first, second, jnp.array([1, 0, 1]), scale=10.0, weights=jnp.array([0.5, 3.0, 2.0])
    )
    assert float(weighted) == pytest.approx(math.log(1 + 1.5 * math.exp(2) + 6 * math.exp(-2)), rel=1e-6)
    equal, metrics = quickly(embedding.cosent, first, second, jnp.array([4, 4, 4]))
    assert float(equal) == float(metrics["num_pairs"]) == 0


def test_cosent_of_a_label_that_is_no_number():
    first, second, _ = batch(dtype=np.float32)
    grades = np.where(np.arange(B) == 3, np.nan, GRADES)
    assert np.isnan(float(quickly(embedding.cosent, first, second, grades)[0]))
    assert np.isfinite(float(quickly(embedding.cosent, first, second, grades, weights=(np.arange(B) != 3) * 1.0)[0]))


def test_triplet_by_hand():
    anchors = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    positives, negatives = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [1.0, 9.0]])
    loss, metrics = quickly(embedding.triplet, anchors, positives, negatives)
    assert float(loss) == (5 - 1 + 5 + 0) / 2
    assert {name: float(x) for name, x in metrics.items()} == {
        "positive_distance": 2.5,
        "negative_distance": 5.0,
        "accuracy": 0.5,
        "num_rows": 2.0,
    }
    own, _ = quickly(
        embedding.triplet, anchors, positives, negatives, distance=lambda x, y: jnp.abs(x - y).sum(1), margin=1
    )
    assert float(own) == (7 - 1 + 1 + 0) / 2


def test_batch_hard_by_hand():
    """On a line: 0 and 4 are of one class, 1 and 9 of another, 5 is alone in its class and so has no positive."""
    line, labels = jnp.array([[0.0], [4.0], [1.0], [9.0], [5.0]]), jnp.array([0, 0, 1, 1, 2])
    loss, metrics = quickly(embedding.batch_hard_triplet, line, labels, margin=1.0)
    assert float(loss) == ((4 - 1 + 1) + (4 - 1 + 1) + (8 - 1 + 1) + (8 - 4 + 1)) / 4
    assert float(metrics["num_rows"]) == 4
    gradient = quickly(jax.grad(lambda x: embedding.batch_hard_triplet(x, labels, margin=1.0)[0]), line)
    # Rows 0: p 4, n 1; 4: p 0, n 5; 1: p 9, n 0; 9: p 1, n 5. Each pulls its positive and pushes its negative.
    assert (4 * gradient[:, 0]).tolist() == [-1 + 1 - 1 + 1, 1 + 1 + 1, -1 - 1 - 1 - 1, 1 + 1 - 1, -1 + 1]


def test_batch_hard_of_one_class_or_of_none_twice():
    embeddings, _, _ = batch(dtype=np.float32)
    for labels in (np.zeros(B, int), np.arange(B)):
        loss, metrics = quickly(embedding.batch_hard_triplet, embeddings, labels)
        assert float(loss) == float(metrics["num_rows"]) == 0


def test_batch_hard_takes_the_first_of_several():
    """0 has positives at 2 and -2; the gradient goes to the first alone."""
    line, labels = jnp.array([[0.0], [2.0], [-2.0], [50.0], [90.0]]), jnp.array([0, 0, 0, 1, 2])
    weights = jnp.array([1.0, 1e-9, 1e-9, 1e-9, 1e-9])
    gradient = quickly(
        jax.grad(lambda x: embedding.batch_hard_triplet(x, labels, margin=99.0, weights=weights)[0]), line
    )
    assert gradient[:, 0].tolist() == pytest.approx([0, 1, 0, -1, 0], abs=1e-6)


# Matryoshka


def test_matryoshka_is_a_sum_over_sizes():
    arrays = batch(dtype=np.float32)
    function = embedding.matryoshka(embedding.info_nce, (D, 3), (1.0, 0.25))
    loss, metrics = quickly(function, *arrays[:2], negatives=arrays[2], scale=5.0)
    parts = [quickly(embedding.info_nce, *(x[..., :dim] for x in arrays), scale=5.0) for dim in (D, 3)]
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
    (loss, _), gradients = quickly(jax.value_and_grad(lambda x: function(*x), has_aux=True), inputs)
    assert float(loss) == pytest.approx(truth(inputs), rel=1e-12)
    for got, want in zip(gradients, difference_quotients(truth, inputs), strict=True):
        assert cases.relative_error(got, want) < 1e-6
        assert not np.asarray(got)[:, 3:].any()


def test_matryoshka_of_cosines_needs_no_normalization():
    anchors, positives, _ = (jnp.asarray(x, jnp.bfloat16) for x in batch())
    functions = [embedding.matryoshka(embedding.info_nce, (D, 2), normalize=n) for n in (0, 1)]
    losses = [quickly(function, anchors, positives)[0] for function in functions]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "what"),
    [(lambda a, b: jnp.sum(a * b), "a "), (lambda a, b: (jnp.sum(a * b, axis=1), {}), r"a loss of shape \(2,\)")],
)
def test_matryoshka_wants_a_loss(loss, what):
    with pytest.raises(TypeError, match=f"`loss` returns {what}.*a scalar and a dict"):
        embedding.matryoshka(loss, (2,))(jnp.eye(2), jnp.eye(2))
