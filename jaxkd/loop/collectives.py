"""In the loop: what devices tell each other, and the types that say where their arrays may differ.

Inside a shard_map with ``check_vma`` the type of an array says over which mesh axes it varies. Nothing here does
anything on one device.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxkd.loop.flattening import map_dims, map_over_mesh, spec
from jaxkd.loop.partitioning import ROWS, VOCABULARY, Axes, Dims, Partitioning


def gather_chunk(partitioning: Partitioning, tree: Any) -> Any:
    """A chunk's rows of all devices that share the vocabulary with rows of their own."""
    if not partitioning.gathered:
        return tree

    def gather(x: jax.Array, dims: Dims) -> jax.Array:
        return jax.lax.all_gather(x, partitioning.gathered, tiled=True) if dims[:1] == (ROWS,) else x

    return map_dims(gather, tree)


def scatter_to_own_rows(partitioning: Partitioning, gradient: jax.Array, dims: Dims, primal: jax.Array) -> jax.Array:
    """From the gradient of a gathered chunk by a device's own columns, that of its own rows by all columns."""
    if VOCABULARY in dims:
        return gradient
    gathered = partitioning.gathered
    if gathered:
        gradient = jax.lax.psum_scatter(gradient, gathered, scatter_dimension=0, tiled=True)
    return psum(gradient, tuple(x for x in partitioning.vocabulary if x not in gathered and x not in varying(primal)))


def own_rows(partitioning: Partitioning, x: jax.Array) -> jax.Array:
    """Of numbers of the rows of a gathered chunk, those of a device's own rows."""
    gathered = partitioning.gathered
    if not gathered:
        return x
    size = x.shape[0] // partitioning.gather_size
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(gathered) * size, size)


def in_step(partitioning: Partitioning, count: jax.Array) -> jax.Array:
    """The largest ``count`` of the devices that gather from one another, for they have to keep in step."""
    gathered = partitioning.gathered
    return jax.lax.pmax(_vary(count, gathered), gathered) if gathered else count


def total(partitioning: Partitioning, x: jax.Array) -> jax.Array:
    """The sum over all rows, from that over a device's chunks."""
    return _alike(partitioning, psum(x, partitioning.replicas))


def total_of_own(partitioning: Partitioning, x: jax.Array) -> jax.Array:
    """The sum over all rows, from that over a device's own; outside of the loop."""
    return _alike(partitioning, psum(x, partitioning.row_axes)) if partitioning.is_manual else x


def _alike(partitioning: Partitioning, x: jax.Array) -> jax.Array:
    """What is equal on all devices, of a type that says so."""
    axes = tuple(axis for axis in partitioning.axes if axis in varying(x))
    return jax.lax.pmax(x, axes) if axes else x


def total_gradient(partitioning: Partitioning, gradient: jax.Array, dims: Dims, dtype: jnp.dtype) -> jax.Array:
    """The gradient of what serves all rows, ``dtype`` being the type of its primal.

    In the caller's shard_map the backward pass sums it, by `as_primal`.
    """
    if not partitioning.is_mapped:
        return gradient
    if is_in_parts(partitioning, gradient.shape, dims, dtype):
        return jax.lax.psum_scatter(gradient, partitioning.replicas, scatter_dimension=0, tiled=True)
    return psum(gradient, partitioning.replicas if VOCABULARY in dims else partitioning.axes)


def is_in_parts(partitioning: Partitioning, shape: tuple[int, ...], dims: Dims, dtype: jnp.dtype) -> bool:
    """Whether each replica sums a part of a head's gradient, of this ``shape`` on a device.

    The parts are gathered when they are in the type of the head: where that is 16 bits wide, each device moves 6 bytes
    an entry, and sums and rounds no more than its part, where an all-reduce in float32 moves 8.
    """
    num_replicas = partitioning.size(partitioning.replicas)
    is_head = dims == (VOCABULARY, None) and jnp.dtype(dtype).itemsize < 4
    return partitioning.is_mapped and num_replicas > 1 and is_head and shape[0] % num_replicas == 0


def spec_of_gradient(partitioning: Partitioning, primal: jax.Array, dims: Dims) -> P:
    """Of what `total_gradient` gives."""
    if is_in_parts(partitioning, _local_shape(partitioning, primal, dims), dims, primal.dtype):
        return P((*partitioning.vocabulary, *partitioning.replicas))
    return spec(partitioning, dims)


def gathered_parts(partitioning: Partitioning, gradient: jax.Array, dims: Dims) -> jax.Array:
    """A head's gradient in the type of the head, whole on each replica."""
    if not is_in_parts(partitioning, _local_shape(partitioning, gradient, dims), dims, gradient.dtype):
        return gradient
    replicas = partitioning.replicas
    return map_over_mesh(
        partitioning,
        lambda x: jax.lax.all_gather(x, replicas, tiled=True),
        P((*partitioning.vocabulary, *replicas)),
        spec(partitioning, dims),
        check_vma=False,
    )(gradient)


def _local_shape(partitioning: Partitioning, x: Any, dims: Dims) -> tuple[int, ...]:
    return tuple(partitioning.local_width(n) if dim == VOCABULARY else n for n, dim in zip(x.shape, dims, strict=False))


def check_differentiable(partitioning: Partitioning) -> None:
    if partitioning.is_manual and not is_checked():
        raise ValueError(
            "jaxkd cannot tell what is differentiated in a shard_map with `check_vma=False`; leave `check_vma` on"
        )


def psum(x: jax.Array, axes: Axes) -> jax.Array:
    return jax.lax.psum(_vary(x, axes), axes) if axes else x


def varying(x: Any) -> frozenset[str]:
    """The axes of a shard_map with ``check_vma`` over which ``x`` may differ."""
    aval: Any = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    if not hasattr(aval, "manual_axis_type"):  # jax 0.9
        return frozenset(aval.vma or ())
    return frozenset() if aval.manual_axis_type is None else aval.manual_axis_type.varying


def _vary(x: jax.Array, axes: Any) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def is_checked() -> bool:
    """Whether this is inside of a shard_map with ``check_vma``."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return bool(axes) and bool(varying(jax.lax.axis_index(axes[0])))


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x`` free to differ wherever ``like`` does: what a cotangent of it has to be."""
    return _vary(x, varying(like))


def as_primal(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
    """A cotangent with the type of its primal: what is the same on several devices gets the sum of their cotangents."""
    axes = varying(cotangent) - varying(primal)
    return _vary(psum(cotangent, tuple(axes)), varying(primal))


def differing(source: Any, rows: str, others: Any) -> Any:
    """``source`` with its arrays but that of ``rows`` free to differ between devices wherever ``others`` do.

    Else autodiff of a chunk would sum their gradient over devices at once, which may be at another chunk.
    """
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(others)))
    return replace(
        source, **{k: jax.tree.map(lambda x: _vary(x, axes), v) for k, v in vars(source).items() if k != rows}
    )


def empty_like(x: jax.Array) -> jax.Array:
    """Nothing, of the type of ``x``."""
    return _vary(jnp.zeros((0,), jnp.result_type(x)), varying(x))


def as_carry(body: Callable[..., Any], carry: Any, *arguments: Any) -> Any:
    """``carry`` with the types that a pass ``body(carry, *arguments)`` of a loop gives it."""
    if not is_checked():
        return carry
    return jax.tree.map(lambda x, after: _vary(x, varying(after)), carry, jax.eval_shape(body, carry, *arguments))
