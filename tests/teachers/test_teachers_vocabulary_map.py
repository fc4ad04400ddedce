"""A teacher of another tokenizer: worked numbers, float64 truth by buckets, its laws, and what is refused."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import jaxkd

N, D, V, V_TEACHER, S, CHUNK = 13, 8, 61, 47, 25, 4
RNG = np.random.default_rng(0)
STUDENT_IDS, TEACHER_IDS = RNG.permutation(V)[:S], RNG.permutation(V_TEACHER)[:S]
STUDENT, TEACHER = cases.head(0, N, D, V), cases.head(1, N, 6, V_TEACHER, bias=True, softcap=8.0)
LABELS = cases.some_labels(4, N, V, ignored=0.4)


def in_buckets(z, ids, temperature):
    p = np.exp(cases.log_softmax(z / temperature))
    return np.log(np.concatenate([p[:, ids], np.delete(p, ids, axis=1).sum(1, keepdims=True)], axis=1))


def run(student, teacher, ids=(STUDENT_IDS, TEACHER_IDS), labels=None, **options):
    return loss_and_gradient(student, teacher, ids, labels, **options)


@partial(jax.jit, static_argnames=("sharding",))
def loss_and_gradient(student, teacher, ids, labels, **options):
    """((loss, metrics), gradient to the student), with all numbers traced: one program for many tests."""
    return jax.value_and_grad(jaxkd.distillation_loss, has_aux=True)(
        student, jaxkd.VocabularyMap(teacher, *ids), labels, chunk_size=CHUNK, **options
    )


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon_0.1", "hellinger"])
def test_float64(name, x64):
    """The value, and the gradient along a direction by central differences; ignored rows hold NaN."""
    counted = LABELS != -100
    labels = jnp.asarray(LABELS)
    weights = RNG.uniform(0.5, 2, size=N)
    shares = weights[counted] / weights[counted].sum()
    log_p = in_buckets(TEACHER.logits[counted], TEACHER_IDS, 1.5)

    def exact(z):
        rows = cases.DIVERGENCES[name].truth(log_p, in_buckets(z[counted], STUDENT_IDS, 1.5))[0]
        return shares @ rows

    poisoned = TEACHER.map(lambda f, x: np.where(counted[:, None], x, np.nan) if f == "hidden" else x)
    student = jnp.where(counted[:, None], STUDENT.logits, np.nan)
    options = {"divergence": cases.DIVERGENCES[name].make(), "temperature": 1.5, "weights": weights}
    (loss, _), gradient = run(jaxkd.Logits(student), poisoned.astype(jnp.float64), labels=labels, **options)
    assert float(loss) == pytest.approx(exact(STUDENT.logits), rel=1e-12)
    direction, step = np.random.default_rng(3).normal(size=(N, V)), 1e-6
    difference = exact(STUDENT.logits + step * direction) - exact(STUDENT.logits - step * direction)
    assert float(np.vdot(gradient.values, direction)) == pytest.approx(difference / (2 * step), rel=1e-6)
    assert not np.any(gradient.values[~counted])


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_tokens_that_are_all_shared_are_the_plain_loss(name):
    """In another order, hard loss and head included."""
    teacher = cases.head(1, N, 6, V)
    order = RNG.permutation(V)
    moved = teacher.map(lambda f, x: x[np.argsort(order)] if f == "weight" else x).astype(jnp.float32)
    options = {"divergence": cases.DIVERGENCES[name].make(), "temperature": 1.5, "hard_weight": 0.5}
    got = run(STUDENT.astype(jnp.float32), moved, (np.arange(V), order), LABELS, **options)
    truth = cases.distillation(
        *(cases.twin(x.astype(jnp.float32)) for x in (STUDENT, teacher)), LABELS, **options | {"divergence": name}
    )
    cases.check(got, truth, loss=3e-6, gradient=1e-5)


def test_fewer_shared_tokens_are_a_lower_bound():
    student, teacher = STUDENT.astype(jnp.float32), cases.head(1, N, 6, V).astype(jnp.float32)
    values = [float(run(student, teacher, (ids, ids))[0][0]) for ids in (np.arange(1), np.arange(20), np.arange(V))]
    assert 0 < values[0] < values[1] < values[2]


def test_a_student_with_the_teachers_buckets_is_at_zero():
    """How the rest is spread makes no difference."""
    teacher = jaxkd.Logits(jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1]])))
    student = jaxkd.Logits(jnp.log(jnp.array([[0.05, 0.5, 0.2, 0.2, 0.05]])))
    (loss, _), gradient = run(student, teacher, (np.array([1, 2]), np.array([0, 1])))
    assert 0 <= loss < 1e-6
    assert np.max(np.abs(gradient.values)) < 1e-6


def test_a_tiny_rest_keeps_its_digits(x64):
    """1 - sum would be 0 here."""
    student = np.array([[0.0, 1.0, -50.0, -52.0]])
    teacher = np.array([[0.0, 1.5, -3.0]])
    ids = np.arange(2), np.arange(2)
    (loss, _), _ = run(jaxkd.Logits(jnp.asarray(student)), jaxkd.Logits(jnp.asarray(teacher)), ids)
    total = np.log(np.exp(student[0]).sum())
    log_q = np.array([-total, 1 - total, np.log(np.exp(-50) + np.exp(-52)) - total])
    log_p = cases.log_softmax(teacher[0])
    assert float(loss) == pytest.approx(np.exp(log_p) @ (log_p - log_q), rel=1e-13)


@pytest.mark.parametrize("wrong", [-1, V, 4])
def test_traced_ids_that_do_not_fit_are_no_number(wrong):
    """Outside, or there already."""
    student = jaxkd.Logits(jnp.asarray(STUDENT.logits, jnp.float32))

    ids = np.arange(S)
    assert np.isfinite(run(student, student, (ids, ids))[0][0])
    (value, _), gradient = run(student, student, (np.where(ids == 7, wrong, ids), ids))
    assert np.isnan(value)
    assert np.isnan(gradient.values).any()


def test_no_gradient_to_the_teacher():
    student = STUDENT.astype(jnp.float32)

    def loss(teacher):
        return jaxkd.distillation_loss(student, jaxkd.VocabularyMap(teacher, STUDENT_IDS, TEACHER_IDS))[0]

    assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(loss))(TEACHER.astype(jnp.float32))))


def test_no_more_than_a_chunk_of_logits():
    rows, width, chunk_size = 96, 1009, 16
    student, teacher = (cases.head(i, rows, 40, width + 8 * i).astype(jnp.float32) for i in (0, 1))
    ids = np.arange(500)

    def loss(student, teacher):
        mapped = jaxkd.VocabularyMap(teacher, ids, ids[::-1])
        return jaxkd.distillation_loss(student, mapped, chunk_size=chunk_size)[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(student, teacher)
    for size in (width, width + 8):
        assert jaxprs.most_rows(jaxpr, size, {(size, 40), (40, size)}) == chunk_size


def test_rows_over_a_mesh():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
    models = [x.astype(jnp.float32) for x in (STUDENT, TEACHER)]
    want, got = (run(*models, sharding=x) for x in (None, jaxkd.Sharding("data", mesh=mesh)))
    np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-6)
    assert cases.relative_error(got[1].weight, want[1].weight) < 1e-6


# All of a side's tokens are shared, and the other has more.
DRAFT = (jaxkd.Logits(jnp.zeros((1, 2))), jaxkd.Logits(jnp.log(jnp.array([[0.2, 0.3, 0.5]]))), [1, 0], [2, 0])
WIDER = (jaxkd.Logits(jnp.log(jnp.array([[0.2, 0.3, 0.5]]))), jaxkd.Logits(jnp.zeros((1, 2))), [2, 0], [1, 0])
ENDLESS = [
    (
        DRAFT,
        jaxkd.forward_kl,
        "all V=2 tokens of the student, and the teacher has 1 more.*weight.token_ids.*teacher_ids",
    ),
    (DRAFT, jaxkd.symmetric_kl(), "infinite"),
    (DRAFT, jaxkd.alpha_divergence(2.0), "infinite"),
    (
        WIDER,
        jaxkd.reverse_kl,
        "all V=2 tokens of the teacher, and the student has 1 more.*weight.token_ids.*student_ids",
    ),
]


@pytest.mark.parametrize(("case", "divergence", "message"), ENDLESS)
def test_what_is_infinite_by_construction_is_refused(case, divergence, message):
    student, teacher, *ids = case
    with pytest.raises(ValueError, match=message):
        jaxkd.distillation_loss(student, jaxkd.VocabularyMap(teacher, *map(np.array, ids)), divergence=divergence)
    with pytest.raises(ValueError, match=message):
        jax.jit(
            lambda x, y: jaxkd.distillation_loss(x, jaxkd.VocabularyMap(y, *map(np.array, ids)), divergence=divergence)
        )(student, teacher)


def test_what_is_finite_is_not():
    """In buckets P = (1/2, 1/5, 3/10) and Q = (1/2, 1/2, 0), or the other way round."""
    for (student, teacher, *ids), divergence, want in (
        (DRAFT, jaxkd.reverse_kl, 0.5 * np.log(2.5)),
        (DRAFT, jaxkd.total_variation, 0.3),
        (WIDER, jaxkd.forward_kl, 0.5 * np.log(2.5)),
        (WIDER, jaxkd.jensen_shannon(0.5), 0.25 * np.log(10 / 7) + 0.1 * np.log(4 / 7) + 0.15 * np.log(2)),
    ):
        mapped = jaxkd.VocabularyMap(teacher, *map(np.array, ids))
        loss, _ = jaxkd.distillation_loss(student, mapped, divergence=divergence)
        np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_the_sliced_head_is_what_the_error_says():
    """The teacher over the draft's tokens is (2/7, 5/7), in the order of the student's: KL(5/7, 2/7 ‖ 1/2, 1/2)."""
    student, teacher, student_ids, teacher_ids = DRAFT
    token_ids = np.array(teacher_ids)[np.argsort(student_ids)]
    loss, _ = jaxkd.distillation_loss(student, jaxkd.Logits(teacher.values[:, token_ids]))
    np.testing.assert_allclose(loss, 2 / 7 * np.log(4 / 7) + 5 / 7 * np.log(10 / 7), rtol=1e-6)


TWO = jaxkd.Logits(jnp.ones((2, 5)))
BAD = [
    (jnp.ones((2, 5)), [0], [0], {}, TypeError, "`teacher.teacher`.*LinearLogits"),
    (jaxkd.Mixture([TWO]), [0], [0], {}, TypeError, "`teacher.teacher` is a Mixture"),
    (TWO, [0.0], [0], {}, TypeError, "`teacher.student_ids`.*float.*integer"),
    (TWO, [0, 1], [0], {}, ValueError, r"`teacher.student_ids`.*`teacher.teacher_ids`.*\(2,\).*\(1,\)"),
    (TWO, [[0]], [[0]], {}, ValueError, r"\(S,\)"),
    (TWO, np.zeros(0, int), np.zeros(0, int), {}, ValueError, "one pair"),
    (TWO, [0, 9], [0, 1], {}, ValueError, "`teacher.student_ids` has 9.*student has V=9"),
    (TWO, [0, 1], [0, 5], {}, ValueError, "`teacher.teacher_ids` has 5.*teacher has V=5"),
    (TWO, [0, -1], [0, 1], {}, ValueError, "`teacher.student_ids` has -1"),
    (TWO, [0, 1, 0], [0, 1, 2], {}, ValueError, "`teacher.student_ids` has 0 more than once"),
    (TWO, [0, 1, 2], [3, 1, 3], {}, ValueError, "`teacher.teacher_ids` has 3 more than once"),
    (jaxkd.Logits(jnp.ones((3, 5))), [0], [0], {}, ValueError, r"`teacher.teacher.values`.*\(3,\).*\(2,\)"),
    (TWO, [0], [0], {"divergence": jaxkd.mse}, ValueError, "`divergence`.*`teacher`, a VocabularyMap"),
    (TWO, [0], [0], {"implementation": "triton"}, ValueError, "triton.*buckets of tokens"),
]


@pytest.mark.parametrize(("teacher", "student_ids", "teacher_ids", "options", "error", "message"), BAD)
def test_bad_input(teacher, student_ids, teacher_ids, options, error, message):
    teacher = jaxkd.VocabularyMap(teacher, np.array(student_ids), np.array(teacher_ids))
    with pytest.raises(error, match=message):
        jaxkd.distillation_loss(jaxkd.Logits(jnp.ones((2, 9))), teacher, **options)
