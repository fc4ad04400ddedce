"""What there is to know of every row's distribution, for logging."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.divergences import AnyDivergence, check_divergence, forward_kl
from jaxkd.kernels import ChunkRows, RowLosses, RowOptions, VocabularyShards, row_losses_for, top_token
from jaxkd.logits import Place, Source, take_rows
from jaxkd.loop import Sharding, map_rows, weighted
from jaxkd.loop.checks import (
    check_row_arguments,
    check_same_rows,
    check_scalar,
    check_source,
    check_vocabulary,
    sound_temperature,
)
from jaxkd.loop.flattening import check_sources, on_auto_axes, with_leading_axes
from jaxkd.loop.partitioning import ROWS, Partitioning, partitioning_of
from jaxkd.losses.entropies import ENTROPY
from jaxkd.losses.flat_models import flat_models, partitioning_of_models


def token_statistics(
    student: Source,
    labels: ArrayLike | None = None,
    teacher: Source | None = None,
    *,
    divergence: AnyDivergence = forward_kl,
    temperature: ArrayLike = 1.0,
    vocabulary: str | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    implementation: str | None = None,
    sharding: Sharding | None = None,
) -> dict[str, jax.Array]:
    """What there is to know of every row's distribution, for logging; it carries no gradient.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`.
      labels: (...) integers or None: ``labels[:, t]`` is the token after position t (`jaxkd.shift_labels`). One outside
        the vocabulary other than ``ignore_index`` gives NaN.
      teacher: the same with leading axes equal to the student's and a width of its own, or None.
      divergence, temperature, vocabulary: of the soft loss, as in `distillation_loss`; the rest is untempered.
      ignore_index, chunk_size, implementation, sharding: as in `token_log_probs`.

    Returns:
      A dict of (...) float32 (float64 for float64), 0 in a row that does not count:
      "log_normalizer", log sum exp(z); "entropy", -sum q log q, in nats; "top", the token of the largest logit (int32,
      -1 in a row that does not count); with labels "log_prob", log q[label], and "correct", 1 where it is the top one;
      with a teacher "soft", the divergence, and "agrees", 1 where both models have the same top token.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    >>> import jaxkd
    >>> student = jaxkd.LinearLogits(jnp.ones((2, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> statistics = token_statistics(student, jnp.array([2, -100]))
    >>> for name, x in statistics.items():
    ...     print(f"{name} {x[0]:.4f} {x[1]:.4f}")
    correct 1.0000 0.0000
    entropy 0.9753 0.0000
    log_normalizer 2.5514 0.0000
    log_prob -0.5514 0.0000
    top 2.0000 -1.0000
    """
    check_source(student, "student.")
    name = f"student.{student.ROWS}"
    if teacher is not None:
        check_source(teacher, "teacher.")
        check_same_rows(student, teacher, (name, f"teacher.{teacher.ROWS}"))
    check_row_arguments(student, name, labels=labels, ignore_index=ignore_index, chunk_size=chunk_size)
    check_divergence(divergence)
    check_scalar("temperature", temperature, above=0)
    check_vocabulary(vocabulary)

    if teacher is None:
        partitioning = partitioning_of(sharding, student)
        check_sources(partitioning, student)
    else:
        partitioning = partitioning_of_models(sharding, student, teacher, teacher, divergence, vocabulary)
    of_arrays = partial(_of_arrays, partitioning, ignore_index, chunk_size, implementation, vocabulary or "truncate")
    arrays = student, teacher, labels, divergence, temperature
    return on_auto_axes(partitioning, of_arrays, *jax.lax.stop_gradient(arrays), gives_rows=True)


def _of_arrays(
    partitioning: Partitioning,
    ignore_index: int,
    chunk_size: int | None,
    implementation: str | None,
    vocabulary: str,
    student: Any,
    teacher: Any,
    labels: Any,
    divergence: AnyDivergence,
    temperature: Any,
) -> dict[str, jax.Array]:
    models = flat_models(
        partitioning,
        student,
        teacher,
        vocabulary=vocabulary,
        chunk_size=chunk_size,
        implementation=implementation,
        divergence=divergence,
    )
    dtype, one_head = models.student.dtype, replace(models.chunk, teacher_width=None)
    divergence = jax.tree.map(lambda x: jnp.asarray(x, dtype), divergence)
    rows = models.count_rows(labels=labels, ignore_index=ignore_index)
    statistics = _Statistics(
        labels=rows.labels,
        weights=rows.weights,
        teacher=models.teacher,
        divergence=divergence,
        temperature=sound_temperature(temperature, dtype),
        of_student=row_losses_for(implementation, one_head, ENTROPY),
        of_both=None if teacher is None else row_losses_for(implementation, models.chunk, divergence),
        vocabulary=vocabulary,
        shards=models.shards,
    )
    values = map_rows(statistics, models.student, rows.is_counted, models.plan)
    # float32 holds token ids up to 2**24.
    values["top"] = jnp.where(rows.weights == 1, values["top"], -1).astype(jnp.int32)
    return {name: with_leading_axes(partitioning, values[name], models.leading_shape) for name in statistics.names[1:]}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Statistics:
    """What `token_statistics` gives of each row, for the loop over chunks, without a gradient."""

    labels: Any
    weights: Any
    teacher: Any
    divergence: AnyDivergence
    temperature: Any
    of_student: RowLosses = field(metadata={"static": True})
    of_both: RowLosses | None = field(metadata={"static": True})
    vocabulary: str = field(metadata={"static": True})
    shards: VocabularyShards | None = field(metadata={"static": True})
    DIMS: ClassVar = {"labels": (ROWS,), "weights": (ROWS,)}

    @property
    def names(self) -> tuple[str, ...]:
        of_labels = () if self.labels is None else ("correct", "log_prob")
        of_teacher = ("agrees", "soft") if self.of_both else ()
        return ("loss", *sorted((*of_labels, *of_teacher, "entropy", "log_normalizer", "top")))

    def take(self, index: Int[Array, " C"]) -> "_Statistics":
        return replace(
            self,
            labels=None if self.labels is None else take_rows(self.labels, index),
            weights=take_rows(self.weights, index),
            teacher=None if self.teacher is None else self.teacher.take(index),
        )

    def saving(self) -> "_Statistics":
        return self  # there is no backward pass

    def weighted(self, weights: Float[Array, " N"], saved: dict[str, Float[Array, " N"]]) -> "_Statistics":
        return replace(self, weights=weighted(self.weights, weights))

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: Any, place: Place | None
    ) -> tuple[dict[str, jax.Array], None]:
        one, top = jnp.ones_like(self.weights), top_token(logits, self.shards)
        rows = ChunkRows(logits, top if self.labels is None else self.labels, one, one, jnp.ones_like(self.temperature))
        options = RowOptions(has_labels=self.labels is not None, is_tempered=False, shards=self.shards)
        result = self.of_student(replace(rows, divergence=ENTROPY), options, None)
        log_normalizer = result.sums.plain.value
        values = {"loss": log_normalizer, "log_normalizer": log_normalizer, "entropy": result.soft, "top": top}
        if self.labels is not None:
            values |= {"log_prob": -result.hard.nll, "correct": top == self.labels}
        if self.of_both is not None:
            z = self.teacher.logits().astype(logits.dtype)
            both = replace(rows, teacher=z, temperature=self.temperature, divergence=self.divergence)
            options = replace(options, vocabulary=self.vocabulary, has_labels=False, is_tempered=True)
            soft = self.of_both(both, options, None).soft
            values |= {"soft": soft, "agrees": top == top_token(z, self.shards, of_teacher=True)}
        return {name: weighted(self.weights, x.astype(logits.dtype)) for name, x in values.items()}, None
