"""Triplet losses: of given triplets, and of the hardest ones in a batch, found a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.embedding.distances import Distance, euclidean
from jaxkd.embedding.embedding_rows import (
    as_embeddings,
    check_classes,
    check_counting,
    chunk_size_for,
    weigh_rows,
)
from jaxkd.embedding.over_devices import Devices, over_devices
from jaxkd.logits.array_ops import logits_dtype
from jaxkd.loop import Metrics, Sharding, metrics_of
from jaxkd.loop.checks import check_scalar, check_size


def triplet(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    distance: Callable[[jax.Array, jax.Array], jax.Array] = euclidean,
    margin: ArrayLike | None = 5.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """The triplet loss: an anchor shall be nearer to its positive than to its negative, by a margin.

        loss = sum_i weights_i max(d(a_i, p_i) - d(a_i, n_i) + margin, 0) / normalizer

    Args:
      anchors, positives, negatives: (B, D) floating.
      distance: `euclidean`, `cosine`, or a function of two (B, D) arrays to (B,).
      margin: a number; None is the soft margin, ``log(1 + exp(d(a, p) - d(a, n)))``.
      weights: (B,) non-negative factors of the rows, or None for 1.
      normalizer: what divides the sum; None is the sum of the weights.
      sharding: as in `info_nce`; nothing is gathered.

    Returns:
      The loss, and metrics ``{"positive_distance", "negative_distance", "accuracy", "num_rows"}``: means, normalised
      as the loss is, of both distances and of how often the positive is the nearer.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: Schroff et al., "FaceNet" (arXiv 1503.03832); ``TripletLoss`` of sentence-transformers.

    >>> loss, _ = triplet(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]]))
    >>> print(f"{loss:.0f}")
    8
    """
    anchors, positives, negatives = as_embeddings(anchors=anchors, positives=positives, negatives=negatives)
    if not callable(distance):
        raise TypeError(f"`distance` is {distance!r}; give jaxkd.embedding.euclidean, cosine or a function")
    check_margin(margin)
    check_counting(anchors, weights, normalizer)
    rows = {"anchors": anchors, "positives": positives, "negatives": negatives, "weights": weights}
    return over_devices(sharding, partial(_given, distance), rows, {"margin": margin, "normalizer": normalizer})


def _given(
    distance: Callable[..., jax.Array], devices: Devices, rows: dict[str, Any], shared: dict[str, Any]
) -> tuple[jax.Array, Metrics]:
    weights, (anchors, positives, negatives) = weigh_rows(
        rows["weights"], rows["anchors"], rows["positives"], rows["negatives"]
    )
    return _triplet(devices, anchors, positives, negatives, distance, weights=weights, **shared)


def batch_hard_triplet(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    distance: Distance = euclidean,
    margin: ArrayLike | None = 5.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """The triplet loss of each row with its hardest partners in the batch: `triplet` of what it finds.

    The positive of a row is the farthest other row of its label, the negative the nearest row of another label; of
    several, the first. They are looked for a chunk of rows at a time. A row without one or the other does not count:
    it is not in the mean either (sentence-transformers takes its positive's distance as 0, or invents a negative's).

    Args:
      embeddings: (B, D) floating.
      labels: (B,) integers: the row's class.
      distance: `euclidean`, `cosine` or a `Distance` of your own.
      margin: a number; None is the soft margin, ``log(1 + exp(d(a, p) - d(a, n)))``.
      weights, normalizer: as in `triplet`.
      chunk_size, sharding: as in `info_nce`.

    Returns:
      The loss, and the metrics of `triplet`.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification" (arXiv 1703.07737);
    ``BatchHardTripletLoss`` and ``BatchHardSoftMarginTripletLoss`` of sentence-transformers.

    On a line at 0, 1 and 3, the third of another label: (1 - 3 + 5 + 1 - 2 + 5) / 2.

    >>> loss, metrics = batch_hard_triplet(jnp.array([[0.0], [1.0], [3.0]]), jnp.array([7, 7, 8]))
    >>> print(f"{loss:.1f}, {metrics['num_rows']:.0f} rows")
    3.5, 2 rows
    """
    (embeddings,) = as_embeddings(embeddings=embeddings)
    check_classes(labels, embeddings)
    if not isinstance(distance, Distance):
        raise TypeError(f"`distance` is {distance!r}; give a jaxkd.embedding.Distance such as euclidean or cosine")
    check_margin(margin)
    check_counting(embeddings, weights, normalizer)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)
    rows = {"embeddings": embeddings, "labels": labels, "weights": weights}
    shared = {"margin": margin, "normalizer": normalizer}
    return over_devices(sharding, partial(_hardest, distance, chunk_size), rows, shared)


def _hardest(
    distance: Distance, chunk_size: int | None, devices: Devices, rows: dict[str, Any], shared: dict[str, Any]
) -> tuple[jax.Array, Metrics]:
    embeddings, labels, weights = rows["embeddings"], jnp.asarray(rows["labels"]), rows["weights"]
    num_rows = embeddings.shape[0]
    own = jax.lax.stop_gradient(embeddings)  # for the search, in the type of its product
    everyone, all_labels = devices.gather(own), devices.gather(labels)
    if chunk_size is None:
        chunk_size = chunk_size_for(num_rows, everyone.shape[0], logits_dtype(embeddings))
    row_weights, (embeddings,) = weigh_rows(weights, embeddings)
    counts, all_positions = devices.gather(row_weights != 0), jnp.arange(everyone.shape[0])

    def hardest(row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        embedding, label, i = row
        farness = distance.order(embedding, everyone)  # (B,)
        is_positive = (all_labels == label) & (all_positions != i) & counts
        is_negative = (all_labels != label) & counts
        positive = jnp.argmax(jnp.where(is_positive, farness, -jnp.inf))
        negative = jnp.argmin(jnp.where(is_negative, farness, jnp.inf))
        return positive, negative, is_positive.any() & is_negative.any()

    searched = own, labels, devices.positions(num_rows)
    positive, negative, has_both = jax.lax.map(hardest, searched, batch_size=min(chunk_size, num_rows))
    row_weights, among = jnp.where(has_both, row_weights, 0), devices.gather(embeddings)
    return _triplet(devices, embeddings, among[positive], among[negative], distance, weights=row_weights, **shared)


def _triplet(
    devices: Devices,
    anchors: jax.Array,
    positives: jax.Array,
    negatives: jax.Array,
    distance: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    margin: Any,
    weights: jax.Array,
    normalizer: Any,
) -> tuple[jax.Array, Metrics]:
    mean = devices.mean_by(weights, normalizer)
    near, far = distance(anchors, positives), distance(anchors, negatives)
    metrics = {
        "positive_distance": mean(near),
        "negative_distance": mean(far),
        "accuracy": mean((near < far).astype(near.dtype)),
        "num_rows": devices.total(jnp.sum(weights != 0)),
    }
    return mean(beyond(near - far, margin)), metrics_of(metrics)


def beyond(gap: jax.Array, margin: Any) -> jax.Array:
    """How much a positive is farther than its negative, a margin added; soft without one."""
    return jax.nn.softplus(gap) if margin is None else jax.nn.relu(gap + jnp.asarray(margin, gap.dtype))


def check_margin(margin: Any) -> None:
    if margin is not None:
        check_scalar("margin", margin)
