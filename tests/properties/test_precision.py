"""Rounding: how far each type is from float64 on the same inputs, above all where training has gone well."""

from functools import partial
from itertools import product

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from sweeps import only

import jaxkd

N, D, V, CHUNK = 40, 32, 1003, 16
SMOOTH = [name for name in cases.ONE_OF_EACH if name != "total_variation"]
LABELS = cases.some_labels(2, N, V)


def pair(dtype, *, near, head_dtype=None, **options):
    student = cases.twin(cases.head(0, N, D, V, spread=2.0, **options).astype(dtype, head_dtype))
    teacher = cases.near(student) if near else cases.head(1, N, D, V, spread=2.0, **options)
    return student.astype(dtype, head_dtype), teacher.astype(dtype, head_dtype)


def errors(student, teacher, name, labels=None, **options):
    options["divergence"] = cases.DIVERGENCES[name].make()
    (loss, _), gradient = cases.traced_value_and_grad(student, teacher, labels, chunk_size=CHUNK, **options)
    options["divergence"] = name
    truth = cases.distillation(cases.twin(student), cases.twin(teacher), labels, **options)
    return abs(float(loss) - truth.loss) / truth.loss, cases.gradient_errors(gradient, truth.gradient)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_bfloat16(name, near):
    """The rounding of the bfloat16 result is 2.3e-3: nothing else is lost."""
    loss, gradients = errors(*pair(jnp.bfloat16, near=near), name)
    assert max(gradients.values()) <= 5e-3, gradients
    assert loss <= 1e-4


@pytest.mark.parametrize("near", [False, True])
def test_bfloat16_with_transformed_logits(near):
    """A traced scale and softcap, in the type a model holds them in."""
    student, teacher = pair(jnp.bfloat16, near=near, bias=True, softcap=30.0)
    loss, gradients = errors(student, teacher, "jensen_shannon", temperature=2.0)
    assert max(gradients[name] for name in ("hidden", "weight", "bias")) <= 5e-3, gradients
    assert loss <= 1e-4


@pytest.mark.parametrize("name", SMOOTH)
def test_float16(name):
    loss, gradients = errors(*pair(jnp.float16, near=True), name, normalizer=1.0)
    assert max(gradients.values()) <= 2e-3, gradients
    assert loss <= 1e-4


def test_float16_gradients_of_many_rows_do_not_underflow():
    """A gradient below float16's least number, brought back into range by loss scaling, as float16 is trained."""
    student, teacher = pair(jnp.float16, near=True)
    normalizer, loss_scale = 1e7, 2.0**22

    def scaled(student):
        loss, _ = jaxkd.distillation_loss(student, teacher, normalizer=normalizer, chunk_size=CHUNK)
        return loss * loss_scale

    gradient = jax.jit(jax.grad(scaled))(student)
    want = cases.distillation(
        cases.twin(student), cases.twin(teacher), divergence="forward_kl", normalizer=normalizer / loss_scale
    ).gradient
    assert np.abs(want.hidden / loss_scale).max() < 6e-8
    assert max(cases.gradient_errors(gradient, want).values()) <= 2e-3


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_float32(name, near):
    loss, gradients = errors(*pair(jnp.float32, near=near), name, LABELS, temperature=2.0)
    if name in cases.WITH_JUMPS and near:  # tokens whose probabilities agree to rounding: the sign is either
        assert max(gradients.values()) <= 5e-3, gradients
    else:
        assert max(gradients.values()) <= (3e-5 if near else 1e-5), gradients
    assert loss <= (3e-4 if near else 3e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_identical_models(name, dtype):
    student, _ = pair(dtype, near=True)
    options = {"labels": LABELS, "temperature": 2.0} if dtype == jnp.float32 else {}  # the programs of tests above
    (loss, _), gradient = cases.traced_value_and_grad(
        student, student, divergence=cases.DIVERGENCES[name].make(), chunk_size=CHUNK, **options
    )
    assert 0 <= loss <= 1e-6
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient)) < 1e-6


@pytest.mark.parametrize("hidden", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_gradient_types_are_their_primals(hidden, head):
    student, teacher = pair(hidden, near=False, head_dtype=head, bias=True)
    value_and_grad = partial(cases.traced_value_and_grad, hard_weight=0.5, chunk_size=CHUNK)
    (loss, metrics), gradient = jax.eval_shape(value_and_grad, student, teacher, LABELS)
    assert loss.dtype == jnp.float32
    assert {x.dtype for x in metrics.values()} == {jnp.dtype(jnp.float32)}
    assert (gradient.hidden.dtype, gradient.weight.dtype, gradient.bias.dtype) == (hidden, head, head)


@pytest.mark.parametrize(
    ("hidden", "head"),
    only(
        [(jnp.float16, jnp.float32), (jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float16)],
        product((jnp.float16, jnp.bfloat16, jnp.float32), repeat=2),
    ),
)
def test_gradient_types_of_numbers_of_rows(hidden, head):
    student, teacher = pair(hidden, near=False, head_dtype=head, bias=True)
    calls = {
        "cross_entropy": lambda x: jaxkd.cross_entropy(x, LABELS, label_smoothing=0.1, z_loss=0.1)[0],
        "token_log_probs": lambda x: jaxkd.token_log_probs(x, LABELS, temperature=2.0),
        "token_entropies": lambda x: jaxkd.token_entropies(x, temperature=2.0),
        "token_divergences": lambda x: jaxkd.token_divergences(x, teacher, LABELS),
        "chunked_rows": lambda x: jaxkd.chunked_rows(lambda z, *_: jax.nn.logsumexp(z, axis=1), x, LABELS),
    }
    for name, call in calls.items():
        values, gradient = jax.eval_shape(
            lambda x, call=call: (call(x), jax.grad(lambda y: jnp.sum(call(y)))(x)), student
        )
        assert values.dtype == jnp.float32, name
        assert (gradient.hidden.dtype, gradient.weight.dtype, gradient.bias.dtype) == (hidden, head, head), name


def test_master_weights():
    """float32 weights with bfloat16 hidden states: the product of rounded weights, the gradient unrounded."""
    student, teacher = pair(jnp.bfloat16, near=False, head_dtype=jnp.float32)
    student, teacher = (jaxkd.LinearLogits(x.hidden, x.weight.astype(jnp.float32)) for x in (student, teacher))
    rounded = jaxkd.LinearLogits(student.hidden, student.weight.astype(jnp.bfloat16))
    rounded_teacher = jaxkd.LinearLogits(teacher.hidden, teacher.weight.astype(jnp.bfloat16))
    (loss, _), gradient = cases.traced_value_and_grad(student, teacher, chunk_size=CHUNK)
    truth = cases.distillation(cases.twin(rounded), cases.twin(rounded_teacher), divergence="forward_kl")
    np.testing.assert_allclose(loss, truth.loss, rtol=1e-5)
    assert max(cases.gradient_errors(gradient, truth.gradient).values()) <= 5e-3


def test_head_gradient_is_summed_in_float32():
    """Many chunks, each far below the last place of the sum in bfloat16."""
    rows = 512
    student = cases.head(0, rows, 8, 53).astype(jnp.bfloat16)
    teacher = cases.head(1, rows, 8, 53).astype(jnp.bfloat16)
    _, gradient = cases.traced_value_and_grad(student, teacher, chunk_size=1)
    truth = cases.distillation(cases.twin(student), cases.twin(teacher), divergence="forward_kl")
    assert cases.relative_error(gradient.weight, truth.gradient.weight) <= 4e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dtype", [None, jnp.float32])
@pytest.mark.parametrize("transform", [{}, {"bias": True, "softcap": 30.0}])
def test_no_product_with_float32_operands(dtype, head_dtype, transform):
    student, teacher = pair(dtype, near=False, head_dtype=head_dtype, **transform)

    def loss(student):
        return jaxkd.distillation_loss(student, teacher, LABELS, hard_weight=0.5, chunk_size=CHUNK)[0]

    products = jaxprs.products(jax.make_jaxpr(jax.grad(loss))(student))
    operands = {v.aval.dtype for product in products for v in product.invars}
    assert len(products) == 4
    assert operands == {jnp.dtype(dtype)}
    assert {product.outvars[0].aval.dtype for product in products} == {jnp.dtype(jnp.float32)}
