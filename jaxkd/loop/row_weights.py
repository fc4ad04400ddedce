"""What losses of rows do before the loop: labels, weights and the normalizer say which rows count and how much."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd.logits.sources import LinearLogits, Source
from jaxkd.loop.checks import check_integer, check_labels, check_scalar, check_size, check_weights
from jaxkd.loop.chunked import ONE_DEVICE, Chunks, default_chunk_size, in_pieces
from jaxkd.loop.partitioning import Layout


class CountedRows(NamedTuple):
    """The N flat rows of a call: which of them count, and how much."""

    labels: jax.Array | None  # (N,)
    weights: jax.Array  # (N,): 0 for a row that does not count, NaN for a label outside the vocabulary
    counts: jax.Array | None  # (N,) bool, or None for all
    num_rows: jax.Array  # that count
    normalizer: jax.Array


def check_row_arguments(
    student: Source,
    name: str,
    *,
    labels: Any = None,
    weights: Any = None,
    normalizer: Any = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> None:
    """Raises an error for a value that does not fit; ``name`` is what the student's rows are called."""
    if labels is not None:
        check_labels(labels, student.leading_shape, name)
    if weights is not None:
        check_weights(weights, student.leading_shape, name)
    if normalizer is not None:
        check_scalar("normalizer", normalizer, above=0)
    check_integer("ignore_index", ignore_index)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)


def count_rows(
    student: Source,
    labels: Any = None,
    weights: Any = None,
    normalizer: Any = None,
    ignore_index: int = -100,
    *,
    vocabulary: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> CountedRows:
    """``student`` is flat; labels and weights have its leading shape from before.

    ``vocabulary`` is the student's where its arrays have another width, as shards do.
    """
    (num_rows,), dtype = student.leading_shape, student.dtype
    vocabulary = vocabulary or student.vocabulary
    row_weights = jnp.ones(num_rows, dtype) if weights is None else jnp.reshape(jnp.asarray(weights, dtype), -1)
    row_labels = None
    counted = jnp.asarray(num_rows, dtype)
    if labels is not None:
        row_labels = jnp.reshape(jnp.asarray(labels), -1)
        if row_labels.dtype != jnp.int64:
            row_labels = row_labels.astype(jnp.int32)  # from a narrow or unsigned type, so that V and -100 fit
        labelled = row_labels != ignore_index
        counted = jnp.sum(labelled, dtype=dtype)
        outside = labelled & ((row_labels < 0) | (row_labels >= vocabulary))
        row_weights = jnp.where(outside, jnp.nan, jnp.where(labelled, row_weights, 0))
    return CountedRows(
        labels=row_labels,
        weights=row_weights,
        counts=None if labels is None and weights is None else row_weights != 0,
        num_rows=layout.total_of_own(counted),
        normalizer=layout.total_of_own(jnp.sum(row_weights)) if normalizer is None else jnp.asarray(normalizer, dtype),
    )


def rows_of_chunk(chunk_size: int | None, student: Source, *others: Any, layout: Layout = ONE_DEVICE) -> Chunks:
    """``chunk_size``, or one chosen by the widths, and in how many pieces; hardly more than a device has rows."""
    num_rows = layout.local_rows(student.leading_shape[0])
    width = layout.gather_size * sum(layout.local_width(source.vocabulary) for source in (student, *others))
    bytes_per_row = width * student.dtype.itemsize
    size = default_chunk_size(num_rows, bytes_per_row) if chunk_size is None else chunk_size
    size = max(min(size, num_rows), 1)
    if not (isinstance(student, LinearLogits) and student.is_linear):
        return Chunks(size, size)
    return in_pieces(size, bytes_per_row, largest=chunk_size or 2 * size)


def weighted(weights: jax.Array, x: jax.Array) -> jax.Array:
    """``weights * x``, and 0 where the weight is 0 whatever ``x`` is: what masks a row."""
    return jnp.where(weights == 0, 0, weights * x)
