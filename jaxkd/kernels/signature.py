"""The one signature of everything that turns the logits of a chunk into losses and a gradient.

    losses = row_losses(rows, options, place)

with the soft and the hard loss of each row, and the gradient of ``sum(soft_scale * soft + hard_scale * hard)`` to the
student's logits: alone, or among the rows of its `Place`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.logits import Place
from jaxkd.loop.partitioning import Axes

# Soft loss, hard loss (0 without labels), and the gradient in `RowOptions.gradient_dtype` if that is given.
RowResult: TypeAlias = tuple[Float[Array, " C"], Float[Array, " C"], Float[Array, "_ V"] | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkRows:
    """The C rows of a chunk, and what is computed of them.

    Args:
      student: logits, in float32 (float64 for float64).
      teacher: logits (C, Vt) of the same type; or rows that are compared by buckets, of `bucketed.BucketTeacher`.
      labels: the tokens of the hard loss.
      soft_scale, hard_scale: what the losses are multiplied by in the sum whose gradient is formed; a scale of 0 adds
        nothing whatever the row holds.
      temperature: divides both models' logits in the soft loss.
      divergence: of the soft loss, a `Divergence`, or for `whole_row` a `RowDivergence`.
    """

    student: Float[Array, "C V"]
    teacher: Any
    labels: Int[Array, " C"]
    soft_scale: Float[Array, " C"]
    hard_scale: Float[Array, " C"]
    temperature: Float[Array, ""]
    divergence: Any


@dataclass(frozen=True)
class VocabularyShards:
    """Logits that are a device's columns of a vocabulary, as many on each.

    Args:
      axes: the mesh axes over which the columns are split.
      student, teacher: the widths; columns beyond them are filling, whatever they hold.
    """

    axes: Axes
    student: int
    teacher: int


@dataclass(frozen=True)
class RowOptions:
    """What is decided at tracing.

    Args:
      vocabulary: "truncate" or "mask", for vocabularies of different width.
      has_labels: whether there is a hard loss.
      is_tempered: whether the temperature may differ from 1.
      gradient_dtype: the type of the logits' gradient, or None for the losses alone.
      shards: how the vocabulary is split over devices, or None.
    """

    vocabulary: str = "truncate"
    has_labels: bool = True
    is_tempered: bool = True
    gradient_dtype: jnp.dtype | None = None
    shards: VocabularyShards | None = None


RowLosses: TypeAlias = Callable[[ChunkRows, RowOptions, Place | None], RowResult]
