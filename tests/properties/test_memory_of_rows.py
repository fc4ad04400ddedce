"""Memory and work of the cross-entropy and of what gives one number a row: products counted, logits of a chunk."""

import cases
import jax
import jax.numpy as jnp
import jaxprs
import pytest
from sweeps import all_but

import jaxkd

# Sizes that cannot be mistaken for one another.
N, D, D_TEACHER, V, CHUNK = 96, 40, 56, 1009, 16
HEADS = {(V, D), (D, V), (V, D_TEACHER), (D_TEACHER, V)}
LABELS = jnp.asarray(cases.some_labels(2, N, V))


def cross_entropy(student, teacher, labels):
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "chunk_size": CHUNK}
    return jaxkd.cross_entropy(student, jnp.zeros(N, int) if labels is None else labels, **options)[0]


def log_probs(student, teacher, labels):
    labels = jnp.zeros(N, int) if labels is None else labels
    return jaxkd.token_log_probs(student, labels, temperature=2.0, chunk_size=CHUNK)


def entropies(student, teacher, labels):
    mask = None if labels is None else labels != -100
    return jaxkd.token_entropies(student, mask=mask, temperature=2.0, chunk_size=CHUNK)


def divergences(student, teacher, labels):
    options = {"divergence": jaxkd.jensen_shannon(), "temperature": 2.0, "chunk_size": CHUNK}
    return jaxkd.token_divergences(student, teacher, labels, **options)


def gap(logits, labels, teacher, shared):
    return jnp.mean((logits - teacher) ** 2, axis=1)


def own(student, teacher, labels):
    return jaxkd.chunked_rows(gap, student, labels, per_row=teacher, chunk_size=CHUNK)


def labels_alone(student, teacher, labels):
    """`distillation_loss` without its soft part."""
    options = {"soft_weight": 0, "hard_weight": 1.0, "chunk_size": CHUNK}
    return jaxkd.distillation_loss(student, teacher, labels, **options)[0]


# What computes, and its products: without a gradient, with that of the hidden states alone, with both gradients.
WORK = {
    "cross_entropy": (cross_entropy, (1, 2, 3)),
    "token_log_probs": (log_probs, (1, 3, 4)),
    "token_entropies": (entropies, (1, 3, 4)),
    "token_divergences": (divergences, (2, 5, 6)),
    "chunked_rows": (own, (2, 5, 6)),
    "soft_weight=0": (labels_alone, (1, 2, 3)),
}


def models(dtype=jnp.float32):
    return cases.head(0, N, D, V).astype(dtype), cases.head(1, N, D_TEACHER, V).astype(dtype)


def traced(name, differentiated, labels=LABELS, dtype=jnp.float32):
    student, teacher = models(dtype)

    def total(arrays):
        return jnp.sum(jnp.square(WORK[name][0](jaxkd.LinearLogits(**arrays), teacher, labels)))

    arrays = {"hidden": student.hidden, "weight": student.weight}
    if not differentiated:
        return jax.make_jaxpr(total)(arrays)
    trained = {key: arrays[key] for key in differentiated}
    return jax.make_jaxpr(jax.grad(lambda trained: total(arrays | trained)))(trained)


@pytest.mark.parametrize(
    ("name", "is_labelled"), [*((name, True) for name in WORK), *((x, False) for x in WORK if x != "soft_weight=0")]
)
def test_products_and_no_more_than_a_chunk_of_logits(name, is_labelled):
    counts = []
    for differentiated in ((), ("hidden",), ("hidden", "weight")):
        jaxpr = traced(name, differentiated, LABELS if is_labelled else None)
        assert jaxprs.most_rows(jaxpr, V, HEADS) == CHUNK
        counts.append(len(jaxprs.products(jaxpr)))
    assert tuple(counts) == WORK[name][1]


@pytest.mark.parametrize("name", WORK)
def test_head_gradient_is_carried_in_float32_and_no_product_is(name):
    jaxpr = traced(name, ("hidden", "weight"), dtype=jnp.bfloat16)
    loops = [x for x in jaxprs.equations(jaxpr) if x.primitive.name in ("scan", "while")]
    assert {v.aval.dtype for loop in loops for v in loop.outvars if v.aval.shape == (V, D)} == {jnp.dtype(jnp.float32)}
    products = jaxprs.products(jaxpr)
    assert {v.aval.dtype for product in products for v in product.invars} == {jnp.dtype(jnp.bfloat16)}
    assert {product.outvars[0].aval.dtype for product in products} == {jnp.dtype(jnp.float32)}


def temporary_bytes(name, rows, width=8192, hidden=64, chunk_size=64):
    student, teacher = (
        jaxkd.LinearLogits(*(jax.ShapeDtypeStruct((size, hidden), jnp.float32) for size in (rows, width)))
        for _ in range(2)
    )
    options = {"chunk_size": chunk_size}
    calls = {
        "cross_entropy": lambda s, t, y: jaxkd.cross_entropy(s, y, label_smoothing=0.1, z_loss=0.1, **options)[0],
        "token_entropies": lambda s, t, y: jaxkd.token_entropies(s, mask=y != -100, **options),
        "token_divergences": lambda s, t, y: jaxkd.token_divergences(s, t, y, **options),
    }
    function = jax.jit(jax.grad(lambda *x: jnp.sum(calls[name](*x) ** 2)))
    lowered = function.lower(student, teacher, jax.ShapeDtypeStruct((rows,), jnp.int32))
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name", all_but(["token_entropies"], ["cross_entropy", "token_entropies", "token_divergences"])
)
def test_compiled_memory_does_not_grow_with_the_rows(name):
    """Twelve arrays of a chunk's logits and two of a head are generous; the dense loss has several of all rows."""
    few, many = temporary_bytes(name, 512), temporary_bytes(name, 4096)
    assert few <= 4 * (12 * 64 * 8192 + 2 * 64 * 8192 + 8 * 512 * 64)
    assert many - few <= 4 * (4096 - 512) * (8 * 64)
