"""Which rows count and how much, and what is returned beside a loss."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.loop.collectives import total_of_own
from jaxkd.loop.flattening import flat_rows, has_filling
from jaxkd.loop.partitioning import Partitioning

Metrics = dict[str, jax.Array]


class CountedRows(NamedTuple):
    """The N flat rows of a call: which of them count, and how much."""

    labels: jax.Array | None  # (N,)
    weights: jax.Array  # (N,): 0 for a row that does not count, NaN for a label outside the vocabulary
    is_counted: jax.Array | None  # (N,) bool, or None for all
    num_rows: jax.Array  # that count
    normalizer: jax.Array
    label_weights: jax.Array | None = None  # (N,): of what is asked of labels, where a mask gives it other rows


def count_rows(
    partitioning: Partitioning,
    leading_shape: tuple[int, ...],
    vocabulary: int,
    dtype: jnp.dtype,
    *,
    labels: Any = None,
    weights: Any = None,
    normalizer: Any = None,
    mask: Any = None,
    ignore_index: int = -100,
) -> CountedRows:
    """Labels, weights and mask come with the leading axes of a student of so many tokens; filling counts never.

    With a ``mask`` there are two sets of rows: ``weights`` are those of its rows, ``label_weights`` those of the rows
    whose label counts, and a row counts that is in either. Divided by ``normalizer`` each sums to 1, or, if that was
    given, both are divided by it.
    """
    num_rows = math.prod(leading_shape)
    if weights is None and has_filling(partitioning, leading_shape):
        weights = jnp.ones(leading_shape, dtype)
    flat_labels, flat_weights = flat_rows(partitioning, labels, ignore_index), flat_rows(partitioning, weights, 0)
    row_weights = jnp.ones(num_rows, dtype) if flat_weights is None else jnp.asarray(flat_weights, dtype)
    num_counted = jnp.asarray(num_rows, dtype)
    if flat_labels is not None:
        if flat_labels.dtype != jnp.int64:
            flat_labels = flat_labels.astype(jnp.int32)  # from a narrow or unsigned type, so that V and -100 fit
        is_labelled = flat_labels != ignore_index
        num_counted = jnp.sum(is_labelled, dtype=dtype)
        is_outside = is_labelled & ((flat_labels < 0) | (flat_labels >= vocabulary))
        row_weights = jnp.where(is_outside, jnp.nan, jnp.where(is_labelled, row_weights, 0))
    label_weights = None
    is_counted = None if labels is None and weights is None else row_weights != 0
    if mask is not None:
        is_masked_in = flat_rows(partitioning, mask, False)
        mask_weights = jnp.where(is_masked_in, 1 if flat_weights is None else flat_weights, 0).astype(dtype)
        is_counted, is_of_either = mask_weights != 0, is_masked_in
        if flat_labels is not None:
            label_weights, is_of_either = row_weights, is_masked_in | is_labelled
            is_counted |= label_weights != 0
        row_weights, num_counted = mask_weights, jnp.sum(is_of_either, dtype=dtype)
    if normalizer is None:
        normalizer = total_of_own(partitioning, jnp.sum(row_weights))
        if label_weights is not None:
            of_labels = total_of_own(partitioning, jnp.sum(label_weights))
            normalizer = jnp.where(normalizer == 0, of_labels, normalizer)
            label_weights = weighted(label_weights, normalizer / jnp.where(of_labels == 0, 1, of_labels))
    return CountedRows(
        labels=flat_labels,
        weights=row_weights,
        is_counted=is_counted,
        num_rows=total_of_own(partitioning, num_counted),
        normalizer=jnp.asarray(normalizer, dtype),
        label_weights=label_weights,
    )


def weighted(weights: jax.Array, x: jax.Array) -> jax.Array:
    """``weights * x``, and 0 where the weight is 0 whatever ``x`` is: what masks a row."""
    return jnp.where(weights == 0, 0, weights * x)


def metrics_of(values: dict[str, Any]) -> Metrics:
    """The values in float32 and without gradient: metrics are for reading."""
    return {name: jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for name, x in values.items()}
