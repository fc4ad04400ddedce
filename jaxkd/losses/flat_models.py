"""Student and teacher as the loop over chunks has them, and how many rows of them are together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from jaxkd.divergences import AnyDivergence, Divergence
from jaxkd.kernels import Chunk, VocabularyShards, aligned_width
from jaxkd.logits import LinearLogits
from jaxkd.loop import CountedRows, Plan, Sharding, count_rows, rows_of_chunk
from jaxkd.loop.checks import check_widths
from jaxkd.loop.flattening import check_sources, filled_up, flat_sources, splits_vocabulary
from jaxkd.loop.partitioning import Partitioning, partitioning_of


def partitioning_of_models(
    sharding: Sharding | None,
    student: Any,
    teacher: Any,
    rows: Any,
    divergence: AnyDivergence,
    vocabulary: str | None,
) -> Partitioning:
    """What each device has of two models; ``rows`` are the teacher's, as the loop takes them.

    Raises:
      ValueError: models that cannot be split so, or whose widths differ without a word on it.
    """
    needs_whole_rows = None
    if not isinstance(divergence, Divergence):
        needs_whole_rows = "this `divergence`"
    elif not splits_vocabulary(rows):
        needs_whole_rows = f"a {type(teacher).__name__} as `teacher`"
    partitioning = partitioning_of(sharding, student, needs_whole_rows)
    check_sources(partitioning, student, rows)
    if divergence.vocabulary == "common" and not rows.IN_BUCKETS:
        check_widths(*(partitioning.whole_width(x.vocabulary) for x in (student, rows)), vocabulary=vocabulary)
    return partitioning


# A head is copied to give it columns that a kernel can align, unless the copy would take more bytes or the kernel was
# named: the next kernel does without.
FILLED_BYTES = 2**28


class FlatModels(NamedTuple):
    """With one leading axis, filled up so that all devices have as much.

    Args:
      teacher: None for a loss of one head.
      width: of the student's vocabulary.
      shards: how the vocabulary is split over devices, or None.
      chunk: the shape of a chunk's logits on a device.
    """

    student: Any
    teacher: Any
    leading_shape: tuple[int, ...]
    width: int
    shards: VocabularyShards | None
    chunk: Chunk
    plan: Plan

    @property
    def count_rows(self) -> partial[CountedRows]:
        """`jaxkd.loop.count_rows` of the student's rows: which of them count, and how much."""
        return partial(count_rows, self.plan.partitioning, self.leading_shape, self.width, self.student.dtype)


def flat_models(
    partitioning: Partitioning,
    student: Any,
    teacher: Any = None,
    *,
    divergence: AnyDivergence | None = None,
    vocabulary: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> FlatModels:
    """Of full arrays, on the Auto axes of a mesh; ``vocabulary`` is that of `distillation_loss`."""
    leading_shape, width = student.leading_shape, partitioning.whole_width(student.vocabulary)
    teacher_width = width if teacher is None else partitioning.whole_width(teacher.vocabulary)
    shards = None
    if partitioning.vocabulary:
        shards = VocabularyShards(partitioning.vocabulary, width, teacher_width)
    student, teacher = flat_sources(partitioning, student, teacher, truncate=vocabulary != "mask")

    heads = [student] if teacher is None else [student, teacher]
    chunks = rows_of_chunk(chunk_size, *heads, partitioning=partitioning)
    chunk = Chunk(
        partitioning.gather_size * chunks.size,
        partitioning.local_width(student.vocabulary),
        None if teacher is None else partitioning.local_width(teacher.vocabulary),
        student.dtype,
        is_shard=shards is not None,
    )
    if shards is None and all(_may_be_filled(x, implementation) for x in heads):
        aligned = aligned_width(implementation, chunk, divergence)
        if aligned != width:
            shards = VocabularyShards((), width, teacher_width)
            chunk = replace(chunk, student_width=aligned, teacher_width=None if teacher is None else aligned)
            student, *rest = (filled_up(x, aligned) for x in heads)
            teacher = rest[0] if rest else None
    teacher = None if teacher is None else teacher.prepared()
    return FlatModels(student, teacher, leading_shape, width, shards, chunk, Plan(chunks, partitioning))


def _may_be_filled(source: Any, implementation: str | None) -> bool:
    return isinstance(source, LinearLogits) and (implementation is not None or source.weight.nbytes <= FILLED_BYTES)
