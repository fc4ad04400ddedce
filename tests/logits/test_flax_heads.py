"""A Flax model's head as LinearLogits: its logits are the module's own, and it learns through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

pytest.importorskip("flax")
from flax import linen, nnx

HIDDEN = jax.random.normal(jax.random.key(0), (2, 3, 8))
LABELS = jnp.array([[0, 3, -100], [10, 2, 1]])


def linear(use_bias):
    head = nnx.Linear(8, 11, use_bias=use_bias, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    return head, head(HIDDEN)


def embed():
    head = nnx.Embed(11, 8, rngs=nnx.Rngs(0))
    return head, head.attend(HIDDEN)


def linen_dense():
    module = linen.Dense(11, bias_init=nnx.initializers.normal(1.0))
    variables = module.init(jax.random.key(1), HIDDEN)
    return variables["params"], module.apply(variables, HIDDEN)


def linen_embed():
    module = linen.Embed(11, 8)
    variables = module.init(jax.random.key(1), LABELS)
    return variables["params"], module.apply(variables, HIDDEN, method="attend")


HEADS = {
    "nnx.Linear": lambda: linear(use_bias=False),
    "nnx.Linear, bias": lambda: linear(use_bias=True),
    "nnx.Embed": embed,
    "linen.Dense": linen_dense,
    "linen.Embed": linen_embed,
}


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_the_modules_own(name):
    head, expected = HEADS[name]()
    logits = jaxkd.flax_logits(HIDDEN, head).flat().logits().reshape(2, 3, 11)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    transformed = jaxkd.flax_logits(HIDDEN, head, scale=0.5, softcap=2.0).flat().logits().reshape(2, 3, 11)
    np.testing.assert_allclose(transformed, 2 * np.tanh(np.asarray(expected) * 0.5 / 2), rtol=1e-5, atol=1e-5)


def test_gradients_reach_an_nnx_head():
    head, _ = linear(use_bias=True)
    teacher = jaxkd.Logits(jax.random.normal(jax.random.key(2), (2, 3, 11)))

    def fused(head):
        return jaxkd.distillation_loss(jaxkd.flax_logits(HIDDEN, head), teacher, LABELS)[0]

    def dense(head):
        return jaxkd.distillation_loss(jaxkd.Logits(head(HIDDEN)), teacher, LABELS)[0]

    actual, expected = nnx.jit(nnx.grad(fused))(head), nnx.jit(nnx.grad(dense))(head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected)


def test_what_is_no_head():
    with pytest.raises(TypeError, match=r"`head` is a RMSNorm without `kernel` and `embedding`"):
        jaxkd.flax_logits(HIDDEN, nnx.RMSNorm(8, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"`head` is a dict without"):
        jaxkd.flax_logits(HIDDEN, {"params": {"kernel": jnp.ones((8, 11))}})
    with pytest.raises(ValueError, match=r"`head` has a kernel of 3 dimensions; give one of \(D, V\)"):
        jaxkd.flax_logits(HIDDEN, {"kernel": jnp.ones((8, 11, 2))})
