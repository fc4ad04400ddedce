"""Rows of one's own: the function of all logits at once, a gradient for every row, what the loop promises, errors."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

B, T, D, D_TEACHER, V, CHUNK = 3, 7, 12, 9, 67, 8
STUDENT, TEACHER = cases.head(0, (B, T), D, V, bias=True), cases.head(1, (B, T), D_TEACHER, V)
LABELS = cases.some_labels(3, (B, T), V)
COUNTED = LABELS != -100
FACTORS = np.random.default_rng(5).uniform(0.2, 2, size=(B, T)).astype(np.float32)
UPSTREAM = np.random.default_rng(6).normal(size=(B, T)).astype(np.float32)


def tempered_gap(logits, labels, per_row, shared):
    log_p, log_q = jax.nn.log_softmax(per_row["teacher"] / shared["tau"]), jax.nn.log_softmax(logits / shared["tau"])
    gap = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)
    if labels is not None:
        gap = gap - jnp.take_along_axis(log_q, labels[:, None], axis=1)[:, 0]
    return per_row["factors"] * gap


def run(student, teacher, labels=LABELS, factors=FACTORS, upstream=UPSTREAM, chunk_size=CHUNK):
    return values_and_pullback(student, teacher, labels, factors, upstream, 2.0, chunk_size)


@partial(jax.jit, static_argnums=6)
def values_and_pullback(student, teacher, labels, factors, upstream, tau, chunk_size):
    def rows(student):
        per_row = {"teacher": teacher, "factors": factors}
        return jaxkd.chunked_rows(
            tempered_gap, student, labels, per_row=per_row, shared={"tau": tau}, chunk_size=chunk_size
        )

    values, pullback = jax.vjp(rows, student)
    return values, pullback(upstream.astype(values.dtype))[0]


@jax.jit
def dense(student, teacher, labels, factors, upstream):
    """The same function, of one row's logits at a time, by `jax.vmap`; 0 where the label is ignored."""

    def rows(student):
        def one(hidden, teacher_hidden, label, factor):
            z = hidden @ student.weight.T + student.bias
            per_row = {"teacher": (teacher_hidden @ teacher.weight.T)[None], "factors": factor}
            return tempered_gap(z[None], label[None], per_row, {"tau": 2.0})[0]

        each = jax.vmap(jax.vmap(one))(student.hidden, teacher.hidden, jnp.maximum(labels, 0), factors)
        return jnp.where(labels == -100, 0, each)

    values, pullback = jax.vjp(rows, student)
    return values, pullback(upstream.astype(values.dtype))[0]


def models(dtype):
    return STUDENT.astype(dtype), TEACHER.astype(dtype)


def check(got, want, tolerance):
    assert got[0].shape == (B, T)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert cases.relative_error(x, y) <= tolerance


@pytest.mark.parametrize("chunk_size", [1, CHUNK, None])
def test_float64(chunk_size, x64):
    want = dense(*models(jnp.float64), LABELS, FACTORS, UPSTREAM)
    got = run(*models(jnp.float64), chunk_size=chunk_size)
    assert got[0].dtype == jnp.float64
    check(got, want, 1e-12)


def test_bfloat16():
    values, gradient = run(*models(jnp.bfloat16))
    with jax.enable_x64(True):
        exact = (x.astype(jnp.bfloat16) for x in (STUDENT, TEACHER))
        want = dense(*(cases.twin(x).astype(jnp.float64) for x in exact), LABELS, FACTORS, UPSTREAM)
    assert values.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}
    assert cases.relative_error(values, want[0]) < 1e-5
    assert (
        max(cases.relative_error(x, y) for x, y in zip(*map(jax.tree.leaves, (gradient, want[1])), strict=True)) < 5e-3
    )


def test_the_mean_is_the_loss():
    student, teacher = models(jnp.float32)
    for labels in (LABELS, None):
        values, _ = run(student, teacher, labels)
        per_row = {"teacher": teacher, "factors": FACTORS}
        loss, _ = jaxkd.chunked_loss(
            tempered_gap, student, labels, per_row=per_row, shared={"tau": jnp.asarray(2.0)}, chunk_size=CHUNK
        )
        np.testing.assert_allclose(values.mean(where=COUNTED if labels is LABELS else True), loss, rtol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_do_not_count_are_never_looked_at(value):
    """In either pass, and in nothing that is given by row."""
    spoil = lambda name, x: np.where(COUNTED[..., None], x, value) if name == "hidden" else x  # noqa: E731
    spoilt = (x.map(spoil).astype(jnp.float32) for x in (STUDENT, TEACHER))
    got = run(*spoilt, factors=np.where(COUNTED, FACTORS, value), upstream=np.where(COUNTED, UPSTREAM, value))
    for x, y in zip(*map(jax.tree.leaves, (got, run(*models(jnp.float32)))), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.any(got[0][~COUNTED])
    assert not np.any(got[1].hidden[~COUNTED])


def direction(logits, labels, per_row, shared):
    """NaN, and its gradient too, in a row of zeros, which is what fills the last chunk."""
    return logits[:, 0] / jnp.linalg.norm(logits, axis=1)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_a_function_that_cannot_do_with_zeros(labels):
    student = STUDENT.astype(jnp.float32)
    values, gradient = jax.value_and_grad(
        lambda s: jnp.sum(jaxkd.chunked_rows(direction, s, labels, chunk_size=CHUNK) ** 2)
    )(student)
    z = cases.twin(student).logits[np.ones(B * T, bool) if labels is None else COUNTED.reshape(-1)]
    np.testing.assert_allclose(values, np.sum((z[:, 0] / np.linalg.norm(z, axis=1)) ** 2), rtol=1e-5)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


def test_label_outside_the_vocabulary_is_nan_in_its_row_alone():
    labels = np.where(COUNTED, LABELS, 0)
    labels[1, 2] = V
    values, _ = run(*models(jnp.float32), labels)
    np.testing.assert_array_equal(np.isnan(values), labels == V)


def test_no_rows_and_none_that_count():
    student, teacher = models(jnp.float32)
    assert not any(np.any(x) for x in jax.tree.leaves(run(student, teacher, np.full((B, T), -100))))
    empty = jaxkd.chunked_rows(direction, jaxkd.Logits(jnp.ones((0, 4, 5))))
    assert empty.shape == (0, 4)


CONSTANTS = {
    r"per_row\['teacher'\].weight": lambda x: {"per_row": {"teacher": jaxkd.LinearLogits(jnp.ones((B, T, D)), x)}},
    r"shared\['tau'\]": lambda x: {"shared": {"tau": x[0, 0]}},
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_not_differentiated(name):
    def rows(x):
        changed = CONSTANTS[name](x)
        per_row = {"teacher": TEACHER.astype(jnp.float32), "factors": FACTORS} | changed.pop("per_row", {})
        options = {"shared": {"tau": 2.0}} | changed
        return jnp.sum(jaxkd.chunked_rows(tempered_gap, STUDENT.astype(jnp.float32), per_row=per_row, **options))

    with pytest.raises(TypeError, match=rf"`{name}`.*stop_gradient"):
        jax.grad(rows)(jnp.ones((V, D)))


BAD = {
    "function": ({"function": "kl"}, TypeError, "`function`.*kl"),
    "student": ({"student": STUDENT.hidden}, TypeError, "`student`.*LinearLogits"),
    "labels": ({"labels": np.zeros((B, T + 1), int)}, ValueError, r"`labels`.*\(3, 8\).*`student.hidden`.*\(3, 7\)"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "`chunk_size`.*0"),
    "ignore_index": ({"ignore_index": 0.5}, TypeError, "`ignore_index`.*0.5"),
    "rows": ({"per_row": {"a": np.ones((B, T + 1))}}, ValueError, r"`per_row\['a'\]`.*\(3, 8\).*\(3, 7\).*`shared`"),
    "scalar": ({"function": lambda z, *_: jnp.sum(z)}, ValueError, r"`function`.*\(\).*\(8,\)"),
    "shape": ({"function": lambda z, *_: z}, ValueError, r"`function`.*\(8, 67\).*\(8,\)"),
    "metrics": ({"function": lambda z, *_: (z[:, 0], {"top": z[:, 1]})}, (TypeError, ValueError), "`function`.*alone"),
    "nothing": ({"function": lambda *_: None}, TypeError, "`function`.*None"),
    "mixed rows": ({"function": lambda z, *_: z[:, 0] - jnp.mean(z[:, 0])}, ValueError, "`function`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    arguments = {"function": direction, "student": STUDENT.astype(jnp.float32), "chunk_size": CHUNK} | changes
    with pytest.raises(error, match=message):
        jaxkd.chunked_rows(**arguments)
