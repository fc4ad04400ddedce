"""What the embedding losses promise: no B x B array anywhere, no rounding and no wide product for narrow embeddings."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from jaxkd import embedding

B, D, CHUNK = 97, 8, 16  # a batch that is nobody else's size
ROWS = np.random.default_rng(0).normal(size=(3, B, D)).astype(np.float32)
LABELS = np.arange(B) % 7
EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
LOSSES = {
    "info_nce": lambda x: embedding.info_nce(x[0], x[1]),
    "info_nce, symmetric, hard negatives": lambda x: embedding.info_nce(*x, symmetric=True, chunk_size=CHUNK),
    "info_nce, weights": lambda x: embedding.info_nce(x[0], x[1], weights=jnp.ones(B), chunk_size=CHUNK),
    "info_nce, all directions": lambda x: embedding.info_nce(
        *x, directions=EVERY, document_ids=jnp.arange(2 * B).reshape(B, 2), guide=embedding.Guide(*x)
    ),
    "nt_xent": lambda x: embedding.nt_xent(x[0], LABELS),
    "angle": lambda x: embedding.angle(x[0], x[1], LABELS),
    "cosent": lambda x: embedding.cosent(x[0], x[1], LABELS),
    "triplet": lambda x: embedding.triplet(*x),
    "batch_hard_triplet": lambda x: embedding.batch_hard_triplet(x[0], LABELS),
    "batch_hard_triplet, cosine": lambda x: embedding.batch_hard_triplet(x[0], LABELS, distance=embedding.cosine),
    "batch_semi_hard_triplet": lambda x: embedding.batch_semi_hard_triplet(x[0], LABELS),
    "batch_all_triplet": lambda x: embedding.batch_all_triplet(x[0], LABELS),
    "batch_all_triplet, cosine": lambda x: embedding.batch_all_triplet(x[0], LABELS, distance=embedding.cosine),
    "margin_mse": lambda x: embedding.margin_mse(*x, jnp.ones((B, 2))),
    "score_distillation": lambda x: embedding.score_distillation(*x, jnp.ones((B, 2))),
    "matryoshka": lambda x: embedding.matryoshka(embedding.info_nce, (D, 3))(x[0], x[1]),
}


def traced(name, dtype=jnp.float32):
    return jax.make_jaxpr(jax.value_and_grad(LOSSES[name], has_aux=True))(jnp.asarray(ROWS, dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_no_more_than_a_chunk_of_similarities(name):
    """By default an eighth of the rows; the embeddings themselves are a few columns wide."""
    widths = B, 2 * B
    squares = [x for x in jaxprs.shapes(traced(name)) if np.prod(x) >= B * B // 2]
    assert not squares
    rows = max((x[0] for x in jaxprs.shapes(traced(name)) if len(x) == 2 and x[1] in widths), default=0)
    assert rows <= CHUNK


def test_the_walk_sees_dense_similarities():
    jaxpr = jax.make_jaxpr(jax.jit(lambda x: jax.nn.logsumexp(x[0] @ x[1].T)))(ROWS)
    assert (B, B) in jaxprs.shapes(jaxpr)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "matryoshka"])
def test_products_of_bfloat16_embeddings_are_bfloat16(name):
    for product in jaxprs.products(traced(name, jnp.bfloat16)):
        assert {v.aval.dtype for v in product.invars} == {jnp.dtype(jnp.bfloat16)}
        assert product.outvars[0].aval.dtype == jnp.float32


def test_info_nce_is_three_products():
    """Similarities and both gradients; evaluation needs the first alone."""
    assert len(jaxprs.products(traced("info_nce"))) == 3
    assert len(jaxprs.products(jax.make_jaxpr(LOSSES["info_nce"])(ROWS))) == 1


def dense_info_nce(x, y):
    unit = [z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(20 * unit[0] @ unit[1].T)))


def dense_cosent(x, y):
    scores = 20 * jnp.sum(x * y, 1) / (jnp.linalg.norm(x, axis=1) * jnp.linalg.norm(y, axis=1))
    grades = jnp.arange(len(x))
    differences = jnp.where(grades[:, None] < grades, scores[:, None] - scores, -jnp.inf)
    return jnp.logaddexp(0, jax.nn.logsumexp(differences))


def dense_batch_hard(x, y):
    squares = jnp.sum(x * x, 1)[:, None] + jnp.sum(x * x, 1) - 2 * x @ x.T
    labels = jnp.arange(len(x)) // 2
    same = labels[:, None] == labels
    return jnp.mean(jax.nn.relu(jnp.where(same, squares, 0).max(1) - jnp.where(same, jnp.inf, squares).min(1) + 5))


def classes(x):
    return jnp.arange(len(x)) // 2


@pytest.mark.parametrize(
    ("loss", "dense"),
    [
        (embedding.info_nce, dense_info_nce),
        (partial(embedding.info_nce, symmetric=True), dense_info_nce),
        (lambda x, y: embedding.info_nce(x, y, directions=EVERY, guide=embedding.Guide(y, x)), dense_info_nce),
        (lambda x, y: embedding.cosent(x, y, jnp.arange(len(x))), dense_cosent),
        (lambda x, y: embedding.batch_hard_triplet(x, classes(x)), dense_batch_hard),
        (lambda x, y: embedding.batch_semi_hard_triplet(x, classes(x)), dense_batch_hard),
        (lambda x, y: embedding.batch_all_triplet(x, classes(x)), dense_batch_hard),
    ],
    ids=[
        "info_nce",
        "info_nce, symmetric",
        "info_nce, all directions and a guide",
        "cosent",
        "batch_hard_triplet",
        "batch_semi_hard_triplet",
        "batch_all_triplet",
    ],
)
def test_compiled_memory(loss, dense):
    """At B = 8192 the similarities take 256 MiB; a default chunk and its gradient take a quarter of that."""
    rows = jax.ShapeDtypeStruct((8192, 32), jnp.float32)

    def temporary_bytes(function):
        compiled = jax.jit(jax.grad(function, (0, 1))).lower(rows, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    square = 4 * 8192**2
    assert temporary_bytes(dense) >= square
    assert temporary_bytes(lambda x, y: loss(x, y)[0]) <= square / 3


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: embedding.info_nce(x[0], x[1][:5]), ValueError, r"`positives` has shape \(5, 8\) but `anchors` has"),
        (
            lambda x: embedding.info_nce(x[0], x[1].astype(np.float16)),
            TypeError,
            "`positives` is float16 but `anchors`",
        ),
        (lambda x: embedding.info_nce(x[0], x[1], x[2, :4]), ValueError, r"`negatives` has shape \(4, 8\).*K, 8"),
        (lambda x: embedding.info_nce(LABELS, x[1]), TypeError, "`anchors` is int64; give a floating-point array"),
        (lambda x: embedding.info_nce(x[0, 0], x[1, 0]), ValueError, r"`anchors` has shape \(8,\); give embeddings"),
        (lambda x: embedding.info_nce(x[0, :0], x[1, :0]), ValueError, "of one row at least"),
        (lambda x: embedding.info_nce(x[0], x[1], scale=0), ValueError, "`scale` is 0; give a number above 0"),
        (lambda x: embedding.info_nce(x[0], x[1], chunk_size=0), ValueError, "`chunk_size` is 0"),
        (lambda x: embedding.info_nce(x[0], x[1], normalizer=-1), ValueError, "`normalizer` is -1"),
        (lambda x: embedding.info_nce(x[0], x[1], weights=-LABELS), ValueError, "`weights` has a negative value"),
        (lambda x: embedding.info_nce(x[0], x[1], weights=LABELS[:3]), ValueError, r"`weights` has shape \(3,\)"),
        (
            lambda x: embedding.cosent(x[0], x[1], LABELS[:3]),
            ValueError,
            r"`labels` has shape \(3,\) but `first` has B=97; give \(97,\)",
        ),
        (lambda x: embedding.cosent(x[0], x[1], LABELS[:, None] / 2), ValueError, r"`labels` has shape \(97, 1\) but"),
        (lambda x: embedding.cosent(x[0], x[1], LABELS > 3), TypeError, "`labels` is bool; give numbers, for booleans"),
        (
            lambda x: embedding.matryoshka(embedding.cosent, (4,))(x[0], x[1], jnp.ones((B, 1))),
            ValueError,
            r"`dims` has 4 but embeddings of shape \(97, 1\) have D=1; .* labels of shape \(B,\)",
        ),
        (lambda x: embedding.triplet(*x, distance="cosine"), TypeError, "`distance` is 'cosine'; give jaxkd.embedding"),
        (lambda x: embedding.triplet(*x, margin="soft"), TypeError, "`margin` is 'soft'; give a number"),
        (lambda x: embedding.batch_hard_triplet(x[0], LABELS / 2), ValueError, "`labels` is float32 .*integer a row"),
        (lambda x: embedding.batch_hard_triplet(x[0], LABELS, distance=max), TypeError, "jaxkd.embedding.Distance"),
        (lambda x: embedding.matryoshka("info_nce", (8,)), TypeError, "`loss` is 'info_nce'; give a function"),
        (lambda x: embedding.matryoshka(embedding.cosent, ()), ValueError, r"`dims` is \(\); give distinct positive"),
        (lambda x: embedding.matryoshka(embedding.cosent, (4, 4)), ValueError, "give distinct positive sizes"),
        (lambda x: embedding.matryoshka(embedding.cosent, (4.0,)), TypeError, "`dims` is 4.0; give an integer"),
        (
            lambda x: embedding.matryoshka(embedding.cosent, (4, 2), (1,)),
            ValueError,
            "`weights` has 1 values but `dims`",
        ),
        (
            lambda x: embedding.matryoshka(embedding.info_nce, (9,))(x[0], x[1]),
            ValueError,
            r"`dims` has 9 but embeddings of shape \(97, 8\) have D=8",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(ROWS)
