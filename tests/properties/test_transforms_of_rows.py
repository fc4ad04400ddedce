"""JAX's transformations of the cross-entropy and of what gives one number a row, and what is compiled how often."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_programs import Traced
from sweeps import all_but, only

import jaxkd

N, D, V, CHUNK = 21, 8, 123, 8
STUDENT = cases.head(0, N, D, V, bias=True, scale=0.9, softcap=20.0).astype(jnp.float32)
TEACHER = cases.head(1, N, D - 3, V).astype(jnp.float32)
LABELS = cases.some_labels(2, N, V)
UPSTREAM = jnp.asarray(np.random.default_rng(3).normal(size=N), jnp.float32)


def cross_entropy(student, labels=LABELS, **options):
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "chunk_size": CHUNK} | options
    return jaxkd.cross_entropy(student, labels, **options)[0]


def log_probs(student, labels=LABELS, **options):
    return jaxkd.token_log_probs(student, labels, **{"temperature": 0.7, "chunk_size": CHUNK} | options)


def entropies(student, labels=LABELS, **options):
    options = {"temperature": 0.7, "chunk_size": CHUNK} | options
    return jaxkd.token_entropies(student, mask=labels != -100, **options)


def divergences(student, labels=LABELS, **options):
    options = {"divergence": jaxkd.jensen_shannon(0.3), "temperature": 1.5, "chunk_size": CHUNK} | options
    return jaxkd.token_divergences(student, TEACHER, labels, **options)


def spread(logits, labels, per_row, shared):
    return jnp.mean((logits - jnp.mean(logits, axis=1, keepdims=True)) ** 2, axis=1)


def own(student, labels=LABELS, **options):
    return jaxkd.chunked_rows(spread, student, labels, chunk_size=CHUNK, **options)


ALL = {
    "cross_entropy": cross_entropy,
    "token_log_probs": log_probs,
    "token_entropies": entropies,
    "token_divergences": divergences,
    "chunked_rows": own,
}


def total(name, student, labels=LABELS, **options):
    """A scalar that is no sum of the numbers."""
    values = ALL[name](student, labels, **options)
    return jnp.mean(values * (UPSTREAM + values)) if values.ndim else jnp.sin(3 * values)


FEW = ("cross_entropy", "token_divergences")  # the others go through the same loop


def assert_close(a, b, rtol=2e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert cases.relative_error(x, y) <= rtol


@pytest.mark.parametrize("name", only(FEW, ALL))
def test_jit_remat_and_vmap(name):
    """Each gives the eager value and gradient: of labels, of students, and of the values alone."""

    def value_and_grad(student, labels=LABELS):
        return jax.value_and_grad(lambda x: total(name, x, labels))(student)

    plain = value_and_grad(STUDENT)
    np.testing.assert_allclose(jax.jit(lambda x: total(name, x))(STUDENT), plain[0], rtol=1e-5)
    compiled = jax.jit(value_and_grad)
    assert_close(compiled(STUDENT, LABELS), plain, rtol=1e-5)
    assert_close(jax.jit(jax.value_and_grad(jax.checkpoint(lambda x: total(name, x))))(STUDENT), plain, rtol=1e-5)

    labels = np.stack([LABELS, np.roll(LABELS, 1), np.full(N, -100)])
    students = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x, -x]), STUDENT)
    batched = jax.jit(jax.vmap(value_and_grad))(students, labels)
    for i, row in enumerate(labels):
        student, got = jax.tree.map(lambda x, i=i: x[i], (students, batched))
        assert_close(got, compiled(student, row), rtol=2e-5)


@pytest.mark.parametrize("name", only(("token_log_probs",), ALL))
def test_gradients_of_different_arguments_in_any_order(name):
    """What was differentiated before, and cached, must not matter."""

    def of_arrays(hidden, weight):
        return total(name, jaxkd.LinearLogits(hidden, weight, STUDENT.bias))

    arrays = (STUDENT.hidden, STUDENT.weight)
    want = jax.grad(of_arrays, argnums=(0, 1))(*arrays)
    remade = jax.checkpoint(of_arrays)
    for function, argument in ((of_arrays, 0), (remade, 0), (of_arrays, 1), (remade, 1)):
        assert_close(jax.grad(function, argnums=argument)(*arrays), want[argument])


def test_metrics_of_the_cross_entropy_carry_no_gradient():
    gradients = jax.jit(jax.jacrev(lambda x: jaxkd.cross_entropy(x, LABELS, z_loss=0.1)[1]))(STUDENT)
    assert gradients.keys() == {"hard", "log_normalizer", "accuracy", "num_rows"}
    assert not any(np.any(x) for x in jax.tree.leaves(gradients))


def test_a_row_depends_on_its_own_hidden_state_alone():
    def rows(hidden):
        return divergences(jaxkd.LinearLogits(hidden, STUDENT.weight))

    jacobian = jax.jit(jax.jacrev(rows))(STUDENT.hidden)  # (N, N, D)
    np.testing.assert_array_equal(np.abs(jacobian).max(-1) > 0, np.diag(LABELS != -100))


TRACED = {
    "cross_entropy": {
        "label_smoothing": (0.0, 0.2),
        "z_loss": (0.0, 0.1),
        "normalizer": (11.0, 17.0),
        "weights": (np.linspace(0.5, 2, N), np.linspace(2, 0.5, N)),
    },
    "token_log_probs": {"temperature": (1.0, 2.0)},
    "token_entropies": {"temperature": (1.0, 2.0)},
    "token_divergences": {"temperature": (1.0, 2.0)},
}
SLOW = [("cross_entropy", "normalizer"), ("token_log_probs", "temperature"), ("token_entropies", "temperature")]
CONSTANTS = [(name, option) for name, options in TRACED.items() for option in options]


@pytest.mark.parametrize(("name", "option"), all_but(SLOW, CONSTANTS))
def test_traced_option(name, option):
    """A schedule: new values, no new compilation, the numbers of a constant."""

    @Traced
    def traced(student, value):
        return jax.value_and_grad(lambda x: total(name, x, **{option: value}))(student)

    step = jax.jit(traced)

    for value in TRACED[name][option]:
        constant = jax.value_and_grad(lambda x, value=value: total(name, x, **{option: value}))(STUDENT)
        assert_close(step(STUDENT, jnp.asarray(value)), constant, rtol=2e-5)
    assert traced.count == 1


@pytest.mark.parametrize(("name", "option"), CONSTANTS)
def test_differentiating_a_constant_is_an_error(name, option):
    def of_constant(value):
        return total(name, STUDENT, **{option: value})

    value = jnp.asarray(TRACED[name][option][0])
    with pytest.raises(TypeError, match=rf"`{option}`.*stop_gradient"):
        jax.grad(of_constant)(value)
    assert not np.any(jax.grad(lambda x: of_constant(jax.lax.stop_gradient(x)))(value))


@pytest.mark.parametrize("name", ["token_log_probs", "token_entropies", "token_divergences"])
def test_a_traced_temperature_that_is_none_is_no_number(name):
    """It cannot be refused; at -1 these would be numbers of reversed logits."""
    step = jax.jit(lambda temperature: ALL[name](STUDENT, temperature=temperature))
    for temperature in (0.0, -1.0):
        np.testing.assert_array_equal(np.isnan(step(temperature)), LABELS != -100)


@pytest.mark.parametrize("name", only(FEW, ALL))
def test_second_derivative(name, x64):
    """Forward over reverse: a gradient, formed with the loss or again in the backward pass, is differentiable."""
    student, direction = (cases.head(seed, N, D, V).astype(jnp.float64).hidden for seed in (0, 2))
    weight = jnp.asarray(STUDENT.weight, jnp.float64)

    @jax.jit
    def gradient(hidden):
        return jax.grad(lambda x: total(name, jaxkd.LinearLogits(x, weight)))(hidden)

    _, slope = jax.jit(lambda x, y: jax.jvp(gradient, (x,), (y,)))(student, direction)
    step = 1e-5 * direction
    difference = (gradient(student + step) - gradient(student - step)) / 2e-5
    assert cases.relative_error(slope, difference) < 1e-6
