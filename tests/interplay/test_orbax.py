"""Training that is saved with Orbax and goes on from there: bit by bit the run that never stopped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")
import optax
import orbax.checkpoint as orbax
from flax import linen, nnx
from flax.training.train_state import TrainState

N, D, V = 12, 6, 31
INPUTS, WIDE = jax.random.normal(jax.random.key(0), (N, D)), jax.random.normal(jax.random.key(1), (N, 2 * D))
LABELS = jax.random.randint(jax.random.key(2), (N,), 0, V).at[3:6].set(-100)
TEACHER = jaxkd.LinearLogits(WIDE, jax.random.normal(jax.random.key(3), (V, 2 * D)), softcap=20.0)
OPTIMIZER = optax.apply_if_finite(optax.MultiSteps(optax.adamw(0.1), 2), max_consecutive_errors=2)


def saved_and_restored(folder, state):
    """``state`` by way of the disk, restored where no array of it is left."""
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.tree.map(orbax.utils.to_shape_dtype_struct, state))


def equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def loss_of(hidden, head, teacher):
    return jaxkd.distillation_loss(jaxkd.flax_logits(hidden, head), teacher, LABELS, hard_weight=0.5, chunk_size=4)[0]


def test_train_state(tmp_path):
    """In the middle of micro-batches, with the optimizer's state."""

    class Model(linen.Module):
        def setup(self):
            self.body, self.head = linen.Dense(D), linen.Dense(V)

        def __call__(self, inputs):
            hidden = jnp.tanh(self.body(inputs))
            self.head(hidden)  # makes its parameters
            return hidden

    model = Model()

    @jax.jit
    def step(state):
        def loss(params):
            return loss_of(state.apply_fn({"params": params}, INPUTS), params["head"], TEACHER)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    params = model.init(jax.random.key(4), INPUTS)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=OPTIMIZER)
    for _ in range(3):
        state = step(state)
    restored = saved_and_restored(tmp_path, state)
    equal(restored, state)
    equal(step(restored), step(state))
    assert not np.array_equal(step(restored).params["head"]["kernel"], state.params["head"]["kernel"])


def test_nnx(tmp_path):
    class Model(nnx.Module):
        def __init__(self, seed):
            rngs = nnx.Rngs(seed)
            self.body, self.head = nnx.Linear(D, D, rngs=rngs), nnx.LoRALinear(D, V, lora_rank=2, rngs=rngs)

    def both(seed):
        model = Model(seed)
        return model, nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: loss_of(jnp.tanh(model.body(INPUTS)), model.head, TEACHER)  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))

    trained = both(0)
    for _ in range(3):
        step(*trained)
    other = both(1)
    nnx.update(other, saved_and_restored(tmp_path, nnx.state(trained)))
    for x in (trained, other):
        step(*x)
    equal(nnx.state(other), nnx.state(trained))


def test_teachers(tmp_path):
    """Sources and teachers are pytrees: Orbax gives them back as what they were, and the loss with them is the same."""
    top_k = jaxkd.TopKLogProbs.of(TEACHER, 5)
    restored = saved_and_restored(tmp_path, (TEACHER, top_k))
    equal(restored, (TEACHER, top_k))
    student = jaxkd.LinearLogits(INPUTS, jnp.ones((V, D)))
    of = jax.jit(lambda teacher: jaxkd.distillation_loss(student, teacher, LABELS, chunk_size=4)[0])
    for teacher, again in zip((TEACHER, top_k), restored, strict=True):
        assert of(teacher) == of(again)
