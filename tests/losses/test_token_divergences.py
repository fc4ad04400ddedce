"""Divergences of tokens: float64 NumPy, and `distillation_loss` of single rows, for every kind of teacher."""

import math
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import row_cases
from sweeps import all_but, only

import jaxkd

ln = math.log
B, T, D, D_TEACHER, V, CHUNK = 2, 5, 8, 12, 41, 4
STUDENT, TEACHER = cases.head(0, (B, T), D, V, bias=True), cases.head(1, (B, T), D_TEACHER, V)
LABELS = cases.some_labels(2, (B, T), V)
MASK = np.arange(B * T).reshape(B, T) % 3 > 0
UPSTREAM = np.random.default_rng(3).normal(size=(B, T)).astype(np.float32)
ALL_ROWS = np.ones((B, T), bool)


@partial(jax.jit, static_argnames=("chunk_size", "vocabulary"))
def values_and_pullback(student, teacher, upstream=UPSTREAM, labels=None, mask=None, **options):
    def divergences(student):
        return jaxkd.token_divergences(student, teacher, labels, mask=mask, **{"chunk_size": CHUNK} | options)

    values, pullback = jax.vjp(divergences, student)
    return values, pullback(upstream.astype(values.dtype))[0]


def compare(student, teacher, name, *, labels=None, mask=None, value=3e-6, gradient=1e-5, **options):
    options = {"temperature": 1.0} | options
    result = values_and_pullback(
        student, teacher, labels=labels, mask=mask, divergence=cases.DIVERGENCES[name].make(), **options
    )
    counted = ALL_ROWS if labels is None else labels != -100
    counted = counted if mask is None else counted & mask
    twins = (row_cases.twin(x) for x in (student, teacher))
    truth = row_cases.divergences(*twins, counted, UPSTREAM, name, options["temperature"])
    row_cases.check(result, truth, value=value, gradient=gradient)
    assert not np.any(result[0][~counted])
    return result


def models(dtype=jnp.float32):
    return STUDENT.astype(dtype), TEACHER.astype(dtype)


LIKE_OTHERS = ("symmetric_kl", "skew_kl", "total_variation", "alpha_divergence", "overlap_nll", "alpha_beta")


@pytest.mark.parametrize("name", all_but(LIKE_OTHERS, cases.ONE_OF_EACH))
def test_against_the_truth(name):
    compare(*models(), name, labels=LABELS, mask=MASK, temperature=1.5)


@pytest.mark.parametrize("rows", [{}, {"labels": LABELS}, {"mask": MASK}])
def test_which_rows_count(rows):
    compare(*models(), "jensen_shannon", **rows)


def test_float64(x64):
    values, gradient = compare(*models(jnp.float64), "jensen_shannon", value=1e-12, gradient=1e-12, mask=MASK)
    assert values.dtype == gradient.weight.dtype == jnp.float64


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 5e-3), (jnp.float16, 2e-3)])
def test_types(dtype, bound, near):
    """Near the teacher too, where rounded logits would be no gradient at all."""
    student = cases.twin(STUDENT.astype(dtype))
    teacher = cases.near(student) if near else TEACHER
    values, gradient = compare(student.astype(dtype), teacher.astype(dtype), "reverse_kl", value=3e-4, gradient=bound)
    assert values.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}


def test_worked_by_hand():
    """Of P = (1/8, 1/4, 5/8) and Q = (1/3, 1/3, 1/3), in nats; the second row is ignored, the third masked out."""
    p, q = jnp.log(jnp.tile(jnp.array([1.0, 2.0, 5.0]), (3, 1))), jnp.zeros((3, 3))
    labels, mask = np.array([0, -100, 1]), np.array([True, True, False])
    entropy = ln(8) / 8 + ln(4) / 4 + 5 * ln(8 / 5) / 8
    got = jaxkd.token_divergences(jaxkd.Logits(q), jaxkd.Logits(p), labels, mask=mask)
    np.testing.assert_allclose(got, [ln(3) - entropy, 0, 0], rtol=1e-6)
    _, gradient = values_and_pullback(jaxkd.Logits(q), jaxkd.Logits(p), np.array([2.0, 1, 1]), labels, mask)
    np.testing.assert_allclose(gradient.values, [[10 / 24, 4 / 24, -14 / 24], [0] * 3, [0] * 3], rtol=1e-5)


def float32(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=(B, T, *shape)), jnp.float32)


def log_p(width=V):
    return jax.nn.log_softmax(2 * float32(width))


JSD, TRUNCATED = jaxkd.jensen_shannon(0.3), {"vocabulary": "truncate"}
TEACHERS = {
    "LinearLogits": lambda head: (head, JSD, {}),
    "Logits": lambda head: (jaxkd.Logits(float32(V)), jaxkd.reverse_kl, {}),
    "narrower": lambda head: (jaxkd.Logits(float32(V - 6)), jaxkd.hellinger, TRUNCATED),
    "wider": lambda head: (jaxkd.Logits(float32(V + 6)), jaxkd.forward_kl, TRUNCATED),
    "closed": lambda head: (jaxkd.Logits(float32(V - 6)), JSD, {"vocabulary": "mask"}),
    "TopKLogProbs": lambda head: (jaxkd.TopKLogProbs(*jax.lax.top_k(log_p(), 7)), jaxkd.forward_kl, {}),
    "Mixture": lambda head: (jaxkd.Mixture([head, jaxkd.Logits(float32(V))], jnp.exp(float32(2))), JSD, {}),
    "VocabularyMap": lambda head: (jaxkd.VocabularyMap(head, jnp.arange(20), jnp.arange(20)[::-1]), JSD, {}),
    "mse": lambda head: (head, jaxkd.mse, {}),
    "earth_mover": lambda head: (jaxkd.Logits(float32(V + 6)), jaxkd.earth_mover, {}),
}


@pytest.mark.parametrize("name", only(("LinearLogits", "closed", "Mixture", "VocabularyMap"), TEACHERS))
def test_rows_are_those_of_the_distillation_loss(name):
    """Each alone; and the gradient of their weighted sum is that of the loss with these weights."""
    teacher, divergence, options = TEACHERS[name](TEACHER.astype(jnp.float32))
    student, upstream = STUDENT.astype(jnp.float32), np.abs(UPSTREAM)
    options = {"divergence": divergence, **options}
    values, gradient = values_and_pullback(student, teacher, upstream, LABELS, **options)

    @jax.jit
    def loss_and_gradient(student, weights):
        def loss(student):
            return jaxkd.distillation_loss(
                student, teacher, LABELS, weights=weights, normalizer=1.0, chunk_size=CHUNK, **options
            )[0]

        return jax.value_and_grad(loss)(student)

    single = np.eye(B * T, dtype=np.float32).reshape(-1, B, T)
    for row, want in zip(single, values.reshape(-1), strict=True):
        np.testing.assert_allclose(loss_and_gradient(student, row)[0], want, rtol=2e-6, atol=1e-7)
    for x, y in zip(*map(jax.tree.leaves, (gradient, loss_and_gradient(student, upstream)[1])), strict=True):
        assert cases.relative_error(x, y) < 1e-5


@pytest.mark.parametrize("chunk_size", [1, B * T, None])
def test_chunk_size_changes_no_number(chunk_size):
    compare(*models(), "jensen_shannon", chunk_size=chunk_size)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_do_not_count_are_never_looked_at(value):
    """In either pass and in either model, their upstream gradient included."""
    counted = MASK & (LABELS != -100)
    spoil = lambda name, x: np.where(counted[..., None], x, value) if name == "hidden" else x  # noqa: E731
    rows = {"labels": LABELS, "mask": MASK, "divergence": jaxkd.jensen_shannon(), "temperature": 1.5}
    spoilt = (x.map(spoil).astype(jnp.float32) for x in (STUDENT, TEACHER))
    got = values_and_pullback(*spoilt, np.where(counted, UPSTREAM, value), **rows)
    for x, y in zip(*map(jax.tree.leaves, (got, values_and_pullback(*models(), **rows))), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.any(got[1].hidden[~counted])


def test_label_outside_the_vocabulary_is_nan_in_its_row_alone():
    labels = np.where(LABELS == -100, 0, LABELS)
    labels[0, 1] = V
    values, _ = values_and_pullback(*models(), labels=labels)
    np.testing.assert_array_equal(np.isnan(values), labels == V)


def test_closed_tokens():
    """Infinite by definition in the row that has the token, and there alone."""
    z, z_teacher = np.random.default_rng(0).normal(scale=2, size=(2, 3, 11)).astype(np.float32)
    z[:, 2] = z_teacher[:, 2] = z_teacher[1, 4] = -np.inf
    values, gradient = values_and_pullback(
        jaxkd.Logits(z), jaxkd.Logits(z_teacher), np.array([1.0, 0, 1]), divergence=jaxkd.reverse_kl, chunk_size=2
    )
    np.testing.assert_array_equal(np.isinf(values), [False, True, False])
    assert not np.any(gradient.values[:, 2])
    assert np.isfinite(gradient.values[::2]).all()


def test_identical_models():
    student = STUDENT.astype(jnp.float32)
    values, gradient = values_and_pullback(student, student, divergence=jaxkd.jensen_shannon())
    assert np.all((values >= 0) & (values <= 1e-6))
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient)) < 1e-6


def test_teacher_gets_no_gradient():
    student, teacher = models()
    gradient = jax.grad(lambda x: jnp.sum(jaxkd.token_divergences(student, x, chunk_size=CHUNK)))(teacher)
    assert jax.tree.structure(gradient) == jax.tree.structure(teacher)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


Z = jaxkd.Logits(jnp.ones((4, 5)))
BAD = {
    "student": ((jnp.ones((4, 5)), Z), {}, TypeError, "`student`.*LinearLogits"),
    "teacher": ((Z, jnp.ones((4, 5))), {}, TypeError, "`teacher`.*LinearLogits"),
    "rows": ((Z, jaxkd.Logits(jnp.ones((3, 5)))), {}, ValueError, r"`teacher.values`.*\(3,\)"),
    "widths": ((Z, jaxkd.Logits(jnp.ones((4, 7)))), {}, ValueError, "V=5.*V=7.*`vocabulary`"),
    "labels": ((Z, Z, jnp.zeros(3, int)), {}, ValueError, r"`labels`.*\(3,\).*\(4,\)"),
    "mask": ((Z, Z), {"mask": jnp.ones(3, bool)}, ValueError, r"`mask`.*\(3,\).*\(4,\)"),
    "mask of numbers": ((Z, Z), {"mask": jnp.ones(4)}, TypeError, "`mask`.*float32"),
    "temperature": ((Z, Z), {"temperature": -1.0}, ValueError, "`temperature`.*-1"),
    "divergence": ((Z, Z), {"divergence": "kl"}, TypeError, "`divergence`.*kl"),
    "vocabulary": ((Z, Z), {"vocabulary": "pad"}, ValueError, "`vocabulary`.*pad"),
    "chunk_size": ((Z, Z), {"chunk_size": 0}, ValueError, "`chunk_size`.*0"),
    "implementation": ((Z, Z), {"implementation": "cuda"}, ValueError, "`implementation`.*cuda"),
    "triton": ((Z, Z), {"implementation": "triton", "divergence": jaxkd.mse}, ValueError, "triton.*whole rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        jaxkd.token_divergences(*arguments, **options)
