"""Rows of embeddings: what the arrays must be, which rows count and how much, and how many are compared at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.embedding.similarity import widened
from jaxkd.loop.checks import check_floating, check_is_array, check_scalar, check_weights
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
    return jnp.where(jnp.expand_dims(counts, range(counts.ndim, x.ndim)), x, jnp.zeros((), x.dtype))


def chunk_size_for(num_rows: int, num_candidates: int, dtype: jnp.dtype, num_arrays: int = 1) -> int:
    """At most an eighth of the rows, so that the whole never exists, and `SIMILARITY_BYTES`; of so many arrays."""
    most = power_of_two(SIMILARITY_BYTES // (dtype.itemsize * num_candidates * num_arrays), least=128)
    return min(most, -(-num_rows // (8 * num_arrays)))


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


def as_negatives(name: str, negatives: Any, anchors: jax.Array, of: str = "anchors") -> jax.Array:
    """(B, K, D) of (B, D) or (B, K, D)."""
    check_floating(name, negatives)
    negatives, (num_rows, size) = jnp.asarray(negatives), anchors.shape
    if negatives.ndim not in (2, 3) or (negatives.shape[0], negatives.shape[-1]) != (num_rows, size):
        raise ValueError(
            f"`{name}` has shape {negatives.shape} but `{of}` has {anchors.shape}; give ({num_rows}, {size}) or "
            f"({num_rows}, K, {size})"
        )
    check_same_type(name, negatives, of, anchors)
    return negatives[:, None] if negatives.ndim == 2 else negatives


def check_booleans(name: str, x: Any, shape: tuple[int, ...]) -> None:
    check_is_array(name, x)
    if jnp.result_type(x) != jnp.bool or jnp.shape(x) != shape:
        raise ValueError(f"`{name}` is {jnp.result_type(x).name} {jnp.shape(x)}; give booleans {shape}")


def as_negative_mask(mask: Any, negatives: jax.Array | None) -> jax.Array | None:
    """(B, K) of (B,), for one negative each, or (B, K)."""
    if mask is None:
        return None
    if negatives is None:
        raise ValueError("`negative_mask` is given without `negatives`")
    num_rows, num_negatives, _ = negatives.shape
    is_flat = num_negatives == 1 and jnp.ndim(mask) == 1
    check_booleans("negative_mask", mask, (num_rows,) if is_flat else (num_rows, num_negatives))
    return jnp.reshape(jnp.asarray(mask), (num_rows, num_negatives))


def check_classes(labels: Any, embeddings: jax.Array) -> None:
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer) or jnp.shape(labels) != embeddings.shape[:1]:
        raise ValueError(
            f"`labels` is {jnp.result_type(labels).name} {jnp.shape(labels)} but `embeddings` has "
            f"B={embeddings.shape[0]}; give one integer a row"
        )


def scale_of(scale: Any, temperature: Any, default: float = 20.0) -> Any:
    """What similarities are multiplied by, of which one of both says how much."""
    if temperature is None:
        scale = default if scale is None else scale
        check_scalar("scale", scale, above=0)
        return scale
    if scale is not None:
        raise ValueError("`scale` and `temperature` are both given; the scale is 1 / temperature, give one")
    check_scalar("temperature", temperature, above=0)
    return 1 / temperature


def check_same_type(name: str, x: Any, other: str, y: Any) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"`{name}` is {x.dtype} but `{other}` is {y.dtype}; give one type")


def check_counting(embeddings: jax.Array, weights: Any, normalizer: Any) -> None:
    if weights is not None:
        check_weights(weights, embeddings.shape[:1], "embeddings")
    if normalizer is not None:
        check_scalar("normalizer", normalizer, at_least=0)
