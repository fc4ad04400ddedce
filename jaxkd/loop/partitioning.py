"""More than one device: which axes of a mesh hold the rows and the vocabulary, and what moves between devices.

Every device loops over its own rows and its own columns of the vocabulary. Sums over rows are added up once, at the
end; normalisers, and all else that is a sum over the vocabulary, once a chunk, as vectors of one number a row. Logits
never move, nor does a head whose columns are split. Over an axis that holds both rows and vocabulary (FSDP) the hidden
states of a chunk are gathered, and the gradients of these states come back as a scattered sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS, VOCABULARY = "rows", "vocabulary"  # what sources and row losses call the axes of their arrays in `DIMS`
Axes = tuple[str, ...]
Dims = tuple[str | None, ...]


@dataclass(frozen=True)
class Sharding:
    """Which axes of a device mesh hold the rows and the vocabulary.

    Args:
      rows: the axes over which the leading axes of hidden states, labels and weights are split, as a `PartitionSpec`
        has them: "data", or `P("data", "sequence")` for (B, T, D) whose B and T are both split, or
        `P(("data", "fsdp"))`.
      vocabulary: the axis, or the axes, the most significant first, over which the V of both heads is split. One that
        is in ``rows`` too is FSDP: each device has rows of its own and a part of the heads.
      mesh: the mesh; None takes the one in context, that of `jax.set_mesh` or of the caller's `jax.shard_map`.

    Under `jit`, arrays have their full shapes and may come in any sharding: what lies otherwise is moved once a call.
    A gradient leaves in the sharding of its primal; only that of a head split over D, on mesh axes of type Auto, leaves
    split over V where `jax.jit` is given no ``out_shardings``. Neither rows nor vocabulary have to divide: they are
    filled up with rows that do not count and with columns whose logits are -inf, and the filling's gradient is dropped.

    Inside the caller's own `jax.shard_map`, manual over all these axes and with its ``check_vma``, arrays are what the
    device has: shards of equal size. The loss is that of all devices, and the gradient of what several devices hold
    alike is the sum over them, so that no `psum` is left to do.

    Source: Megatron-LM's parallel cross-entropy (arXiv 1909.08053) for the vocabulary, ZeRO (arXiv 1910.02054).
    """

    rows: Any = ()
    vocabulary: str | Axes = ()
    mesh: Mesh | AbstractMesh | None = None


def layout_of(sharding: Sharding | None, leading_rank: int) -> "Layout":
    """``sharding`` checked against its mesh, for arrays with so many leading axes.

    Raises:
      TypeError, ValueError: axes that do not exist or do not fit, and what to do.
    """
    if sharding is None:
        return Layout()
    if not isinstance(sharding, Sharding):
        raise TypeError(f"`sharding` is {sharding!r}; give a jaxkd.Sharding or None")
    rows = tuple(_as_axes("rows", x) for x in _entries(sharding.rows))
    vocabulary = _as_axes("vocabulary", sharding.vocabulary)
    mesh = _mesh_of(sharding)
    layout = Layout(rows, vocabulary, mesh)
    for name, axes in (("rows", layout.row_axes), ("vocabulary", vocabulary)):
        if unknown := [axis for axis in axes if axis not in mesh.shape]:
            raise ValueError(f"`sharding.{name}` names {unknown[0]!r} but the mesh has the axes {mesh.axis_names}")
        if len(set(axes)) < len(axes):
            raise ValueError(f"`sharding.{name}` is {getattr(sharding, name)!r}; name each axis once")
    if len(rows) > leading_rank:
        raise ValueError(
            f"`sharding.rows` splits {len(rows)} axes but there are {leading_rank} before the last; "
            'two mesh axes over one of them are written P(("a", "b"))'
        )
    manual = {axis for axis in layout.axes if axis in mesh.manual_axes} if isinstance(mesh, AbstractMesh) else set()
    if not manual:  # an axis of one device splits nothing
        rows, vocabulary = tuple(map(layout.long, rows)), layout.long(vocabulary)
        return replace(layout, rows=rows, vocabulary=vocabulary)
    if missing := [axis for axis in layout.axes if axis not in manual]:
        raise ValueError(
            f"`sharding` names {missing[0]!r}, which is not manual in this shard_map as {min(manual)!r} is; make it so"
        )
    return replace(layout, is_manual=True)


def _entries(rows: Any) -> tuple[Any, ...]:
    return (rows,) if isinstance(rows, str) else tuple(rows)


def _as_axes(name: str, x: Any) -> Axes:
    axes = () if x is None else (x,) if isinstance(x, str) else tuple(x)
    if not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"`sharding.{name}` holds {x!r}; give names of mesh axes")
    return axes


def _mesh_of(sharding: Sharding) -> Mesh | AbstractMesh:
    context = jax.sharding.get_abstract_mesh()
    if context.empty:
        if sharding.mesh is None:
            raise ValueError("`sharding` has no mesh and there is none in context: give `mesh`, or use jax.set_mesh")
        return sharding.mesh
    if sharding.mesh is not None and dict(sharding.mesh.shape) != dict(context.shape):
        raise ValueError(f"`sharding.mesh` is {sharding.mesh} but the mesh in context is {context}; leave it out")
    # Outside of shard_map the mesh that was given knows its devices, which a context may not.
    return context if sharding.mesh is None or context.manual_axes else sharding.mesh


@dataclass(frozen=True)
class Layout:
    """What a `Sharding` says, made sure of. Without arguments: one device, on which everything here does nothing.

    Args:
      rows: the mesh axes over each leading axis.
      vocabulary: the mesh axes over the vocabulary.
      mesh: of these axes.
      is_manual: whether the caller has mapped over them, so that arrays are shards already.
    """

    rows: tuple[Axes, ...] = ()
    vocabulary: Axes = ()
    mesh: Mesh | AbstractMesh | None = None
    is_manual: bool = False

    @property
    def is_mapped(self) -> bool:
        """Whether it is the loop here that is mapped over the mesh."""
        return self.mesh is not None and not self.is_manual

    @property
    def row_axes(self) -> Axes:
        return tuple(axis for axes in self.rows for axis in axes)

    @property
    def gathered(self) -> Axes:
        """The axes that hold both rows and vocabulary."""
        return tuple(axis for axis in self.vocabulary if axis in self.row_axes)

    @property
    def gather_size(self) -> int:
        """How many devices' rows are compared with each device's columns."""
        return self.size(self.gathered)

    @property
    def replicas(self) -> Axes:
        """The axes that hold rows alone, along which the heads are the same."""
        return tuple(axis for axis in self.row_axes if axis not in self.vocabulary)

    @property
    def axes(self) -> Axes:
        return (*self.replicas, *self.vocabulary)

    def long(self, axes: Axes) -> Axes:
        return tuple(axis for axis in axes if self.size((axis,)) > 1)

    def size(self, axes: Axes) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in axes)

    def local_rows(self, num_rows: int) -> int:
        """How many of the rows of a flat array a device has."""
        return num_rows // self.size(self.row_axes) if self.is_mapped else num_rows

    def local_width(self, width: int) -> int:
        """How many columns a device has."""
        return -(-width // self.size(self.vocabulary)) if self.is_mapped else width

    def whole_width(self, width: int) -> int:
        """The width of the vocabulary, from that of an array that came."""
        return width * self.size(self.vocabulary) if self.is_manual else width

    # Around the loop: arrays of full shapes.

    def check(self, student: Any, teacher: Any) -> None:
        """Raises an error for sources that cannot be split so."""
        for name, source in (("student", student), ("teacher", teacher)):
            if self.axes and not hasattr(source, "DIMS"):
                raise TypeError(f"`{name}` is a {type(source).__name__}, which cannot be sharded; give a LinearLogits")
            if self.gathered and source.DIMS[source.ROWS][-1] == VOCABULARY:
                raise ValueError(
                    f"`{name}` is Logits, and {self.gathered[0]!r} has both rows and columns of them, over which they "
                    "would have to be gathered; leave it out of `sharding.vocabulary`"
                )
        if self.is_manual and self.vocabulary and student.vocabulary != teacher.vocabulary:
            raise ValueError(
                f"student and teacher have {student.vocabulary} and {teacher.vocabulary} columns on a device; inside "
                "shard_map give both the same ones"
            )

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, which returns scalars; within, no axis of the mesh is of type Explicit."""
        if self.is_manual or self.mesh is None or AxisType.Explicit not in self.mesh.axis_types:
            return function(*arguments)
        out_sharding = NamedSharding(self._mesh_to_map(), P())
        function = jax.sharding.auto_axes(function, axes=self.mesh.axis_names, out_sharding=out_sharding)
        return jax.jit(function)(*arguments)

    def map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any, check_vma: bool = True) -> Any:
        return jax.shard_map(
            function, mesh=self._mesh_to_map(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )

    def _mesh_to_map(self) -> Any:
        context = jax.sharding.get_abstract_mesh()
        return self.mesh if context.empty else context

    def spec(self, dims: Dims) -> P:
        """Of a flat array whose axes are called ``dims``."""
        axes = {ROWS: self.row_axes, VOCABULARY: self.vocabulary}
        return P(*(axes.get(dim) or None for dim in dims))  # type: ignore[arg-type]

    def specs(self, tree: Any) -> Any:
        return map_dims(lambda x, dims: self.spec(dims), tree)

    def fills_up(self, leading_shape: tuple[int, ...]) -> bool:
        """Whether there will be rows that stand for none."""
        return self.is_mapped and self._filled(leading_shape) != leading_shape

    def _filled(self, leading_shape: tuple[int, ...]) -> tuple[int, ...]:
        rows = self.rows + ((),) * (len(leading_shape) - len(self.rows))
        return tuple(n + -n % self.size(axes) for n, axes in zip(leading_shape, rows, strict=True))

    def flat(self, student: Any, teacher: Any, truncate: bool) -> tuple[Any, Any]:
        """Both with one leading axis, filled up so that all devices have as many rows and the same columns of both.

        The width is that of the wider vocabulary, or the student's if the teacher may be truncated to it.
        """
        if not self.is_mapped:
            return student.flat(), teacher.flat()
        width = student.vocabulary if truncate else max(student.vocabulary, teacher.vocabulary)
        return self._flat(student, width), self._flat(teacher, width)

    def _flat(self, source: Any, width: int) -> Any:
        depth, width = len(source.leading_shape), self.local_width(width) * self.size(self.vocabulary)

        def flat(x: jax.Array, dims: Dims) -> jax.Array:
            if self.vocabulary and VOCABULARY in dims:
                x = self._of_width(x, width, dims)
            return self._flat_rows(x, dims, depth) if dims[:1] == (ROWS,) else x

        return map_dims(flat, source)

    def flat_rows(self, x: Any, fill: Any) -> Any:
        """The same for labels and weights, or None."""
        return self._flat_rows(jnp.asarray(x), (ROWS,), jnp.ndim(x), fill) if self.is_mapped and x is not None else x

    def _flat_rows(self, x: jax.Array, dims: Dims, depth: int, fill: Any = 0) -> jax.Array:
        rest = x.shape[depth:]
        shape = (*self._filled(x.shape[:depth]), *rest)
        if shape != x.shape:
            x = jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)], constant_values=fill)
        if depth == 1:
            return x
        # The order of rows is no matter: each device flattens its own, and nothing moves.
        rows, others = self.rows + ((),) * (depth - len(self.rows)), self.spec(dims)[1:]
        before = P(*(axes or None for axes in rows), *others)
        return self.map(lambda x: jnp.reshape(x, (-1, *x.shape[depth:])), before, P(self.row_axes or None, *others))(x)

    def _of_width(self, x: jax.Array, width: int, dims: Dims) -> jax.Array:
        axis, shards = dims.index(VOCABULARY) - len(dims), self.size(self.vocabulary)
        if x.shape[axis] == width:
            return x
        if dims != (VOCABULARY, None) or x.shape[1] % shards:
            return _resized(x, width, axis)

        # Split over V a head could be resized only by moving it whole. Each device has some of its columns meanwhile.
        def resized(x: jax.Array) -> jax.Array:
            return jax.lax.all_to_all(_resized(x, width, 0), self.vocabulary, split_axis=0, concat_axis=1, tiled=True)

        return self.map(resized, P(None, self.vocabulary), P(self.vocabulary))(x)

    # In the loop: what a device has.

    def gather(self, tree: Any) -> Any:
        """A chunk's rows of all devices that share the vocabulary with rows of their own."""
        if not self.gathered:
            return tree

        def gather(x: jax.Array, dims: Dims) -> jax.Array:
            return jax.lax.all_gather(x, self.gathered, tiled=True) if dims[:1] == (ROWS,) else x

        return map_dims(gather, tree)

    def own_rows(self, gradient: jax.Array, dims: Dims, primal: jax.Array) -> jax.Array:
        """From the gradient of a gathered chunk by a device's own columns, that of its own rows by all columns."""
        if VOCABULARY in dims:
            return gradient
        if self.gathered:
            gradient = jax.lax.psum_scatter(gradient, self.gathered, scatter_dimension=0, tiled=True)
        return psum(gradient, tuple(x for x in self.vocabulary if x not in self.gathered and x not in varying(primal)))

    def most(self, count: jax.Array | None) -> jax.Array | None:
        """The largest ``count`` of the devices that gather from one another, for they have to keep in step."""
        return count if count is None or not self.gathered else jax.lax.pmax(_vary(count, self.gathered), self.gathered)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over all rows, from that over a device's chunks."""
        return self._alike(psum(x, self.replicas))

    def total_of_own(self, x: jax.Array) -> jax.Array:
        """The sum over all rows, from that over a device's own; outside of the loop."""
        return self._alike(psum(x, self.row_axes)) if self.is_manual else x

    def _alike(self, x: jax.Array) -> jax.Array:
        """What is equal on all devices, of a type that says so."""
        axes = tuple(axis for axis in self.axes if axis in varying(x))
        return jax.lax.pmax(x, axes) if axes else x

    def total_gradient(self, gradient: jax.Array, dims: Dims) -> jax.Array:
        """The gradient of what serves all rows. In the caller's shard_map the backward pass sums it, by `as_primal`."""
        if not self.is_mapped:
            return gradient
        return psum(gradient, self.replicas if VOCABULARY in dims else self.axes)

    def check_differentiable(self) -> None:
        if self.is_manual and not is_checked():
            raise ValueError(
                "jaxkd cannot tell what is differentiated in a shard_map with `check_vma=False`; leave `check_vma` on"
            )


def map_dims(function: Callable[[jax.Array, Dims], Any], tree: Any) -> Any:
    """``function(array, dims)`` of each array of a dataclass, whose ``DIMS`` name the axes of those that have any."""

    def mapped(x: Any, dims: Dims) -> Any:
        return map_dims(function, x) if _has_dims(x) else function(x, dims)

    values = {f.name: getattr(tree, f.name) for f in fields(tree) if not f.metadata.get("static")}
    return replace(
        tree,
        **{
            k: jax.tree.map(partial(mapped, dims=tree.DIMS.get(k, ())), x, is_leaf=_has_dims) for k, x in values.items()
        },
    )


def _has_dims(x: Any) -> bool:
    return hasattr(x, "DIMS")


def psum(x: jax.Array, axes: Axes) -> jax.Array:
    return jax.lax.psum(_vary(x, axes), axes) if axes else x


def varying(x: Any) -> frozenset[str]:
    """The axes of a shard_map with ``check_vma`` over which ``x`` may differ."""
    kind = getattr(x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x), "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def _vary(x: jax.Array, axes: Any) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def is_checked() -> bool:
    """Whether this is inside of a shard_map with ``check_vma``."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return bool(axes) and bool(varying(jax.lax.axis_index(axes[0])))


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


def as_carry(body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """``carry`` with the types that a pass through the loop's ``body`` gives it."""
    if not is_checked():
        return carry
    return jax.tree.map(lambda x, after: _vary(x, varying(after)), carry, jax.eval_shape(body, 0, carry))


def _resized(x: jax.Array, width: int, axis: int) -> jax.Array:
    x = jax.lax.slice_in_dim(x, 0, min(width, x.shape[axis]), axis=axis)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, width - x.shape[axis])
    return jnp.pad(x, pad)
