"""THE loop over chunks of rows. It knows no loss and has two faces.

`sum_rows`: a weighted sum of row losses, with the gradients formed in the forward pass, inside of `jax.lax.scan`:

    logits = hidden[chunk] @ weight.T                      student, and teacher alike
    losses, dlogits = row_loss(logits)                     one number a row, and the gradient of their sum
    dhidden[chunk], dweight += dlogits @ weight, dlogits.T @ hidden[chunk]

and `jax.custom_vjp` hands these gradients out in the backward pass: three products with the student's head instead of
the four that recomputing would take. The idea is Liger Kernel's (its pull request 408 and RFC 371).

`map_rows`: one number a row, whose gradient is a number a row and comes only later: the backward pass runs the loop
again, as a weighted sum with these numbers as weights. `read_rows` is its forward pass alone, for more than numbers.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Int, Shaped

from jaxkd.logits.sources import Gradients, Source
from jaxkd.loop.chunk_pass import ChunkPass, Plan, set_rows
from jaxkd.loop.collectives import (
    as_carry,
    as_primal,
    check_differentiable,
    differing,
    empty_like,
    gather_chunk,
    gathered_parts,
    in_step,
    own_rows,
    spec_of_gradient,
)
from jaxkd.loop.flattening import map_field, map_over_mesh, spec, specs
from jaxkd.loop.partitioning import ROWS, Partitioning
from jaxkd.loop.platform import target_platform
from jaxkd.loop.reverse_once import reverse_once
from jaxkd.loop.row_loss import Counted, RowLoss, RowReadings, RowValues, Sums

# Gradients in the forward pass.


def sum_rows(loss: RowLoss, student: Source, is_counted: Counted, normalizer: Float[Array, ""], plan: Plan) -> Sums:
    """Sums of ``loss`` over the rows of the flat source ``student`` that count, divided by ``normalizer``.

    Only "loss" is differentiable, and only with respect to ``student``; 0 where ``normalizer`` is 0. A row that does
    not count is never read. Memory beyond inputs and gradients is that of one chunk. Over more than one device, the
    ``plan`` says what of the arrays each of them has.
    """
    return _sum_rows(plan, PROBE, is_counted, loss, student, normalizer)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_rows(
    plan: Plan, probe: Any, is_counted: Counted, loss: Any, student: Any, normalizer: Float[Array, ""]
) -> Sums:
    sums, _ = _sums_and_residuals(plan, frozenset(), is_counted, loss, student, normalizer)
    return sums


def _sum_rows_forward(plan: Plan, *arguments: Any) -> tuple[Sums, Any]:
    probe, _, loss, student, normalizer = arguments
    _reject_gradient(probe, loss=loss, normalizer=normalizer)
    check_differentiable(plan.partitioning)
    return _sums_and_residuals(plan, _perturbed(student), *custom_vjp_primal_tree_values(arguments[1:]))


# Compiled once a shape when called outside of jit too, and inside of the custom_vjp: differentiation then traces the
# forward pass alone.
@partial(jax.jit, static_argnums=(0, 1))
def _sums_and_residuals(
    plan: Plan, wanted: frozenset[str], is_counted: Counted, loss: Any, student: Any, normalizer: Float[Array, ""]
) -> tuple[Sums, Any]:
    sums, gradients = _loop_on_mesh(plan, is_counted, loss, student, normalizer, wanted)
    # With each gradient goes an empty array of its primal's type, all that the backward pass needs of the primal. A
    # field that was not wanted has an empty gradient: JAX expects the same tree whichever fields are differentiated.
    residuals = {
        name: (gradients[name] if name in gradients else _nothing(x), jax.tree.map(empty_like, x))
        for name, x in vars(student).items()
    }
    return sums, replace(student, **residuals)


def _nothing(field: Any) -> Any:
    return jax.tree.map(lambda _: jnp.zeros((0,)), field)


def _sum_rows_backward(plan: Plan, residuals: Any, cotangents: dict[str, Any]) -> tuple[Any, ...]:
    upstream = cotangents["loss"]
    if isinstance(upstream, SymbolicZero):
        return None, None, None, None, None
    return None, None, None, _times_gradients(plan, upstream, residuals), None


@partial(jax.jit, static_argnums=0)
def _times_gradients(plan: Plan, upstream: Float[Array, ""], residuals: Any) -> Any:
    def finished(gradient: jax.Array, primal: jax.Array) -> jax.Array | None:
        wanted = gradient.shape != (0,)
        return as_primal(upstream * gradient.astype(upstream.dtype), primal).astype(primal.dtype) if wanted else None

    fields = {name: jax.tree.map(finished, *entry) for name, entry in vars(residuals).items()}
    return _gathered(plan, residuals, fields)


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward, symbolic_zeros=True)


# Gradients recomputed in the backward pass.


def map_rows(loss: RowValues, student: Source, is_counted: Counted, plan: Plan) -> dict[str, Float[Array, " N"]]:
    """What ``loss`` gives for each row of the flat source ``student``, and 0 for one that does not count.

    Differentiable and read as in `sum_rows`; memory is the same, in the backward pass too: no chunk is kept for it.
    """
    return _map_rows(plan, PROBE, is_counted, loss, student)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_rows(plan: Plan, probe: Any, is_counted: Counted, loss: Any, student: Any) -> dict[str, Float[Array, " N"]]:
    return _values_on_mesh(plan, is_counted, loss, student)


def _map_rows_forward(plan: Plan, *arguments: Any) -> tuple[dict[str, jax.Array], Any]:
    probe, _, loss, student = arguments
    _reject_gradient(probe, loss=loss)
    check_differentiable(plan.partitioning)
    primals = custom_vjp_primal_tree_values(arguments[1:])
    is_counted, primal_loss, primal_student = primals
    values = _values_on_mesh(plan, is_counted, primal_loss.saving(), primal_student)
    saved = {name: x for name, x in values.items() if name not in primal_loss.names}
    # An empty array marks a field that is not wanted, for the reason above.
    wanted = _perturbed(student)
    marks = {name: np.zeros((int(name in wanted),), np.float32) for name in vars(student)}
    return {name: values[name] for name in primal_loss.names}, (primals, saved, marks)


def _map_rows_backward(plan: Plan, residuals: Any, cotangents: dict[str, Any]) -> tuple[Any, ...]:
    primals, saved, marks = residuals
    upstream = cotangents["loss"]
    if isinstance(upstream, SymbolicZero):
        return None, None, None, None
    wanted = frozenset(name for name, mark in marks.items() if mark.size)
    return None, None, None, _weighted_gradients(plan, wanted, upstream, saved, *primals)


@partial(jax.jit, static_argnums=(0, 1))
def _weighted_gradients(
    plan: Plan, wanted: frozenset[str], upstream: Any, saved: Any, is_counted: Counted, loss: Any, student: Any
) -> Any:
    one = jnp.ones((), student.dtype)
    _, gradients = _loop_on_mesh(plan, is_counted, loss.weighted(upstream, saved), student, one, wanted)

    def finished(gradient: jax.Array, primal: jax.Array) -> jax.Array:
        return as_primal(gradient, primal).astype(jnp.result_type(primal))

    fields = {
        name: jax.tree.map(finished, gradients[name], x) if name in wanted else None
        for name, x in vars(student).items()
    }
    return _gathered(plan, student, fields)


def _gathered(plan: Plan, source: Any, gradients: dict[str, Any]) -> Any:
    """``source`` with the gradients of its fields, whole on each device; None where a field was not wanted."""
    gather = partial(gathered_parts, plan.partitioning)
    fields = {
        name: map_field(gather, x, source.DIMS.get(name, ())) if jax.tree.leaves(x) else x
        for name, x in gradients.items()
    }
    return replace(source, **fields)


_map_rows.defvjp(_map_rows_forward, _map_rows_backward, symbolic_zeros=True)


def read_rows(loss: RowReadings, student: Source, is_counted: Counted, plan: Plan) -> dict[str, Shaped[Array, "N ..."]]:
    """What ``loss`` gives for each row of the flat source ``student``, and 0 for one that does not count.

    Read as in `sum_rows`. Nothing of it can be differentiated.
    """
    return _values_on_mesh(plan, is_counted, loss, student)


@partial(jax.jit, static_argnums=0)
def _values_on_mesh(plan: Plan, is_counted: Counted, loss: Any, student: Any) -> dict[str, Shaped[Array, "N ..."]]:
    rows = spec(plan.partitioning, (ROWS,))
    return _on_mesh(plan, partial(_values, plan), dict.fromkeys(loss.names, rows), is_counted, loss, student)


def _values(plan: Plan, is_counted: Counted, loss: Any, student: Any) -> dict[str, Shaped[Array, "N ..."]]:
    partitioning = plan.partitioning
    student = student.prepared()

    def chunk(values: dict[str, jax.Array], index: Int[Array, " C"], _: Any) -> dict[str, jax.Array]:
        own_student, own_loss = (gather_chunk(partitioning, x.take(index)) for x in (student, loss))
        rows, _ = own_loss(own_student.logits(), None, None)
        return {name: set_rows(values[name], index, own_rows(partitioning, x)) for name, x in rows.items()}

    kinds = loss.kinds if isinstance(loss, RowReadings) else dict.fromkeys(loss.names, ((), student.dtype))
    values = {name: jnp.zeros((*student.leading_shape, *shape), dtype) for name, (shape, dtype) in kinds.items()}
    values = _for_each_chunk(plan.chunks.piece, is_counted, student, partitioning, chunk, values)
    return _differentiable(plan, is_counted, student, values)


# The loop.


def _on_mesh(
    plan: Plan, function: Callable[..., Any], out_specs: Any, is_counted: Counted, loss: Any, student: Any, *rest: Any
) -> Any:
    """``function`` of flat arrays, on each device of the mesh where the arrays are not shards already."""
    partitioning = plan.partitioning
    if not partitioning.is_mapped:
        return function(is_counted, loss, student, *rest)
    in_specs = spec(partitioning, (ROWS,)), specs(partitioning, loss), specs(partitioning, student)
    # Autodiff stays outside: what `check_vma` would see to is done by `collectives`, and the kernels do without it.
    return map_over_mesh(
        partitioning,
        function,
        in_specs=(*in_specs, *(spec(partitioning, ()) for _ in rest)),
        out_specs=out_specs,
        check_vma=False,
    )(is_counted, loss, student, *rest)


def _loop_on_mesh(
    plan: Plan, is_counted: Counted, loss: Any, student: Any, normalizer: Any, wanted: frozenset[str]
) -> tuple[Sums, Gradients]:
    gradients = {
        name: map_field(
            partial(spec_of_gradient, plan.partitioning), getattr(student, name), student.DIMS.get(name, ())
        )
        for name in wanted
    }
    sums = dict.fromkeys(loss.names, spec(plan.partitioning, ()))
    loop = partial(_loop, plan, wanted=wanted)
    return _on_mesh(plan, loop, (sums, gradients), is_counted, loss, student, normalizer)


def _loop(
    plan: Plan,
    is_counted: Counted,
    loss: RowLoss,
    student: Source,
    normalizer: Float[Array, ""],
    wanted: frozenset[str],
) -> tuple[Sums, Gradients]:
    """The normalised sums, and the gradients of the ``wanted`` fields of the student."""
    primal_dtypes = {name: tuple(map(jnp.result_type, jax.tree.leaves(getattr(student, name)))) for name in wanted}
    student = differing(student.prepared(), student.ROWS, (is_counted, loss, student))
    inverse = jnp.where(normalizer == 0, 0, 1 / normalizer).astype(student.dtype)
    chunk_pass = ChunkPass(plan, loss, student, inverse, primal_dtypes)
    # On a GPU the first chunk writes the head's gradient: filling it with zeros and adding to them moves 8 bytes a
    # weight, some 2 % of the whole. Elsewhere a program of half the size is worth more.
    is_first_apart = target_platform() in ("cuda", "gpu", "rocm") and student.leading_shape[0] > plan.chunks.size
    start = chunk_pass.start(is_every_row_counted=is_counted is None, bare=is_first_apart)
    state = _for_each_chunk(plan.chunks.size, is_counted, student, plan.partitioning, chunk_pass, start, is_first_apart)
    return _differentiable(plan, is_counted, student, chunk_pass.finish(state))


def _differentiable(plan: Plan, is_counted: Counted, student: Source, results: Any) -> Any:
    """What a loop gives: how many chunks it runs, which the reverse mode would need, may not be known at tracing."""
    has_unknown_trips = is_counted is not None and student.leading_shape[0] > plan.chunks.piece
    return reverse_once(results) if has_unknown_trips else results


def _for_each_chunk(
    chunk_size: int,
    is_counted: Counted,
    student: Source,
    partitioning: Partitioning,
    body: Callable[[Any, Int[Array, " C"], Int[Array, ""] | None], Any],
    carry: Any,
    is_first_apart: bool = False,
) -> Any:
    """``carry`` after ``body(carry, index, num_counted)`` for each chunk: its rows, and how many of them count.

    The number is None if all may. The first chunk is run before the loop, whether any of its rows count or not, if it
    ``is_first_apart``: what it returns may have more in it than ``carry``.
    """
    num_counted, order = _order(student.leading_shape[0], is_counted, chunk_size)
    if not order.size:  # an empty batch has no row to trace with
        return carry
    order = jnp.reshape(order, (-1, chunk_size))  # (chunks, C)
    num_chunks = order.shape[0]

    def num_here(i: Int[Array, ""] | int) -> Int[Array, ""] | None:
        # Rows gathered from several devices that count are not together.
        if num_counted is None or partitioning.gathered:
            return None
        return jnp.clip(num_counted - i * chunk_size, 0, chunk_size)

    if is_first_apart:
        carry = body(carry, order[0], num_here(0))

    if num_counted is None:

        def chunk(carry: Any, index: Int[Array, " C"]) -> tuple[Any, None]:
            return body(carry, index, None), None

        carry = as_carry(body, carry, order[0], None)
        return jax.lax.scan(chunk, carry, order[int(is_first_apart) :])[0]

    # The rows that count come first, and a chunk that has none is not run.
    def some(i: Int[Array, ""] | int, carry: Any) -> Any:
        return body(carry, jax.lax.dynamic_index_in_dim(order, i, keepdims=False), num_here(i))

    most = in_step(partitioning, num_counted)
    trips: Any = (most + chunk_size - 1) // chunk_size if num_chunks > 1 else num_chunks
    return jax.lax.fori_loop(int(is_first_apart), trips, some, as_carry(lambda carry: some(0, carry), carry))


def _order(num_rows: int, is_counted: Counted, chunk_size: int) -> tuple[Int[Array, ""] | None, Int[Array, " P"]]:
    """How many rows count (None: all), and the rows in the order of the chunks.

    Rows that count come first, in order; the rest of the last chunk points beyond the last row, where `take` is zero.
    """
    position = jnp.arange(-(-num_rows // chunk_size) * chunk_size, dtype=jnp.int32)
    if is_counted is None:
        return None, position
    num_counted = jnp.sum(is_counted, dtype=jnp.int32)
    order = jnp.argsort(~is_counted, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, position.size - num_rows))
    order = jnp.where(position < num_counted, order, num_rows + position)
    return num_counted, order


# What is differentiated. Nothing is with respect to an integer, unless everything is said to be: `jax.checkpoint` does
# that with the configurations `jax_custom_vjp3` and `jax_remat3` together.
PROBE = np.zeros((), np.int32)


def _perturbed(student: Any) -> frozenset[str]:
    """The fields of which an array is differentiated."""

    def is_perturbed(field: Any) -> bool:
        return any(x.perturbed for x in jax.tree.leaves(field, is_leaf=lambda x: isinstance(x, CustomVJPPrimal)))

    return frozenset(name for name, field in vars(student).items() if is_perturbed(field))


def _reject_gradient(probe: CustomVJPPrimal, **constants: Any) -> None:
    """An error for a differentiated argument that is a constant here: silence would train on a wrong gradient."""
    if probe.perturbed:
        return
    leaves, _ = jax.tree_util.tree_flatten_with_path(constants, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    for (argument, *path), leaf in leaves:
        if leaf.perturbed and jnp.issubdtype(jnp.result_type(leaf.value), jnp.inexact):
            name = jax.tree_util.keystr(tuple(path)).lstrip(".") or argument.key
            raise TypeError(
                f"jaxkd does not differentiate with respect to `{name}`: pass `jax.lax.stop_gradient({name})`, "
                "or leave it out of the arguments of jax.grad"
            )
