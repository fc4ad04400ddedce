"""Rows with class labels, each with all of the batch: whose partner each is, and a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkd.embedding.embedding_rows import chunk_size_for, only
from jaxkd.embedding.over_devices import Devices
from jaxkd.logits import LinearLogits, logits_dtype
from jaxkd.loop import Metrics, weighted
from jaxkd.losses.chunked_losses import chunked_sums


class LabelledRows(NamedTuple):
    """The rows that a device has, and those of all; what does not count is zeros."""

    devices: Devices
    embeddings: Float[Array, "N D"]
    labels: Int[Array, " N"]
    weights: Float[Array, " N"]
    everyone: Float[Array, "B D"]
    all_labels: Int[Array, " B"]
    all_counts: Bool[Array, " B"]

    @property
    def counts(self) -> Bool[Array, " N"]:
        return self.weights != 0

    def num_partners(self) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
        """How many other rows have a row's label, and how many another one; 0 for one that does not count."""
        order = jnp.argsort(self.all_labels)
        ordered, there = self.all_labels[order], self.all_counts[order].astype(jnp.int32)
        before = jnp.concatenate([jnp.zeros_like(there, shape=1), jnp.cumsum(there)])
        start, end = (before[jnp.searchsorted(ordered, self.labels, side=side)] for side in ("left", "right"))
        return jnp.where(self.counts, end - start - 1, 0), jnp.where(self.counts, before[-1] - (end - start), 0)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of one number a row, weighted, over all devices."""
        return self.devices.total(jnp.sum(weighted(self.weights, x.astype(self.weights.dtype))))

    def number(self, x: jax.Array) -> jax.Array:
        """The sum of counts or booleans over all devices."""
        return self.devices.total(jnp.sum(x, dtype=jnp.float32))

    def sums(
        self,
        function: Callable[..., Any],
        pairs: LinearLogits,
        options: Any = None,
        *,
        normalizer: Any = 1,
        chunk_size: int | None,
        num_arrays: int = 1,
    ) -> tuple[jax.Array, Metrics]:
        """The loss and the sums of ``function(values (C, B), places, labels, shared)``, a chunk of rows at a time.

        ``partners(places, labels, shared)`` are the masks of these rows, ``shared["options"]`` what is given here.
        ``num_arrays`` as large as the values exist at a time.
        """
        dtype = logits_dtype(self.embeddings)
        return chunked_sums(
            function,
            pairs,
            self.devices.positions(self.labels.size),
            per_row=self.labels,
            shared={"labels": self.all_labels, "counts": self.all_counts, "options": options},
            weights=self.weights,
            normalizer=normalizer,
            chunk_size=chunk_size or chunk_size_for(self.labels.size, self.all_labels.size, dtype, num_arrays),
            sharding=self.devices.sharding,
        )


def labelled_rows(devices: Devices, rows: dict[str, Any]) -> LabelledRows:
    """Of "embeddings", "labels" and "weights"."""
    embeddings, labels, weights = rows["embeddings"], jnp.asarray(rows["labels"]), rows["weights"]
    if weights is None:
        weights = jnp.ones_like(embeddings[:, 0], logits_dtype(embeddings))
    else:
        weights = jnp.asarray(weights, logits_dtype(embeddings))
        embeddings = only(weights != 0, embeddings)
    of_all = (devices.gather(x) for x in (embeddings, labels, weights != 0))
    return LabelledRows(devices, embeddings, labels, weights, *of_all)


def partners(
    places: Int[Array, " C"], labels: Int[Array, " C"], shared: dict[str, Any]
) -> tuple[Bool[Array, "C B"], Bool[Array, "C B"]]:
    """Which of the batch are of a row's label and not itself, and which of another."""
    is_same = shared["labels"] == labels[:, None]
    is_itself = jnp.arange(shared["labels"].size, dtype=places.dtype) == places[:, None]
    return is_same & ~is_itself & shared["counts"], ~is_same & shared["counts"]
