"""One number a row, of its label or of a soft loss, and the gradient from the sums that the forward pass kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.divergences import AnyDivergence, Divergence
from jaxkd.kernels import ChunkRows, RowLosses, RowOptions, RowSums, names_of_sums, row_gradient, row_losses_for
from jaxkd.logits import Place, take_rows
from jaxkd.loop import map_rows, weighted
from jaxkd.loop.checks import known_to_be, sound_temperature
from jaxkd.loop.flattening import on_auto_axes, with_leading_axes
from jaxkd.loop.partitioning import ROWS, Partitioning
from jaxkd.losses.flat_models import flat_models


def token_values(
    partitioning: Partitioning,
    student: Any,
    teacher: Any = None,
    *,
    divergence: AnyDivergence | None = None,
    labels: Any = None,
    mask: Any = None,
    ignore_index: int = -100,
    temperature: Any,
    vocabulary: str | None = None,
    chunk_size: int | None,
    implementation: str | None,
) -> Float[Array, "..."]:
    """The divergence of each row, or without one the log-probability of its label, at the temperature.

    0, and without a gradient, in a row that does not count: by its label or by the mask. ``teacher`` is as the loop
    takes its rows, or None for one head.
    """
    of_arrays = partial(
        _of_arrays,
        partitioning=partitioning,
        ignore_index=ignore_index,
        is_tempered=not known_to_be(temperature, 1),
        vocabulary=vocabulary,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    arrays = student, teacher, divergence, labels, mask, temperature
    return on_auto_axes(partitioning, of_arrays, *arrays, gives_rows=True)


def _of_arrays(
    student: Any,
    teacher: Any,
    divergence: AnyDivergence | None,
    labels: Any,
    mask: Any,
    temperature: Any,
    *,
    partitioning: Partitioning,
    ignore_index: int,
    is_tempered: bool,
    vocabulary: str | None,
    chunk_size: int | None,
    implementation: str | None,
) -> Float[Array, "..."]:
    models = flat_models(
        partitioning,
        student,
        teacher,
        vocabulary=vocabulary,
        chunk_size=chunk_size,
        implementation=implementation,
        divergence=divergence,
    )
    dtype, teacher = models.student.dtype, models.teacher
    rows = models.count_rows(labels=labels, weights=mask, ignore_index=ignore_index)
    divergence = jax.tree.map(lambda x: jnp.asarray(x, dtype), divergence)
    in_buckets = teacher is not None and teacher.IN_BUCKETS
    loss = _TokenValues(
        labels=jnp.zeros_like(rows.weights, jnp.int32) if rows.labels is None else rows.labels,
        weights=rows.weights,
        teacher=teacher,
        temperature=sound_temperature(temperature, dtype),
        divergence=divergence,
        row_losses=row_losses_for(implementation, models.chunk, divergence, in_buckets=in_buckets),
        has_sums=not in_buckets and (divergence is None or isinstance(divergence, Divergence)),
        options=RowOptions(
            vocabulary=vocabulary or "truncate",
            has_labels=divergence is None,
            is_tempered=is_tempered,
            tempers_labels=True,
            shards=models.shards,
        ),
    )
    values = map_rows(loss, models.student, rows.is_counted, models.plan)
    return with_leading_axes(partitioning, values["loss"], models.leading_shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _TokenValues:
    """For the loop over chunks: forward, the values, with the sums if they are kept; backward, the gradient alone."""

    labels: Any
    weights: Any
    teacher: Any
    temperature: Any
    divergence: AnyDivergence | None
    row_losses: RowLosses = field(metadata={"static": True})
    has_sums: bool = field(metadata={"static": True})  # whether the gradient can be had from them
    options: RowOptions = field(metadata={"static": True})
    sums: dict[str, Any] | None = None  # of the rows, by name: known in the backward pass
    is_backward: bool = field(default=False, metadata={"static": True})
    DIMS: ClassVar = {"labels": (ROWS,), "weights": (ROWS,), "sums": (ROWS,)}

    @property
    def names(self) -> tuple[str, ...]:
        if self.is_backward:
            return ()
        kept = names_of_sums(self.divergence is not None, self.teacher is not None)
        return ("loss", *(kept if self.options.keeps_sums else ()))

    def take(self, index: Int[Array, " C"]) -> "_TokenValues":
        return replace(
            self,
            teacher=None if self.teacher is None else self.teacher.take(index),
            labels=take_rows(self.labels, index),
            weights=take_rows(self.weights, index),
            sums=jax.tree.map(lambda x: take_rows(x, index), self.sums),
        )

    def saving(self) -> "_TokenValues":
        return replace(self, options=replace(self.options, keeps_sums=self.has_sums))

    def weighted(self, weights: Float[Array, " N"], saved: dict[str, Float[Array, " N"]]) -> "_TokenValues":
        return replace(
            self, weights=weighted(self.weights, weights), sums=saved if self.has_sums else None, is_backward=True
        )

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: Any, place: Place | None
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        rows = ChunkRows(
            student=logits,
            teacher=None if self.teacher is None else self.teacher.compared(logits.dtype),
            labels=self.labels,
            soft_scale=self.weights,
            hard_scale=-self.weights,
            temperature=self.temperature,
            divergence=self.divergence,
        )
        options = replace(self.options, gradient_dtype=gradient_dtype)
        if self.is_backward:
            if self.sums is not None:
                return {}, row_gradient(rows, options, RowSums.of(self.sums), place)
            return {}, self.row_losses(rows, options, place).gradient
        result = self.row_losses(rows, options, None)
        value = -result.hard.nll if self.divergence is None else result.soft
        return {"loss": weighted(self.weights, value)} | (result.sums.named() if options.keeps_sums else {}), None
