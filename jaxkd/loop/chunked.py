"""THE loop over chunks of rows. It knows no loss and has two faces.

`sum_rows`: a weighted sum of row losses, with the gradients formed in the forward pass. For each chunk it forms the
student's logits, asks the row loss for one number a row and for the gradient of their sum to the logits, and pulls that
gradient back to the student's arrays before the next chunk: three products with the student's head instead of the four
that recomputing in the backward pass would take. The idea is Liger Kernel's (its pull request 408 and RFC 371). Logits
are wider than their gradient and not needed after it, so those of a large chunk are formed a piece at a time.

`map_rows`: one number a row, whose gradient is a number a row and comes only later: the backward pass runs the loop
again, as a weighted sum with these numbers as weights.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Bool, Float, Int

from jaxkd.logits.sources import Gradients, Place, Source
from jaxkd.loop.partitioning import ROWS, Layout, as_carry, as_primal, differing, empty_like

Sums = dict[str, jax.Array]

# The logits of a chunk, student and teacher together, would take at most this many bytes unless `chunk_size` says
# otherwise. Where they can be formed a piece at a time, those of a piece take at most half.
CHUNK_BYTES = 5 * 2**29
PIECE_BYTES = CHUNK_BYTES // 2
CHUNK_MULTIPLE = 128

ONE_DEVICE = Layout()


class Chunks(NamedTuple):
    """How many rows are together.

    Args:
      size: whose gradients go through the student's head.
      piece: whose logits are formed; `size` is a multiple of it.
    """

    size: int
    piece: int


Static = tuple[Chunks, Layout]  # and what each device has
Carry = tuple[Sums, Gradients, Any]  # and the gradient of a chunk's logits, where its pieces are gathered


@runtime_checkable
class RowLoss(Protocol):
    """A loss of each row, as a pytree: arrays with a row for each position, scalars, static choices."""

    @property
    def names(self) -> tuple[str, ...]:
        """What it sums: "loss", which is differentiated, and the metrics."""

    def take(self, index: Int[Array, " C"]) -> "RowLoss":
        """The rows ``index``; for an index beyond the last row, a row whose losses and gradient are 0."""

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: jnp.dtype | None, place: Place | None
    ) -> tuple[dict[str, Float[Array, " C"]], jax.Array | None]:
        """One number a row for each of ``names``, and, if its type is given, the gradient of the sum of "loss".

        If there is a ``place``, the gradient goes there and what comes back is ``place.rows`` with it.
        """


@runtime_checkable
class WeightedRowLoss(RowLoss, Protocol):
    """A row loss for `map_rows`."""

    def weighted(self, weights: Float[Array, " N"]) -> "WeightedRowLoss":
        """The same with each row's number multiplied by its weight."""


def default_chunk_size(num_rows: int, bytes_per_row: int) -> int:
    """The power of two that `CHUNK_BYTES` allow, evened out over the rows there are.

    A chunk more is a pass more over the head's gradient, and powers of two fill the tiles of a matrix product.
    """
    largest = CHUNK_MULTIPLE
    while 2 * largest * bytes_per_row <= CHUNK_BYTES:
        largest *= 2
    if num_rows <= largest:
        return max(num_rows, 1)
    rows = -(-num_rows // -(-num_rows // largest))
    return -(-rows // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def in_pieces(chunk_size: int, bytes_per_row: int, largest: int) -> Chunks:
    """A power of two of pieces that `PIECE_BYTES` allow; the chunk is rounded to them, and never above ``largest``."""
    pieces = 1
    while chunk_size * bytes_per_row > pieces * PIECE_BYTES and pieces < chunk_size:
        pieces *= 2
    piece = -(-chunk_size // pieces)
    if pieces * piece > largest:
        piece = chunk_size // pieces
    return Chunks(pieces * piece, piece)


def sum_rows(
    loss: RowLoss,
    student: Source,
    counts: Bool[Array, " N"] | None,
    normalizer: Float[Array, ""],
    chunks: Chunks,
    layout: Layout = ONE_DEVICE,
) -> Sums:
    """Sums of ``loss`` over the rows of the flat source ``student`` that count (None: all), divided by ``normalizer``.

    Only "loss" is differentiable, and only with respect to ``student``; 0 where ``normalizer`` is 0. A row that does
    not count is never read. Memory beyond inputs and gradients is that of one chunk. Over more than one device,
    ``layout`` says what of the arrays each of them has.
    """
    return _sum_rows((chunks, layout), counts, loss, student, normalizer)


def map_rows(
    loss: WeightedRowLoss, student: Source, counts: Bool[Array, " N"] | None, chunks: Chunks
) -> dict[str, Float[Array, " N"]]:
    """What ``loss`` gives for each row of the flat source ``student``, and 0 for one that does not count.

    Differentiable and read as in `sum_rows`; memory is the same, in the backward pass too: no chunk is kept for it.
    """
    return _map_rows(chunks, counts, loss, student)


def _order(
    num_rows: int, counts: Bool[Array, " N"] | None, chunk_size: int
) -> tuple[Int[Array, ""] | None, Int[Array, " P"]]:
    """How many rows count (None: all), and the rows in the order of the chunks.

    Rows that count come first, in order; the rest of the last chunk points beyond the last row, where `take` is zero.
    """
    position = jnp.arange(-(-num_rows // chunk_size) * chunk_size, dtype=jnp.int32)
    if counts is None:
        return None, position
    num_counted = jnp.sum(counts, dtype=jnp.int32)
    order = jnp.argsort(~counts, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, position.size - num_rows))
    order = jnp.where(position < num_counted, order, num_rows + position)
    return num_counted, order


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_sum_rows(
    static: Static, counts: Bool[Array, " N"] | None, loss: Any, student: Any, normalizer: Float[Array, ""]
) -> Sums:
    return _loop_on_mesh(static, counts, loss, student, normalizer, frozenset())[0]


def _forward(static: Static, *arguments: Any) -> tuple[Sums, Any]:
    counts, loss, student, normalizer = custom_vjp_primal_tree_values(arguments)
    for name, argument in (("loss", arguments[1]), ("normalizer", arguments[3])):
        _reject_gradient(name, argument)
    static[1].check_differentiable()
    sums, gradients = _loop_on_mesh(static, counts, loss, student, normalizer, _perturbed(arguments[2]))
    # With each gradient goes an empty array of its primal's type, all that the backward pass needs of the primal. A
    # field that was not wanted has an empty gradient: JAX expects the same tree whichever fields are differentiated.
    nothing = jnp.zeros((0,))
    residuals = {
        name: None if x is None else (gradients.get(name, nothing), empty_like(x)) for name, x in vars(student).items()
    }
    return sums, replace(student, **residuals)


def _backward(static: Static, residuals: Any, cotangents: dict[str, Any]) -> tuple[Any, ...]:
    upstream = cotangents["loss"]
    if isinstance(upstream, SymbolicZero):
        return None, None, None, None

    def finished(gradient: jax.Array, primal: jax.Array) -> jax.Array | None:
        wanted = gradient.shape != (0,)
        return as_primal(upstream * gradient.astype(upstream.dtype), primal).astype(primal.dtype) if wanted else None

    gradients = {name: entry and finished(*entry) for name, entry in vars(residuals).items()}
    return None, None, replace(residuals, **gradients), None


_differentiable_sum_rows.defvjp(_forward, _backward, symbolic_zeros=True)
_sum_rows = jax.jit(_differentiable_sum_rows, static_argnums=0)  # compiled once a shape when called outside of jit too


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_map_rows(
    chunks: Chunks, counts: Bool[Array, " N"] | None, loss: Any, student: Any
) -> dict[str, Float[Array, " N"]]:
    student = student.prepared()

    def chunk(index: Int[Array, " C"], _: Any, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows, _ = loss.take(index)(student.take(index).logits(), None, None)
        return {name: _set_rows(values[name], index, x) for name, x in rows.items()}

    nothing = {name: jnp.zeros(student.leading_shape, student.dtype) for name in loss.names}
    return _for_each_chunk(chunks.piece, counts, student, ONE_DEVICE, chunk, nothing)


def _map_forward(chunks: Chunks, *arguments: Any) -> tuple[dict[str, jax.Array], Any]:
    counts, loss, student = primals = custom_vjp_primal_tree_values(arguments)
    _reject_gradient("loss", arguments[1])
    # An empty array marks a field that is not wanted, for the reason above.
    marks = {name: jnp.zeros((int(name in _perturbed(arguments[2])),)) for name in vars(student)}
    return _differentiable_map_rows(chunks, counts, loss, student), (primals, marks)


def _map_backward(chunks: Chunks, residuals: Any, cotangents: dict[str, Any]) -> tuple[Any, ...]:
    (counts, loss, student), marks = residuals
    upstream = cotangents["loss"]
    if isinstance(upstream, SymbolicZero):
        return None, None, None
    wanted = frozenset(name for name, mark in marks.items() if mark.size)
    one = jnp.ones((), student.dtype)
    _, gradients = _loop((chunks, ONE_DEVICE), counts, loss.weighted(upstream), student, one, wanted)
    finished: dict[str, Any] = {
        name: as_primal(gradients[name], x).astype(jnp.result_type(x)) if name in wanted else None
        for name, x in vars(student).items()
    }
    return None, None, replace(student, **finished)


_differentiable_map_rows.defvjp(_map_forward, _map_backward, symbolic_zeros=True)
_map_rows = jax.jit(_differentiable_map_rows, static_argnums=0)


def _perturbed(student: Any) -> frozenset[str]:
    """The fields that are differentiated."""
    return frozenset(name for name, leaf in vars(student).items() if leaf is not None and leaf.perturbed)


def _loop_on_mesh(
    static: Static, counts: Any, loss: Any, student: Any, normalizer: Any, wanted: frozenset[str]
) -> tuple[Sums, Gradients]:
    """The loop, on each device of the mesh where the arrays are not shards already."""
    layout = static[1]
    loop = partial(_loop, static, wanted=wanted)
    if not layout.is_mapped:
        return loop(counts, loss, student, normalizer)
    rows, one = layout.spec((ROWS,)), layout.spec(())
    gradients = {name: layout.spec(student.DIMS.get(name, ())) for name in wanted}
    # Autodiff stays outside: what `check_vma` would see to is done by `Layout`, and the kernels do without it.
    return layout.map(
        loop,
        in_specs=(rows, layout.specs(loss), layout.specs(student), one),
        out_specs=(dict.fromkeys(loss.names, one), gradients),
        check_vma=False,
    )(counts, loss, student, normalizer)


def _loop(
    static: Static,
    counts: Bool[Array, " N"] | None,
    loss: RowLoss,
    student: Source,
    normalizer: Float[Array, ""],
    wanted: frozenset[str],
) -> tuple[Sums, Gradients]:
    """The normalised sums, and the gradients of the ``wanted`` fields of the student."""
    chunks, layout = static
    num_pieces = chunks.size // chunks.piece
    kept = bool(wanted) and num_pieces > 1  # one array for the gradients of all chunks' logits
    student = differing(student.prepared(), student.ROWS, (counts, loss, student))
    dtype, gradient_dtype = student.dtype, student.gradient_dtype if wanted else None
    inverse = jnp.where(normalizer == 0, 0, 1 / normalizer).astype(dtype)

    def zeros(name: str) -> jax.Array:
        like = getattr(student, name)
        # float16 gradients wait for the upstream gradient, which may hold the loss scale that keeps them in range.
        rounds = name == student.ROWS and like.dtype != jnp.float16
        return jnp.zeros(jnp.shape(like), like.dtype if rounds else dtype)

    def added(sums: Sums, row_sums: dict[str, jax.Array]) -> Sums:
        return {name: total + jnp.sum(row_sums[name]) for name, total in sums.items()}

    def pieces(student: Source, loss: RowLoss, num_counted: Any, sums: Sums, dlogits: Any) -> tuple[Sums, Any]:
        size = student.leading_shape[0] // num_pieces

        def piece(i: jax.Array, carry: tuple[Sums, Any]) -> tuple[Sums, Any]:
            sums, dlogits = carry
            index = i * size + jnp.arange(size, dtype=jnp.int32)
            place = None if dlogits is None else Place(dlogits, jnp.asarray(i * size, jnp.int32))
            row_sums, dlogits = loss.take(index)(student.take(index).logits(), gradient_dtype, place)
            return added(sums, row_sums), dlogits

        # What a piece without rows that count leaves of an earlier chunk is multiplied by hidden states of 0.
        trips = num_pieces if num_counted is None else (num_counted + size - 1) // size
        return jax.lax.fori_loop(0, trips, piece, as_carry(piece, (sums, dlogits)))

    def chunk(index: Int[Array, " C"], num_counted: Any, carry: Carry) -> Carry:
        sums, gradients, dlogits = carry
        own_student, own_loss = layout.gather(student.take(index)), layout.gather(loss.take(index))
        if num_pieces > 1:
            sums, dlogits = pieces(own_student, own_loss, num_counted, sums, dlogits)
            pullback = own_student.product_pullback
        else:
            logits, pullback = own_student.logits_and_pullback()  # (C, V)
            row_sums, dlogits = own_loss(logits, gradient_dtype, None)  # (C,), (C, V)
            sums = added(sums, row_sums)
        if not wanted:
            return sums, gradients, None
        for name, g in pullback(dlogits, wanted).items():
            total = gradients[name]
            if name == student.ROWS:
                g = layout.own_rows(g, student.DIMS[name], getattr(student, name))
                gradients = gradients | {name: _set_rows(total, index, (g * inverse).astype(total.dtype))}
            else:
                gradients = gradients | {name: total + g}
        return sums, gradients, dlogits if kept else None

    nothing = jnp.zeros if counts is not None else jax.lax.empty  # every piece is run if every row counts
    carry: Carry = (
        {name: jnp.zeros((), dtype) for name in loss.names},
        {name: zeros(name) for name in sorted(wanted)},
        nothing((layout.gather_size * chunks.size, student.vocabulary), gradient_dtype) if kept else None,
    )
    sums, gradients, _ = _for_each_chunk(chunks.size, counts, student, layout, chunk, carry)
    sums = {name: layout.total(total) * inverse for name, total in sums.items()}
    for name in wanted - {student.ROWS}:
        gradients[name] = layout.total_gradient(gradients[name], student.DIMS.get(name, ())) * inverse
    return sums, gradients


def _for_each_chunk(
    chunk_size: int,
    counts: Bool[Array, " N"] | None,
    student: Source,
    layout: Layout,
    body: Callable[[Int[Array, " C"], Int[Array, ""] | None, Any], Any],
    carry: Any,
) -> Any:
    """``carry`` after ``body(index, num_counted, carry)`` for each chunk: its rows, and how many of them count.

    The number is None if all may.
    """
    num_counted, order = _order(student.leading_shape[0], counts, chunk_size)
    most = layout.most(num_counted)
    if not order.size:  # an empty batch has no row to trace with
        return carry

    def chunk(i: Int[Array, ""] | int, carry: Any) -> Any:
        first = i * chunk_size
        # Rows gathered from several devices that count are not together.
        here = None if num_counted is None or layout.gathered else jnp.clip(num_counted - first, 0, chunk_size)
        return body(jax.lax.dynamic_slice_in_dim(order, first, chunk_size), here, carry)

    # With a Python number of chunks this is `jax.lax.scan`, and one chunk needs no loop; when rows may be left out, the
    # chunks that have none are not run.
    trips: Any = order.size // chunk_size
    if most is not None and trips > 1:
        trips = (most + chunk_size - 1) // chunk_size
    return jax.lax.fori_loop(0, trips, chunk, as_carry(chunk, carry))


def _set_rows(x: jax.Array, index: Int[Array, " C"], rows: jax.Array) -> jax.Array:
    """``x`` with other rows at ``index``; an index beyond its last row sets nothing."""
    return x.at[index].set(rows, mode="drop", unique_indices=True, indices_are_sorted=True)


def _reject_gradient(name: str, argument: Any) -> None:
    """An error for a differentiated argument that is a constant here: silence would train on a wrong gradient."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(argument, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    for path, leaf in leaves:
        if leaf.perturbed and jnp.issubdtype(jnp.result_type(leaf.value), jnp.inexact):
            name = jax.tree_util.keystr(path).lstrip(".") or name
            raise TypeError(
                f"jaxkd does not differentiate with respect to `{name}`: pass `jax.lax.stop_gradient({name})`, "
                "or leave it out of the arguments of jax.grad"
            )
