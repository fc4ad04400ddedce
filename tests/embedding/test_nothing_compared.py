"""Rows that do not count add exactly nothing to an embedding loss, whatever they hold, by whatever way they go.

Every loss, cut to several sizes too, eagerly and compiled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedding_cases import (
    CASES,
    GUIDE,
    MATRYOSHKA,
    ONE_OF_EACH,
    SCORES,
    THERE,
    WEIGHTS,
    B,
    K,
    batch,
    check,
    exact_gradients,
)
from quick_programs import QUICK

from jaxkd import embedding

ALL = CASES | MATRYOSHKA
every_loss = pytest.mark.parametrize("name", ALL)
EAGER = [*ONE_OF_EACH, "matryoshka of triplet"]
FEW = ("info_nce", "batch_hard_triplet", "margin_mse", "matryoshka of triplet")  # one of each file
both_ways = pytest.mark.parametrize(
    ("name", "is_jitted"),
    [(name, True) for name in ALL]
    + [pytest.param(name, False, marks=() if name in FEW else pytest.mark.slow) for name in EAGER],
)


def evaluate(name, is_jitted, inputs, weights):
    if is_jitted:
        return ALL[name].value_and_grad(inputs, weights)
    return jax.value_and_grad(lambda inputs: ALL[name].loss(inputs, weights=weights), has_aux=True)(inputs)


def is_zero(result):
    (loss, metrics), gradients = result
    return loss == 0 and all(x == 0 for x in metrics.values()) and not any(np.any(x) for x in gradients)


def poisoned(name):
    inputs = [x.copy() for x in ALL[name].inputs(np.float32)]
    for x, value in zip(inputs, (np.nan, np.inf, -np.inf), strict=False):
        x[WEIGHTS == 0] = value
    return tuple(jnp.asarray(x) for x in inputs)


@both_ways
def test_a_row_of_weight_0_is_not_there(name, is_jitted):
    """Not even as a candidate, whatever it holds: the truth leaves it out."""
    exact = [x.astype(np.float64) for x in ALL[name].inputs(np.float32)]
    loss = ALL[name].truth(exact, weights=WEIGHTS)
    result = evaluate(name, is_jitted, poisoned(name), jnp.asarray(WEIGHTS, jnp.float32))
    check(result, loss, exact_gradients(name, True, np.float32), 5e-6, 1e-6)
    assert all(np.isfinite(x) for x in result[0][1].values())
    assert not any(np.asarray(g)[WEIGHTS == 0].any() for g in result[1])


@both_ways
def test_nothing_counts(name, is_jitted):
    inputs = tuple(jnp.full_like(x, np.nan) for x in ALL[name].inputs(np.float32))
    assert is_zero(evaluate(name, is_jitted, inputs, jnp.zeros(B)))


RAGGED = [name for name in ALL if "ragged" in name]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", RAGGED)
def test_a_negative_that_is_not_there(name, value):
    """Whatever it holds, and whatever the teacher says of it."""
    case = ALL[name]
    *rows, negatives = case.inputs(np.float32)
    poisoned = np.where(THERE[..., None], negatives, value).astype(np.float32)
    labels = tuple(np.where(THERE, x[:, -K:], value).astype(np.float32) for x in case.labels)
    labels = tuple(np.concatenate([x[:, :-K], y], axis=1) for x, y in zip(case.labels, labels, strict=True))
    gradient = jax.jit(jax.value_and_grad(lambda x, labels: case.loss(x, labels)[0]), compiler_options=QUICK)
    want = gradient((*rows, negatives), tuple(x.astype(np.float32) for x in case.labels))
    got = gradient((*rows, poisoned), labels)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not np.asarray(got[1][2])[~THERE].any()


@pytest.mark.parametrize("name", ["margin_mse", "score_distillation"])
def test_what_a_teacher_says_of_a_row_that_does_not_count(name):
    inputs, weights = CASES[name].inputs(np.float32), WEIGHTS.astype(np.float32)
    scores = [np.where(weights[:, None] == 0, x, SCORES).astype(np.float32) for x in (0, np.nan)]
    results = [CASES[name].loss(inputs, (x,), weights=weights) for x in scores]
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert np.isfinite(results[0][0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_a_guide_holds_of_a_row_that_does_not_count(value):
    case, weights = CASES["info_nce, guide"], WEIGHTS.astype(np.float32)

    def result(value):
        texts = [np.where(weights.reshape(-1, *(1,) * (np.ndim(x) - 1)) == 0, value, x) for x in texts_of(GUIDE)]
        return case.loss(case.inputs(np.float32), weights=weights, guide=embedding.Guide(*texts, margin=0.1))[0]

    assert np.isfinite(result(value))
    assert result(value) == result(0)


def texts_of(guide):
    return guide.anchors, guide.positives, guide.negatives


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_matryoshka_does_not_see(value, normalize):
    """Those that a function holds itself: its dead rows are cut and normalised as all others are."""
    anchors, positives, _ = (jnp.asarray(x, jnp.float32) for x in batch())
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    dead = weights[:, None] == 0

    def own(anchors, positives):
        return embedding.triplet(anchors, positives, positives[::-1], margin=0.3, weights=weights)

    function = embedding.matryoshka(own, (4, 2), normalize=normalize)
    gradient = jax.jit(jax.value_and_grad(lambda *x: function(*x)[0], (0, 1)), compiler_options=QUICK)
    results = [gradient(jnp.where(dead, x, anchors), positives) for x in (0, value)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert np.isfinite(results[1][0])


@every_loss
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_zeros_and_equal_rows_have_finite_gradients(name, value):
    inputs = tuple(np.full_like(x, value) for x in ALL[name].inputs(np.float32))
    (loss, _), gradients = ALL[name].value_and_grad(inputs, np.ones(B, np.float32))
    assert np.isfinite(float(loss))
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)
    if value == 0:
        assert not any(np.asarray(g).any() for g in gradients)


DIVIDED = [name for name in ONE_OF_EACH if name not in ("cosent", "angle")]


@pytest.mark.parametrize("name", DIVIDED)
def test_an_empty_micro_batch(name):
    """A normalizer of 0 gives 0, also where it is not known before."""
    inputs = ALL[name].inputs(np.float32)
    divided = lambda normalizer: ALL[name].loss(inputs, weights=jnp.zeros(B), normalizer=normalizer)  # noqa: E731
    loss, metrics = jax.jit(divided, compiler_options=QUICK)(0.0)
    assert loss == 0
    assert all(x == 0 for x in metrics.values())
    assert divided(0.0)[0] == 0
