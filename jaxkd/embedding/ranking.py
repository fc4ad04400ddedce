"""`cosent` and `angle`: pairs in the order of their labels, by a sort instead of all pairs of pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.embedding.embedding_rows import as_embeddings, check_counting, scale_of, weigh_rows
from jaxkd.embedding.over_devices import Devices, over_devices
from jaxkd.embedding.similarity import angle_similarity, cosine_similarity
from jaxkd.loop import Metrics, Sharding, metrics_of


def cosent(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """CoSENT: pairs labelled as more similar shall be more similar.

        loss = log(1 + sum over i, j with labels_i < labels_j of weights_i weights_j exp(scale (s_i - s_j)))

    with ``s_i = cos(first_i, second_i)``. The B x B differences are never formed: sorted by their labels, rows need
    one cumulative log-sum-exp, and one more for the exact gradient. Time is O(B log B), memory O(B).

    Args:
      first, second: (B, D) floating; row i of one is compared with row i of the other.
      labels: (B,) numbers, of which only the order matters: how similar the two are. A NaN makes the loss NaN.
      scale: the inverse temperature, above 0; None is 20. It may be traced, and a gradient reaches it.
      temperature: the same as ``scale=1 / temperature``.
      weights: (B,) non-negative factors of the rows, or None for 1. There is no normalizer: the loss is no mean.
      sharding: as in `info_nce`; what is gathered is one number a row.

    Returns:
      The loss, and metrics ``{"num_rows", "num_pairs"}``: rows that count, and terms of the sum.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: Su, "CoSENT" (kexue.fm/archives/8847); ``CoSENTLoss`` of sentence-transformers.

    Two rows of cosines 1 and 0, in the wrong order: log(1 + exp(1 - 0)).

    >>> loss, _ = cosent(jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0.2, 0.7]), scale=1.0)
    >>> print(f"{loss:.4f}")
    1.3133
    """
    return _ranked(cosine_similarity, first, second, labels, scale_of(scale, temperature), weights, sharding)


def angle(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """AnglE: `cosent` with a similarity of complex vectors, which does not saturate as a cosine does.

    The similarity is ``|Re z + Im z|`` of ``z = sum_d x_d conj(y_d)``, x and y being the embeddings at length 1, the
    second half of each its imaginary part, as in the authors' code. Their paper adds this loss to `cosent` and
    `info_nce`.

    Args:
      first, second, labels, scale, temperature, weights, sharding: as in `cosent`.

    Returns:
      The loss, and the metrics of `cosent`.

    Raises:
      TypeError, ValueError: as in `cosent`.

    Sources: Li and Li, "AnglE-optimized Text Embeddings" (arXiv 2309.12871); ``AnglELoss`` of sentence-transformers.

    Similarities |1 + 0| and |0 + 1|, the second being i times the other; equal, in whatever order: log(1 + 1).

    >>> loss, _ = angle(jnp.array([[1.0, 0.0]] * 2), jnp.eye(2), jnp.array([0.2, 0.7]), scale=1.0)
    >>> print(f"{loss:.4f}")
    0.6931
    """
    return _ranked(angle_similarity, first, second, labels, scale_of(scale, temperature), weights, sharding)


def _ranked(
    similarity: Callable[[jax.Array, jax.Array], jax.Array],
    first: Any,
    second: Any,
    labels: Any,
    scale: Any,
    weights: Any,
    sharding: Sharding | None,
) -> tuple[jax.Array, Metrics]:
    first, second = as_embeddings(first=first, second=second)
    kind, shape = jnp.result_type(labels), jnp.shape(labels)
    if not (jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating)):
        raise TypeError(f"`labels` is {kind.name}; give numbers, for booleans ``labels.astype(int)``")
    if shape != first.shape[:1]:
        raise ValueError(f"`labels` has shape {shape} but `first` has B={first.shape[0]}; give ({first.shape[0]},)")
    check_counting(first, weights, None)

    rows = {"first": first, "second": second, "labels": labels, "weights": weights}
    return over_devices(sharding, partial(_in_order, similarity), rows, {"scale": scale})


def _in_order(
    similarity: Callable[[jax.Array, jax.Array], jax.Array],
    devices: Devices,
    rows: dict[str, Any],
    shared: dict[str, Any],
) -> tuple[jax.Array, Metrics]:
    row_weights, (first, second) = weigh_rows(rows["weights"], rows["first"], rows["second"])
    labels = jnp.asarray(rows["labels"])
    scores = jnp.asarray(shared["scale"], row_weights.dtype) * similarity(first, second)
    scores = jnp.where(jnp.isnan(labels) & (row_weights != 0), jnp.nan, scores)
    labels, scores, row_weights = (devices.gather(x) for x in (labels, scores, row_weights))
    order = jnp.argsort(labels)
    labels, scores, row_weights = labels[order], scores[order], row_weights[order]
    lower_end = jnp.searchsorted(labels, labels, side="left")
    higher_start = jnp.searchsorted(labels, labels, side="right")
    loss = _log_sum_of_pairs(scores, row_weights, lower_end, higher_start)

    counts = (row_weights != 0).astype(jnp.float32)
    before = jnp.concatenate([jnp.zeros_like(counts, shape=1), jnp.cumsum(counts)])
    num_pairs = jnp.sum(counts * before[lower_end])
    metrics = {"num_rows": devices.alike(jnp.sum(counts)), "num_pairs": devices.alike(num_pairs)}
    return devices.alike(loss), metrics_of(metrics)


@jax.custom_jvp
def _log_sum_of_pairs(
    scores: Float[Array, " B"], weights: Float[Array, " B"], lower_end: Int[Array, " B"], higher_start: Int[Array, " B"]
) -> Float[Array, ""]:
    """log(1 + sum_ij w_i w_j exp(s_i - s_j)) over j >= ``higher_start[i]``, which is i < ``lower_end[j]``."""
    return _log_sum_of_pairs_and_slopes(scores, weights, lower_end, higher_start)[0]


@_log_sum_of_pairs.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    loss, to_scores, to_weights = _log_sum_of_pairs_and_slopes(*primals)
    return loss, jnp.sum(to_scores * tangents[0] + to_weights * tangents[1])


def _log_sum_of_pairs_and_slopes(
    scores: jax.Array, weights: jax.Array, lower_end: jax.Array, higher_start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    log_weights = jnp.where(weights == 0, -jnp.inf, jnp.log(jnp.where(weights == 0, 1, weights)))
    nothing = jnp.full((1,), -jnp.inf, scores.dtype)
    higher = jnp.concatenate([jax.lax.cumlogsumexp(log_weights - scores, reverse=True), nothing])[higher_start]
    lower = jnp.concatenate([nothing, jax.lax.cumlogsumexp(log_weights + scores)])[lower_end]
    loss = jax.nn.logsumexp(jnp.concatenate([jnp.zeros_like(nothing), log_weights + scores + higher]))
    as_lower, as_higher = jnp.exp(scores + higher - loss), jnp.exp(lower - scores - loss)
    return loss, weights * (as_lower - as_higher), as_lower + as_higher
