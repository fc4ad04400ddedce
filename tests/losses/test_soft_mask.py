"""A mask of the soft loss beside labels of the hard one: two sets of rows, each with a mean of its own."""

import dataclasses
from itertools import product

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import only

import jaxkd

N, D, V = 23, 8, 61
STUDENT, TEACHER = cases.head(0, N, D, V, bias=True), cases.head(1, N, D - 3, V)
LABELS = cases.some_labels(3, N, V, ignored=0.6)
MASK = np.random.default_rng(5).random(N) < 0.6
WEIGHTS = np.random.default_rng(4).uniform(0.2, 2, size=N).astype(np.float32)
LABELLED = LABELS != -100
OPTIONS = {"temperature": 1.5, "soft_weight": 0.7, "hard_weight": 0.5}
assert len(set(zip(MASK, LABELLED, strict=True))) == 4  # rows of both parts, of either and of none


def run(student, teacher, labels=LABELS, chunk_size=8, **options):
    options = {"divergence": jaxkd.jensen_shannon(0.1), "mask": MASK} | OPTIONS | options
    if labels is None:
        del options["hard_weight"]
    return cases.traced_value_and_grad(student, teacher, labels, chunk_size=chunk_size, **options)


def truth(labels=LABELS, mask=MASK, weights=None, normalizer=None):
    """Each part alone, over its own rows, in float64."""
    student, teacher = (cases.twin(x.astype(jnp.float32)) for x in (STUDENT, TEACHER))
    options = {"divergence": "jensen_shannon_0.1", "temperature": 1.5, "weights": weights, "normalizer": normalizer}
    soft = cases.distillation(student, teacher, np.where(mask, 0, -100), soft_weight=0.7, hard_weight=0.0, **options)
    hard = cases.distillation(student, teacher, labels, soft_weight=0.0, hard_weight=0.5, **options)
    added = {
        f.name: getattr(soft.gradient, f.name) + getattr(hard.gradient, f.name)
        for f in dataclasses.fields(cases.Head)
        if getattr(soft.gradient, f.name) is not None
    }
    num_rows = int((mask | (labels != -100)).sum())
    return cases.Truth(soft.loss + hard.loss, soft.soft, hard.hard, num_rows, cases.Head(**added))


def models(spoil_teacher=~MASK, spoil_student=~(MASK | LABELLED)):
    """NaN where a row is not to be read: the teacher's without soft loss, the student's without any."""
    student, teacher = STUDENT.astype(jnp.float32), TEACHER.astype(jnp.float32)
    hidden = jnp.where(spoil_student[:, None], jnp.nan, student.hidden)
    teacher_hidden = jnp.where(spoil_teacher[:, None], jnp.nan, teacher.hidden)
    return (
        jaxkd.LinearLogits(hidden, student.weight, student.bias),
        jaxkd.LinearLogits(teacher_hidden, teacher.weight),
    )


@pytest.mark.parametrize(
    ("chunk_size", "is_weighted", "normalizer"),
    only(
        [(5, False, None), (5, True, 11.0), (64, True, None), (64, False, 11.0)],
        product([5, 64], [False, True], [None, 11.0]),
    ),
)
def test_each_part_has_its_own_rows(chunk_size, is_weighted, normalizer):
    options = {"weights": WEIGHTS if is_weighted else None, "normalizer": normalizer}
    result = run(*models(), chunk_size=chunk_size, **options)
    cases.check(result, truth(**options), loss=3e-6, gradient=1e-5)
    assert not np.any(np.asarray(result[1].hidden)[~(MASK | LABELLED)])


NO_LABEL, NO_ROW = np.full(N, -100), np.zeros(N, bool)


@pytest.mark.parametrize(
    ("labels", "mask"), [(LABELS, NO_ROW), (NO_LABEL, MASK), (NO_LABEL, NO_ROW), (LABELS, np.ones(N, bool))]
)
def test_a_part_without_a_row_is_0(labels, mask):
    student, teacher = models(~mask, ~(mask | (labels != -100)))
    result = run(student, teacher, labels, mask=mask)
    want = truth(labels, mask)
    if mask.any() or (labels != -100).any():
        return cases.check(result, want, loss=3e-6, gradient=1e-5)
    assert not any(np.any(x) for x in jax.tree.leaves(result))
    return None


def test_a_mask_of_the_rows_whose_label_counts_changes_nothing():
    student, teacher = models(~LABELLED, ~LABELLED)
    masked, plain = (run(student, teacher, mask=mask, weights=WEIGHTS) for mask in (LABELLED, None))
    for got, want in zip(jax.tree.leaves(masked), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def test_without_labels_the_mask_alone_counts():
    student, teacher = models(~MASK, ~MASK)
    (loss, metrics), gradient = run(student, teacher, None)
    want = truth(NO_LABEL)
    np.testing.assert_allclose([loss, metrics["soft"]], [want.loss, want.soft], rtol=3e-6)
    assert float(metrics["num_rows"]) == MASK.sum()
    assert max(cases.gradient_errors(gradient, want.gradient).values()) < 1e-5


def test_a_label_outside_the_vocabulary_is_no_number():
    labels = LABELS.copy()
    labels[np.flatnonzero(LABELLED)[0]] = V
    (loss, _), gradient = run(*models(), labels)
    assert np.isnan(loss)
    assert np.isnan(gradient.weight).any()


def test_a_frozen_head():
    """The hidden states alone are differentiated, through the one-line loss."""
    student, teacher = models()

    def loss(hidden):
        frozen = hidden, student.weight, teacher.hidden, teacher.weight, LABELS
        return jaxkd.fused_linear_jsd(*frozen, beta=0.1, student_bias=student.bias, mask=MASK, chunk_size=5, **OPTIONS)[
            0
        ]

    value, gradient = jax.value_and_grad(loss)(student.hidden)
    want = truth()
    np.testing.assert_allclose(value, want.loss, rtol=3e-6)
    assert cases.relative_error(gradient, want.gradient.hidden) < 1e-5


@pytest.mark.parametrize("kind", ["rows", "buckets", "triton"])
def test_other_implementations_leave_rows_out_alike(kind, monkeypatch):
    """Held to the rows of each part in a call of its own."""
    monkeypatch.setattr("jaxkd.kernels.pallas_triton.INTERPRET", True)
    student, teacher = models()
    options = {"divergence": jaxkd.mse if kind == "rows" else jaxkd.jensen_shannon(0.1), "temperature": 1.5}
    if kind == "triton":
        options["implementation"] = "triton"
    if kind == "buckets":
        teacher = jaxkd.VocabularyMap(teacher, np.arange(20), np.arange(20)[::-1])

    def loss(student, labels, **more):
        return jaxkd.distillation_loss(student, teacher, labels, chunk_size=8, **options, **more)[0]

    @jax.jit
    @jax.value_and_grad
    def both(student):
        return loss(student, LABELS, mask=MASK, soft_weight=0.7, hard_weight=0.5)

    @jax.jit
    @jax.value_and_grad
    def apart(student):
        soft = loss(student, np.where(MASK, 0, -100), soft_weight=0.7, hard_weight=0.0)
        return soft + loss(student, LABELS, soft_weight=0.0, hard_weight=0.5)

    got, want = both(student), apart(student)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert max(cases.relative_error(x, y) for x, y in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True)) < 1e-5
