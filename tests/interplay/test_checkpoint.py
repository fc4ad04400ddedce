"""`jax.checkpoint` of a loss, and of the model below it: the same numbers, whatever is kept and whatever is remade."""

import cases
import jax
import jax.numpy as jnp
import pytest

import jaxkd

N, D, V, LAYERS = 21, 8, 123, 3
TEACHER = cases.head(1, N, D - 3, V, bias=True).astype(jnp.float32)
LABELS = cases.some_labels(2, N, V)
POLICIES = {
    "default": None,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
}
PARAMS = {
    "layers": jax.random.normal(jax.random.key(0), (LAYERS, D, D)) / D**0.5,
    "head": jax.random.normal(jax.random.key(1), (V, D)) / D**0.5,
}
INPUTS = jax.random.normal(jax.random.key(2), (N, D))


def layer(hidden, weight):
    return hidden + jnp.tanh(hidden @ weight), None


def loss_of(hidden, head):
    student = jaxkd.LinearLogits(hidden, head, scale=0.9, softcap=20.0)
    return jaxkd.distillation_loss(student, TEACHER, LABELS, hard_weight=0.5, temperature=1.5, chunk_size=8)[0]


def training_loss(params, layer=layer, loss_of=loss_of):
    hidden, _ = jax.lax.scan(layer, INPUTS, params["layers"])
    return loss_of(hidden, params["head"])


@pytest.fixture(scope="module")
def plain():
    return jax.jit(jax.value_and_grad(training_loss))(PARAMS)


def assert_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert cases.relative_error(x, y) <= 1e-6


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name, plain):
    """Of the layers, of the loss, of both together and each by itself."""
    remade = lambda function: jax.checkpoint(function, policy=POLICIES[name])  # noqa: E731
    ways = {
        "layers": lambda params: training_loss(params, layer=remade(layer)),
        "loss": lambda params: training_loss(params, loss_of=remade(loss_of)),
        "all": remade(training_loss),
        "nested": remade(lambda params: training_loss(params, remade(layer), remade(loss_of))),
    }
    results = jax.jit(lambda params: {k: jax.value_and_grad(f)(params) for k, f in ways.items()})(PARAMS)
    for result in results.values():
        assert_close(result, plain)


def test_row_losses(plain):
    """A loss that is differentiated row by row works again in the backward pass, inside a checkpoint too."""

    def by_row(hidden, head):
        student = jaxkd.LinearLogits(hidden, head, scale=0.9, softcap=20.0)
        return jnp.sum(jnp.sin(jaxkd.token_divergences(student, TEACHER, chunk_size=8)))

    expected = jax.jit(jax.value_and_grad(lambda params: training_loss(params, loss_of=by_row)))(PARAMS)
    remade = jax.checkpoint(by_row, policy=POLICIES["nothing"])
    assert_close(jax.jit(jax.value_and_grad(lambda params: training_loss(params, loss_of=remade)))(PARAMS), expected)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_remat_of_flax(framework):
    """`nnx.remat` of a method and `linen.remat` of a module that have a loss of jaxkd inside."""
    pytest.importorskip("flax")
    if framework == "nnx":
        from flax import nnx

        class Model(nnx.Module):
            def __init__(self):
                rngs = nnx.Rngs(0)
                self.body, self.head = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, V, use_bias=False, rngs=rngs)

            def loss(self, inputs):
                return loss_of(jnp.tanh(self.body(inputs)), self.head.kernel[...].T)

        results = [nnx.jit(nnx.value_and_grad(loss))(Model(), INPUTS) for loss in (Model.loss, nnx.remat(Model.loss))]
    else:
        from flax import linen

        class Model(linen.Module):
            @linen.compact
            def __call__(self, inputs):
                head = self.param("head", linen.initializers.normal(), (V, D))
                return loss_of(jnp.tanh(linen.Dense(D)(inputs)), head)

        variables = Model().init(jax.random.key(0), INPUTS)
        results = [
            jax.jit(jax.value_and_grad(model.apply))(variables, INPUTS) for model in (Model(), linen.remat(Model)())
        ]
    assert_close(*results)
