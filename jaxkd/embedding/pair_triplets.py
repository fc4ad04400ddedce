"""Triplets of a labelled batch from all of its pairs, a chunk of rows at a time: the semi-hard ones, and all."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.embedding.distances import AllPairs, Distance, euclidean
from jaxkd.embedding.embedding_rows import as_embeddings, check_classes, check_counting
from jaxkd.embedding.labelled_rows import labelled_rows, partners
from jaxkd.embedding.over_devices import Devices, over_devices
from jaxkd.embedding.triplets import beyond, check_margin
from jaxkd.loop import Metrics, Sharding, metrics_of
from jaxkd.loop.checks import check_scalar, check_size


def batch_semi_hard_triplet(
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
    """The triplet loss of each row and each other row of its label, with the negative that is just farther.

        loss = sum over i, p with labels_i = labels_p of weights_i max(d(i, p) - d(i, n) + margin, 0) / normalizer

    where n is the nearest row of another label with d(i, n) > d(i, p), or the farthest if none is. A row without a
    partner of one or the other kind does not count (sentence-transformers takes 0 as its negative's distance).

    Args:
      embeddings: (B, D) floating.
      labels: (B,) integers: the row's class.
      distance: `euclidean`, `cosine` or a `Distance` of your own with ``all_pairs``.
      margin: a number; None is the soft margin, ``log(1 + exp(d(i, p) - d(i, n)))``.
      weights: (B,) non-negative factors of the rows i, or None for 1.
      normalizer: what divides the sum; None is the number of pairs (i, p), each weighing as its row i does.
      chunk_size, sharding: as in `info_nce`.

    ``margin``, ``weights`` and ``normalizer`` are constants: asking for their gradient raises an error.

    Returns:
      The loss, and metrics ``{"positive_distance", "negative_distance", "accuracy", "num_rows", "num_pairs"}``: means
      over pairs as in `triplet`, normalised as the loss is; the rows and the pairs that there are.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: Schroff et al., "FaceNet" (arXiv 1503.03832); ``BatchSemiHardTripletLoss`` of sentence-transformers, after
    that of TensorFlow Addons.

    On a line at 0, 1 and 3, the third of another label: (1 - 3 + 5 + 1 - 2 + 5) / 2.

    >>> loss, metrics = batch_semi_hard_triplet(jnp.array([[0.0], [1.0], [3.0]]), jnp.array([7, 7, 8]))
    >>> print(f"{loss:.1f}, {metrics['num_pairs']:.0f} pairs")
    3.5, 2 pairs
    """
    check_margin(margin)
    return _of_pairs(_semi_hard, embeddings, labels, distance, margin, weights, normalizer, chunk_size, sharding)


def _semi_hard(
    all_pairs: AllPairs, chunk_size: int | None, devices: Devices, rows: dict[str, Any], shared: dict[str, Any]
) -> tuple[jax.Array, Metrics]:
    batch = labelled_rows(devices, rows)
    num_positives, num_negatives = batch.num_partners()
    num_pairs = jnp.where(num_negatives > 0, num_positives, 0)
    loss, sums = batch.sums(
        _semi_hard_rows,
        all_pairs(batch.embeddings, batch.everyone),
        shared["margin"],
        normalizer=batch.total(num_pairs) if shared["normalizer"] is None else shared["normalizer"],
        chunk_size=chunk_size,
        num_arrays=4,
    )
    names = ("positive_distance", "negative_distance", "accuracy")
    counted = {"num_rows": batch.number(num_pairs > 0), "num_pairs": batch.number(num_pairs)}
    return loss, metrics_of({name: sums[name] for name in names} | counted)


def _semi_hard_rows(
    distances: Float[Array, "C B"], places: Int[Array, " C"], labels: Int[Array, " C"], shared: Any
) -> tuple[Any, Any]:
    is_positive, is_negative = partners(places, labels, shared)
    negatives = jnp.where(is_negative, distances, jnp.inf)
    order = jnp.argsort(negatives, axis=1)  # of the negatives, the others at the end
    num_negatives = jnp.sum(is_negative, axis=1, keepdims=True)
    rank = _number_up_to(jnp.take_along_axis(negatives, order, axis=1), distances)
    rank = jnp.maximum(jnp.minimum(rank, num_negatives - 1), 0)
    far = jnp.take_along_axis(distances, jnp.take_along_axis(order, rank, axis=1), axis=1)
    is_pair = is_positive & (num_negatives > 0)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_pair, x, 0), axis=1)

    metrics = {
        "positive_distance": total(distances),
        "negative_distance": total(far),
        "accuracy": total((distances < far).astype(distances.dtype)),
    }
    return total(beyond(distances - far, shared["options"])), metrics


def batch_all_triplet(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    distance: Distance = euclidean,
    margin: ArrayLike = 5.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """The triplet loss of all triplets of the batch, as a mean over those that have a loss.

        loss = sum over i, p, n of weights_i max(d(i, p) - d(i, n) + margin, 0) / normalizer

    over labels_i = labels_p, i != p, and labels_n another. The triplets are never formed: sorted by their distance, a
    row's partners need one count each, of how many triplets with a loss they are in. Time is O(B^2 (D + log B)),
    memory that of a chunk of rows with all.

    Args:
      embeddings, labels, distance, weights, chunk_size, sharding: as in `batch_semi_hard_triplet`.
      margin: a number; a soft margin would need the triplets.
      normalizer: what divides the sum; None is the number of triplets with a loss above 0, each weighing as its row i
        does, so that the many easy ones do not drown them. It carries no gradient.

    ``margin``, ``weights`` and ``normalizer`` are constants: asking for their gradient raises an error.

    Returns:
      The loss, and metrics ``{"active", "num_rows", "num_triplets"}``: the share of triplets with a loss above 0, by
      weight; rows that have a triplet; and all triplets.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification" (arXiv 1703.07737), the mean
    over what is not 0; ``BatchAllTripletLoss`` of sentence-transformers.

    On a line at 0, 1 and 3, the third of another label, margin 1.5: of 1 - 3 + 1.5 and 1 - 2 + 1.5 the latter.

    >>> line, labels = jnp.array([[0.0], [1.0], [3.0]]), jnp.array([7, 7, 8])
    >>> loss, metrics = batch_all_triplet(line, labels, margin=1.5)
    >>> print(f"{loss:.1f}, {metrics['active']:.1f} of {metrics['num_triplets']:.0f} triplets")
    0.5, 0.5 of 2 triplets
    """
    check_scalar("margin", margin)
    return _of_pairs(_all, embeddings, labels, distance, margin, weights, normalizer, chunk_size, sharding)


def _all(
    all_pairs: AllPairs, chunk_size: int | None, devices: Devices, rows: dict[str, Any], shared: dict[str, Any]
) -> tuple[jax.Array, Metrics]:
    batch = labelled_rows(devices, rows)
    num_positives, num_negatives = batch.num_partners()
    num_triplets = num_positives.astype(batch.weights.dtype) * num_negatives.astype(batch.weights.dtype)
    loss, sums = batch.sums(
        _all_rows,
        all_pairs(batch.embeddings, batch.everyone),
        shared["margin"],
        chunk_size=chunk_size,
        num_arrays=6,
    )
    active = sums["active"]
    divisor = active if shared["normalizer"] is None else jnp.asarray(shared["normalizer"], loss.dtype)
    metrics = {
        "active": _quotient(active, batch.total(num_triplets)),
        "num_rows": batch.number(num_triplets > 0),
        "num_triplets": batch.number(num_triplets),
    }
    return _quotient(loss, divisor), metrics_of(metrics)


def _all_rows(
    distances: Float[Array, "C B"], places: Int[Array, " C"], labels: Int[Array, " C"], shared: Any
) -> tuple[Any, Any]:
    is_positive, is_negative = partners(places, labels, shared)
    reach = distances + jnp.asarray(shared["options"], distances.dtype)  # a triplet has a loss where d(i, n) is below
    fixed, fixed_reach = jax.lax.stop_gradient((distances, reach))
    negatives = jnp.sort(jnp.where(is_negative, fixed, jnp.inf), axis=1)
    reaches = jnp.sort(jnp.where(is_positive, fixed_reach, -jnp.inf), axis=1)
    of_positive = jnp.where(is_positive, _number_below(negatives, fixed_reach), 0).astype(distances.dtype)
    of_negative = jnp.where(is_negative, distances.shape[1] - _number_up_to(reaches, fixed), 0).astype(distances.dtype)
    # Both sums have the same number of terms, so that a shift of all distances is none of the loss: it keeps digits.
    middle = jnp.mean(fixed, axis=1, keepdims=True)
    terms = of_positive * (reach - middle) - of_negative * (distances - middle)
    return jnp.sum(terms, axis=1), {"active": jnp.sum(of_positive, axis=1)}


def _number_below(ordered: Float[Array, "C B"], x: Float[Array, "C B"]) -> Int[Array, "C B"]:
    return jax.vmap(partial(jnp.searchsorted, side="left"))(ordered, x)


def _number_up_to(ordered: Float[Array, "C B"], x: Float[Array, "C B"]) -> Int[Array, "C B"]:
    return jax.vmap(partial(jnp.searchsorted, side="right"))(ordered, x)


def _quotient(x: jax.Array, divisor: jax.Array) -> jax.Array:
    return jnp.where(divisor == 0, 0, x / jnp.where(divisor == 0, 1, divisor))


def _of_pairs(
    function: Any,
    embeddings: Any,
    labels: Any,
    distance: Any,
    margin: Any,
    weights: Any,
    normalizer: Any,
    chunk_size: int | None,
    sharding: Sharding | None,
) -> tuple[jax.Array, Metrics]:
    (embeddings,) = as_embeddings(embeddings=embeddings)
    check_classes(labels, embeddings)
    if not isinstance(distance, Distance) or distance.all_pairs is None:
        raise TypeError(
            f"`distance` is {distance!r}; give a jaxkd.embedding.Distance with `all_pairs` such as euclidean or cosine"
        )
    check_counting(embeddings, weights, normalizer)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)
    rows = {"embeddings": embeddings, "labels": labels, "weights": weights}
    shared = {"margin": margin, "normalizer": normalizer}
    return over_devices(sharding, partial(function, distance.all_pairs, chunk_size), rows, shared)
