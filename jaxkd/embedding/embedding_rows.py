"""Rows of embeddings: what the arrays must be, which rows count and how much, and how many are compared at a time."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.embedding.similarity import widened
from jaxkd.loop.checks import check_floating, check_scalar, check_weights
from jaxkd.loop.chunk_size import power_of_two

SIMILARITY_BYTES = 5 * 2**26  # of a chunk


def weigh_rows(weights: Any, *embeddings: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """A weight for each row, and embeddings in float32 or better in which a row that does not count holds zeros."""
    wide = [widened(x) for x in embeddings]
    if weights is None:
        return jnp.ones_like(wide[0][:, 0]), wide
    weights = jnp.asarray(weights, wide[0].dtype)
    return weights, [only(weights != 0, x) for x in wide]


def only(counts: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(counts.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def chunk_size_for(num_rows: int, num_candidates: int, dtype: jnp.dtype) -> int:
    """At most an eighth of the rows, so that the whole never exists, and `SIMILARITY_BYTES`."""
    most = power_of_two(SIMILARITY_BYTES // (dtype.itemsize * num_candidates), least=128)
    return min(most, -(-num_rows // 8))


def as_embeddings(**embeddings: Any) -> list[jax.Array]:
    """The arguments as arrays of one shape (B, D) and one type."""
    (first, model), *rest = embeddings.items()
    for name, x in embeddings.items():
        check_floating(name, x)
    if model.ndim != 2 or 0 in model.shape:
        raise ValueError(f"`{first}` has shape {model.shape}; give embeddings (B, D), of one row at least")
    for name, x in rest:
        if x.shape != model.shape:
            raise ValueError(f"`{name}` has shape {x.shape} but `{first}` has {model.shape}; give one row each")
        check_same_type(name, x, first, model)
    return [jnp.asarray(x) for x in embeddings.values()]


def check_same_type(name: str, x: Any, other: str, y: Any) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"`{name}` is {x.dtype} but `{other}` is {y.dtype}; give one type")


def check_counting(embeddings: jax.Array, weights: Any, normalizer: Any) -> None:
    if weights is not None:
        check_weights(weights, embeddings.shape[:1], "embeddings")
    if normalizer is not None:
        check_scalar("normalizer", normalizer, at_least=0)
