"""One pass of the loop: the logits of a chunk, its losses and their gradient, and the products that pull it back.

Logits are wider than their gradient and not needed after it, so those of a large chunk are formed a piece at a time.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.logits.gradient_place import Place
from jaxkd.logits.sources import Gradients, Source
from jaxkd.loop.chunk_size import Chunks
from jaxkd.loop.collectives import as_carry, gather_chunk, scatter_to_own_rows, total, total_gradient
from jaxkd.loop.flattening import dims_of_each
from jaxkd.loop.partitioning import ONE_DEVICE, Partitioning
from jaxkd.loop.row_loss import RowLoss, Sums


class Plan(NamedTuple):
    """What is decided at tracing: how many rows are together, and what each device has."""

    chunks: Chunks
    partitioning: Partitioning = ONE_DEVICE


class State(NamedTuple):
    """What the loop carries."""

    sums: Sums
    gradients: Gradients  # of the wanted fields, over the chunks so far; before the first those of rows alone
    dlogits: Float[Array, "C V"] | None  # of a chunk, where they come a piece at a time


@dataclass(frozen=True)
class ChunkPass:
    """What is done with each chunk."""

    plan: Plan
    loss: RowLoss
    student: Source
    inverse: Float[Array, ""]  # of the normalizer
    primal_dtypes: dict[str, tuple[jnp.dtype, ...]]  # of the arrays of the wanted fields, as the caller gave them

    @property
    def wanted(self) -> frozenset[str]:
        """The student's fields whose gradients are formed."""
        return frozenset(self.primal_dtypes)

    @property
    def gradient_dtype(self) -> jnp.dtype | None:
        return self.student.gradient_dtype if self.wanted else None

    @property
    def num_pieces(self) -> int:
        return self.plan.chunks.size // self.plan.chunks.piece

    def start(self, is_every_row_counted: bool, bare: bool = False) -> State:
        """Before the first chunk; ``bare`` of the zeros that other gradients than those of rows are added to."""
        dlogits = None
        if self.wanted and self.num_pieces > 1:  # one array for the gradients of all chunks' logits
            nothing = jax.lax.empty if is_every_row_counted else jnp.zeros  # every piece is run if every row counts
            num_rows = self.plan.partitioning.gather_size * self.plan.chunks.size
            dlogits = nothing((num_rows, self.student.vocabulary), self.gradient_dtype)
        started = {self.student.ROWS} & self.wanted if bare else self.wanted
        return State(
            sums={name: jnp.zeros((), self.student.dtype) for name in self.loss.names},
            gradients={name: self._zeros(name) for name in sorted(started)},
            dlogits=dlogits,
        )

    def _zeros(self, name: str) -> Any:
        def zeros(like: jax.Array) -> jax.Array:
            # float16 gradients wait for the upstream gradient, which may hold the loss scale that keeps them in range.
            rounds = name == self.student.ROWS and like.dtype != jnp.float16
            return jnp.zeros(jnp.shape(like), like.dtype if rounds else self.student.dtype)

        return jax.tree.map(zeros, getattr(self.student, name))

    def __call__(self, state: State, index: Int[Array, " C"], num_counted: Int[Array, ""] | None) -> State:
        student = gather_chunk(self.plan.partitioning, self.student.take(index))
        if self.num_pieces > 1:
            sums, dlogits = self._in_pieces(student, index, num_counted, state)
            pullback = student.product_pullback
        else:
            loss = gather_chunk(self.plan.partitioning, self.loss.take(index))
            logits, pullback = student.logits_and_pullback()  # (C, V)
            row_sums, dlogits = loss(logits, self.gradient_dtype, None)  # (C,), (C, V)
            sums = _added(state.sums, row_sums)
        if not self.wanted:
            return State(sums, state.gradients, None)
        gradients = self._added_gradients(state.gradients, index, pullback(dlogits, self.wanted))
        return State(sums, gradients, dlogits if self.num_pieces > 1 else None)

    def _in_pieces(self, student: Source, index: Int[Array, " C"], num_counted: Any, state: State) -> tuple[Sums, Any]:
        """Sums with those of the chunk, and its ``dlogits``: the logits themselves exist a piece at a time."""
        size, gathered = student.leading_shape[0] // self.num_pieces, None
        if self.plan.partitioning.gathered:
            gathered = gather_chunk(self.plan.partitioning, self.loss.take(index))

        def piece(i: jax.Array | int, carry: tuple[Sums, Any]) -> tuple[Sums, Any]:
            sums, dlogits = carry
            here = i * size + jnp.arange(size, dtype=jnp.int32)
            # Not of a chunk's rows that were taken before: a teacher's would be held twice.
            loss = self.loss.take(index[here]) if gathered is None else gathered.take(here)
            place = None if dlogits is None else Place(dlogits, jnp.asarray(i * size, jnp.int32))
            row_sums, dlogits = loss(student.take(here).logits(), self.gradient_dtype, place)
            return _added(sums, row_sums), dlogits

        # What a piece without rows that count leaves of an earlier chunk is multiplied by hidden states of 0.
        trips = self.num_pieces if num_counted is None else (num_counted + size - 1) // size
        carry = as_carry(lambda carry: piece(0, carry), (state.sums, state.dlogits))
        return jax.lax.fori_loop(0, trips, piece, carry)

    def _added_gradients(self, totals: Gradients, index: Int[Array, " C"], gradients: Gradients) -> Gradients:
        rows = self.student.ROWS
        totals = totals | {
            name: jax.tree.map(jnp.add, totals[name], g) if name in totals else g
            for name, g in gradients.items()
            if name != rows
        }
        if rows in gradients:
            own = scatter_to_own_rows(
                self.plan.partitioning, gradients[rows], self.student.DIMS[rows], getattr(self.student, rows)
            )
            totals[rows] = set_rows(totals[rows], index, (own * self.inverse).astype(totals[rows].dtype))
        return totals

    def finish(self, state: State) -> tuple[Sums, Gradients]:
        """Over all devices, and normalised."""
        partitioning, student = self.plan.partitioning, self.student
        sums = {name: total(partitioning, x) * self.inverse for name, x in state.sums.items()}

        def finished(name: str, field: Any) -> Any:
            arrays, structure = jax.tree.flatten(field)
            each = zip(arrays, dims_of_each(student.DIMS.get(name, ()), arrays), self.primal_dtypes[name], strict=True)
            return jax.tree.unflatten(structure, [total_gradient(partitioning, *x) * self.inverse for x in each])

        gradients = {name: x if name == student.ROWS else finished(name, x) for name, x in state.gradients.items()}
        return sums, gradients


def _added(sums: Sums, row_sums: dict[str, Float[Array, " C"]]) -> Sums:
    return {name: x + jnp.sum(row_sums[name]) for name, x in sums.items()}


def set_rows(x: jax.Array, index: Int[Array, " C"], rows: jax.Array) -> jax.Array:
    """``x`` with other rows at ``index``; an index beyond its last row sets nothing."""
    return x.at[index].set(rows, mode="drop", unique_indices=True, indices_are_sorted=True)
