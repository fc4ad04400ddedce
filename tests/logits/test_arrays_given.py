"""What is given as the arrays of a source: objects that wrap one, other libraries' tensors, logits as hidden states."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

N, D, V = 6, 4, 11
HEAD = cases.head(0, N, D, V, bias=True, scale=0.5, softcap=20.0).astype(jnp.float32)
TEACHER = jaxkd.Logits(jnp.asarray(np.random.default_rng(1).normal(size=(N, V)), jnp.float32))
PAIR = jnp.ones((D, 2)) / D, jnp.ones((2, V))


class Variable:
    """An array in an object, as ``keras.Variable`` is: its dtype is a string, and JAX reads it by `__jax_array__`."""

    def __init__(self, value):
        self.value = value

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    dtype = property(lambda self: str(self.value.dtype))

    def __jax_array__(self):
        return self.value


def loss_of(source):
    return jaxkd.distillation_loss(source, TEACHER, chunk_size=4)[0]


def linear(wrap, hidden, weight, bias, pair, scale, softcap):
    pair = tuple(map(wrap, pair))
    return jaxkd.LinearLogits(
        wrap(hidden), wrap(weight), wrap(bias), low_rank=pair, scale=wrap(scale), softcap=wrap(softcap)
    )


def test_wrapped_arrays_are_differentiated():
    arrays = HEAD.hidden, HEAD.weight, HEAD.bias, PAIR, HEAD.scale, HEAD.softcap
    every = tuple(range(len(arrays)))
    plain = jax.grad(lambda *x: loss_of(linear(lambda x: x, *x)), argnums=every)(*arrays)
    for transform in (lambda f: f, jax.jit):
        wrapped = transform(jax.grad(lambda *x: loss_of(linear(Variable, *x)), argnums=every))(*arrays)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), wrapped, plain)
    values = TEACHER.values[:, ::-1]
    np.testing.assert_array_equal(
        jax.grad(lambda x: loss_of(jaxkd.Logits(Variable(x))))(values),
        jax.grad(lambda x: loss_of(jaxkd.Logits(x)))(values),
    )


def test_a_source_may_hold_any_leaf():
    """JAX builds pytrees of objects, shapes, axes and None."""
    for leaf in (object(), None, 3, jax.ShapeDtypeStruct((V, D), jnp.float32)):
        source = jax.tree.map(lambda _, leaf=leaf: leaf, HEAD)
        assert source.weight is leaf
    sums = jax.vmap(lambda x: jnp.sum(x.hidden), in_axes=(jaxkd.LinearLogits(0, None),))(HEAD)
    np.testing.assert_allclose(sums, jnp.sum(HEAD.hidden, axis=1), rtol=1e-5)


# Errors.


def tensor_of(module, name):
    """A stand-in for another library's tensor, which NumPy has no type for."""
    kind = type(name, (), {"__module__": module})
    tensor = kind()
    tensor.dtype, tensor.shape, tensor.ndim = f"{module}.float32", (N, D), 2
    return tensor


TENSORS = {
    ("torch", "Tensor"): "is a torch.Tensor; give a JAX array, or use torch_bridge.torch_loss",
    ("torch.nn.parameter", "Parameter"): "is a torch.Parameter; give a JAX array, or use torch_bridge.torch_loss",
    ("mlx.core", "array"): "is a mlx.core.array; give a JAX or NumPy array",
}


@pytest.mark.parametrize("kind", TENSORS, ids=".".join)
def test_tensors_of_other_libraries(kind):
    tensor = tensor_of(*kind)
    for name, source in {
        "student.hidden": jaxkd.LinearLogits(tensor, HEAD.weight),
        "student.weight": jaxkd.LinearLogits(HEAD.hidden, tensor),
        "student.bias": jaxkd.LinearLogits(HEAD.hidden, HEAD.weight, tensor),
        "A of student.low_rank": jaxkd.LinearLogits(HEAD.hidden, HEAD.weight, low_rank=(tensor, PAIR[1])),
        "student.values": jaxkd.Logits(tensor),
    }.items():
        with pytest.raises(TypeError, match=f"`{name}` {TENSORS[kind]}"):
            loss_of(source)


def test_logits_as_hidden_states():
    logits = jnp.ones((2, 3, V))
    with pytest.raises(ValueError, match=r"these look like logits, which are jaxkd.Logits\(student.hidden\)"):
        loss_of(jaxkd.LinearLogits(logits, HEAD.weight))
    with pytest.raises(ValueError, match=r"is it transposed\? pass `student.weight.T`$"):
        loss_of(jaxkd.LinearLogits(HEAD.hidden, HEAD.weight.T))


# What is shown.


def test_repr_has_shapes_and_types():
    source = jaxkd.LinearLogits(HEAD.hidden.astype(jnp.bfloat16), HEAD.weight, low_rank=PAIR, scale=0.5)
    assert repr(source) == (
        "LinearLogits(hidden=bfloat16[6,4], weight=float32[11,4], low_rank=(float32[4,2], float32[2,11]), scale=0.5)"
    )
    assert repr(jaxkd.Logits(TEACHER.values)) == "Logits(values=float32[6,11])"
    assert repr(jax.tree.map(lambda _: None, HEAD)) == "LinearLogits()"
    assert repr(jax.eval_shape(lambda x: x, HEAD)) == (
        "LinearLogits(hidden=float32[6,4], weight=float32[11,4], bias=float32[11], scale=float32[], softcap=float32[])"
    )
    shown = []
    jax.jit(lambda x: shown.append(repr(x)))(jaxkd.Logits(TEACHER.values))
    assert shown == ["Logits(values=float32[6,11])"]
