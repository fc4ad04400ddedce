"""THE loop over chunks of rows. It knows no loss and has two faces.

`sum_rows`: a weighted sum of row losses, with the gradients formed in the forward pass. For each chunk it forms the
student's logits, asks the row loss for one number a row and for the gradient of their sum to the logits, and pulls that
gradient back to the student's arrays before the chunk's logits are dropped: three products with the student's head
instead of the four that recomputing in the backward pass would take. The idea is Liger Kernel's (its pull request 408
and RFC 371).

`map_rows`: one number a row, whose gradient is a number a row and comes only later: the backward pass runs the loop
again, as a weighted sum with these numbers as weights.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Bool, Float, Int

from jaxkd.logits import Gradients, Source
from jaxkd.sharding import ROWS, Layout, as_carry, as_primal, differing, empty_like

Sums = dict[str, jax.Array]

# The logits of a chunk, student and teacher together, take at most this many bytes unless `chunk_size` says otherwise.
CHUNK_BYTES = 5 * 2**29
CHUNK_MULTIPLE = 128

ONE_DEVICE = Layout()
Static = tuple[int, Layout]  # the chunk size and what each device has


@runtime_checkable
class RowLoss(Protocol):
    """A loss of each row, as a pytree: arrays with a row for each position, scalars, static choices."""

    @property
    def names(self) -> tuple[str, ...]:
        """What it sums: "loss", which is differentiated, and the metrics."""

    def take(self, index: Int[Array, " C"]) -> "RowLoss":
        """The rows ``index``; for an index beyond the last row, a row whose losses and gradient are 0."""

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: jnp.dtype | None
    ) -> tuple[dict[str, Float[Array, " C"]], Float[Array, "C V"] | None]:
        """One number a row for each of ``names``, and, if its type is given, the gradient of the sum of "loss"."""


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


def sum_rows(
    loss: RowLoss,
    student: Source,
    counts: Bool[Array, " N"] | None,
    normalizer: Float[Array, ""],
    chunk_size: int,
    layout: Layout = ONE_DEVICE,
) -> Sums:
    """Sums of ``loss`` over the rows of the flat source ``student`` that count (None: all), divided by ``normalizer``.

    Only "loss" is differentiable, and only with respect to ``student``; 0 where ``normalizer`` is 0. A row that does
    not count is never read. Memory beyond inputs and gradients is that of one chunk of ``chunk_size`` rows. Over more
    than one device, ``layout`` says what of the arrays each of them has.
    """
    return _sum_rows((chunk_size, layout), counts, loss, student, normalizer)


def map_rows(
    loss: WeightedRowLoss, student: Source, counts: Bool[Array, " N"] | None, chunk_size: int
) -> dict[str, Float[Array, " N"]]:
    """What ``loss`` gives for each row of the flat source ``student``, and 0 for one that does not count.

    Differentiable and read as in `sum_rows`; memory is the same, in the backward pass too: no chunk is kept for it.
    """
    return _map_rows(chunk_size, counts, loss, student)


def _chunks(
    num_rows: int, counts: Bool[Array, " N"] | None, chunk_size: int
) -> tuple[Int[Array, ""] | None, Int[Array, " P"]]:
    """How many chunks there are to run (None: all), and the rows in the order of the chunks.

    Rows that count come first, in order; the rest of the last chunk points beyond the last row, where `take` is zero.
    """
    position = jnp.arange(-(-num_rows // chunk_size) * chunk_size, dtype=jnp.int32)
    if counts is None:
        return None, position
    num_counted = jnp.sum(counts, dtype=jnp.int32)
    order = jnp.argsort(~counts, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, position.size - num_rows))
    order = jnp.where(position < num_counted, order, num_rows + position)
    return (num_counted + chunk_size - 1) // chunk_size, order


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
    chunk_size: int, counts: Bool[Array, " N"] | None, loss: Any, student: Any
) -> dict[str, Float[Array, " N"]]:
    student = student.prepared()

    def chunk(index: Int[Array, " C"], values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows, _ = loss.take(index)(student.take(index).logits(), None)
        return {name: _set_rows(values[name], index, x) for name, x in rows.items()}

    nothing = {name: jnp.zeros(student.leading_shape, student.dtype) for name in loss.names}
    return _for_each_chunk(chunk_size, counts, student, ONE_DEVICE, chunk, nothing)


def _map_forward(chunk_size: int, *arguments: Any) -> tuple[dict[str, jax.Array], Any]:
    counts, loss, student = primals = custom_vjp_primal_tree_values(arguments)
    _reject_gradient("loss", arguments[1])
    # An empty array marks a field that is not wanted, for the reason above.
    marks = {name: jnp.zeros((int(name in _perturbed(arguments[2])),)) for name in vars(student)}
    return _differentiable_map_rows(chunk_size, counts, loss, student), (primals, marks)


def _map_backward(chunk_size: int, residuals: Any, cotangents: dict[str, Any]) -> tuple[Any, ...]:
    (counts, loss, student), marks = residuals
    upstream = cotangents["loss"]
    if isinstance(upstream, SymbolicZero):
        return None, None, None
    wanted = frozenset(name for name, mark in marks.items() if mark.size)
    one = jnp.ones((), student.dtype)
    _, gradients = _loop((chunk_size, ONE_DEVICE), counts, loss.weighted(upstream), student, one, wanted)
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
    layout = static[1]
    student = differing(student.prepared(), student.ROWS, (counts, loss, student))
    dtype = student.dtype
    inverse = jnp.where(normalizer == 0, 0, 1 / normalizer).astype(dtype)

    def zeros(name: str) -> jax.Array:
        like = getattr(student, name)
        # float16 gradients wait for the upstream gradient, which may hold the loss scale that keeps them in range.
        rounds = name == student.ROWS and like.dtype != jnp.float16
        return jnp.zeros(jnp.shape(like), like.dtype if rounds else dtype)

    def chunk(index: Int[Array, " C"], carry: tuple[Sums, Gradients]) -> tuple[Sums, Gradients]:
        sums, gradients = carry
        logits, pullback = layout.gather(student.take(index)).logits_and_pullback()  # (C, V)
        gradient_dtype = student.gradient_dtype if wanted else None
        row_sums, dlogits = layout.gather(loss.take(index))(logits, gradient_dtype)  # (C,), (C, V)
        sums = {name: total + jnp.sum(row_sums[name]) for name, total in sums.items()}
        if not wanted:
            return sums, gradients
        for name, g in pullback(dlogits, wanted).items():
            total = gradients[name]
            if name == student.ROWS:
                g = layout.own_rows(g, student.DIMS[name], getattr(student, name))
                gradients = gradients | {name: _set_rows(total, index, (g * inverse).astype(total.dtype))}
            else:
                gradients = gradients | {name: total + g}
        return sums, gradients

    carry = {name: jnp.zeros((), dtype) for name in loss.names}, {name: zeros(name) for name in sorted(wanted)}
    sums, gradients = _for_each_chunk(static[0], counts, student, layout, chunk, carry)
    sums = {name: layout.total(total) * inverse for name, total in sums.items()}
    for name in wanted - {student.ROWS}:
        gradients[name] = layout.total_gradient(gradients[name], student.DIMS.get(name, ())) * inverse
    return sums, gradients


def _for_each_chunk(
    chunk_size: int,
    counts: Bool[Array, " N"] | None,
    student: Source,
    layout: Layout,
    body: Callable[[Int[Array, " C"], Any], Any],
    carry: Any,
) -> Any:
    """``carry`` after ``body(index, carry)`` for each chunk, ``index`` being its rows."""
    num_chunks, order = _chunks(student.leading_shape[0], counts, chunk_size)
    num_chunks = layout.most(num_chunks)
    if not order.size:  # an empty batch has no row to trace with
        return carry

    def chunk(i: jax.Array, carry: Any) -> Any:
        return body(jax.lax.dynamic_slice_in_dim(order, i * chunk_size, chunk_size), carry)

    # With a Python number of chunks this is `jax.lax.scan`; when rows may be left out, their chunks are not run.
    trips = order.size // chunk_size if num_chunks is None else num_chunks
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
