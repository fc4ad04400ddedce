"""A Flax head as LinearLogits: its logits are the module's own in every dtype, and what it cannot be is refused.

Models that are trained through it are in `tests/interplay/`.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

pytest.importorskip("flax")
from flax import linen, nnx
from flax.core import freeze

D, V, RANK = 8, 11, 2
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(2, 3, D)), jnp.float32)
TEACHER = jaxkd.Logits(jnp.asarray(RNG.normal(size=(2, 3, V)), jnp.float32))
LABELS = jnp.array([[0, 3, -100], [10, 2, 1]])
BIAS, ADAPTER = nnx.initializers.normal(1.0), {"b_initializer": nnx.initializers.normal(1.0)}


def linear(**options):
    head = nnx.Linear(D, V, **{"bias_init": BIAS, "rngs": nnx.Rngs(0), **options})
    return head, lambda head, hidden: head(hidden)


def embed(**options):
    head = nnx.Embed(V, D, rngs=nnx.Rngs(0), **options)
    return head, lambda head, hidden: head.attend(hidden)


def lora_linear(**options):
    head = nnx.LoRALinear(D, V, lora_rank=RANK, bias_init=BIAS, rngs=nnx.Rngs(0), **ADAPTER, **options)
    return head, lambda head, hidden: head(hidden)


def lora(base, **options):
    base = nnx.Linear(D, V, bias_init=BIAS, rngs=nnx.Rngs(1), **base)
    head = nnx.LoRA(D, RANK, V, base_module=base, rngs=nnx.Rngs(0), **ADAPTER, **options)
    return head, lambda head, hidden: head(hidden)


class Inherits(nnx.Linear):
    """A user's class with parameters of its own and Flax's output."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unused = nnx.Param(jnp.ones(3))


def inherits():
    head = Inherits(D, V, rngs=nnx.Rngs(0))
    return head, lambda head, hidden: head(hidden)


BF16, F32 = jnp.bfloat16, jnp.float32
MODULES = {
    "Linear": lambda: linear(),
    "Linear without bias": lambda: linear(use_bias=False),
    "Linear in float32": lambda: linear(dtype=F32, param_dtype=BF16),
    "Linear in bfloat16": lambda: linear(dtype=BF16),
    "Linear of bfloat16": lambda: linear(param_dtype=BF16),
    "Linear to float32": lambda: linear(dtype=BF16, preferred_element_type=F32),
    "Linear of default options": lambda: linear(precision="default", dot_general=jax.lax.dot_general),
    "Linear with metadata": lambda: linear(kernel_metadata={"axes": (None, "v")}),
    "a class that inherits": inherits,
    "Embed": lambda: embed(),
    "Embed in bfloat16": lambda: embed(dtype=BF16),
    "Embed of bfloat16": lambda: embed(param_dtype=BF16),
    "LoRALinear": lambda: lora_linear(),
    "LoRALinear without bias": lambda: lora_linear(use_bias=False),
    "LoRALinear in bfloat16": lambda: lora_linear(dtype=BF16, lora_dtype=BF16),
    "LoRALinear in float32": lambda: lora_linear(dtype=F32, lora_dtype=F32, lora_param_dtype=BF16),
    "LoRA": lambda: lora({}),
    "LoRA in bfloat16": lambda: lora({"dtype": BF16}, dtype=BF16),
    "LoRA in bfloat16 around Linear": lambda: lora({"param_dtype": BF16}, dtype=BF16),
    "LoRA in float32": lambda: lora({"dtype": F32}, dtype=F32),
}


def logits_of(source):
    return source.flat().logits().reshape(2, 3, V)


def check_logits(source, expected):
    """Up to the rounding of the module's own sums."""
    bound = {"float32": 1e-6, "bfloat16": 2**-7}[source.hidden.dtype.name]
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(logits_of(source), expected, rtol=0, atol=bound * np.max(np.abs(expected)))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", MODULES)
def test_logits_are_the_modules_own(name, dtype):
    head, call = MODULES[name]()
    hidden = HIDDEN.astype(dtype)
    source, expected = jaxkd.flax_logits(hidden, head), call(head, hidden)
    check_logits(source, expected)
    if "to float32" not in name:
        assert source.hidden.dtype == expected.dtype


def test_an_adapter_in_a_type_of_its_own():
    """Neither rounds bfloat16 hidden states, so both are exact in the wider type, with the kernel rounded as before."""
    for head, call in (lora_linear(dtype=BF16), lora({"dtype": BF16}, dtype=F32)):
        hidden = HIDDEN.astype(BF16)
        source = jaxkd.flax_logits(hidden, head)
        assert source.hidden.dtype == F32
        kernel = head.kernel if isinstance(head, nnx.LoRALinear) else head.base_module.kernel
        np.testing.assert_array_equal(source.weight.T, kernel[...].astype(BF16))
        np.testing.assert_allclose(logits_of(source), call(head, hidden).astype(F32), rtol=2**-6, atol=2**-6)


def test_scale_and_softcap():
    for make in (lora_linear, linear):
        head, call = make()
        source = jaxkd.flax_logits(HIDDEN, head, scale=0.5, softcap=2.0)
        expected = 2 * np.tanh(np.asarray(call(head, HIDDEN)) * 0.5 / 2)
        np.testing.assert_allclose(logits_of(source), expected, rtol=1e-5, atol=1e-5)


# Gradients.


def loss_of(source):
    return jaxkd.distillation_loss(source, TEACHER, LABELS, hard_weight=0.5)[0]


def check_gradients(actual, expected, bound):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [
        *((name, F32, 1e-5) for name in ("Linear", "Embed", "LoRALinear", "LoRA", "a class that inherits")),
        *((name, BF16, 1e-5) for name in ("Linear", "Embed", "LoRALinear")),  # a bfloat16 body under a float32 head
        ("LoRALinear in bfloat16", BF16, 1e-2),
        ("Linear in bfloat16", F32, 1e-2),
    ],
)
def test_gradients_are_the_modules_own(name, dtype, bound):
    head, call = MODULES[name]()
    hidden = HIDDEN.astype(dtype)

    def fused(head, hidden):
        return loss_of(jaxkd.flax_logits(hidden, head))

    def dense(head, hidden):
        return loss_of(jaxkd.Logits(call(head, hidden)))

    actual, expected = (nnx.jit(nnx.grad(f, argnums=(0, 1)))(head, hidden) for f in (fused, dense))
    check_gradients(actual[0], expected[0], bound)
    check_gradients(actual[1], expected[1], max(bound, 2**-7 if dtype == BF16 else 0))


# Linen: a bound module, or its parameters and its dtype.

PARTITIONED = {"kernel_init": linen.with_partitioning(linen.initializers.lecun_normal(), (None, "v"))}
LOGICAL = {"kernel_init": linen.with_logical_partitioning(linen.initializers.lecun_normal(), (None, "v"))}
LINEN = {
    "Dense": lambda: linen.Dense(V, bias_init=BIAS),
    "Dense without bias": lambda: linen.Dense(V, use_bias=False),
    "Dense in bfloat16": lambda: linen.Dense(V, dtype=BF16),
    "Dense in float32": lambda: linen.Dense(V, dtype=F32, param_dtype=BF16),
    "Dense, partitioned": lambda: linen.Dense(V, **PARTITIONED),
    "Dense, logically partitioned": lambda: linen.Dense(V, **LOGICAL),
    "Embed": lambda: linen.Embed(V, D),
    "Embed in bfloat16": lambda: linen.Embed(V, D, dtype=BF16),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", LINEN)
def test_linen_logits_are_the_modules_own(name, dtype):
    module, hidden = LINEN[name](), HIDDEN.astype(dtype)
    method = "attend" if "Embed" in name else "__call__"
    variables = module.init(jax.random.key(1), LABELS if method == "attend" else HIDDEN)
    expected = module.apply(variables, hidden, method=method)
    parameters = variables["params"]
    for source in (
        jaxkd.flax_logits(hidden, module.bind(variables)),
        jaxkd.flax_logits(hidden, parameters, dtype=module.dtype),
        jaxkd.flax_logits(hidden, freeze(parameters), dtype=module.dtype),
    ):
        check_logits(source, expected)
        assert source.hidden.dtype == expected.dtype


def test_boxes_of_any_kind():
    kernel = jax.random.normal(jax.random.key(3), (D, V))
    expected = HIDDEN @ kernel
    boxes = {
        "value": SimpleNamespace(value=kernel),
        "unbox": SimpleNamespace(unbox=lambda: kernel),
        "one in another": linen.Partitioned(SimpleNamespace(value=kernel), (None, None)),
        "nnx.Param": nnx.Param(kernel),
        "NumPy": np.asarray(kernel),
    }
    for name, box in boxes.items():
        np.testing.assert_allclose(
            logits_of(jaxkd.flax_logits(HIDDEN, {"kernel": box})), expected, rtol=1e-5, atol=1e-5, err_msg=name
        )
    state = nnx.state(nnx.Linear(D, V, rngs=nnx.Rngs(0)))
    assert jaxkd.flax_logits(HIDDEN, state).bias.shape == (V,)
    assert jaxkd.flax_logits(nnx.Variable(HIDDEN), {"kernel": kernel, "bias": None}).bias is None


# What is refused, by its name.


class Scaled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def promote_to_float32(arrays, *, dtype=None):
    return tuple(None if x is None else x.astype(F32) for x in arrays)


def dot_in_float32(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


def with_base(head):
    head.lora.base_module = nnx.data(nnx.Linear(D, V, rngs=nnx.Rngs(0)))
    return head


RNGS = nnx.Rngs(0)
KERNEL = jnp.ones((D, V))
REFUSED = {
    "RMSNorm": lambda: nnx.RMSNorm(D, rngs=RNGS),
    "LinearGeneral": lambda: nnx.LinearGeneral(D, V, rngs=RNGS),
    "Einsum": lambda: nnx.Einsum("btd,dv->btv", (D, V), (V,), rngs=RNGS),
    "Sequential": lambda: nnx.Sequential(nnx.Linear(D, V, rngs=RNGS)),
    "WeightNorm": lambda: nnx.WeightNorm(nnx.Linear(D, V, rngs=RNGS), rngs=RNGS),
    "Scaled": lambda: Scaled(D, V, rngs=RNGS),
    "SimpleNamespace": lambda: SimpleNamespace(kernel=KERNEL, gate=jnp.ones(V)),
    "NoneType": lambda: nnx.LoRA(D, RANK, V, rngs=RNGS),
    "LoRA around a LoRALinear": lambda: nnx.LoRA(D, RANK, V, base_module=lora_linear()[0], rngs=RNGS),
    "an adapter of a Linear too": lambda: with_base(lora_linear()[0]),
    r"dict of \['kernel', 'lora_a', 'lora_b'\]": lambda: {"kernel": KERNEL, "lora_a": KERNEL, "lora_b": KERNEL},
    r"State of \['bias', 'kernel', 'lora'\]": lambda: nnx.state(lora_linear()[0]),
    r"dict of \['params'\]": lambda: {"params": {"kernel": KERNEL}},
    r"dict of \['bias', 'embedding'\]": lambda: {"embedding": KERNEL.T, "bias": jnp.ones(V)},
    r"dict of \[\]": dict,
    "`precision` of its own": lambda: linear(precision="highest")[0],
    "`dot_general` of its own": lambda: linear(dot_general=dot_in_float32)[0],
    "`promote_dtype` of its own": lambda: linear(promote_dtype=promote_to_float32)[0],
    "Embed with a `promote_dtype`": lambda: embed(promote_dtype=promote_to_float32)[0],
    "LoRA with a `promote_dtype`": lambda: lora_linear(lora_promote_dtype=promote_to_float32)[0],
    "preferred_element_type=bfloat16, narrower than its product in float32": lambda: linear(
        preferred_element_type=BF16
    )[0],
    "multiplied in bfloat16 and whose adapter in float32, and `hidden` is float32": lambda: lora_linear(dtype=BF16)[0],
    "Dense without parameters": lambda: linen.Dense(V),
    "Dense that has no parameters yet": lambda: linen.Dense(V).bind({}),
    "DenseGeneral": lambda: linen.DenseGeneral(V).bind({"params": {"kernel": KERNEL}}),
    "Dense with a `precision`": lambda: linen.Dense(V, precision="highest").bind({"params": {"kernel": KERNEL}}),
    "Dense with a `dot_general_cls`": lambda: linen.Dense(V, dot_general_cls=lambda: dot_in_float32).bind(
        {"params": {"kernel": KERNEL}}
    ),
    r"`head\['kernel'\]` is a dict": lambda: {"kernel": {"scale": KERNEL}},
    r"`head\['kernel'\]` is int8": lambda: {"kernel": KERNEL.astype(jnp.int8)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    with pytest.raises(TypeError, match=name) as error:
        jaxkd.flax_logits(HIDDEN, REFUSED[name]())
    assert len(str(error.value)) < 500  # no arrays in it


def test_further_errors():
    with pytest.raises(ValueError, match=r"`head\['kernel'\]` has 3 dimensions; give one of \(D, V\)"):
        jaxkd.flax_logits(HIDDEN, {"kernel": jnp.ones((D, V, 2))})
    with pytest.raises(TypeError, match="`dtype` is given, but `head` is a Linear, which has its own"):
        jaxkd.flax_logits(HIDDEN, linear()[0], dtype=BF16)
    with pytest.raises(TypeError, match="`hidden` is int32"):
        jaxkd.flax_logits(LABELS, linear()[0])
