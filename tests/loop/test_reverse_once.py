"""Second derivatives: those that go through the loop are right, and the one that does not is refused in words."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

N, D, V = 7, 3, 11
STUDENT, TEACHER = cases.head(0, N, D, V), cases.head(1, N, 2, V)
LABELS = np.array([1, 2, -100, 3, 4, 5, 6])
DIRECTION = np.random.default_rng(2).normal(size=(N, D))


def distilled(hidden, chunk_size=2):
    student = jaxkd.LinearLogits(hidden, jnp.asarray(STUDENT.weight, hidden.dtype))
    teacher = TEACHER.astype(hidden.dtype)
    return jaxkd.distillation_loss(student, teacher, LABELS, hard_weight=0.5, chunk_size=chunk_size)[0]


def log_probs(hidden, chunk_size=2):
    student = jaxkd.LinearLogits(hidden, jnp.asarray(STUDENT.weight, hidden.dtype))
    return jnp.sum(jaxkd.token_log_probs(student, LABELS, chunk_size=chunk_size) ** 2)


def entropies(hidden):
    student = jaxkd.LinearLogits(hidden, jnp.asarray(STUDENT.weight, hidden.dtype))
    return jnp.sum(jaxkd.token_entropies(student, mask=LABELS != -100, chunk_size=2))


def labelled(hidden):
    student = jaxkd.LinearLogits(hidden, jnp.asarray(STUDENT.weight, hidden.dtype))
    return jaxkd.cross_entropy(student, LABELS, z_loss=0.1, chunk_size=2)[0]


def squared_gradient(loss, **options):
    return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x, **options) ** 2))


def value_of_both(loss):
    return jax.grad(lambda x: jax.value_and_grad(loss)(x)[0])


HIDDEN = jnp.asarray(STUDENT.hidden, jnp.float32)
REFUSED = {
    "gradient": squared_gradient(distilled),
    "value": value_of_both(distilled),
    "rows": squared_gradient(log_probs),
    "values of rows": value_of_both(log_probs),
    "entropies": squared_gradient(entropies),
    "cross_entropy": squared_gradient(labelled),
    "compiled": jax.jit(squared_gradient(distilled)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reverse_over_reverse_is_refused_in_words(name):
    with pytest.raises(TypeError, match=r"differentiated once in reverse mode.*forward over reverse.*chunk_size"):
        REFUSED[name](HIDDEN)


def test_forward_over_reverse(x64):
    """The second derivative along a direction, by central differences of the gradient."""
    hidden, step = jnp.asarray(STUDENT.hidden), 1e-5
    _, got = jax.jvp(jax.grad(distilled), (hidden,), (jnp.asarray(DIRECTION),))
    ahead, behind = (jax.grad(distilled)(hidden + sign * step * DIRECTION) for sign in (1, -1))
    assert cases.relative_error(got, (ahead - behind) / (2 * step)) < 1e-7


def test_reverse_over_reverse_in_one_chunk(x64):
    hidden, step = jnp.asarray(STUDENT.hidden), 1e-5
    gradient = squared_gradient(distilled, chunk_size=N)(hidden)
    ahead, behind = (
        jnp.sum(jax.grad(distilled)(hidden + sign * step * DIRECTION, chunk_size=N) ** 2) for sign in (1, -1)
    )
    np.testing.assert_allclose(jnp.vdot(gradient, DIRECTION), (ahead - behind) / (2 * step), rtol=1e-6)


def test_a_gradient_that_is_held_fixed_is_one_reverse_pass():
    """A weight made of a gradient's norm."""

    def loss(x):
        size = jax.lax.stop_gradient(jnp.sum(jax.grad(distilled)(x) ** 2))
        return size * distilled(x)

    want = jax.grad(distilled)(HIDDEN)
    np.testing.assert_allclose(jax.grad(loss)(HIDDEN), jnp.sum(want**2) * want, rtol=1e-5)
