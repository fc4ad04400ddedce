"""`info_nce`: each anchor against all candidates, a chunk of anchors at a time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.embedding.embedding_rows import (
    as_embeddings,
    check_counting,
    check_same_type,
    chunk_size_for,
    only,
)
from jaxkd.embedding.over_devices import Devices, over_devices
from jaxkd.embedding.similarity import CosineLogits
from jaxkd.logits import logits_dtype
from jaxkd.loop import Metrics, Sharding, metrics_of
from jaxkd.loop.checks import check_floating, check_scalar, check_size
from jaxkd.losses.chunked_losses import chunked_loss


def info_nce(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike | None = None,
    *,
    scale: ArrayLike = 20.0,
    symmetric: bool = False,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """InfoNCE, alias multiple negatives ranking: each anchor shall find its positive among all candidates.

        loss = sum_i weights_i (log sum_j exp(scale cos(a_i, c_j)) - scale cos(a_i, p_i)) / normalizer

    where the candidates c are all positives and all hard negatives of the batch. It is the cross-entropy of the B x M
    similarities with the labels 0, 1, 2, ..., of which one chunk of rows exists at a time; gradients are formed in the
    same pass.

    Args:
      anchors, positives: (B, D) floating; row i of one belongs to row i of the other.
      negatives: (B, D) or (B, K, D) hard negatives, or None.
      scale: the inverse temperature, above 0. It may be traced, and learned: a gradient reaches it.
      symmetric: the mean with the other direction, in which each positive shall find its anchor among all anchors.
      weights: (B,) non-negative factors of the rows, or None for 1.
      normalizer: what divides the sum; None is the sum of the weights.
      chunk_size: rows whose similarities exist at a time, at most; None takes an eighth of the rows, or as many as
        256 MiB allow where that is less.
      sharding: a `jaxkd.Sharding` that says over which mesh axes the rows are split; None is one device, or on Explicit
        mesh axes what the types of the arrays say. Candidates are gathered as embeddings, never as similarities.

    ``weights`` and ``normalizer`` are constants: asking for their gradient raises an error.

    Returns:
      The loss, and metrics ``{"accuracy", "num_rows"}``: the share of anchors whose positive is the most similar
      candidate (the mean of both directions if ``symmetric``), normalised as the loss is.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (arXiv 1807.03748);
    ``MultipleNegativesRankingLoss`` of sentence-transformers, ``symmetric`` being its directions query to doc and doc
    to query in the partition mode per direction.

    Cosines (1, 0.7071) of the first anchor and (0, 0.7071) of the second: the mean of log(1 + exp(0.7071 - 1)) and
    log(1 + exp(-0.7071)).

    >>> anchors, positives = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> loss, metrics = info_nce(anchors, positives, scale=1.0)
    >>> print(f"{loss:.4f}, accuracy {metrics['accuracy']:.0f}")
    0.4791, accuracy 1
    """
    anchors, positives = as_embeddings(anchors=anchors, positives=positives)
    if negatives is not None:
        negatives = _hard_negatives(negatives, anchors)
    check_scalar("scale", scale, above=0)
    check_counting(anchors, weights, normalizer)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)

    of_devices = partial(_info_nce, symmetric, chunk_size)
    rows = {"anchors": anchors, "positives": positives, "negatives": negatives, "weights": weights}
    return over_devices(sharding, of_devices, rows, {"scale": scale, "normalizer": normalizer})


def _info_nce(
    symmetric: bool, chunk_size: int | None, devices: Devices, rows: dict[str, Any], shared: dict[str, Any]
) -> tuple[jax.Array, Metrics]:
    anchors, positives, negatives, weights = (rows[x] for x in ("anchors", "positives", "negatives", "weights"))
    counts = None
    if weights is not None:
        weights = jnp.asarray(weights, logits_dtype(anchors))
        counts = weights != 0
        anchors, positives = only(counts, anchors), only(counts, positives)
        negatives = None if negatives is None else only(counts, negatives)
    num_rows = anchors.shape[0]

    def direction(queries: jax.Array, *candidates: jax.Array) -> tuple[jax.Array, Metrics]:
        there = counts
        if counts is not None:
            there = jnp.concatenate([devices.gather(jnp.repeat(counts, x.size // queries.size)) for x in candidates])
        among = jnp.concatenate([devices.gather(x.reshape(-1, x.shape[-1])) for x in candidates])  # (M, D)
        return chunked_loss(
            _cross_entropy,
            CosineLogits(queries, among, scale=shared["scale"]),
            devices.positions(num_rows),
            shared=there,
            weights=weights,
            normalizer=shared["normalizer"],
            chunk_size=chunk_size or chunk_size_for(num_rows, among.shape[0], logits_dtype(queries)),
            sharding=devices.sharding,
        )

    loss, metrics = direction(anchors, positives, *(() if negatives is None else (negatives,)))
    if symmetric:
        backward_loss, backward = direction(positives, anchors)
        loss = (loss + backward_loss) / 2
        metrics = metrics | {"accuracy": (metrics["accuracy"] + backward["accuracy"]) / 2}
    counted = metrics["num_rows"] if counts is None else devices.total(jnp.sum(counts, dtype=jnp.float32))
    return loss, metrics_of({"accuracy": metrics["accuracy"], "num_rows": counted})


def _cross_entropy(logits: Float[Array, "C M"], labels: Int[Array, " C"], per_row: Any, there: Any) -> tuple[Any, Any]:
    if there is not None:
        logits = jnp.where(there, logits, -jnp.inf)
    positive = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    is_first = jax.lax.argmax(logits, 1, labels.dtype) == labels
    return jax.nn.logsumexp(logits, axis=1) - positive, {"accuracy": is_first.astype(logits.dtype)}


def _hard_negatives(negatives: Any, anchors: jax.Array) -> jax.Array:
    check_floating("negatives", negatives)
    num_rows, size = anchors.shape
    if negatives.ndim not in (2, 3) or (negatives.shape[0], negatives.shape[-1]) != (num_rows, size):
        raise ValueError(
            f"`negatives` has shape {negatives.shape} but `anchors` has {anchors.shape}; give ({num_rows}, {size}) or "
            f"({num_rows}, K, {size})"
        )
    check_same_type("negatives", negatives, "anchors", anchors)
    return jnp.asarray(negatives)
