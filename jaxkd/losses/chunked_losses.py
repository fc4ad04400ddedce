"""A row loss of one's own, chunked: a plain function of a chunk's logits gets everything the losses here have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.logits import LinearLogits, Logits, Place, Source, placed, take_rows
from jaxkd.loop import (
    Chunks,
    CountedRows,
    Metrics,
    Plan,
    Sharding,
    count_rows,
    map_rows,
    metrics_of,
    rows_of_chunk,
    sum_rows,
    weighted,
)
from jaxkd.loop.checks import check_is_array, check_row_arguments, check_source
from jaxkd.loop.collectives import vary_like
from jaxkd.loop.flattening import flat_tree, on_auto_axes, with_leading_axes
from jaxkd.loop.handed_functions import check_row_function
from jaxkd.loop.partitioning import ROWS, Partitioning, partitioning_of

RowFunction = Callable[..., Any]


def chunked_loss(
    function: RowFunction,
    student: Source,
    labels: ArrayLike | None = None,
    *,
    per_row: Any = (),
    shared: Any = (),
    ignore_index: int = -100,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """A loss of your own over rows of logits that are never formed all at once.

        loss = sum_n weights_n function(logits, labels, per_row, shared)_n / normalizer

    The function sees one chunk of C rows and returns one number a row. Chunks, masks, means, float32 sums and the
    gradient in the forward pass are those of `distillation_loss`: a row labelled ``ignore_index`` or of weight 0 is
    never looked at, and the function's own derivative (`jax.vjp`) is pulled back to the student chunk by chunk.

    Args:
      function: ``function(logits, labels, per_row, shared)`` of logits (C, V) in float32 (float64 for float64), labels
        (C,) or None, and what is given below, to (C,), or to (C,) and a dict of metrics (C,). A row's number may depend
        on no other row: which rows share a chunk is not yours to know. A sum, a sort or a shift over rows is an error;
        what mixes them unseen, by an index say, gives a number that changes with ``chunk_size``. Define it at module
        level, or call under `jax.jit`: it is part of what is compiled.
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`; gradients reach all its arrays.
      labels: (...) integers or None: ``labels[:, t]`` is the token after position t (`jaxkd.shift_labels`). One outside
        the vocabulary other than ``ignore_index`` makes the loss NaN.
      per_row: a pytree. A `LinearLogits` or `Logits` in it (a teacher) reaches the function as its logits of the
        chunk's rows, (C, Vt); an array (..., *rest) with the student's leading axes as its rows, (C, *rest).
      shared: a pytree of arrays that reaches the function as it is: temperatures, tables.
      ignore_index, weights, normalizer, chunk_size: as in `distillation_loss`.
      sharding: as in `distillation_loss`; it may split rows, not the vocabulary, of which the function sees all.

    ``per_row``, ``shared`` and ``weights`` are constants: asking for their gradient raises an error. A teacher that
    depends on what is trained goes through `jax.lax.stop_gradient`.

    Returns:
      The loss, a float32 scalar (float64 for float64), and the metrics: the function's, each normalised as the loss is,
      and "num_rows" that count, in float32 and without gradient.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, what the function returns included, named, before
        any work.

    The idea is Liger Kernel's FlexChunkLoss (its RFC 371).

    Cross-entropy with a penalty on the log-normaliser (PaLM's z-loss):

    >>> def z_loss(logits, labels, per_row, shared):
    ...     log_z = jax.nn.logsumexp(logits, axis=1)
    ...     label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    ...     return log_z - label_logits + shared * log_z**2, {"log_z": log_z}
    >>> student = LinearLogits(jnp.ones((3, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> loss, metrics = chunked_loss(z_loss, student, jnp.array([0, 2, -100]), shared=jnp.asarray(0.1))
    >>> print(f"{loss:.4f}, log-normaliser {metrics['log_z']:.4f}, {metrics['num_rows']:.0f} rows")
    1.7024, log-normaliser 2.5514, 2 rows
    """
    loss, sums = chunked_sums(
        function,
        student,
        labels,
        per_row=per_row,
        shared=shared,
        ignore_index=ignore_index,
        weights=weights,
        normalizer=normalizer,
        chunk_size=chunk_size,
        sharding=sharding,
    )
    return loss, metrics_of(sums)


def chunked_sums(
    function: RowFunction,
    student: Source,
    labels: ArrayLike | None = None,
    *,
    per_row: Any = (),
    shared: Any = (),
    ignore_index: int = -100,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """`chunked_loss` with its metrics unrounded, in the type of the loss: for what computes with them."""
    _check_arguments(function, student, labels, per_row, shared, ignore_index, chunk_size, weights, normalizer)
    partitioning = partitioning_of(sharding, student, needs_whole_rows="`function`")
    of_arrays = partial(_loss_of_arrays, function, partitioning, ignore_index, chunk_size)
    return on_auto_axes(partitioning, of_arrays, student, labels, per_row, shared, weights, normalizer)


def chunked_rows(
    function: RowFunction,
    student: Source,
    labels: ArrayLike | None = None,
    *,
    per_row: Any = (),
    shared: Any = (),
    ignore_index: int = -100,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> jax.Array:
    """One number a row of your own, of logits that are never formed all at once: `chunked_loss` without its sum.

    Differentiable in all arrays of ``student``, each row with a gradient of its own: the backward pass forms the logits
    again, a chunk at a time, and pulls the function's derivative back. A row labelled ``ignore_index`` is never looked
    at and has 0.

    Args:
      function: as in `chunked_loss`, but to (C,) alone, without metrics.
      student, labels, per_row, shared, ignore_index, chunk_size, sharding: as in `chunked_loss`.

    Returns:
      (...) float32 (float64 for float64).

    Raises:
      TypeError, ValueError: as in `chunked_loss`.

    >>> def margin(logits, labels, per_row, shared):
    ...     best_two, _ = jax.lax.top_k(logits, 2)
    ...     return best_two[:, 0] - best_two[:, 1]
    >>> student = LinearLogits(jnp.ones((2, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 1.5]]))
    >>> print(chunked_rows(margin, student))
    [2.5 2.5]
    """
    _check_arguments(function, student, labels, per_row, shared, ignore_index, chunk_size)
    partitioning = partitioning_of(sharding, student, needs_whole_rows="`function`")
    of_arrays = partial(_rows_of_arrays, function, partitioning, ignore_index, chunk_size)
    return on_auto_axes(partitioning, of_arrays, student, labels, per_row, shared, gives_rows=True)


def _check_arguments(
    function: RowFunction,
    student: Source,
    labels: Any,
    per_row: Any,
    shared: Any,
    ignore_index: int,
    chunk_size: int | None,
    weights: Any = None,
    normalizer: Any = None,
) -> None:
    if not callable(function):
        raise TypeError(f"`function` is {function!r}; give a function (logits, labels, per_row, shared) -> (C,)")
    check_source(student, "student.")
    name = f"student.{student.ROWS}"
    check_row_arguments(
        student,
        name,
        labels=labels,
        weights=weights,
        normalizer=normalizer,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
    )
    jax.tree_util.tree_map_with_path(
        lambda path, x: _check_per_row("per_row" + jax.tree_util.keystr(path), x, student.leading_shape, name),
        per_row,
        is_leaf=_is_source,
    )
    jax.tree_util.tree_map_with_path(lambda path, x: check_is_array("shared" + jax.tree_util.keystr(path), x), shared)


def _loss_of_arrays(
    function: RowFunction,
    partitioning: Partitioning,
    ignore_index: int,
    chunk_size: int | None,
    student: Any,
    labels: Any,
    per_row: Any,
    shared: Any,
    weights: Any,
    normalizer: Any,
) -> tuple[jax.Array, Metrics]:
    rows = count_rows(
        partitioning,
        student.leading_shape,
        student.vocabulary,
        student.dtype,
        labels=labels,
        weights=weights,
        normalizer=normalizer,
        ignore_index=ignore_index,
    )
    loss, student, chunks = _in_chunks(function, partitioning, chunk_size, student, rows, per_row, shared)
    sums = sum_rows(loss, student, rows.is_counted, rows.normalizer, Plan(chunks, partitioning))
    metrics = {name: sums[name] for name in loss.metrics} | {"num_rows": rows.num_rows}
    return sums["loss"], jax.lax.stop_gradient(metrics)


def _rows_of_arrays(
    function: RowFunction,
    partitioning: Partitioning,
    ignore_index: int,
    chunk_size: int | None,
    student: Any,
    labels: Any,
    per_row: Any,
    shared: Any,
) -> jax.Array:
    leading_shape = student.leading_shape
    rows = count_rows(
        partitioning, leading_shape, student.vocabulary, student.dtype, labels=labels, ignore_index=ignore_index
    )
    loss, student, chunks = _in_chunks(function, partitioning, chunk_size, student, rows, per_row, shared)
    if loss.metrics:
        raise TypeError(f"`function` returns metrics {sorted(loss.metrics)}; give (C,) alone")
    values = map_rows(loss, student, rows.is_counted, Plan(chunks, partitioning))
    return with_leading_axes(partitioning, values["loss"], leading_shape)


def _in_chunks(
    function: RowFunction,
    partitioning: Partitioning,
    chunk_size: int | None,
    student: Any,
    rows: CountedRows,
    per_row: Any,
    shared: Any,
) -> tuple["FunctionLoss", Any, Chunks]:
    """The function as a row loss, the flat student, and how many of its rows are together."""
    student, per_row = flat_tree(partitioning, (student, per_row), student.leading_shape)
    per_row = jax.tree.map(lambda x: x.prepared() if _is_source(x) else x, per_row, is_leaf=_is_source)
    teachers = [x for x in jax.tree.leaves(per_row, is_leaf=_is_source) if _is_source(x)]
    chunks = rows_of_chunk(chunk_size, student, *teachers, partitioning=partitioning)
    loss = FunctionLoss(function, rows.labels, rows.weights, per_row, jax.tree.map(jnp.asarray, shared))
    return replace(loss, metrics=names_of_metrics(loss, student, chunks.piece)), student, chunks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FunctionLoss:
    """A function of a chunk's logits as a row loss for the loop over chunks."""

    function: RowFunction = field(metadata={"static": True})
    labels: Any
    weights: Any
    per_row: Any = ()
    shared: Any = ()
    metrics: tuple[str, ...] = field(default=(), metadata={"static": True})
    DIMS: ClassVar = {"labels": (ROWS,), "weights": (ROWS,), "per_row": (ROWS,)}

    @property
    def names(self) -> tuple[str, ...]:
        return ("loss", *self.metrics)

    def take(self, index: Int[Array, " C"]) -> "FunctionLoss":
        def rows(x: Any) -> Any:
            return x.take(index) if _is_source(x) else take_rows(x, index)

        return replace(
            self,
            per_row=jax.tree.map(rows, self.per_row, is_leaf=_is_source),
            labels=None if self.labels is None else take_rows(self.labels, index),
            weights=take_rows(self.weights, index),
        )

    def saving(self) -> "FunctionLoss":
        return self

    def weighted(self, weights: Float[Array, " N"], saved: dict[str, Float[Array, " N"]]) -> "FunctionLoss":
        return replace(self, weights=weighted(self.weights, weights))

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: Any, place: Place | None
    ) -> tuple[Metrics, jax.Array | None]:
        if gradient_dtype is None:
            loss, metrics = self.rows(logits)
            gradient = None
        else:
            loss, pullback, metrics = jax.vjp(self.rows, logits, has_aux=True)
            (gradient,) = pullback(vary_like(self.weights, loss))
            gradient = placed(jnp.where(self.weights[:, None] == 0, 0, gradient).astype(gradient_dtype), place)
        return {name: weighted(self.weights, x) for name, x in {"loss": loss, **metrics}.items()}, gradient

    def rows(self, logits: Float[Array, "C V"]) -> tuple[Float[Array, " C"], Metrics]:
        """The function's numbers in the type of the logits."""
        per_row = jax.tree.map(
            lambda x: x.logits().astype(logits.dtype) if _is_source(x) else x, self.per_row, is_leaf=_is_source
        )
        result = self.function(logits, self.labels, per_row, self.shared)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        return loss.astype(logits.dtype), {name: x.astype(logits.dtype) for name, x in metrics.items()}


def _is_source(x: Any) -> bool:
    return isinstance(x, (LinearLogits, Logits))


def _check_per_row(name: str, x: Any, rows: tuple[int, ...], student: str) -> None:
    if _is_source(x):
        check_source(x, f"{name}.")
    else:
        check_is_array(name, x)
    shape = x.leading_shape if _is_source(x) else jnp.shape(x)[: len(rows)]
    if shape != rows:
        what = f"leading shape {shape}" if _is_source(x) else f"shape {jnp.shape(x)}"
        raise ValueError(
            f"`{name}` has {what} but `{student}` has leading shape {rows}; give one row each, or pass it in `shared`"
        )


def names_of_metrics(loss: FunctionLoss, student: Source, chunk_size: int) -> tuple[str, ...]:
    """What the function returns for a chunk, traced on shapes alone and checked."""

    def arguments(num_rows: int) -> tuple[Any, ...]:
        def chunk(x: Any) -> jax.ShapeDtypeStruct:
            if _is_source(x):
                return jax.ShapeDtypeStruct((num_rows, x.vocabulary), student.dtype)
            return jax.ShapeDtypeStruct((num_rows, *x.shape[1:]), x.dtype)

        logits = jax.ShapeDtypeStruct((num_rows, student.vocabulary), student.dtype)
        labels = None if loss.labels is None else chunk(loss.labels)
        return logits, labels, jax.tree.map(chunk, loss.per_row, is_leaf=_is_source), shared

    shared = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), loss.shared)
    metrics = check_row_function("function", loss.function, arguments, chunk_size)
    if reserved := {"loss", "num_rows"} & set(metrics):
        raise ValueError(f"`function` returns a metric {sorted(reserved)}; these are jaxkd's own, give another name")
    return metrics
