"""What a teacher is to `distillation_loss`: one protocol for all kinds, so that no other room asks for a type."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkd.divergences import AnyDivergence, Divergence
from jaxkd.logits import Source
from jaxkd.loop.checks import check_source
from jaxkd.teachers.mixture import Mixture
from jaxkd.teachers.routed import Routed
from jaxkd.teachers.top_k import TopKLogProbs
from jaxkd.teachers.vocabulary_map import VocabularyMap

Teacher: TypeAlias = Source | Mixture | Routed | TopKLogProbs | VocabularyMap


@runtime_checkable
class TeacherRows(Protocol):
    """A teacher as the loop has it. `LinearLogits` and `Logits` satisfy this as they are."""

    ROWS: str  # its array with a row for each position, as the caller calls it
    DIMS: ClassVar[dict[str, Any]]  # which axes of its arrays are rows and which the vocabulary, as in `jaxkd.logits`
    IN_BUCKETS: ClassVar[bool]  # whether it is compared by buckets of tokens

    @property
    def leading_shape(self) -> tuple[int, ...]: ...

    @property
    def vocabulary(self) -> int:
        """How many numbers a row has."""

    def flat(self) -> "TeacherRows":
        """The same with one leading axis."""

    def prepared(self) -> "TeacherRows":
        """What can be done once is done, not a chunk."""

    def take(self, index: Int[Array, " C"]) -> "TeacherRows":
        """The rows ``index``; for an index beyond the last row, a row of zeros."""

    def compared(self, dtype: jnp.dtype) -> Any:
        """What the rows of a chunk are compared with: logits (C, Vt), or a `BucketTeacher`."""


@runtime_checkable
class TeacherKind(Protocol):
    """A teacher that is more than a source of logits."""

    def check(self, name: str, student: Source, divergence: AnyDivergence, temperature: Any) -> None:
        """Raises an error for what does not fit; ``name`` is what the caller calls it."""

    def at(self, temperature: Any) -> TeacherRows:
        """What the loop takes rows of, for a loss at this temperature. No gradient reaches the models."""


def check_teacher(teacher: Any, prefix: str, student: Source, divergence: AnyDivergence, temperature: Any) -> None:
    """Raises an error for a teacher that does not fit; ``prefix`` is what its fields are called by the caller."""
    if not isinstance(teacher, TeacherKind) or isinstance(teacher, type):
        return check_source(teacher, prefix)
    name = prefix.rstrip("._")
    if getattr(teacher, "IN_BUCKETS", False) and not isinstance(divergence, Divergence):
        raise ValueError(
            f"`divergence` is a function of whole rows of logits, which `{name}`, a {type(teacher).__name__}, does not "
            "have; give a sum over tokens such as jaxkd.forward_kl"
        )
    return teacher.check(name, student, divergence, temperature)


def rows_of(teacher: Any, temperature: Any) -> TeacherRows:
    """What the loop takes rows of: no gradient reaches the teacher."""
    return teacher.at(temperature) if isinstance(teacher, TeacherKind) else jax.lax.stop_gradient(teacher)
