"""Several teachers of which each row has one, and goes through that one's head alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.divergences import AnyDivergence
from jaxkd.logits import Source, take_rows
from jaxkd.logits.array_ops import ShownBriefly
from jaxkd.loop.checks import check_is_array, known_value
from jaxkd.loop.chunk_pass import set_rows
from jaxkd.loop.collectives import as_carry
from jaxkd.loop.partitioning import ROWS, VOCABULARY
from jaxkd.teachers.several import check_sources_alike

MOST_TOGETHER = 256  # rows through a head at a time: more hardly repay its bytes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Routed(ShownBriefly):
    """A teacher for each row, one of several, for `distillation_loss`: by domain, language or task.

    The loss is that of a `Mixture` whose weights are 1 for the teacher and 0 for the others, without the products of
    these: the rows of a chunk are sorted by teacher, and each teacher's go through its head in blocks. Blocks that are
    not full take less than half as many rows more as the chunk has. Every divergence and implementation takes it.

    Args:
      teachers: `LinearLogits` or `Logits` with the student's rows and one vocabulary; hidden sizes of their own, and
        any values, NaN too, in rows that are not theirs. Teachers of one hidden size may share one array of hidden
        states, each row its own teacher's. A vocabulary split over devices wants heads. No gradient ever reaches them.
      index: (...) integers: which of the teachers a row has, from 0. It may be traced. A row that counts with a
        negative index, or a traced one beyond the last teacher, makes the loss NaN.

    The first row is the second teacher's, (1/4, 3/4), and the second one the first's, (1/2, 1/2), as the student's:

    >>> from jaxkd import Logits, distillation_loss
    >>> teachers = [Logits(jnp.log(jnp.array([p, p]))) for p in ([0.5, 0.5], [0.25, 0.75])]
    >>> loss, _ = distillation_loss(Logits(jnp.zeros((2, 2))), Routed(teachers, jnp.array([1, 0])))
    >>> print(f"{loss:.4f}")  # (1/4 log(1/2) + 3/4 log(3/2)) / 2
    0.0654
    """

    teachers: Sequence[Any]
    index: ArrayLike

    @property
    def ROWS(self) -> str:
        return f"teachers[0].{self.teachers[0].ROWS}"

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.teachers[0].leading_shape

    def check(self, name: str, student: Source, divergence: AnyDivergence, temperature: Any) -> None:
        """Raises an error for teachers that do not fit one another and an index that does not fit them."""
        check_sources_alike(f"{name}.teachers", self.teachers)
        check_is_array(f"{name}.index", self.index)
        shape, dtype, count = jnp.shape(self.index), jnp.result_type(self.index), len(self.teachers)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f"`{name}.index` is {dtype.name}; give integers, which teacher each row has")
        if shape != self.leading_shape:
            raise ValueError(
                f"`{name}.index` has shape {shape} but `{name}.{self.ROWS}` has leading shape {self.leading_shape}; "
                "give one teacher for each row"
            )
        known = known_value(self.index)
        if known is not None and known.size and known.max() >= count:
            raise ValueError(
                f"`{name}.index` has {known.max():.0f} but there are {count} teachers; give 0 to {count - 1}"
            )

    def at(self, temperature: Any) -> "RoutedLogits":
        """The temperature of a loss is no matter: these are logits."""
        count, index = len(self.teachers), jnp.asarray(self.index)
        place = jnp.where((index >= 0) & (index < count), index.astype(jnp.int32) + 1, count + 1)
        return RoutedLogits(jax.lax.stop_gradient(tuple(self.teachers)), place)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutedLogits:
    """The logits of a `Routed` as the loop has them: a block of one teacher's rows after the other."""

    ROWS: ClassVar[str] = "place"
    IN_BUCKETS: ClassVar[bool] = False

    teachers: tuple[Any, ...]
    place: Any  # (...) int32: 1 to M, the teacher's; 0 in a row that is filling; M + 1 where there is no such teacher

    @property
    def DIMS(self) -> dict[str, Any]:
        # A head has a device's columns; logits that exist would have to be split over both their axes.
        heads = all(VOCABULARY not in x.DIMS[x.ROWS] for x in self.teachers)
        return {"place": (ROWS,)} | ({"teachers": (VOCABULARY,)} if heads else {})

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def vocabulary(self) -> int:
        return self.teachers[0].vocabulary

    def flat(self) -> "RoutedLogits":
        return replace(self, teachers=tuple(x.flat() for x in self.teachers), place=jnp.reshape(self.place, -1))

    def prepared(self) -> "RoutedLogits":
        return replace(self, teachers=tuple(x.prepared() for x in self.teachers))

    def take(self, index: Int[Array, " C"]) -> "RoutedLogits":
        return replace(self, teachers=tuple(x.take(index) for x in self.teachers), place=take_rows(self.place, index))

    def compared(self, dtype: jnp.dtype) -> Float[Array, "C V"]:
        count, size = len(self.teachers), self.place.shape[0]
        together = rows_together(size, count)
        order = jnp.argsort(self.place, stable=True).astype(jnp.int32)
        ends = jnp.searchsorted(self.place[order], jnp.arange(count + 1), side="right").astype(jnp.int32)

        def block(teacher: Any, start: Any, end: Any, i: Any, z: Float[Array, "C V"]) -> Float[Array, "C V"]:
            step = jnp.arange(together, dtype=jnp.int32)
            entry = start + i * together + step
            index = jnp.where(entry < end, order.at[entry].get(mode="clip"), size + step)  # increasing
            return set_rows(z, index, teacher.take(index).logits().astype(dtype))

        nothing = jnp.where(self.place > count, jnp.nan, 0).astype(dtype)
        z = jnp.broadcast_to(nothing[:, None], (size, self.vocabulary))
        for number, teacher in enumerate(self.teachers):
            start, end = ends[number], ends[number + 1]
            one = partial(block, teacher, start, end)
            z = jax.lax.fori_loop(0, (end - start + together - 1) // together, one, as_carry(partial(one, 0), z))
        return z


def rows_together(size: int, count: int) -> int:
    """Of a chunk of ``size`` rows with ``count`` teachers: a power of two, so small that blocks waste few rows."""
    most = min(max(size // (2 * count), 1), MOST_TOGETHER)
    return 1 << (most.bit_length() - 1)
