"""A head with an adapter of low rank: held in float64 to the head with the adapter merged into it."""

from dataclasses import replace
from itertools import product

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from sweeps import only

import jaxkd
from jaxkd.loop import chunk_size as chunk_sizes

N, D, V, RANK = 9, 8, 123, 3


def adapter(seed, hidden=D, vocabulary=V, rank=RANK):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(hidden, rank)) / np.sqrt(hidden), rng.normal(size=(rank, vocabulary)) / np.sqrt(rank)


def adapted(head, pair, dtype, head_dtype=None):
    return replace(head.astype(dtype, head_dtype), low_rank=tuple(jnp.asarray(x, head_dtype or dtype) for x in pair))


def merged(student):
    """The float64 twin, whose head is ``weight + (A B)^T``."""
    a, b = (np.asarray(x).astype(np.float64) for x in student.low_rank)
    return cases.twin(student).map(lambda name, x: x + (a @ b).T if name == "weight" else x)


def check(result, student, truth, *, loss, gradient):
    """As `cases.check`, and the adapter's gradient: that of the merged head, through ``weight + (A B)^T``."""
    cases.check(result, truth, loss=loss, gradient=gradient)
    a, b = (np.asarray(x).astype(np.float64) for x in student.low_rank)
    da, db = result[1].low_rank
    merged_gradient = truth.gradient.weight
    errors = cases.relative_error(da, merged_gradient.T @ b.T), cases.relative_error(db, a.T @ merged_gradient.T)
    assert max(errors) <= gradient, errors
    assert (da.dtype, db.dtype) == tuple(x.dtype for x in student.low_rank)


TRANSFORMS = {"none": {}, "bias": {"bias": True}, "all": {"bias": True, "scale": -1.5, "softcap": 20.0}}
BOUNDS = {  # of the loss and of the gradient
    "float32": (3e-6, 1e-5),
    "bfloat16": (2e-5, 3e-3),
    "float16": (2e-5, 1e-3),
}


@pytest.mark.parametrize(
    ("dtype", "transform"),
    only([*product(["float32"], TRANSFORMS), ("bfloat16", "all"), ("float16", "all")], [*product(BOUNDS, TRANSFORMS)]),
)
def test_loss_and_gradients(dtype, transform):
    student = adapted(cases.head(0, N, D, V, **TRANSFORMS[transform]), adapter(5), dtype)
    teacher = cases.head(1, N, 5, V).astype(jnp.float32)
    labels = cases.some_labels(2, N, V)
    options = {"temperature": 1.5, "hard_weight": 0.5}
    result = cases.traced_value_and_grad(student, teacher, labels, divergence=jaxkd.reverse_kl, chunk_size=4, **options)
    truth = cases.distillation(merged(student), cases.twin(teacher), labels, divergence="reverse_kl", **options)
    loss, gradient = BOUNDS[dtype]
    check(result, student, truth, loss=loss, gradient=gradient)


def test_float64(x64):
    student = adapted(cases.head(0, N, D, V, bias=True), adapter(5), jnp.float64)
    teacher = cases.head(1, N, 5, V).astype(jnp.float64)
    result = cases.value_and_grad(student, teacher, divergence=jaxkd.reverse_kl, chunk_size=4)
    truth = cases.distillation(merged(student), cases.twin(teacher), divergence="reverse_kl")
    check(result, student, truth, loss=1e-12, gradient=1e-12)


def test_adapter_of_a_wider_type_than_the_hidden_states():
    """float32 parameters of which the products see the bfloat16 ones; the gradients come in float32."""
    student = adapted(cases.head(0, N, D, V), adapter(5), jnp.bfloat16, jnp.float32)
    teacher = cases.head(1, N, 5, V).astype(jnp.float32)
    result = cases.value_and_grad(student, teacher, divergence=jaxkd.forward_kl, chunk_size=4)
    seen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), student)
    truth = cases.distillation(merged(seen), cases.twin(teacher), divergence="forward_kl")
    check(result, student, truth, loss=2e-5, gradient=3e-3)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_near_the_teacher(dtype):
    """Where training has gone well: ``hidden @ A`` rounded to the hidden states' type would be no gradient at all."""
    rows, size, vocabulary, rank = 64, 64, 512, 8
    head, pair = cases.head(0, rows, size, vocabulary), adapter(5, size, vocabulary, rank)
    student = adapted(head, pair, dtype)
    exact = merged(student)
    teacher = jaxkd.Logits(jnp.asarray(cases.near(exact, noise=0.02).logits, jnp.float32))
    result = cases.value_and_grad(student, teacher, divergence=jaxkd.forward_kl, chunk_size=32)
    truth = cases.distillation(exact, np.asarray(teacher.values, np.float64), divergence="forward_kl")
    check(result, student, truth, loss=1e-3, gradient=3e-3)


@pytest.mark.parametrize("of_rows", [False, True])
def test_in_pieces(monkeypatch, of_rows):
    monkeypatch.setattr(chunk_sizes, "rows_of_piece", lambda *_: 2)
    student = adapted(cases.head(0, N, D, V), adapter(5), jnp.float32)
    teacher = cases.head(1, N, 5, V).astype(jnp.float32)
    labels = cases.some_labels(2, N, V) if of_rows else None
    chunks = chunk_sizes.rows_of_chunk(8, student, teacher)
    assert chunks.size > chunks.piece
    result = cases.value_and_grad(student, teacher, labels, divergence=jaxkd.reverse_kl, chunk_size=8)
    truth = cases.distillation(merged(student), cases.twin(teacher), labels, divergence="reverse_kl")
    check(result, student, truth, loss=3e-6, gradient=1e-5)


def test_as_the_teacher():
    student = cases.head(0, N, D, V).astype(jnp.float32)
    teacher = adapted(cases.head(1, N, 5, V), adapter(6, hidden=5), jnp.float32)
    result = cases.value_and_grad(student, teacher, divergence=jaxkd.forward_kl, chunk_size=4)
    truth = cases.distillation(cases.twin(student), merged(teacher), divergence="forward_kl")
    cases.check(result, truth, loss=3e-6, gradient=1e-5)
    gradient = jax.grad(lambda teacher: jaxkd.distillation_loss(student, teacher, chunk_size=4)[0])(teacher)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def dense(student):
    a, b = student.low_rank
    return jaxkd.Logits(student.hidden @ student.weight.T + student.hidden @ a @ b)


def gap(logits, *_):
    return jax.nn.logsumexp(logits, axis=1)


OF_ROWS = {
    "cross_entropy": lambda source, labels: jaxkd.cross_entropy(source, labels, label_smoothing=0.1, z_loss=0.1)[0],
    "token_entropies": lambda source, labels: jaxkd.token_entropies(source, mask=labels != -100),
    "token_divergences": lambda source, labels: jaxkd.token_divergences(
        source, cases.head(1, N, 5, V).astype(jnp.float32), labels
    ),
    "chunked_rows": lambda source, labels: jaxkd.chunked_rows(gap, source, labels),
    "token_log_probs": lambda source, labels: jaxkd.token_log_probs(source, labels),
    "chunked_loss": lambda source, labels: jaxkd.chunked_loss(gap, source, labels)[0],
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_other_losses(name):
    student = adapted(cases.head(0, N, D, V), adapter(5), jnp.float32)
    labels = jnp.asarray(cases.some_labels(2, N, V))

    def total(of, student):
        values = OF_ROWS[name](of(student), labels)
        return jnp.sum(jnp.arange(1.0, N + 1) * values) if values.ndim else values

    for x, y in zip(
        jax.tree.leaves(jax.grad(total, argnums=1)(lambda x: x, student)),
        jax.tree.leaves(jax.grad(total, argnums=1)(dense, student)),
        strict=True,
    ):
        assert cases.relative_error(x, y) <= 1e-5


def loss_of(pair, student, teacher, **options):
    return jaxkd.distillation_loss(replace(student, low_rank=pair), teacher, chunk_size=4, **options)[0]


TRANSFORMED = {
    "jit": lambda grad: jax.jit(grad),
    "remat": lambda grad: lambda *x: jax.grad(jax.checkpoint(loss_of))(*x),
    "vmap": lambda grad: (
        lambda pair, *x: jax.tree.map(
            lambda x: x[1], jax.vmap(grad, (0, None, None))(jax.tree.map(lambda x: jnp.stack([0 * x, x]), pair), *x)
        )
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms(name):
    student = adapted(cases.head(0, N, D, V), adapter(5), jnp.float32)
    teacher = cases.head(1, N, 5, V).astype(jnp.float32)
    grad = jax.grad(loss_of)
    actual = TRANSFORMED[name](grad)(student.low_rank, student, teacher)
    for x, y in zip(actual, grad(student.low_rank, student, teacher), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_one_of_the_pair_alone():
    """A frozen ``A`` is a constant; ``B`` has the gradient that it has with ``A``."""
    student = adapted(cases.head(0, N, D, V), adapter(5), jnp.float32)
    teacher = cases.head(1, N, 5, V).astype(jnp.float32)
    a, b = student.low_rank
    both = jax.grad(loss_of)((a, b), student, teacher)
    np.testing.assert_allclose(jax.grad(lambda b: loss_of((a, b), student, teacher))(b), both[1], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda a: loss_of([a, b], student, teacher))(a), both[0], rtol=1e-6)


# Memory.

LARGE = {"rows": 32, "hidden": 40, "vocabulary": 1009, "rank": 2}


def shapes_of_large(dtype):
    rows, hidden, vocabulary, rank = LARGE.values()
    shape = [(rows, hidden), (vocabulary, hidden), (hidden, rank), (rank, vocabulary), (rows, 5), (vocabulary, 5)]
    return [jax.ShapeDtypeStruct(x, dtype) for x in shape]


def adapters_alone(hidden, weight, a, b, teacher_hidden, teacher_weight):
    def loss(hidden, pair):
        student = jaxkd.LinearLogits(hidden, weight, low_rank=pair)
        return jaxkd.distillation_loss(student, jaxkd.LinearLogits(teacher_hidden, teacher_weight), chunk_size=8)[0]

    return jax.grad(loss, argnums=(0, 1))(hidden, (a, b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_the_heads_size_is_formed(dtype):
    jaxpr = jax.make_jaxpr(adapters_alone)(*shapes_of_large(dtype))
    _, hidden, vocabulary, rank = LARGE.values()
    computed = [
        v.aval
        for equation in jaxprs.equations(jaxpr)
        for v in equation.outvars
        if equation.primitive.name not in ("jit", "pjit", "custom_vjp_call")
    ]
    assert not [x for x in computed if sorted(x.shape) == [hidden, vocabulary]]
    carried = [v.aval for x in jaxprs.equations(jaxpr) if x.primitive.name == "scan" for v in x.outvars]
    assert [x.dtype for x in carried if x.shape == (rank, vocabulary)] == [jnp.float32]
    assert [x.dtype for x in carried if x.shape == (hidden, rank)] == [jnp.float32]


@pytest.mark.optimized
def test_compiled_memory_is_that_of_a_chunk():
    """Less than one array of the head's size, beside some of a chunk's logits."""
    rows, hidden, vocabulary, rank, chunk = 256, 1024, 4096, 4, 16
    shape = [(rows, hidden), (vocabulary, hidden), (hidden, rank), (rank, vocabulary), (rows, 8), (vocabulary, 8)]
    arguments = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shape]
    compiled = jax.jit(adapters_alone).lower(*arguments).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 4 * (12 * chunk * vocabulary + 3 * rows * hidden)
    assert temporary < 4 * vocabulary * hidden / 2


# Errors.

GOOD = cases.head(0, N, D, V).astype(jnp.float32)
A, B = (jnp.asarray(x, jnp.float32) for x in adapter(5))
ERRORS = {
    "an array": (A, TypeError, r"`student.low_rank` is a ArrayImpl; give \(A \(D, r\), B \(r, V\)\)"),
    "one of two": ((A,), TypeError, r"`student.low_rank` is a tuple; give \(A \(D, r\), B \(r, V\)\)"),
    "integers": ((A, B.astype(int)), TypeError, "`B of student.low_rank` is int32"),
    "as PyTorch has them": ((A.T, B.T), ValueError, r"are they transposed\? pass \(A.T, B.T\)"),
    "two ranks": ((A[:, :2], B), ValueError, r"`student.low_rank` has shapes \(8, 2\) and \(3, 123\)"),
    "of another head": ((A, B[:, 1:]), ValueError, r"give A \(8, r\) and B \(r, 123\)"),
    "rank 0": ((A[:, :0], B[:0]), ValueError, r"has shapes \(8, 0\) and \(0, 123\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    pair, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        jaxkd.distillation_loss(replace(GOOD, low_rank=pair), GOOD)
