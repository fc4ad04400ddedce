"""Optimizers that wrap others, around a loss of jaxkd: steps that are put together, steps that are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

optax = pytest.importorskip("optax")

N, D, V, PARTS = 12, 6, 31, 3
LABELS = jax.random.randint(jax.random.key(0), (N,), 0, V).at[jnp.array([1, 5, 6, 7])].set(-100)
HIDDEN, WIDE = jax.random.normal(jax.random.key(1), (N, D)), jax.random.normal(jax.random.key(2), (N, 2 * D))
TEACHER_WEIGHT = jax.random.normal(jax.random.key(3), (V, 2 * D))
BATCH = (HIDDEN, WIDE, LABELS)


@pytest.fixture
def params():
    return {"body": jnp.eye(D), "head": jax.random.normal(jax.random.key(4), (V, D)) / D**0.5}


def loss_of(params, batch, normalizer=None):
    hidden, wide, labels = batch
    student = jaxkd.LinearLogits(jnp.tanh(hidden @ params["body"]), params["head"])
    teacher = jaxkd.LinearLogits(wide, TEACHER_WEIGHT)
    return jaxkd.distillation_loss(student, teacher, labels, hard_weight=0.5, normalizer=normalizer, chunk_size=4)[0]


def step_of(optimizer):
    @jax.jit
    def step(params, state, batch, normalizer=None):
        updates, state = optimizer.update(jax.grad(loss_of)(params, batch, normalizer), state, params)
        return optax.apply_updates(params, updates), state

    return step


def same(actual, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), actual, expected)


def equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_micro_batches_in_a_scan(params):
    """`MultiSteps` of parts with 3, 1 and 4 rows that count: with a normalizer, the step of the whole batch."""
    optimizer = optax.adam(0.1)
    expected, _ = step_of(optimizer)(params, optimizer.init(params), BATCH)
    parts = jax.tree.map(lambda x: x.reshape(PARTS, N // PARTS, *x.shape[1:]), BATCH)
    assert [int(n) for n in (parts[2] != -100).sum(-1)] == [3, 1, 4]
    accumulating = optax.MultiSteps(optimizer, PARTS)
    normalizer, step = jnp.sum(LABELS != -100) / PARTS, step_of(accumulating)

    def body(carry, part):
        carry = step(*carry, part, normalizer)
        return carry, carry[0]

    (actual, _), all_params = jax.lax.scan(body, (params, accumulating.init(params)), parts)
    same(actual, expected)
    for i in range(PARTS - 1):  # nothing moves before the last
        equal(jax.tree.map(lambda x, i=i: x[i], all_params), params)


def spoiled(row, what):
    """The batch with a NaN in a row of the student's or the teacher's hidden states."""
    return tuple(x.at[row].set(jnp.nan) if i == what else x for i, x in enumerate(BATCH))


@pytest.mark.parametrize("what", [0, 1], ids=["student", "teacher"])
def test_steps_that_are_not_finite(what, params):
    """`apply_if_finite` leaves parameters and moments where a counted row is NaN, and goes on as if it had not been."""
    optimizer = optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=2)
    step, start = step_of(optimizer), optimizer.init(params)
    after, state = step(params, start, spoiled(0, what))
    equal((after, state.inner_state), (params, start.inner_state))
    assert not state.last_finite
    assert int(state.total_notfinite) == 1
    after, state = step(after, state, BATCH)
    assert state.last_finite
    equal((after, state.inner_state), step_of(optax.adam(0.1))(params, start.inner_state, BATCH))
    assert np.all(np.asarray(after["head"] != params["head"]))


def test_a_row_that_does_not_count_skips_no_step(params):
    """A teacher's; below a student's the model itself would multiply NaN by the gradient of 0."""
    optimizer = optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=2)
    step, start = step_of(optimizer), optimizer.init(params)
    after, state = step(params, start, spoiled(1, 1))
    assert state.last_finite
    equal(after, step(params, start, BATCH)[0])


def test_micro_batches_that_are_not_finite(params):
    """`MultiSteps` with `skip_not_finite`: the one with a NaN is left out."""
    optimizer = optax.MultiSteps(optax.sgd(0.1), 2, should_skip_update_fn=optax.skip_not_finite)
    step, state, after = step_of(optimizer), optimizer.init(params), params
    for batch in (BATCH, spoiled(0, 0), BATCH):
        after, state = step(after, state, batch)
    same(after, jax.tree.map(lambda x, g: x - 0.1 * g, params, jax.grad(loss_of)(params, BATCH)))
