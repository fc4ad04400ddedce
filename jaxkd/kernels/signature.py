"""The one signature of everything that turns the logits of a chunk into losses and a gradient.

    result = row_losses(rows, options, place)

A row has a soft loss, a divergence of two heads or a sum over the tokens of one; a hard loss, of its label; or both.
With them come the sums that they are made of, and the gradient of ``sum(soft_scale * soft + hard_scale * hard)`` to the
student's logits: alone, or among the rows of its `Place`. Where the sums are known from an earlier pass,
`reference.row_gradient` has the gradient without any reduction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.logits import Place
from jaxkd.loop.partitioning import Axes


class LogSumExp(NamedTuple):
    """``log sum exp(z)`` of rows in two parts, whose sum would lose digits: the largest logit, and the rest."""

    top: jax.Array
    log_total: jax.Array  # log sum exp(z - top)

    @property
    def value(self) -> jax.Array:
        """In one part."""
        return self.top + self.log_total

    def log_probability(self, z: jax.Array) -> jax.Array:
        """Of logits of the same shape."""
        return (z - self.top) - self.log_total  # in this order: exact where all logits are large


def names_of_sums(has_soft: bool, has_teacher: bool) -> tuple[str, ...]:
    """What `RowSums.named` has where all sums are kept."""
    soft = ("student_top", "student_log_total") if has_soft else ()
    teacher = ("teacher_top", "teacher_log_total") if has_teacher else ()
    return ("top", "log_total", *soft, *teacher, *(("slope_sum", "outer_slope") if has_soft else ()))


class RowSums(NamedTuple):
    """What is known of C rows once their columns were seen. One that nobody asked for is None."""

    plain: LogSumExp  # of the student, as the hard loss has it
    student: LogSumExp | None = None  # at the temperature of the soft loss
    teacher: LogSumExp | None = None
    slope_sum: Float[Array, " C"] | None = None  # of d term / d log q
    outer_slope: Float[Array, " C"] | None = None  # of the divergence's outer function, at the sum of the terms

    def named(self) -> dict[str, Float[Array, " C"]]:
        """The numbers that are there, by name."""
        parts = {"": self.plain, "student_": self.student, "teacher_": self.teacher}
        numbers = {p + name: x for p, lse in parts.items() if lse is not None for name, x in lse._asdict().items()}
        slopes = {"slope_sum": self.slope_sum, "outer_slope": self.outer_slope}
        return numbers | {name: x for name, x in slopes.items() if x is not None}

    @classmethod
    def of(cls, numbers: dict[str, Float[Array, " C"]]) -> "RowSums":
        """Of numbers by these names, whatever else is among them."""

        def lse(prefix: str) -> LogSumExp | None:
            top = numbers.get(prefix + "top")
            return None if top is None else LogSumExp(top, numbers[prefix + "log_total"])

        plain = LogSumExp(numbers["top"], numbers["log_total"])
        return cls(plain, lse("student_"), lse("teacher_"), numbers.get("slope_sum"), numbers.get("outer_slope"))


class HardLosses(NamedTuple):
    """What is asked of the labels of C rows, and 0 without labels.

    Args:
      loss: (1 - label_smoothing) nll + label_smoothing mean_v(-log q_v) + z_loss log_normalizer**2.
      nll: -log q[label].
      is_top: 1 where no logit is larger than the label's.
    """

    loss: Float[Array, " C"]
    nll: Float[Array, " C"]
    is_top: Float[Array, " C"]


class RowResult(NamedTuple):
    """Of C rows.

    Args:
      soft: the divergence, and 0 without one.
      sums: what `reference.row_gradient` needs, if `RowOptions.keeps_sums`.
      gradient: in `RowOptions.gradient_dtype` if that is given.
    """

    soft: Float[Array, " C"]
    hard: HardLosses
    sums: RowSums
    gradient: Float[Array, "_ V"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkRows:
    """The C rows of a chunk, and what is computed of them.

    Args:
      student: logits, in float32 (float64 for float64).
      labels: the tokens of the hard loss.
      soft_scale, hard_scale: what the losses are multiplied by in the sum whose gradient is formed; a scale of 0 adds
        nothing whatever the row holds.
      temperature: divides both models' logits in the soft loss, and in the hard one with `RowOptions.tempers_labels`.
      teacher: logits (C, Vt) of the same type; or rows that are compared by buckets, of `bucketed.BucketTeacher`; or
        None, for a loss of one head.
      divergence: of the soft loss, a `Divergence`, or for `whole_row` a `RowDivergence`; None for a hard loss alone.
        Without a teacher it is given log q on both sides.
      label_smoothing, z_loss: of the hard loss.
    """

    student: Float[Array, "C V"]
    labels: Int[Array, " C"]
    soft_scale: Float[Array, " C"]
    hard_scale: Float[Array, " C"]
    temperature: Float[Array, ""]
    teacher: Any = None
    divergence: Any = None
    label_smoothing: Float[Array, ""] | None = None
    z_loss: Float[Array, ""] | None = None


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
      tempers_labels: whether the hard loss is at the temperature too.
      gradient_dtype: the type of the logits' gradient, or None for the losses alone.
      keeps_sums: whether all sums are asked for that a later gradient needs; without it only those of the hard loss.
      shards: how the vocabulary is split over devices, or None.
    """

    vocabulary: str = "truncate"
    has_labels: bool = True
    is_tempered: bool = True
    tempers_labels: bool = False
    gradient_dtype: jnp.dtype | None = None
    keeps_sums: bool = False
    shards: VocabularyShards | None = None

    @property
    def has_plain_sums(self) -> bool:
        """Whether the student's normaliser of the hard loss is another than that of the soft one."""
        return self.has_labels and self.is_tempered and not self.tempers_labels


RowLosses: TypeAlias = Callable[[ChunkRows, RowOptions, Place | None], RowResult]
