"""Which rows count, and how much: masks, weights, the normalizer, and rows that must not be looked at."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

N, D, V, CHUNK = 23, 8, 123, 8
LABELS = cases.some_labels(3, N, V, ignored=0.4)
WEIGHTS = np.random.default_rng(4).uniform(0.2, 2, size=N).astype(np.float32)
STUDENT, TEACHER = cases.head(0, N, D, V, bias=True), cases.head(1, N, D - 3, V)
TRUTH = {"divergence": "jensen_shannon_0.1", "hard_weight": 0.5, "temperature": 1.5}


def run(student, teacher, labels, **options):
    if isinstance(student, cases.Head):
        student = student.astype(jnp.float32)
    if isinstance(teacher, cases.Head):
        teacher = teacher.astype(jnp.float32)
    numbers = {"divergence": jaxkd.jensen_shannon(0.1), "temperature": 1.5, "hard_weight": 0.5} | options
    if labels is None:
        del numbers["hard_weight"]
    return cases.traced_value_and_grad(student, teacher, labels, chunk_size=CHUNK, **numbers)


def check(result, labels, **options):
    student, teacher = (cases.twin(x.astype(jnp.float32)) for x in (STUDENT, TEACHER))
    truth = cases.distillation(student, teacher, labels, **TRUTH | options)
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("ignored", [0.0, 0.1, 0.5, 0.9])
def test_mask(ignored):
    labels = cases.some_labels(5, N, V, ignored=ignored)
    check(run(STUDENT, TEACHER, labels), labels)


@pytest.mark.parametrize("ignore_index", [-1, 0, 17, 100000])
def test_any_ignore_index(ignore_index):
    labels = cases.some_labels(5, N, V, ignored=0.3, ignore_index=ignore_index)
    labels[:3] = ignore_index
    check(run(STUDENT, TEACHER, labels, ignore_index=ignore_index), labels, ignore_index=ignore_index)


@pytest.mark.parametrize("labels", [LABELS, None])
@pytest.mark.parametrize("normalizer", [None, 11.0])
def test_weights(labels, normalizer):
    options = {"weights": WEIGHTS, "normalizer": normalizer, "hard_weight": 0.0 if labels is None else 0.5}
    check(run(STUDENT, TEACHER, labels, **options), labels, **options)


def test_a_weight_of_zero_adds_nothing_but_counts():
    weights = WEIGHTS.copy()
    weights[LABELS != -100] *= np.arange((LABELS != -100).sum()) % 2
    check(run(STUDENT, TEACHER, LABELS, weights=weights), LABELS, weights=weights)


def test_weights_of_one_are_the_default():
    plain = run(STUDENT, TEACHER, LABELS)
    assert_equal(run(STUDENT, TEACHER, LABELS, weights=np.ones(N, np.float32)), plain)
    assert_equal(run(STUDENT, TEACHER, LABELS, normalizer=float((LABELS != -100).sum())), plain)


def test_integer_normalizer():
    count = int((LABELS != -100).sum())
    assert_equal(run(STUDENT, TEACHER, LABELS, normalizer=count), run(STUDENT, TEACHER, LABELS))
    assert_equal(run(STUDENT, TEACHER, LABELS, normalizer=jnp.asarray(count)), run(STUDENT, TEACHER, LABELS))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_micro_batches_add_up(weights, x64):
    """Gradient accumulation: parts of different sizes, one with nothing to count, and the same normalizer."""
    labels = LABELS.copy()
    labels[:4] = -100
    student, teacher = STUDENT.astype(jnp.float64), TEACHER.astype(jnp.float64)
    total = (np.ones(N) if weights is None else weights)[labels != -100].sum()

    def loss(student, start, stop):
        part = np.s_[start:stop]
        rows = jaxkd.LinearLogits(student.hidden[part], student.weight, student.bias)
        return jaxkd.distillation_loss(
            rows,
            jaxkd.LinearLogits(teacher.hidden[part], teacher.weight),
            labels[part],
            weights=None if weights is None else weights[part],
            normalizer=total,
            hard_weight=0.5,
            chunk_size=CHUNK,
        )

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))
    whole = value_and_grad(student, 0, N)
    parts = [value_and_grad(student, *part) for part in ((0, 4), (4, 17), (17, N))]
    added = jax.tree.map(lambda *x: sum(x), *parts)
    for got, want in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-15)
    np.testing.assert_allclose(added[0][0], whole[0][0], rtol=1e-12)
    assert cases.relative_error(added[1].weight, whole[1].weight) < 1e-12


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("normalizer", [None, 11.0])
def test_no_counted_row(weights, normalizer):
    labels = np.full(N, -100)
    (loss, metrics), gradient = run(STUDENT, TEACHER, labels, weights=weights, normalizer=normalizer)
    assert loss == 0
    assert {name: float(x) for name, x in metrics.items()} == dict.fromkeys(metrics, 0.0)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_no_counted_weight():
    (loss, _), gradient = run(STUDENT, TEACHER, LABELS, weights=np.zeros(N, np.float32))
    assert loss == 0
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_poisoned_ignored_rows_of_heads(where, poison):
    """Bitwise: what a row that does not count holds cannot be told from the result."""
    clean = run(STUDENT, TEACHER, LABELS)
    spoil = poisoned(poison)
    student = STUDENT.map(spoil) if where != "teacher" else STUDENT
    teacher = TEACHER.map(spoil) if where != "student" else TEACHER
    result = run(student, teacher, LABELS)
    assert_equal(result, clean)
    assert not np.any(np.asarray(result[1].hidden)[LABELS == -100])


def poisoned(poison):
    def spoil(name, x):
        x = np.array(x)
        if name == "hidden":
            x[LABELS == -100] = poison
        return x

    return spoil


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poisoned_ignored_rows_of_logits(poison):
    student, teacher = np.random.default_rng(0).normal(scale=3, size=(2, N, V)).astype(np.float32)
    clean = run(jaxkd.Logits(student), jaxkd.Logits(teacher), LABELS)
    student[LABELS == -100] = poison
    teacher[LABELS == -100] = poison
    result = run(jaxkd.Logits(student), jaxkd.Logits(teacher), LABELS)
    assert_equal(result, clean)
    assert not np.any(np.asarray(result[1].values)[LABELS == -100])


def test_poisoned_weights_of_ignored_rows():
    weights = np.where(LABELS == -100, np.nan, WEIGHTS)
    assert_equal(run(STUDENT, TEACHER, LABELS, weights=weights), run(STUDENT, TEACHER, LABELS, weights=WEIGHTS))


def test_a_poisoned_row_that_counts_is_seen():
    labels = LABELS.copy()
    labels[:] = 5
    (loss, _), _ = run(STUDENT.map(poisoned(np.nan)), TEACHER, labels)
    assert np.isnan(loss)


@pytest.mark.parametrize("label", [-1, V, V + 5, -V, 2**31 - 1])
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_label_outside_the_vocabulary(label, hard_weight):
    """Never a silently wrong number, whatever the label is used for."""
    labels = LABELS.copy()
    labels[np.flatnonzero(labels != -100)[0]] = label
    (loss, _), gradient = run(STUDENT, TEACHER, labels, hard_weight=hard_weight)
    assert np.isnan(loss)
    assert np.isnan(gradient.weight).any()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32])
def test_label_types(dtype):
    labels = np.where(LABELS == -100, 100, LABELS % 100)
    want = run(STUDENT, TEACHER, labels, ignore_index=100)
    assert_equal(run(STUDENT, TEACHER, labels.astype(dtype), ignore_index=100), want)


def test_hard_is_reported_whenever_there_are_labels():
    (_, with_labels), _ = run(STUDENT, TEACHER, LABELS, hard_weight=0.0)
    (_, without), _ = run(STUDENT, TEACHER, None, hard_weight=0.0)
    truth = cases.distillation(STUDENT, TEACHER, LABELS, divergence="forward_kl")
    np.testing.assert_allclose(with_labels["hard"], truth.hard, rtol=1e-5)
    assert without["hard"] == 0.0
