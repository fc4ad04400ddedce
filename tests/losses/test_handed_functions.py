"""Functions that a user hands in: what sums, mixes or reshapes rows is refused before any work, in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd.loop.handed_functions import check_row_function

N, V, CHUNK = 7, 11, 3
STUDENT, TEACHER = (jaxkd.Logits(jnp.asarray(z, jnp.float32)) for z in np.random.default_rng(0).normal(size=(2, N, V)))


def squares(teacher, student):
    return jnp.mean(jnp.square(student - teacher), axis=1)


def rescaled(teacher, student):
    """Of one row too it is a number, and of two of C rows: (C,) in every chunk."""
    row = squares(teacher, student)
    return row - jnp.mean(row)


# What a function of rows may not be, and what the error says of it.
BAD_ROWS = {
    "mean over all": (lambda t, s: jnp.mean(jnp.square(s - t)), r"returns \(\) as the loss"),
    "whole rows": (lambda t, s: jnp.square(s - t), r"returns \(3, 11\) as the loss"),
    "column": (lambda t, s: squares(t, s)[:, None], r"returns \(3, 1\) as the loss"),
    "batch mean taken off": (rescaled, "`reduce_sum` along the axis of rows"),
    "softmax over rows": (lambda t, s: squares(t, jax.nn.softmax(s, axis=0)), "along the axis of rows"),
    "running sum": (lambda t, s: jnp.cumsum(squares(t, s)), "`cumsum` along the axis of rows"),
    "sorted": (lambda t, s: jnp.sort(squares(t, s)), "`sort` along the axis of rows"),
    "next row": (lambda t, s: squares(jnp.roll(t, 1, axis=0), s), "`concatenate` along the axis of rows"),
    "covariance": (lambda t, s: jnp.sum(s @ (t.T @ s), axis=1), "`dot_general` along the axis of rows"),
    "other rows": (lambda t, s: jax.nn.logsumexp(s @ t.T, axis=1), "along the axis of rows"),
    "in a scan": (
        lambda t, s: jax.lax.fori_loop(0, 2, lambda _, x: x - jnp.mean(x), squares(t, s)),
        "along the axis of rows",
    ),
    "in a call": (lambda t, s: jax.checkpoint(jax.jit(rescaled))(t, s), "along the axis of rows"),
    "number of rows": (lambda t, s: squares(t, s) * jnp.arange(CHUNK), "runs on 3 rows and not on"),
    "number": (lambda t, s: 1.0, r"returns \(\) as the loss"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("call", ["distillation_loss", "chunked_loss", "token_statistics", "jit"])
def test_functions_of_rows(case, call):
    function, message = BAD_ROWS[case]
    divergence = jaxkd.RowDivergence(function)

    def distill():
        return jaxkd.distillation_loss(STUDENT, TEACHER, divergence=divergence, chunk_size=CHUNK)

    calls = {
        "distillation_loss": distill,
        "token_statistics": lambda: jaxkd.token_statistics(
            STUDENT, teacher=TEACHER, divergence=divergence, chunk_size=CHUNK
        ),
        "chunked_loss": lambda: jaxkd.chunked_loss(
            lambda z, labels, teacher, shared: function(teacher, z), STUDENT, per_row=TEACHER, chunk_size=CHUNK
        ),
        "jit": lambda: jax.jit(distill).trace(),
    }
    with pytest.raises((TypeError, ValueError), match=f"`(divergence.)?function`.*{message}"):
        calls[call]()


def test_the_mean_over_a_chunk_that_was_weighed_as_a_row():
    """What is right, by a function of rows, is the mean of the rows whatever the chunk."""
    want = np.mean(np.square(np.asarray(STUDENT.values) - TEACHER.values))
    for chunk_size in (None, 3, 1):
        loss, _ = jaxkd.distillation_loss(
            STUDENT, TEACHER, divergence=jaxkd.RowDivergence(squares), chunk_size=chunk_size
        )
        np.testing.assert_allclose(loss, want, rtol=1e-6)


def row_by_row(teacher, student):
    return jax.lax.map(lambda z: jnp.sum(jnp.sort(z[0]) - jnp.sort(z[1])) ** 2, (teacher, student))


def through_a_product(teacher, student):
    return jnp.sum((student @ jnp.eye(V)) * teacher, axis=1) ** 2 + jnp.cumsum(student, axis=1)[:, -1] ** 2


@pytest.mark.parametrize("function", [squares, row_by_row, through_a_product, jax.vmap(lambda t, s: jnp.max(s - t))])
def test_what_looks_at_a_row_alone_is_taken(function):
    loss, _ = jaxkd.distillation_loss(STUDENT, TEACHER, divergence=jaxkd.RowDivergence(function), chunk_size=CHUNK)
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    "make",
    [
        lambda e: jaxkd.mse,
        lambda e: jaxkd.cosine_distance,
        lambda e: jaxkd.earth_mover,
        lambda e: jaxkd.sinkhorn(e),
        lambda e: jaxkd.kernel_distance(e),
        lambda e: jaxkd.kernel_distance(e, degree=2),
    ],
)
def test_divergences_of_whole_rows_are_taken_at_any_width(make):
    embeddings = jax.ShapeDtypeStruct((500, 5), jnp.float32)
    rows = jaxkd.Logits(jax.ShapeDtypeStruct((N, 500), jnp.float32))

    def loss(student, teacher, embeddings):
        return jaxkd.distillation_loss(student, teacher, divergence=make(embeddings), chunk_size=CHUNK)[0]

    assert jax.eval_shape(loss, rows, rows, embeddings).shape == ()


@jax.custom_vjp
def exp(x):
    return jnp.exp(x)


exp.defvjp(lambda x: (jnp.exp(x), x), lambda x, cotangent: (cotangent * jnp.exp(x),))

BAD_TERMS = {
    "sum": (lambda p, q: jnp.sum(jnp.exp(p) * (p - q), axis=1), r"`divergence\.term` makes an array \(\d+,\)"),
    "mean": (lambda p, q: jnp.mean(p - q), r"`divergence\.term` makes an array \(\)"),
    "number": (lambda p, q: 0.5, r"`divergence\.term` makes "),
    "softmax": (lambda p, q: p - jax.nn.log_softmax(q), r"`divergence\.term` has a `reduce_max` along an axis"),
    "over rows": (lambda p, q: q - jnp.mean(q, axis=0), r"`divergence\.term` has a `reduce_sum` along an axis"),
    "running": (lambda p, q: jnp.cumsum(q, axis=-1), r"`divergence\.term` has a `cumsum` along an axis"),
    "custom_vjp": (lambda p, q: exp(p) - exp(q), r"`divergence\.term`.*custom_vjp.*slope"),
}


@pytest.mark.parametrize("case", BAD_TERMS)
@pytest.mark.parametrize("implementation", [None, "xla", "triton"])
def test_terms(case, implementation):
    term, message = BAD_TERMS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        jaxkd.distillation_loss(STUDENT, TEACHER, divergence=jaxkd.Divergence(term), implementation=implementation)


def test_terms_of_statistics():
    with pytest.raises(ValueError, match=r"`divergence\.term`"):
        jaxkd.token_statistics(STUDENT, teacher=TEACHER, divergence=jaxkd.Divergence(BAD_TERMS["sum"][0]))


def test_slope():
    divergence = jaxkd.Divergence(lambda p, q: p - q, slope=lambda p, q: jnp.sum(p, axis=1))
    with pytest.raises(ValueError, match=r"`divergence\.slope`"):
        jaxkd.distillation_loss(STUDENT, TEACHER, divergence=divergence)


def test_a_slope_that_is_given_stands_for_a_custom_vjp():
    divergence = jaxkd.Divergence(lambda p, q: exp(p) * (p - q), slope=lambda p, q: -jnp.exp(p))
    value, gradient = jax.value_and_grad(
        lambda s: jaxkd.distillation_loss(s, TEACHER, divergence=divergence, chunk_size=CHUNK)[0]
    )(STUDENT)
    want, want_gradient = jax.value_and_grad(lambda s: jaxkd.distillation_loss(s, TEACHER, chunk_size=CHUNK)[0])(
        STUDENT
    )
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient.values, want_gradient.values, rtol=1e-5, atol=1e-7)


def test_widths_that_are_sizes_of_the_check():
    """A vocabulary of 211 tokens is no axis of rows."""
    arguments = lambda rows: (jax.ShapeDtypeStruct((rows, 211), jnp.float32),) * 2  # noqa: E731
    assert check_row_function("f", squares, arguments, 4) == ()
    with pytest.raises(ValueError, match="along the axis of rows"):
        check_row_function("f", rescaled, arguments, 4)


def test_parts_that_nothing_depends_on_do_not_count():
    divergence = jaxkd.Divergence(lambda p, q: jax.grad(lambda x: jnp.sum(jnp.exp(p) * (p - x)))(q) + 2 * jnp.exp(p))
    loss, _ = jaxkd.distillation_loss(STUDENT, TEACHER, divergence=divergence)
    np.testing.assert_allclose(loss, 1, rtol=1e-6)
