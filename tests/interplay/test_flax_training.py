"""Training through a Flax model's head as its users write it: what is learned is what the model's own logits teach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

pytest.importorskip("flax")
import optax
from flax import linen, nnx
from flax.training.train_state import TrainState

IN, D, V, RANK, STEPS = 5, 8, 11, 2, 3
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(6, IN)), jnp.float32)
TEACHER = jaxkd.Logits(jnp.asarray(2 * RNG.normal(size=(6, V)), jnp.float32))


def loss_of(source):
    return jaxkd.distillation_loss(source, TEACHER, chunk_size=4)[0]


def same(actual, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), actual, expected)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.body = nnx.Linear(IN, D, rngs=rngs)
        self.head = nnx.LoRALinear(D, V, lora_rank=RANK, b_initializer=nnx.initializers.normal(1.0), rngs=rngs)


def fused(model):
    return loss_of(jaxkd.flax_logits(jnp.tanh(model.body(INPUTS)), model.head))


def dense(model):
    return loss_of(jaxkd.Logits(model.head(jnp.tanh(model.body(INPUTS)))))


def test_adapter_alone_in_nnx():
    """``wrt=nnx.LoRAParam``: the adapter moves as by the model's own logits, and nothing else moves."""

    def trained(loss):
        model = Model()
        optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model, optimizer):
            value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
            optimizer.update(model, gradients)
            return value

        return model, [step(model, optimizer) for _ in range(STEPS)]

    (model, losses), (expected, expected_losses) = trained(fused), trained(dense)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    same(nnx.state(model, nnx.LoRAParam), nnx.state(expected, nnx.LoRAParam))
    start = Model()
    assert losses[-1] < losses[0]
    assert np.all(np.asarray(model.head.lora.lora_b[...]) != start.head.lora.lora_b[...])
    np.testing.assert_array_equal(model.head.kernel[...], start.head.kernel[...])


def test_split_and_merge():
    """`jax.grad` over the state of a model, and over that of its adapter with the rest closed over."""
    graph, state = nnx.split(Model())
    assert all(np.any(x) for x in jax.tree.leaves(jax.grad(lambda state: fused(nnx.merge(graph, state)))(state)))
    same(*(jax.jit(jax.grad(lambda state, f=f: f(nnx.merge(graph, state))))(state) for f in (fused, dense)))
    graph, adapter, rest = nnx.split(Model(), nnx.LoRAParam, ...)
    same(*(jax.jit(jax.grad(lambda x, f=f: f(nnx.merge(graph, x, rest))))(adapter) for f in (fused, dense)))


def test_parameters_handed_over_as_they_are():
    """An ``nnx.Param`` in `LinearLogits` and `Logits`: gradients arrive in it."""
    model = nnx.Linear(D, V, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    model.scale = nnx.Param(jnp.asarray(0.5))
    embedding = nnx.Embed(V, D, rngs=nnx.Rngs(1))
    hidden = jax.random.normal(jax.random.key(4), (6, D))

    def with_objects(model, embedding, hidden):
        source = jaxkd.LinearLogits(hidden, embedding.embedding, model.bias, scale=model.scale)
        return loss_of(source) + loss_of(jaxkd.Logits(hidden @ model.kernel))

    def with_arrays(model, embedding, hidden):
        logits = model.scale[...] * (hidden @ embedding.embedding[...].T + model.bias[...])
        return loss_of(jaxkd.Logits(logits)) + loss_of(jaxkd.Logits(hidden @ model.kernel[...]))

    same(
        *(nnx.jit(nnx.grad(f, argnums=(0, 1, 2)))(model, embedding, hidden) for f in (with_objects, with_arrays)),
    )
    values = nnx.Param(jax.random.normal(jax.random.key(5), (6, V)))
    same(
        jax.grad(lambda x: loss_of(jaxkd.Logits(x)))(values)[...],
        jax.grad(lambda x: loss_of(jaxkd.Logits(x)))(values[...]),
    )


class LinenModel(linen.Module):
    """Its parameters are boxed; its loss is of the head that is bound in it."""

    tied: bool = False

    def setup(self):
        normal = linen.initializers.lecun_normal()
        boxed = linen.with_partitioning(normal, (None, "vocabulary"))
        self.body = linen.Dense(D, kernel_init=linen.with_logical_partitioning(normal, (None, None)))
        if self.tied:
            self.head = linen.Embed(
                V, D, embedding_init=linen.with_partitioning(linen.initializers.normal(), (None, "v"))
            )
        else:
            self.head = linen.Dense(V, kernel_init=boxed)

    def hidden(self, inputs):
        return jnp.tanh(self.body(inputs))

    def __call__(self, inputs):
        return (self.head.attend if self.tied else self.head)(self.hidden(inputs))

    def loss(self, inputs):
        if self.is_initializing():
            self(inputs)
        return loss_of(jaxkd.flax_logits(self.hidden(inputs), self.head))


@pytest.mark.parametrize("tied", [False, True])
def test_linen_train_state(tied):
    model = LinenModel(tied)
    parameters = model.init(jax.random.key(1), INPUTS, method="loss")["params"]

    def outside(parameters):
        hidden = model.apply({"params": parameters}, INPUTS, method="hidden")
        return loss_of(jaxkd.flax_logits(hidden, parameters["head"]))

    losses = {
        "outside": outside,
        "inside": lambda parameters: model.apply({"params": parameters}, INPUTS, method="loss"),
        "dense": lambda parameters: loss_of(jaxkd.Logits(model.apply({"params": parameters}, INPUTS))),
    }

    def trained(loss):
        state = TrainState.create(apply_fn=model.apply, params=parameters, tx=optax.adam(0.05))
        step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
        for _ in range(STEPS):
            state = step(state)
        return state.params

    expected = trained(losses.pop("dense"))
    for loss in losses.values():
        same(trained(loss), expected)
