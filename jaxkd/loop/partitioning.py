"""More than one device: which axes of a mesh hold the rows and the vocabulary.

Every device loops over its own rows and its own columns of the vocabulary. Sums over rows are added up once, at the
end; normalisers, and all else that is a sum over the vocabulary, once a chunk, as vectors of one number a row. Logits
never move, nor does a head whose columns are split. Over an axis that holds both rows and vocabulary (FSDP) the hidden
states of a chunk are gathered, and the gradients of these states come back as a scattered sum.

What is said and made sure of stands here; `flattening` brings arrays of full shapes to the loop, and `collectives` has
what the devices tell each other in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

ROWS, VOCABULARY = "rows", "vocabulary"  # what sources and row losses call the axes of their arrays in `DIMS`
Axes = tuple[str, ...]
Dims = tuple[str | None, ...]


def dims_of_each(dims: Any, arrays: list[Any]) -> list[Dims]:
    """Those of each array of a field, from its entry in `DIMS`: one for each, or one for all."""
    return list(dims) if dims and isinstance(dims[0], tuple) and arrays else [dims] * len(arrays)


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

    On a mesh with Explicit axes the types of the student's arrays say all this, and no `Sharding` is needed. On Auto
    axes JAX does not tell how arrays lie: without a `Sharding` each device does the work of all.

    Inside the caller's own `jax.shard_map`, manual over all these axes and with its ``check_vma``, arrays are what the
    device has: shards of equal size. The loss is that of all devices, and the gradient of what several devices hold
    alike is the sum over them, so that no `psum` is left to do.

    Source: Megatron-LM's parallel cross-entropy (arXiv 1909.08053) for the vocabulary, ZeRO (arXiv 1910.02054).
    """

    rows: Any = ()
    vocabulary: str | Axes = ()
    mesh: Mesh | AbstractMesh | None = None


@dataclass(frozen=True)
class Partitioning:
    """What a `Sharding` says, made sure of. Without arguments: one device, where nothing is split.

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


ONE_DEVICE = Partitioning()


def partitioning_of(sharding: Sharding | None, student: Any, needs_whole_rows: str | None = None) -> Partitioning:
    """``sharding`` checked against its mesh and the student's leading axes; None is what the student's types say.

    Args:
      needs_whole_rows: what cannot do with a part of the vocabulary on each device, if there is such a thing.

    Raises:
      TypeError, ValueError: axes that do not exist or do not fit, and what to do.
    """
    leading_rank = len(student.leading_shape)
    if sharding is None:
        sharding = _sharding_of_types(student)
        if sharding is None:
            return ONE_DEVICE
        if needs_whole_rows:
            sharding = replace(sharding, vocabulary=())
    if not isinstance(sharding, Sharding):
        raise TypeError(f"`sharding` is {sharding!r}; give a jaxkd.Sharding or None")
    rows = tuple(_as_axes("rows", x) for x in _entries(sharding.rows))
    vocabulary = _as_axes("vocabulary", sharding.vocabulary)
    mesh = _mesh_of(sharding)
    if vocabulary and needs_whole_rows:
        raise ValueError(
            f"`sharding` splits the vocabulary, and {needs_whole_rows} needs whole rows of logits; leave `vocabulary` "
            "out of `sharding` to split the rows"
        )
    partitioning = Partitioning(rows, vocabulary, mesh)
    for name, axes in (("rows", partitioning.row_axes), ("vocabulary", vocabulary)):
        if unknown := [axis for axis in axes if axis not in mesh.shape]:
            raise ValueError(f"`sharding.{name}` names {unknown[0]!r} but the mesh has the axes {mesh.axis_names}")
        if len(set(axes)) < len(axes):
            raise ValueError(f"`sharding.{name}` is {getattr(sharding, name)!r}; name each axis once")
    if len(rows) > leading_rank:
        raise ValueError(
            f"`sharding.rows` splits {len(rows)} axes but there are {leading_rank} before the last; "
            'two mesh axes over one of them are written P(("a", "b"))'
        )
    manual = (
        {axis for axis in partitioning.axes if axis in mesh.manual_axes} if isinstance(mesh, AbstractMesh) else set()
    )
    if not manual:  # an axis of one device splits nothing
        rows, vocabulary = tuple(map(partitioning.long, rows)), partitioning.long(vocabulary)
        return replace(partitioning, rows=rows, vocabulary=vocabulary)
    if missing := [axis for axis in partitioning.axes if axis not in manual]:
        raise ValueError(
            f"`sharding` names {missing[0]!r}, which is not manual in this shard_map as {min(manual)!r} is; make it so"
        )
    return replace(partitioning, is_manual=True)


def _sharding_of_types(student: Any) -> Sharding | None:
    """What the types of the student's arrays say on a mesh with Explicit axes; None where they say nothing."""
    array = getattr(student, student.ROWS)
    if not isinstance(array, jax.Array):
        return None
    mesh = jax.typeof(array).sharding.mesh
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not explicit:
        return None
    if not isinstance(array, jax.core.Tracer):
        mesh = array.sharding.mesh  # type: ignore[attr-defined]  # which knows its devices

    def axes_of(x: Any, dimension: int) -> Axes:
        entry = jax.typeof(x).sharding.spec[dimension] if isinstance(x, jax.Array) else None
        return tuple(axis for axis in _as_axes("rows", entry) if axis in explicit)

    rows = tuple(axes_of(array, i) for i in range(len(student.leading_shape)))
    vocabulary: list[str] = []
    for name, dims_of_field in student.DIMS.items():
        arrays = jax.tree.leaves(getattr(student, name))
        for x, dims in zip(arrays, dims_of_each(dims_of_field, arrays), strict=True):
            if VOCABULARY in dims:
                # A head that is split over D is turned: it becomes split over V.
                split = range(len(dims)) if ROWS not in dims else [-1]
                found = [axis for i in split for axis in axes_of(x, i)]
                vocabulary += [axis for axis in found if axis not in vocabulary]
    return Sharding(rows, tuple(vocabulary), mesh)


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
