"""THE loop: a weighted sum of row losses over chunks of rows, with the gradients formed in the forward pass.

It knows no loss. For each chunk it forms the student's logits, asks the row loss for one number a row and for the
gradient of their sum to the logits, and pulls that gradient back to the student's arrays before the chunk's logits are
dropped: three products with the student's head instead of the four that recomputing in the backward pass would take.
The idea is Liger Kernel's (its pull request 408 and RFC 371).
"""

from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Bool, Float, Int

from jaxkd.logits import Gradients, Source

Sums = dict[str, jax.Array]

# The logits of a chunk, student and teacher together, take at most this many bytes unless `chunk_size` says otherwise.
CHUNK_BYTES = 2**31
CHUNK_MULTIPLE = 128


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
) -> Sums:
    """Sums of ``loss`` over the rows of the flat source ``student`` that count (None: all), divided by ``normalizer``.

    Only "loss" is differentiable, and only with respect to ``student``; 0 where ``normalizer`` is 0. A row that does
    not count is never read. Memory beyond inputs and gradients is that of one chunk of ``chunk_size`` rows.
    """
    num_rows = student.leading_shape[0]
    position = jnp.arange(-(-num_rows // chunk_size) * chunk_size, dtype=jnp.int32)
    if counts is None:
        return _sum_rows(chunk_size, None, position, loss, student, normalizer)
    # Rows that count come first, in order; the rest of the last chunk points beyond the last row, where `take` is zero.
    num_counted = jnp.sum(counts, dtype=jnp.int32)
    order = jnp.argsort(~counts, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, position.size - num_rows))
    order = jnp.where(position < num_counted, order, num_rows + position)
    return _sum_rows(chunk_size, (num_counted + chunk_size - 1) // chunk_size, order, loss, student, normalizer)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_sum_rows(
    chunk_size: int,
    num_chunks: Int[Array, ""] | None,
    order: Int[Array, " P"],
    loss: Any,
    student: Any,
    normalizer: Float[Array, ""],
) -> Sums:
    return _loop(chunk_size, num_chunks, order, loss, student, normalizer, frozenset())[0]


def _forward(chunk_size: int, *arguments: Any) -> tuple[Sums, Any]:
    num_chunks, order, loss, student, normalizer = custom_vjp_primal_tree_values(arguments)
    for name, argument in (("loss", arguments[2]), ("normalizer", arguments[4])):
        _reject_gradient(name, argument)
    wanted = frozenset(name for name, leaf in vars(arguments[3]).items() if leaf is not None and leaf.perturbed)
    sums, gradients = _loop(chunk_size, num_chunks, order, loss, student, normalizer, wanted)
    # With each gradient goes an empty array of its primal's type, all that the backward pass needs of the primal. A
    # field that was not wanted has an empty gradient: JAX expects the same tree whichever fields are differentiated.
    nothing = jnp.zeros((0,))
    residuals = {
        name: None if x is None else (gradients.get(name, nothing), jnp.zeros((0,), jnp.result_type(x)))
        for name, x in vars(student).items()
    }
    return sums, replace(student, **residuals)


def _backward(chunk_size: int, residuals: Any, cotangents: dict[str, Any]) -> tuple[Any, ...]:
    upstream = cotangents["loss"]
    if isinstance(upstream, SymbolicZero):
        return None, None, None, None, None

    def finished(gradient: jax.Array, primal: jax.Array) -> jax.Array | None:
        wanted = gradient.shape != (0,)
        return (upstream * gradient.astype(upstream.dtype)).astype(primal.dtype) if wanted else None

    gradients = {name: entry and finished(*entry) for name, entry in vars(residuals).items()}
    return None, None, None, replace(residuals, **gradients), None


_differentiable_sum_rows.defvjp(_forward, _backward, symbolic_zeros=True)
_sum_rows = jax.jit(_differentiable_sum_rows, static_argnums=0)  # compiled once a shape when called outside of jit too


def _loop(
    chunk_size: int,
    num_chunks: Int[Array, ""] | None,
    order: Int[Array, " P"],
    loss: RowLoss,
    student: Source,
    normalizer: Float[Array, ""],
    wanted: frozenset[str],
) -> tuple[Sums, Gradients]:
    """The normalised sums, and the gradients of the ``wanted`` fields of the student."""
    student = student.prepared()
    dtype = student.dtype
    inverse = jnp.where(normalizer == 0, 0, 1 / normalizer).astype(dtype)

    def zeros(name: str) -> jax.Array:
        like = getattr(student, name)
        # float16 gradients wait for the upstream gradient, which may hold the loss scale that keeps them in range.
        rounds = name == student.ROWS and like.dtype != jnp.float16
        return jnp.zeros(jnp.shape(like), like.dtype if rounds else dtype)

    def chunk(i: jax.Array, carry: tuple[Sums, Gradients]) -> tuple[Sums, Gradients]:
        sums, gradients = carry
        index = jax.lax.dynamic_slice_in_dim(order, i * chunk_size, chunk_size)  # (C,)
        logits, pullback = student.take(index).logits_and_pullback()  # (C, V)
        row_sums, dlogits = loss.take(index)(logits, student.gradient_dtype if wanted else None)  # (C,), (C, V)
        sums = {name: total + jnp.sum(row_sums[name]) for name, total in sums.items()}
        if not wanted:
            return sums, gradients
        for name, g in pullback(dlogits, wanted).items():
            total = gradients[name]
            if name == student.ROWS:
                g = (g * inverse).astype(total.dtype)
                total = total.at[index].set(g, mode="drop", unique_indices=True, indices_are_sorted=True)
            else:
                total = total + g
            gradients = gradients | {name: total}
        return sums, gradients

    # With a Python number of chunks this is `jax.lax.scan`; when rows may be left out, their chunks are not run.
    trips = order.size // chunk_size if num_chunks is None else num_chunks
    carry = {name: jnp.zeros((), dtype) for name in loss.names}, {name: zeros(name) for name in sorted(wanted)}
    if order.size:  # an empty batch has no row to trace with
        carry = jax.lax.fori_loop(0, trips, chunk, carry)
    sums, gradients = carry
    sums = {name: total * inverse for name, total in sums.items()}
    return sums, {name: g if name == student.ROWS else g * inverse for name, g in gradients.items()}


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
