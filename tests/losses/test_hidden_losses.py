"""Losses of hidden states against float64 NumPy with gradients in closed form; masks, weights and bad input."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

B, T, D, WIDE, CHUNK = 2, 7, 6, 9, 4
RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(B, T, D)), RNG.normal(size=(B, T, WIDE))
PROJECTION = RNG.normal(size=(WIDE, D)) / np.sqrt(D)
LABELS = cases.some_labels(1, (B, T), 50000, ignored=0.4)
WEIGHTS = RNG.uniform(0.5, 2, size=(B, T)).astype(np.float32)
LOSSES = {"hidden_cosine": jaxkd.hidden_cosine, "hidden_mse": jaxkd.hidden_mse}


def truth(name, student, teacher, projection, labels=LABELS, weights=None, normalizer=None):
    counted = np.ones((B, T), bool) if labels is None else labels != -100
    s, t = student[counted], teacher[counted]
    w = np.ones(len(s)) if weights is None else weights[counted]
    w = (w / (w.sum() if normalizer is None else normalizer))[:, None]
    y = s if projection is None else s @ projection.T
    if name == "hidden_mse":
        rows, dy = np.square(y - t).mean(1), 2 * (y - t) / t.shape[1]
    else:
        lengths = np.linalg.norm(y, axis=1, keepdims=True), np.linalg.norm(t, axis=1, keepdims=True)
        cosine = (y * t).sum(1, keepdims=True) / (lengths[0] * lengths[1])
        rows, dy = 1 - cosine[:, 0], cosine * y / lengths[0] ** 2 - t / (lengths[0] * lengths[1])
    dy = w * dy
    dstudent = np.zeros_like(student)
    dstudent[counted] = dy if projection is None else dy @ projection
    return w[:, 0] @ rows, dstudent, dy.T @ s


def run(name, student, teacher, projection=None, labels=LABELS, dtype=jnp.float32, **options):
    arrays = [None if x is None else jnp.asarray(x, dtype) for x in (student, projection, teacher)]
    return value_and_gradients(name, *arrays, labels, options)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(name, student, projection, teacher, labels, options):
    def loss(student, projection):
        return LOSSES[name](student, teacher, labels, projection=projection, chunk_size=CHUNK, **options)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(student, projection)


SETTINGS = [{}, {"labels": None}, {"weights": WEIGHTS}, {"weights": WEIGHTS, "normalizer": 5.0}]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_projected(name, options):
    (loss, metrics), (dstudent, dprojection) = run(name, STUDENT, TEACHER, PROJECTION, **options)
    want, want_dstudent, want_dprojection = truth(name, STUDENT, TEACHER, PROJECTION, **options)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    assert metrics == {"num_rows": B * T if "labels" in options else np.sum(LABELS != -100)}
    assert cases.relative_error(dstudent, want_dstudent) < 1e-5
    assert cases.relative_error(dprojection, want_dprojection) < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_of_one_width_in_float64(name, x64):
    (loss, _), (dstudent, _) = run(name, STUDENT, TEACHER[..., :D], dtype=jnp.float64)
    want, want_dstudent, _ = truth(name, STUDENT, TEACHER[..., :D], None)
    assert loss.dtype == dstudent.dtype == jnp.float64
    assert float(loss) == pytest.approx(want, rel=1e-13)
    assert cases.relative_error(dstudent, want_dstudent) < 1e-12


def test_outside_implementation():
    torch = pytest.importorskip("torch")
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER[..., :D])
    cosine = torch.nn.functional.cosine_embedding_loss(
        student.flatten(0, 1), teacher.flatten(0, 1), torch.ones(B * T, dtype=torch.float64)
    )
    for name, want in (("hidden_cosine", cosine), ("hidden_mse", torch.nn.functional.mse_loss(student, teacher))):
        assert float(run(name, STUDENT, TEACHER[..., :D], labels=None)[0][0]) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_do_not_count_are_never_looked_at(name):
    clean = run(name, STUDENT, TEACHER, PROJECTION, weights=WEIGHTS)
    hole = (LABELS == -100)[..., None]
    spoiled = np.where(hole, np.nan, STUDENT), np.where(hole, np.inf, TEACHER)
    result = run(name, *spoiled, PROJECTION, weights=np.where(hole[..., 0], np.nan, WEIGHTS))
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_counts(name):
    result = run(name, STUDENT, TEACHER, PROJECTION, np.full((B, T), -100))
    assert not any(np.any(x) for x in jax.tree.leaves(result))


def test_bfloat16():
    """Both products in bfloat16, the head's gradient summed in float32."""
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (STUDENT, TEACHER, PROJECTION)]
    (loss, _), gradients = run("hidden_cosine", STUDENT, TEACHER, PROJECTION, dtype=jnp.bfloat16)
    want, *want_gradients = truth("hidden_cosine", *rounded)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(want, rel=1e-5)
    for got, exact in zip(gradients, want_gradients, strict=True):
        assert got.dtype == jnp.bfloat16
        assert cases.relative_error(got, exact) < 5e-3


def test_no_gradient_to_the_teacher():
    gradient = jax.grad(lambda t: jaxkd.hidden_mse(jnp.ones((3, 2)), t)[0])(jnp.zeros((3, 2)))
    assert not np.any(gradient)


def test_a_state_of_zeros_has_no_direction():
    value, gradient = jax.value_and_grad(lambda s: jaxkd.hidden_cosine(s, jnp.ones((1, 3)))[0])(jnp.zeros((1, 3)))
    assert value == 1
    assert not np.any(gradient)


GOOD = {"student_hidden": jnp.ones((B, T, D)), "teacher_hidden": jnp.ones((B, T, D))}
BAD = {
    "width": (
        {"teacher_hidden": jnp.ones((B, T, 9))},
        ValueError,
        "`teacher_hidden`.*D=9.*`student_hidden`.*D=6.*proj",
    ),
    "rows": ({"teacher_hidden": jnp.ones((B, 8, D))}, ValueError, r"`teacher_hidden`.*\(2, 8\).*\(2, 7\)"),
    "type": ({"student_hidden": jnp.ones((B, T, D), int)}, TypeError, "`student_hidden`.*int"),
    "list": ({"teacher_hidden": [[1.0]]}, TypeError, "`teacher_hidden`.*list"),
    "scalar": ({"student_hidden": jnp.ones(())}, ValueError, r"`student_hidden`.*\(\.\.\., D\)"),
    "projection": ({"projection": jnp.ones((6, 5))}, ValueError, r"`projection`.*\(6, 5\).*Dt=6.*D=6"),
    "transposed": (
        {"teacher_hidden": jnp.ones((B, T, 9)), "projection": jnp.ones((6, 9))},
        ValueError,
        r"`projection`.*transposed.*projection\.T",
    ),
    "rank": ({"projection": jnp.ones(6)}, ValueError, r"`projection`.*\(6,\).*\(Dt, D\)"),
    "labels": ({"labels": jnp.zeros((B, 8), int)}, ValueError, r"`labels`.*\(2, 8\).*\(2, 7\)"),
    "weights": ({"weights": -np.ones((B, T))}, ValueError, "`weights`.*-1"),
    "ignore_index": ({"ignore_index": 1.0}, TypeError, "`ignore_index`"),
    "normalizer": ({"normalizer": -1}, ValueError, "`normalizer`"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "`chunk_size`"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, name):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        LOSSES[name](**GOOD | changes)
