"""More than one device: each has rows of its own, and what they are compared with is gathered as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxkd.logits import Logits, logits_dtype
from jaxkd.loop import Sharding, weighted
from jaxkd.loop.collectives import psum
from jaxkd.loop.flattening import map_over_mesh, on_auto_axes
from jaxkd.loop.partitioning import Axes, partitioning_of


class Devices(NamedTuple):
    """Those that have the rows of a batch, inside of a shard_map over ``axes``; one device without."""

    axes: Axes = ()

    @property
    def sharding(self) -> Sharding | None:
        return Sharding(P(self.axes)) if self.axes else None

    def gather(self, x: jax.Array) -> jax.Array:
        """The rows of all devices."""
        return jax.lax.all_gather(x, self.axes, tiled=True) if self.axes else x

    def positions(self, num_rows: int) -> jax.Array:
        """Of a device's own rows among those of all."""
        first = jax.lax.axis_index(self.axes) * num_rows if self.axes else 0
        return first + jnp.arange(num_rows, dtype=jnp.int32)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over devices."""
        return psum(x, self.axes)

    def mean_by(self, weights: jax.Array, normalizer: Any) -> Callable[[jax.Array], jax.Array]:
        """The weighted mean of one number a row over devices, 0 where the normalizer is; None is the sum of weights."""
        total = self.total(jnp.sum(weights)) if normalizer is None else jnp.asarray(normalizer, weights.dtype)
        inverse = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
        return lambda x: self.total(jnp.sum(weighted(weights, x))) * inverse

    def alike(self, x: jax.Array) -> jax.Array:
        """What all devices have computed alike, of a type that says so."""
        return psum(x / jax.lax.axis_size(self.axes), self.axes) if self.axes else x


def over_devices(
    sharding: Sharding | None, function: Callable[..., Any], rows: dict[str, Any], shared: dict[str, Any]
) -> Any:
    """``function(devices, rows, shared)``, which returns scalars, with the rows that each device has.

    Args:
      rows: arrays (B, ...) or None, among them "weights"; rows that fill up the last device have weight 0.
      shared: what serves all rows.
    """
    first = next(iter(rows.values()))
    partitioning = partitioning_of(sharding, Logits(first), needs_whole_rows="a loss of embeddings")
    axes = partitioning.row_axes
    if not partitioning.is_mapped:
        return function(Devices(axes), rows, shared)
    missing = -first.shape[0] % partitioning.size(axes)
    if missing and rows["weights"] is None:
        rows = rows | {"weights": jnp.ones(first.shape[0], logits_dtype(first))}

    def filled(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x

    def mapped(rows: Any, shared: Any) -> Any:
        of_device = partial(function, Devices(axes))
        return map_over_mesh(partitioning, of_device, (P(axes or None), P()), P())(jax.tree.map(filled, rows), shared)

    return on_auto_axes(partitioning, mapped, jax.tree.map(jnp.asarray, rows), jax.tree.map(jnp.asarray, shared))
