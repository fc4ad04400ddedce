"""JAX's transformations of the loss, and what is compiled how often."""

import os
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_programs import Traced

import jaxkd

N, D, V, CHUNK = 21, 8, 123, 8
STUDENT = cases.head(0, N, D, V, bias=True, scale=0.9, softcap=20.0).astype(jnp.float32)
TEACHER = cases.head(1, N, D - 3, V, bias=True).astype(jnp.float32)
LABELS = cases.some_labels(2, N, V)
OPTIONS = {"temperature": 1.5, "hard_weight": 0.5, "chunk_size": CHUNK, "divergence": jaxkd.jensen_shannon(0.3)}


def loss(student, labels=LABELS, **options):
    return jaxkd.distillation_loss(student, TEACHER, labels, **OPTIONS | options)


def assert_close(a, b, rtol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert cases.relative_error(x, y) <= rtol


@pytest.fixture(scope="module")
def reference():
    return jax.value_and_grad(loss, has_aux=True)(STUDENT)


def test_jit(reference):
    assert_close(jax.jit(jax.value_and_grad(loss, has_aux=True))(STUDENT), reference)


def test_the_primal_is_the_value_of_the_gradient(reference):
    assert_close(jax.jit(loss)(STUDENT), reference[0])


def test_grad_of_the_loss_alone(reference):
    assert_close(jax.grad(lambda student: loss(student)[0])(STUDENT), reference[1])


def test_upstream_gradient(reference):
    gradient = jax.jit(jax.grad(lambda student: jnp.sin(3 * loss(student)[0])))(STUDENT)
    factor = 3 * jnp.cos(3 * reference[0][0])
    assert_close(gradient, jax.tree.map(lambda x: factor * x, reference[1]))


def test_metrics_carry_no_gradient():
    gradients = jax.jit(jax.jacrev(lambda student: loss(student)[1]))(STUDENT)
    assert set(gradients) >= {"soft", "hard", "num_rows"}
    for name, gradient in gradients.items():
        assert not any(np.any(x) for x in jax.tree.leaves(gradient)), name


def test_metrics_used_beside_the_loss_change_no_gradient(reference):
    def with_metrics(student):
        value, metrics = loss(student)
        return value + metrics["soft"] * metrics["hard"]

    assert_close(jax.jit(jax.grad(with_metrics))(STUDENT), reference[1])


def test_teacher_gets_no_gradient():
    def of_teacher(teacher):
        return jaxkd.distillation_loss(STUDENT, teacher, LABELS, **OPTIONS)[0]

    gradient = jax.jit(jax.grad(of_teacher))(TEACHER)
    assert jax.tree.structure(gradient) == jax.tree.structure(TEACHER)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_shared_hidden_states_get_the_students_gradient_only():
    """Teacher and student of one trunk: only the student's use of it is trained."""

    def self_distillation(hidden):
        student, teacher = (jaxkd.LinearLogits(hidden, x) for x in (STUDENT.weight, 2 * STUDENT.weight))
        return jaxkd.distillation_loss(student, teacher)[0]

    fixed = jaxkd.LinearLogits(STUDENT.hidden, 2 * STUDENT.weight)
    alone = jax.grad(lambda h: jaxkd.distillation_loss(jaxkd.LinearLogits(h, STUDENT.weight), fixed)[0])
    got, want = (jax.jit(function)(STUDENT.hidden) for function in (jax.grad(self_distillation), alone))
    np.testing.assert_array_equal(got, want)


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("argument", [slow(0), slow(1), 2])
def test_gradient_of_one_argument_alone(argument, reference):
    names = ("hidden", "weight", "bias")

    def of_arrays(*arrays):
        return loss(jaxkd.LinearLogits(*arrays, scale=STUDENT.scale, softcap=STUDENT.softcap))[0]

    gradient = jax.jit(jax.grad(of_arrays, argnums=argument))(*(getattr(STUDENT, name) for name in names))
    assert_close(gradient, getattr(reference[1], names[argument]))


@pytest.mark.parametrize("jit", [slow(False), True])
def test_gradients_of_different_arguments_in_any_order(jit):
    """What was differentiated before, and cached, must not matter."""

    def of_arrays(hidden, weight):
        return loss(jaxkd.LinearLogits(hidden, weight))[0]

    of_arrays = jax.jit(of_arrays) if jit else of_arrays
    arrays = (STUDENT.hidden, STUDENT.weight)
    want = jax.grad(of_arrays, argnums=(0, 1))(*arrays)
    rematerialised = jax.checkpoint(of_arrays)
    for function, arguments in ((of_arrays, 0), (rematerialised, 0), (of_arrays, 1), (rematerialised, 1)):
        assert_close(jax.grad(function, argnums=arguments)(*arrays), want[arguments])
    for function in (rematerialised, of_arrays):
        assert_close(jax.grad(function, argnums=(0, 1))(*arrays), want)


def test_scan_over_micro_batches(reference):
    """Gradient accumulation inside `jax.lax.scan`."""
    count = int(np.sum(LABELS != -100))

    def step(total, batch):
        hidden, teacher_hidden, labels = batch

        def part(student):
            rows = jaxkd.LinearLogits(
                hidden, student.weight, student.bias, scale=student.scale, softcap=student.softcap
            )
            teacher = jaxkd.LinearLogits(teacher_hidden, TEACHER.weight, TEACHER.bias)
            return jaxkd.distillation_loss(rows, teacher, labels, normalizer=count, **OPTIONS)[0]

        value, gradient = jax.value_and_grad(part)(STUDENT)
        return jax.tree.map(jnp.add, total, (value, gradient.weight)), None

    batches = tuple(jnp.reshape(x, (3, 7, *x.shape[1:])) for x in (STUDENT.hidden, TEACHER.hidden, LABELS))
    total, _ = jax.jit(lambda: jax.lax.scan(step, (0.0, jnp.zeros_like(STUDENT.weight)), batches))()
    assert_close(total, (reference[0][0], reference[1].weight))


def test_vmap():
    """One student, several rows of labels: the gradients of each."""
    labels = np.stack([LABELS, np.roll(LABELS, 1), np.full(N, -100)])
    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    batched = jax.jit(jax.vmap(value_and_grad, in_axes=(None, 0)))(STUDENT, labels)
    for i, row in enumerate(labels):
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), value_and_grad(STUDENT, row), rtol=1e-5)


def test_vmap_over_students():
    students = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), STUDENT)
    gradient = jax.jit(jax.grad(lambda student: loss(student)[0]))
    batched = jax.jit(jax.vmap(gradient))(students)
    for i in range(2):
        one = gradient(jax.tree.map(lambda x, i=i: x[i], students))
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), one)


@pytest.mark.skipif(
    os.environ.get("JAX_CUSTOM_VJP3") == "1", reason="with this configuration JAX traces the loss first"
)
@pytest.mark.parametrize(
    ("of_rows", "backward"), [(jaxkd.chunked_loss, 0), (jaxkd.chunked_rows, 1)], ids=["chunked_loss", "chunked_rows"]
)
def test_differentiation_traces_the_forward_pass_alone(of_rows, backward):
    """And not the loss besides; one number a row has a loop in its backward pass."""

    def loss(student):
        values = of_rows(counted, student, chunk_size=CHUNK)
        return values[0] if of_rows is jaxkd.chunked_loss else jnp.sum(values)

    counts = []
    for function in (loss, jax.value_and_grad(loss)):
        counted = Traced(lambda logits, labels, per_row, shared: jnp.mean(logits**2, axis=1))
        jax.jit(function).trace(STUDENT)
        counts.append(counted.count)
    assert counts[1] == counts[0] + backward


TRACED = {
    "temperature": (1.5, 3.0),
    "soft_weight": (1.0, 0.25),
    "hard_weight": (0.5, 0.75),
    "normalizer": (11.0, 17.0),
    "weights": (np.linspace(0.5, 2, N), np.linspace(2, 0.5, N)),
}


@pytest.mark.optimized  # to 1e-6, of a gradient that cancels
@pytest.mark.parametrize("names", [tuple(TRACED), *(slow((name,)) for name in TRACED)], ids="-".join)
def test_traced_options(names):
    """A schedule: new values, no new compilation, the numbers of a constant."""
    traces = []

    @jax.jit
    def step(student, options):
        traces.append(names)
        return jax.value_and_grad(loss, has_aux=True)(student, **options)

    for i in range(2):
        options = {name: TRACED[name][i] for name in names}
        constant = jax.value_and_grad(loss, has_aux=True)(STUDENT, **options)
        assert_close(step(STUDENT, jax.tree.map(jnp.asarray, options)), constant)
    assert len(traces) == 1


FAMILIES = [jaxkd.jensen_shannon, *map(slow, (jaxkd.symmetric_kl, jaxkd.skew_kl, jaxkd.alpha_divergence))]


@pytest.mark.parametrize("family", FAMILIES)
def test_traced_parameter_of_a_divergence(family):
    """Of the others `test_loss.py` has the numbers, with each parameter traced."""
    traces = []

    @jax.jit
    def step(student, value):
        traces.append(family)
        return jax.value_and_grad(loss, has_aux=True)(student, divergence=family(value))

    for value in (0.2, 0.7):
        constant = jax.value_and_grad(loss, has_aux=True)(STUDENT, divergence=family(value))
        assert_close(step(STUDENT, value), constant, rtol=1e-5)
    assert len(traces) == 1


def test_traced_beta_of_fused_linear_jsd():
    arrays = (STUDENT.hidden, STUDENT.weight, TEACHER.hidden, TEACHER.weight)
    traced = Traced(lambda beta: jaxkd.fused_linear_jsd(*arrays, beta=beta)[0])
    step = jax.jit(traced)
    for beta in (0.3, 0.6):
        np.testing.assert_allclose(step(beta), jaxkd.fused_linear_jsd(*arrays, beta=beta)[0], rtol=1e-6)
    assert traced.count == 1


def test_traced_scale_and_softcap():
    def of_numbers(scale, softcap):
        return loss(jaxkd.LinearLogits(STUDENT.hidden, STUDENT.weight, scale=scale, softcap=softcap))[0]

    traced = Traced(jax.value_and_grad(of_numbers, argnums=(0, 1)))
    step = jax.jit(traced)
    for numbers in ((0.5, 10.0), (2.0, 30.0)):
        assert_close(step(*numbers), jax.value_and_grad(of_numbers, argnums=(0, 1))(*numbers))
    assert traced.count == 1


CONSTANTS = [*TRACED, "beta"]


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("jit", [False, True])
def test_differentiating_a_constant_is_an_error(name, jit):
    def of_constant(value):
        option = {"divergence": jaxkd.jensen_shannon(value)} if name == "beta" else {name: value}
        return loss(STUDENT, **option)[0]

    gradient = jax.grad(of_constant)
    with pytest.raises(TypeError, match="stop_gradient"):
        (jax.jit(gradient) if jit else gradient)(jnp.asarray(TRACED.get(name, (0.5,))[0]))


def test_stopped_constants_are_allowed(reference):
    """A schedule computed from parameters, as the error advises."""

    def of_constants(student, constants):
        beta, options = jax.lax.stop_gradient(constants)
        return loss(student, divergence=jaxkd.jensen_shannon(beta), **options)[0]

    count = jnp.float32(np.sum(LABELS != -100))  # what is divided by where nothing is said
    options = {name: jnp.asarray(TRACED[name][0]) for name in ("temperature", "soft_weight", "hard_weight")}
    constants = jnp.asarray(0.3), options | {"normalizer": count, "weights": jnp.ones(N)}
    gradient, zeros = jax.jit(jax.grad(of_constants, argnums=(0, 1)))(STUDENT, constants)
    assert not any(np.any(x) for x in jax.tree.leaves(zeros))
    assert_close(gradient, reference[1], rtol=1e-5)


def test_sources_are_pytrees():
    leaves, structure = jax.tree.flatten(STUDENT)
    assert len(leaves) == 5
    assert jax.tree.unflatten(structure, leaves) == STUDENT
    assert len(jax.tree.leaves(jaxkd.Logits(jnp.ones((2, 3))))) == 1
    assert jax.tree.leaves(jaxkd.jensen_shannon(0.25)) == [0.25]
    assert jax.tree.leaves(jaxkd.forward_kl) == []


def test_second_derivative(x64):
    """Forward over reverse: the gradient that is formed with the loss is differentiable itself."""
    student, teacher = (cases.head(seed, 5, 3, 11).astype(jnp.float64) for seed in (0, 1))

    @jax.jit
    def gradient(hidden):
        rows = jaxkd.LinearLogits(hidden, student.weight)
        return jax.grad(lambda x: jaxkd.distillation_loss(x, teacher, chunk_size=2)[0])(rows).hidden

    direction = np.random.default_rng(2).normal(size=student.hidden.shape)
    _, slope = jax.jit(partial(jax.jvp, gradient))((student.hidden,), (jnp.asarray(direction),))
    step = 1e-5 * direction
    difference = (gradient(student.hidden + step) - gradient(student.hidden - step)) / 2e-5
    np.testing.assert_allclose(slope, difference, atol=1e-9)
