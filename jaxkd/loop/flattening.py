"""Around the loop: arrays of full shapes become flat ones that all devices have as much of."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.loop.partitioning import ROWS, VOCABULARY, Dims, Partitioning, dims_of_each


def splits_vocabulary(source: Any) -> bool:
    """Whether a device can have a part of its columns."""
    return any(VOCABULARY in dims for dims in source.DIMS.values())


def check_sources(partitioning: Partitioning, student: Any, teacher: Any = None) -> None:
    """Raises an error for sources that cannot be split so."""
    teacher = student if teacher is None else teacher
    for name, source in (("student", student), ("teacher", teacher)):
        if partitioning.gathered and source.DIMS[source.ROWS][-1] == VOCABULARY:
            raise ValueError(
                f"`{name}` is Logits, and {partitioning.gathered[0]!r} has both rows and columns of them, over which "
                "they would have to be gathered; leave it out of `sharding.vocabulary`"
            )
    if partitioning.is_manual and partitioning.vocabulary and student.vocabulary != teacher.vocabulary:
        raise ValueError(
            f"student and teacher have {student.vocabulary} and {teacher.vocabulary} columns on a device; inside "
            "shard_map give both the same ones"
        )


def on_auto_axes(
    partitioning: Partitioning, function: Callable[..., Any], *arguments: Any, gives_rows: bool = False
) -> Any:
    """``function(*arguments)``, within which no axis of the mesh is of type Explicit.

    It returns scalars, or arrays with the leading axes of the rows if it ``gives_rows``.
    """
    mesh = partitioning.mesh
    if partitioning.is_manual or mesh is None or AxisType.Explicit not in mesh.axis_types:
        return function(*arguments)
    spec = P(*(axes or None for axes in partitioning.rows)) if gives_rows else P()
    out_sharding = NamedSharding(_mesh_to_map(partitioning), spec)
    function = jax.sharding.auto_axes(function, axes=mesh.axis_names, out_sharding=out_sharding)
    return jax.jit(function)(*arguments)


def map_over_mesh(
    partitioning: Partitioning, function: Callable[..., Any], in_specs: Any, out_specs: Any, check_vma: bool = True
) -> Any:
    return jax.shard_map(
        function, mesh=_mesh_to_map(partitioning), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )


def _mesh_to_map(partitioning: Partitioning) -> Any:
    context = jax.sharding.get_abstract_mesh()
    return partitioning.mesh if context.empty else context


def spec(partitioning: Partitioning, dims: Dims) -> P:
    """Of a flat array whose axes are called ``dims``."""
    axes = {ROWS: partitioning.row_axes, VOCABULARY: partitioning.vocabulary}
    return P(*(axes.get(dim) or None for dim in dims))  # type: ignore[arg-type]


def specs(partitioning: Partitioning, tree: Any) -> Any:
    return map_dims(lambda x, dims: spec(partitioning, dims), tree)


def has_filling(partitioning: Partitioning, leading_shape: tuple[int, ...]) -> bool:
    """Whether there will be rows that stand for none."""
    return partitioning.is_mapped and _filled(partitioning, leading_shape) != leading_shape


def _filled(partitioning: Partitioning, leading_shape: tuple[int, ...]) -> tuple[int, ...]:
    rows = _axes_of_rows(partitioning, len(leading_shape))
    return tuple(n + -n % partitioning.size(axes) for n, axes in zip(leading_shape, rows, strict=True))


def _axes_of_rows(partitioning: Partitioning, depth: int) -> tuple[Any, ...]:
    """The mesh axes of each of ``depth`` leading axes."""
    return partitioning.rows + ((),) * (depth - len(partitioning.rows))


def flat_sources(
    partitioning: Partitioning, student: Any, teacher: Any = None, truncate: bool = True
) -> tuple[Any, Any]:
    """Both with one leading axis, filled up so that all devices have as many rows and the same columns of both.

    The width is that of the wider vocabulary, or the student's if the teacher may be truncated to it.
    """
    if teacher is None:
        return flat_tree(partitioning, student, student.leading_shape), None
    if not partitioning.is_mapped:
        return student.flat(), teacher.flat()
    width = student.vocabulary if truncate else max(student.vocabulary, teacher.vocabulary)
    return _flat_source(partitioning, student, width), _flat_source(partitioning, teacher, width)


def flat_tree(partitioning: Partitioning, tree: Any, leading_shape: tuple[int, ...]) -> Any:
    """A tree of sources and arrays with these leading axes: the same for each, widths as they are."""

    def flat(x: Any) -> Any:
        if _has_dims(x):
            return _flat_source(partitioning, x, x.vocabulary) if partitioning.is_mapped else x.flat()
        x = jnp.asarray(x)
        if partitioning.is_mapped:
            return _flat_array(partitioning, x, (ROWS,), len(leading_shape))
        return jnp.reshape(x, (-1, *x.shape[len(leading_shape) :]))

    return jax.tree.map(flat, tree, is_leaf=_has_dims)


def with_leading_axes(partitioning: Partitioning, x: jax.Array, leading_shape: tuple[int, ...]) -> jax.Array:
    """Of flat rows (N, ...), in the shape that the rows came in."""
    rest = x.shape[1:]
    if not partitioning.is_mapped:
        return jnp.reshape(x, (*leading_shape, *rest))
    filled = _filled(partitioning, leading_shape)
    axes = _axes_of_rows(partitioning, len(leading_shape))
    own = tuple(n // partitioning.size(a) for n, a in zip(filled, axes, strict=True))
    before, after = P(partitioning.row_axes or None), P(*(a or None for a in axes))
    x = map_over_mesh(partitioning, lambda x: jnp.reshape(x, (*own, *rest)), before, after)(x)
    return x[tuple(slice(n) for n in leading_shape)] if filled != leading_shape else x


def _flat_source(partitioning: Partitioning, source: Any, width: int) -> Any:
    depth = len(source.leading_shape)
    width = partitioning.local_width(width) * partitioning.size(partitioning.vocabulary)

    def flat(x: Any, dims: Dims) -> Any:  # a scale may be a Python number
        if partitioning.vocabulary and VOCABULARY in dims:
            x = _of_width(partitioning, x, width, dims)
        return _flat_array(partitioning, x, dims, depth) if dims[:1] == (ROWS,) else x

    return map_dims(flat, source)


def flat_rows(partitioning: Partitioning, x: Any, fill: Any) -> Any:
    """The same for labels and weights, or None."""
    if x is None:
        return None
    x = jnp.asarray(x)
    return _flat_array(partitioning, x, (ROWS,), x.ndim, fill) if partitioning.is_mapped else jnp.reshape(x, -1)


def _flat_array(partitioning: Partitioning, x: jax.Array, dims: Dims, depth: int, fill: Any = 0) -> jax.Array:
    rest = x.shape[depth:]
    shape = (*_filled(partitioning, x.shape[:depth]), *rest)
    if shape != x.shape:
        x = jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)], constant_values=fill)
    if depth == 1:
        return x
    # The order of rows is no matter: each device flattens its own, and nothing moves.
    others = spec(partitioning, dims)[1:]
    before = P(*(axes or None for axes in _axes_of_rows(partitioning, depth)), *others)
    after = P(partitioning.row_axes or None, *others)
    return map_over_mesh(partitioning, lambda x: jnp.reshape(x, (-1, *x.shape[depth:])), before, after)(x)


def _of_width(partitioning: Partitioning, x: jax.Array, width: int, dims: Dims) -> jax.Array:
    axes = partitioning.vocabulary
    axis = dims.index(VOCABULARY) - len(dims)
    if x.shape[axis] == width:
        return x
    if dims != (VOCABULARY, None) or x.shape[1] % partitioning.size(axes):
        return _resized(x, width, axis)

    # Split over V a head could be resized only by moving it whole. Each device has some of its columns meanwhile.
    def resized(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(_resized(x, width, 0), axes, split_axis=0, concat_axis=1, tiled=True)

    return map_over_mesh(partitioning, resized, P(None, axes), P(axes))(x)


def filled_up(source: Any, width: int) -> Any:
    """A source with so many columns, the last of which are 0."""

    def filled(x: jax.Array, dims: Dims) -> jax.Array:
        return _resized(x, width, dims.index(VOCABULARY) - len(dims)) if VOCABULARY in dims else x

    return map_dims(filled, source)


def _resized(x: jax.Array, width: int, axis: int) -> jax.Array:
    x = jax.lax.slice_in_dim(x, 0, min(width, x.shape[axis]), axis=axis)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, width - x.shape[axis])
    return jnp.pad(x, pad)


def map_dims(function: Callable[[jax.Array, Dims], Any], tree: Any) -> Any:
    """``function(array, dims)`` of each array of a dataclass, whose ``DIMS`` name the axes of those that have any."""
    values = {f.name: getattr(tree, f.name) for f in fields(tree) if not f.metadata.get("static")}
    return replace(tree, **{k: map_field(function, x, tree.DIMS.get(k, ())) for k, x in values.items()})


def map_field(function: Callable[[jax.Array, Dims], Any], field: Any, dims: Any) -> Any:
    """The same of each array of a field, whose entry in ``DIMS`` is ``dims``."""
    arrays, structure = jax.tree.flatten(field, is_leaf=_has_dims)
    mapped = [
        map_dims(function, x) if _has_dims(x) else function(x, d)
        for x, d in zip(arrays, dims_of_each(dims, arrays), strict=True)
    ]
    return jax.tree.unflatten(structure, mapped)


def _has_dims(x: Any) -> bool:
    return hasattr(x, "DIMS")
