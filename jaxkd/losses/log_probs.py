"""One number a row without the (N, V) logits: log-probabilities of labels, which losses are made of, and statistics."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.divergences import AnyDivergence, Divergence, check_divergence, forward_kl, weigh
from jaxkd.kernels import ChunkRows, RowOptions, VocabularyShards, xla_row_losses
from jaxkd.kernels.reference import at_label, label_log_probs, log_softmax, own_columns, own_labels, top_token
from jaxkd.logits import Place, Source, take_rows
from jaxkd.loop import Plan, Sharding, count_rows, map_rows, rows_of_chunk, weighted
from jaxkd.loop.checks import (
    check_row_arguments,
    check_same_rows,
    check_scalar,
    check_source,
    check_vocabulary,
    check_widths,
    sound_temperature,
)
from jaxkd.loop.collectives import psum
from jaxkd.loop.flattening import check_sources, flat_sources, on_auto_axes, with_leading_axes
from jaxkd.loop.partitioning import ROWS, Axes, Partitioning, partitioning_of


def token_log_probs(
    student: Source,
    labels: ArrayLike,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> jax.Array:
    """log softmax(z)[label] of every row, and 0 where the label is ``ignore_index``.

    Differentiable in all arrays of ``student``. The backward pass forms the logits again, a chunk at a time (four
    products with the head in all, where `distillation_loss` takes three), so that each row may have a gradient of its
    own and memory beyond inputs and gradients stays that of a chunk. A row that does not count is never looked at, in
    either pass. Gradients of the head are summed in float32.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`.
      labels: (...) integers: ``labels[:, t]`` is the token after position t (`jaxkd.shift_labels`). One outside the
        vocabulary other than ``ignore_index`` gives NaN.
      ignore_index: the label of a row that does not count.
      chunk_size: rows whose logits exist at a time, at most; None chooses by the width of the vocabulary.
      sharding: as in `distillation_loss`.

    Returns:
      (...) float32 (float64 for float64).

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    >>> import jaxkd
    >>> student = jaxkd.LinearLogits(jnp.ones((3, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> print(token_log_probs(student, jnp.array([0, 2, -100])).round(4))
    [-1.5514 -0.5514  0.    ]
    """
    check_source(student, "student.")
    check_row_arguments(
        student, f"student.{student.ROWS}", labels=labels, ignore_index=ignore_index, chunk_size=chunk_size
    )
    partitioning = partitioning_of(sharding, student)
    check_sources(partitioning, student)
    of_arrays = partial(_log_probs_of_arrays, partitioning, ignore_index, chunk_size)
    return on_auto_axes(partitioning, of_arrays, student, labels, gives_rows=True)


def _log_probs_of_arrays(
    partitioning: Partitioning, ignore_index: int, chunk_size: int | None, student: Any, labels: Any
) -> jax.Array:
    leading_shape, width = student.leading_shape, partitioning.whole_width(student.vocabulary)
    student, _ = flat_sources(partitioning, student)
    rows = count_rows(partitioning, leading_shape, width, student.dtype, labels=labels, ignore_index=ignore_index)
    loss = _LabelLogProb(rows.labels, rows.weights, _shards(partitioning, width))
    plan = Plan(rows_of_chunk(chunk_size, student, partitioning=partitioning), partitioning)
    values = map_rows(loss, student, rows.is_counted, plan)
    return with_leading_axes(partitioning, values["loss"], leading_shape)


def _shards(partitioning: Partitioning, student: int, teacher: int | None = None) -> VocabularyShards | None:
    if not partitioning.vocabulary:
        return None
    return VocabularyShards(partitioning.vocabulary, student, student if teacher is None else teacher)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _LabelLogProb:
    """The log-probability of each row's label, for the loop over chunks."""

    labels: Any
    weights: Any
    shards: VocabularyShards | None = field(metadata={"static": True})
    names = ("loss",)
    DIMS: ClassVar = {"labels": (ROWS,), "weights": (ROWS,)}

    def take(self, index: Int[Array, " C"]) -> "_LabelLogProb":
        return replace(self, labels=take_rows(self.labels, index), weights=take_rows(self.weights, index))

    def weighted(self, weights: Float[Array, " N"]) -> "_LabelLogProb":
        return replace(self, weights=weighted(self.weights, weights))

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: Any, place: Place | None
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        values, gradient = label_log_probs(logits, self.labels, self.weights, gradient_dtype, self.shards, place)
        return {"loss": weighted(self.weights, values)}, gradient


def sequence_log_probs(
    student: Source,
    labels: ArrayLike,
    *,
    average: bool = False,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> jax.Array:
    """The log-probability of each sequence: the sum of `token_log_probs` over the last axis of the labels.

    Args:
      student: hidden states (..., T, D) or logits (..., T, V).
      labels: (..., T) integers: ``labels[:, t]`` is the token after position t (`jaxkd.shift_labels`).
      average: whether to divide by the number of labels that count. A sequence without one has 0, not NaN.
      ignore_index, chunk_size, sharding: as in `token_log_probs`.

    Returns:
      (...) float32 (float64 for float64).

    Raises:
      TypeError, ValueError: as in `token_log_probs`, or labels without an axis to sum over.

    >>> import jaxkd
    >>> student = jaxkd.LinearLogits(jnp.ones((2, 3, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> labels = jnp.array([[0, 2, -100], [-100, -100, -100]])
    >>> print(sequence_log_probs(student, labels).round(4), sequence_log_probs(student, labels, average=True).round(4))
    [-2.1029  0.    ] [-1.0514  0.    ]
    """
    if jnp.ndim(labels) < 1:
        raise ValueError(f"`labels` has shape {jnp.shape(labels)}; give sequences of them, (..., T)")
    log_probs = token_log_probs(student, labels, ignore_index=ignore_index, chunk_size=chunk_size, sharding=sharding)
    total = jnp.sum(log_probs, axis=-1)
    if not average:
        return total
    count = jnp.sum(jnp.asarray(labels) != ignore_index, axis=-1)
    return total / jnp.maximum(count, 1).astype(total.dtype)


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
    sharding: Sharding | None = None,
) -> dict[str, jax.Array]:
    """What there is to know of every row's distribution, for logging; it carries no gradient.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`.
      labels: (...) integers or None: ``labels[:, t]`` is the token after position t (`jaxkd.shift_labels`). One outside
        the vocabulary other than ``ignore_index`` gives NaN.
      teacher: the same with leading axes equal to the student's and a width of its own, or None.
      divergence, temperature, vocabulary: of the soft loss, as in `distillation_loss`; the rest is untempered.
      ignore_index, chunk_size, sharding: as in `token_log_probs`.

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

    needs_whole_rows = None if isinstance(divergence, Divergence) or teacher is None else "this `divergence`"
    partitioning = partitioning_of(sharding, student, needs_whole_rows)
    check_sources(partitioning, student, teacher)
    if teacher is not None and divergence.vocabulary == "common":
        check_widths(*(partitioning.whole_width(x.vocabulary) for x in (student, teacher)), vocabulary=vocabulary)
    of_arrays = partial(_statistics_of_arrays, partitioning, ignore_index, chunk_size, vocabulary or "truncate")
    arrays = student, teacher, labels, divergence, temperature
    return on_auto_axes(partitioning, of_arrays, *jax.lax.stop_gradient(arrays), gives_rows=True)


def _statistics_of_arrays(
    partitioning: Partitioning,
    ignore_index: int,
    chunk_size: int | None,
    vocabulary: str,
    student: Any,
    teacher: Any,
    labels: Any,
    divergence: AnyDivergence,
    temperature: Any,
) -> dict[str, jax.Array]:
    leading_shape, width = student.leading_shape, partitioning.whole_width(student.vocabulary)
    shards = _shards(partitioning, width, teacher and partitioning.whole_width(teacher.vocabulary))
    student, teacher = flat_sources(partitioning, student, teacher, truncate=vocabulary == "truncate")
    teachers = () if teacher is None else (teacher.prepared(),)
    chunks = rows_of_chunk(chunk_size, student, *teachers, partitioning=partitioning)
    rows = count_rows(partitioning, leading_shape, width, student.dtype, labels=labels, ignore_index=ignore_index)
    statistics = _Statistics(
        labels=rows.labels,
        weights=rows.weights,
        teachers=teachers,
        divergence=jax.tree.map(lambda x: jnp.asarray(x, student.dtype), divergence),
        temperature=sound_temperature(temperature, student.dtype),
        vocabulary=vocabulary,
        shards=shards,
    )
    values = map_rows(statistics, student, rows.is_counted, Plan(chunks, partitioning))
    # float32 holds token ids up to 2**24.
    values["top"] = jnp.where(rows.weights == 1, values["top"], -1).astype(jnp.int32)
    return {name: with_leading_axes(partitioning, values[name], leading_shape) for name in statistics.names[1:]}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Statistics:
    """What `token_statistics` gives of each row, for the loop over chunks, without a gradient."""

    labels: Any
    weights: Any
    teachers: tuple[Any, ...]  # one or none
    divergence: AnyDivergence
    temperature: Any
    vocabulary: str = field(metadata={"static": True})
    shards: VocabularyShards | None = field(metadata={"static": True})
    DIMS: ClassVar = {"labels": (ROWS,), "weights": (ROWS,)}

    @property
    def names(self) -> tuple[str, ...]:
        of_labels = () if self.labels is None else ("correct", "log_prob")
        of_teacher = ("agrees", "soft") if self.teachers else ()
        return ("loss", *sorted((*of_labels, *of_teacher, "entropy", "log_normalizer", "top")))

    def take(self, index: Int[Array, " C"]) -> "_Statistics":
        return replace(
            self,
            labels=None if self.labels is None else take_rows(self.labels, index),
            weights=take_rows(self.weights, index),
            teachers=tuple(x.take(index) for x in self.teachers),
        )

    def weighted(self, weights: Float[Array, " N"]) -> "_Statistics":
        return replace(self, weights=weighted(self.weights, weights))

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: Any, place: Place | None
    ) -> tuple[dict[str, jax.Array], None]:
        axes: Axes = () if self.shards is None else self.shards.axes
        own = logits if self.shards is None else own_columns(logits, self.shards.student, axes)
        log_q, top = log_softmax(own, axes), top_token(own, axes)
        entropy = -psum(jnp.sum(weigh(jnp.exp(log_q), log_q), axis=1), axes)
        log_normalizer = _log_normalizer(own, axes)
        values = {"loss": log_normalizer, "log_normalizer": log_normalizer, "entropy": entropy, "top": top}
        if self.labels is not None:
            log_prob = at_label(log_q, own_labels(own, self.labels, axes), axes)
            values |= {"log_prob": log_prob, "correct": top == self.labels}
        for teacher in self.teachers:
            z = teacher.logits().astype(logits.dtype)
            one, options = jnp.ones_like(entropy), RowOptions(self.vocabulary, has_labels=False, shards=self.shards)
            rows = ChunkRows(logits, z, top, one, one, self.temperature, self.divergence)
            soft, _, _ = xla_row_losses(self.divergence)(rows, options, None)
            if self.shards is not None:
                z = own_columns(z, self.shards.teacher, axes)
            values |= {"soft": soft, "agrees": top == top_token(z, axes)}
        return {name: weighted(self.weights, x.astype(logits.dtype)) for name, x in values.items()}, None


def _log_normalizer(z: Float[Array, "C V"], axes: Axes) -> Float[Array, " C"]:
    if not axes:
        return jax.nn.logsumexp(z, axis=1)
    top = jax.lax.pmax(jnp.max(z, axis=1), axes)
    return top + jnp.log(psum(jnp.sum(jnp.exp(z - top[:, None]), axis=1), axes))
