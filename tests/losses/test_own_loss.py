"""A row loss of one's own: against a loss that jaxkd has, and every promise that does not hang on the function."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import jaxkd

N, D, D_TEACHER, V, CHUNK = 23, 12, 9, 123, 8
STUDENT, TEACHER = cases.head(0, N, D, V, bias=True), cases.head(1, N, D_TEACHER, V)
LABELS = cases.some_labels(3, N, V)
WEIGHTS = np.random.default_rng(4).uniform(0.2, 2, size=N).astype(np.float32)
FACTORS = np.random.default_rng(5).uniform(0.2, 2, size=N).astype(np.float32)


def tempered_kl(logits, labels, per_row, shared):
    """The soft and hard loss of `distillation_loss` by other means, each row times a factor."""
    log_p, log_q = jax.nn.log_softmax(per_row["teacher"] / shared["tau"]), jax.nn.log_softmax(logits / shared["tau"])
    soft = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)
    hard = jnp.zeros_like(soft)
    if labels is not None:
        hard = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return per_row["factors"] * (0.3 * soft + 0.7 * hard), {"soft": soft, "factor": per_row["factors"]}


def run(
    labels=LABELS, student=STUDENT, teacher=TEACHER, dtype=jnp.float32, factors=FACTORS, chunk_size=CHUNK, **options
):
    per_row = {"teacher": teacher.astype(dtype), "factors": factors}
    return value_and_grad(student.astype(dtype), labels, per_row, 2.0, options, chunk_size)


@partial(jax.jit, static_argnums=5)
def value_and_grad(student, labels, per_row, tau, options, chunk_size):
    def loss(student):
        return jaxkd.chunked_loss(
            tempered_kl, student, labels, per_row=per_row, shared={"tau": tau}, chunk_size=chunk_size, **options
        )

    return jax.value_and_grad(loss, has_aux=True)(student)


def truth(labels=LABELS, dtype=jnp.float32, weights=None, normalizer=None, student=STUDENT, teacher=TEACHER):
    """The factors are weights of another name; they leave the normaliser alone."""
    w = np.ones(N) if weights is None else weights
    counted = np.ones(N, bool) if labels is None else labels != -100
    return cases.distillation(
        cases.twin(student.astype(dtype)),
        cases.twin(teacher.astype(dtype)),
        labels,
        divergence="forward_kl",
        temperature=2.0,
        soft_weight=0.3,
        hard_weight=0.0 if labels is None else 0.7,
        weights=w * FACTORS,
        normalizer=w[counted].sum() if normalizer is None else normalizer,
    )


def check(result, want, gradient=1e-5):
    (loss, metrics), got = result
    assert float(loss) == pytest.approx(want.loss, rel=3e-6)
    assert metrics["num_rows"] == want.num_rows
    assert max(cases.gradient_errors(got, want.gradient).values()) <= gradient


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("labels", [LABELS, None])
@pytest.mark.parametrize("options", [{}, {"weights": WEIGHTS}, {"weights": WEIGHTS, "normalizer": 11.0}])
def test_against_the_truth(labels, options):
    check(run(labels, **options), truth(labels, **options))


def test_bfloat16():
    (loss, _), gradient = run(dtype=jnp.bfloat16)
    assert loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}
    check(((loss, {"num_rows": (LABELS != -100).sum()}), gradient), truth(dtype=jnp.bfloat16), gradient=5e-3)


def test_metrics_are_normalised_as_the_loss_and_carry_no_gradient():
    (_, metrics), _ = run(weights=WEIGHTS)
    counted = LABELS != -100
    assert metrics.keys() == {"soft", "factor", "num_rows"}
    mean = (WEIGHTS * FACTORS)[counted].sum() / WEIGHTS[counted].sum()
    np.testing.assert_allclose(metrics["factor"], mean, rtol=1e-6)

    def metric(student):
        per_row = {"teacher": TEACHER.astype(jnp.float32), "factors": FACTORS}
        return jaxkd.chunked_loss(tempered_kl, student, LABELS, per_row=per_row, shared={"tau": 2.0})[1]["soft"]

    assert not any(np.any(x) for x in jax.tree.leaves(jax.grad(metric)(STUDENT.astype(jnp.float32))))


def test_leading_axes_and_rows_of_any_rank():
    rng = np.random.default_rng(0)
    logits, table = rng.normal(size=(3, 5, V)).astype(np.float32), rng.normal(size=(3, 5, V, 2)).astype(np.float32)

    def loss(values, table):
        return jaxkd.chunked_loss(projected, jaxkd.Logits(values), per_row=(table,), chunk_size=4)[0]

    want = 2 * np.einsum("btk,btvk->btv", np.einsum("btv,btvk->btk", logits, table), table) / 15
    np.testing.assert_allclose(jax.grad(loss)(logits, table), want, rtol=2e-5, atol=1e-5)


def projected(logits, labels, per_row, shared):
    return jnp.sum(jnp.einsum("cv,cvk->ck", logits, per_row[0]) ** 2, axis=1)


def test_rows_that_do_not_count_are_never_looked_at():
    def spoil(name, x):
        return np.where((LABELS == -100)[:, None], np.nan, x) if name == "hidden" else x

    clean = run()
    factors = np.where(LABELS == -100, np.float32(np.nan), FACTORS)
    assert_equal(run(student=STUDENT.map(spoil), teacher=TEACHER.map(spoil), factors=factors), clean)


def direction(logits, labels, per_row, shared):
    """NaN, and its gradient too, in a row of zeros, which is what fills the last chunk."""
    return logits[:, 0] / jnp.linalg.norm(logits, axis=1)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_a_function_that_cannot_do_with_zeros(labels):
    student = cases.head(0, N, D, V).astype(jnp.float32)
    loss, gradient = jax.value_and_grad(lambda s: jaxkd.chunked_loss(direction, s, labels, chunk_size=CHUNK)[0])(
        student
    )
    z = cases.twin(student).logits[np.ones(N, bool) if labels is None else labels != -100]
    np.testing.assert_allclose(loss, (z[:, 0] / np.linalg.norm(z, axis=1)).mean(), rtol=1e-5)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


def test_no_counted_row():
    (loss, metrics), gradient = run(np.full(N, -100))
    assert loss == 0
    assert not any(np.any(x) for x in jax.tree.leaves((metrics, gradient)))


def test_label_outside_the_vocabulary():
    labels = LABELS.copy()
    labels[0] = V
    (loss, _), _ = run(labels)
    assert np.isnan(loss)


@pytest.mark.parametrize("chunk_size", [1, None])
def test_chunk_size_changes_no_number(chunk_size):
    check(run(chunk_size=chunk_size), truth())


def test_no_more_than_a_chunk_of_logits():
    student, teacher = STUDENT.astype(jnp.float32), TEACHER.astype(jnp.float32)

    def loss(student):
        per_row = {"teacher": teacher, "factors": FACTORS}
        return jaxkd.chunked_loss(tempered_kl, student, LABELS, per_row=per_row, shared={"tau": 2.0}, chunk_size=CHUNK)[
            0
        ]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(student)
    assert jaxprs.most_rows(jaxpr, V, {(V, D), (V, D_TEACHER), (D, V), (D_TEACHER, V)}) == CHUNK
    assert len(jaxprs.products(jaxpr)) == 4
    assert len(jaxprs.products(jax.make_jaxpr(loss)(student))) == 2


CONSTANTS = {
    r"per_row\['teacher'\].weight": lambda x: {"per_row": {"teacher": jaxkd.LinearLogits(jnp.ones((N, D_TEACHER)), x)}},
    r"shared\['tau'\]": lambda x: {"shared": {"tau": x[0, 0]}},
    "weights": lambda x: {"weights": jnp.abs(x[:N, 0])},
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_not_differentiated(name):
    def loss(x):
        changed = CONSTANTS[name](x)
        per_row = {"teacher": TEACHER.astype(jnp.float32), "factors": FACTORS} | changed.pop("per_row", {})
        options = {"shared": {"tau": 2.0}} | changed
        return jaxkd.chunked_loss(tempered_kl, STUDENT.astype(jnp.float32), per_row=per_row, **options)[0]

    with pytest.raises(TypeError, match=rf"`{name}`.*stop_gradient"):
        jax.grad(loss)(jnp.asarray(TEACHER.weight, jnp.float32))


BAD = {
    "function": ({"function": "kl"}, TypeError, "`function`.*kl"),
    "student": ({"student": STUDENT.hidden}, TypeError, "`student`.*LinearLogits"),
    "labels": ({"labels": np.zeros(N + 1, int)}, ValueError, r"`labels`.*\(24,\).*`student.hidden`.*\(23,\)"),
    "weights": ({"weights": -WEIGHTS}, ValueError, "`weights`.*negative"),
    "normalizer": ({"normalizer": -1.0}, ValueError, "`normalizer`.*-1"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "`chunk_size`.*0"),
    "ignore_index": ({"ignore_index": 0.5}, TypeError, "`ignore_index`.*0.5"),
    "rows": ({"per_row": {"a": np.ones(N + 1)}}, ValueError, r"`per_row\['a'\]`.*\(24,\).*\(23,\).*`shared`"),
    "teacher": (
        {"per_row": (jaxkd.Logits(jnp.ones((5, V))),)},
        ValueError,
        r"`per_row\[0\]`.*\(5,\).*`student.hidden`.*\(23,\)",
    ),
    "teacher_itself": ({"per_row": (jaxkd.Logits(jnp.ones((N, 0))),)}, ValueError, r"`per_row\[0\]\.values`.*V=0"),
    "scalar": ({"function": lambda z, *_: jnp.sum(z)}, ValueError, r"`function`.*\(\) as the loss.*\(8,\)"),
    "shape": ({"function": lambda z, *_: z}, ValueError, r"`function`.*\(8, 123\).*\(8,\)"),
    "metric": ({"function": lambda z, *_: (z[:, 0], {"m": z})}, ValueError, r"`function`.*\(8, 123\) as m;.*\(8,\)"),
    "reserved": ({"function": lambda z, *_: (z[:, 0], {"loss": z[:, 0]})}, ValueError, "`function`.*'loss'"),
    "nothing": ({"function": lambda *_: None}, TypeError, "`function`.*None as the loss"),
    "metrics": ({"function": lambda z, *_: (z[:, 0], z[:, 1])}, TypeError, "`function`.*dict"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    arguments = {"function": direction, "student": STUDENT.astype(jnp.float32), "chunk_size": CHUNK} | changes
    with pytest.raises(error, match=message):
        jaxkd.chunked_loss(**arguments)
