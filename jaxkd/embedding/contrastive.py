"""Contrastive losses: `info_nce` of pairs, `nt_xent` of classes, a chunk of anchors with all candidates at a time."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.embedding.all_pairs import CosineLogits, PairedCosineLogits
from jaxkd.embedding.candidates import (
    DIRECTIONS,
    Guide,
    blocks_of,
    check_candidates,
    columns_of,
    mask_of_documents,
    masked_logsumexp,
    sides_of,
    texts_of_guide,
)
from jaxkd.embedding.embedding_rows import (
    as_embeddings,
    as_negative_mask,
    as_negatives,
    check_classes,
    check_counting,
    chunk_size_for,
    only,
    scale_of,
)
from jaxkd.embedding.labelled_rows import labelled_rows, partners
from jaxkd.embedding.over_devices import Devices, over_devices
from jaxkd.logits import logits_dtype
from jaxkd.loop import Metrics, Sharding, metrics_of
from jaxkd.loop.checks import check_scalar, check_size
from jaxkd.losses.chunked_losses import chunked_loss


def info_nce(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    symmetric: bool = False,
    directions: Collection[str] = ("query_to_doc",),
    negative_mask: ArrayLike | None = None,
    candidate_mask: ArrayLike | None = None,
    document_ids: ArrayLike | None = None,
    guide: Guide | None = None,
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
      scale: the inverse temperature, above 0; None is 20. It may be traced, and learned: a gradient reaches it.
      temperature: the same as ``scale=1 / temperature``.
      symmetric: the mean with the other direction, in which each positive shall find its anchor among all anchors.
      directions: what else is in an anchor's sum, which is one: "query_to_query" the other anchors, by their cosine to
        the anchor; "doc_to_query" all anchors, and "doc_to_doc" the documents of other rows, by their cosine to its
        positive. All four are GTE's loss.
      negative_mask: (B, K) booleans, or (B,) for one negative each: the negatives that there are, where rows have
        different numbers of them. Another is nobody's candidate, whatever it holds.
      candidate_mask: (B, M) booleans, M the positives and then the negatives row by row: False where row i is not
        compared with candidate j.
      document_ids: (B, 1 + K) integers, or (B,) without negatives: which document a row's positive and its negatives
        are. A row is not compared with another copy of its positive.
      guide: a `Guide`, which leaves out what another model finds nearer to an anchor than its positive.
      weights: (B,) non-negative factors of the rows, or None for 1.
      normalizer: what divides the sum; None is the sum of the weights.
      chunk_size: rows whose similarities exist at a time, at most; None takes an eighth of the rows, or as many as
        256 MiB allow where that is less, and fewer where ``directions`` or a guide ask for more than one.
      sharding: a `jaxkd.Sharding` that says over which mesh axes the rows are split; None is one device, or on Explicit
        mesh axes what the types of the arrays say. Candidates are gathered as embeddings, never as similarities.

    A row is compared with its own positive whatever the masks say. They hold in all directions: an anchor that is a
    candidate goes by its positive. ``weights``, ``normalizer`` and ``guide`` are constants: asking for the gradient of
    the first two raises an error.

    Returns:
      The loss, and metrics ``{"accuracy", "num_rows"}``: the share of anchors whose positive is the most similar
      candidate (the mean of both directions if ``symmetric``), normalised as the loss is.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (arXiv 1807.03748);
    Li et al., "Towards General Text Embeddings with Multi-stage Contrastive Learning" (GTE, arXiv 2308.03281);
    ``MultipleNegativesRankingLoss`` of sentence-transformers, ``directions`` being its joint partition mode and
    ``symmetric`` its directions query to doc and doc to query in the partition mode per direction.

    Cosines (1, 0.7071) of the first anchor and (0, 0.7071) of the second: the mean of log(1 + exp(0.7071 - 1)) and
    log(1 + exp(-0.7071)).

    >>> anchors, positives = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> loss, metrics = info_nce(anchors, positives, scale=1.0)
    >>> print(f"{loss:.4f}, accuracy {metrics['accuracy']:.0f}")
    0.4791, accuracy 1
    """
    anchors, positives = as_embeddings(anchors=anchors, positives=positives)
    if negatives is not None:
        negatives = as_negatives("negatives", negatives, anchors)
    scale = scale_of(scale, temperature)
    chosen = _checked_directions(directions, symmetric)
    negative_mask = as_negative_mask(negative_mask, negatives)
    check_candidates(anchors, negatives, candidate_mask, document_ids)
    check_counting(anchors, weights, normalizer)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)

    rows: dict[str, Any] = {"anchors": anchors, "positives": positives, "negatives": negatives, "weights": weights}
    rows |= {"negative_mask": negative_mask, "mask": candidate_mask, "guide": None, "ids": None}
    if document_ids is not None:
        rows["ids"] = jnp.reshape(jnp.asarray(document_ids), (anchors.shape[0], -1))
    shared: dict[str, Any] = {"scale": scale, "normalizer": normalizer, "margins": None}
    if guide is not None:
        rows["guide"], shared["margins"] = (
            texts_of_guide(guide, anchors, negatives),
            (guide.margin, guide.relative_margin),
        )
    return over_devices(sharding, partial(_info_nce, chosen, symmetric, chunk_size), rows, shared)


def _info_nce(
    directions: tuple[str, ...],
    symmetric: bool,
    chunk_size: int | None,
    devices: Devices,
    rows: dict[str, Any],
    shared: dict[str, Any],
) -> tuple[jax.Array, Metrics]:
    dtype, negative_mask = logits_dtype(rows["anchors"]), rows["negative_mask"]
    weights = None if rows["weights"] is None else jnp.asarray(rows["weights"], dtype)
    counts = jnp.ones(rows["anchors"].shape[:1], bool) if weights is None else weights != 0

    def texts(anchors: jax.Array, positives: jax.Array, negatives: jax.Array | None = None) -> dict[str, Any]:
        """By the names that they have in a direction, zeros where nothing is there."""
        there = [x for x in (anchors, positives, negatives) if x is not None]
        if weights is not None:
            there = [only(counts, x) for x in there]
        if negative_mask is not None:
            there[2] = only(negative_mask, there[2])
        return {"query": there[:1], "doc": there[1:]}

    of_model = texts(rows["anchors"], rows["positives"], rows["negatives"])
    of_guide = None if rows["guide"] is None else texts(*rows["guide"])
    num_rows, num_negatives = counts.size, 0 if rows["negatives"] is None else rows["negatives"].shape[1]
    all_counts = devices.gather(counts)
    of_rows = {"ids": None if rows["ids"] is None else rows["ids"][:, 0], "mask": None}
    if rows["mask"] is not None:
        of_rows["mask"] = mask_of_documents(jnp.asarray(rows["mask"]), all_counts.size, num_negatives)

    def contrasted(directions: tuple[str, ...]) -> tuple[jax.Array, Metrics]:
        sides, blocks = sides_of(directions), blocks_of(directions)

        def cosines(texts: dict[str, Any], scale: Any = None) -> CosineLogits:
            among = [devices.gather(x.reshape(-1, x.shape[-1])) for name in blocks for x in texts[name]]
            compared = [texts[side][0] for side in sides]
            if len(sides) == 1:
                return CosineLogits(compared[0], jnp.concatenate(among), scale=scale)
            return PairedCosineLogits(jnp.stack(compared, axis=1), jnp.concatenate(among), scale=scale)

        guided = None if of_guide is None else cosines(of_guide)
        columns = None
        if len(directions) > 1 or not all(x is None for x in (weights, negative_mask, guided, *of_rows.values())):
            there = jnp.ones((num_rows, num_negatives), bool) if negative_mask is None else negative_mask
            ids = None if rows["ids"] is None else devices.gather(rows["ids"])
            columns = columns_of(directions, all_counts, devices.gather(there), ids)
        logits = cosines(of_model, shared["scale"])
        num_candidates = all_counts.size * (1 + num_negatives)
        num_arrays = -(-logits.vocabulary // num_candidates) * (1 if guided is None else 2)
        return chunked_loss(
            _cross_entropy,
            logits,
            devices.positions(num_rows),
            per_row=of_rows | {"guide": guided},
            shared={"columns": columns, "margins": shared["margins"]},
            weights=weights,
            normalizer=shared["normalizer"],
            chunk_size=chunk_size or chunk_size_for(num_rows, num_candidates, dtype, num_arrays),
            sharding=devices.sharding,
        )

    loss, metrics = contrasted(directions)
    if symmetric:
        backward_loss, backward = contrasted(("doc_to_query",))
        loss = (loss + backward_loss) / 2
        metrics = metrics | {"accuracy": (metrics["accuracy"] + backward["accuracy"]) / 2}
    counted = metrics["num_rows"] if weights is None else devices.total(jnp.sum(counts, dtype=jnp.float32))
    return loss, metrics_of({"accuracy": metrics["accuracy"], "num_rows": counted})


def _cross_entropy(logits: Float[Array, "C M"], labels: Int[Array, " C"], per_row: Any, shared: Any) -> tuple[Any, Any]:
    columns, others = shared["columns"], logits
    if columns is not None:
        logits = jnp.where(columns.kept(labels, per_row, shared["margins"]), logits, -jnp.inf)
        others = jnp.where(columns.other_pairs(labels), -jnp.inf, logits)
    positive = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    is_first = jax.lax.argmax(others, 1, labels.dtype) == labels
    return jax.nn.logsumexp(logits, axis=1) - positive, {"accuracy": is_first.astype(logits.dtype)}


def nt_xent(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 0.07,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """NT-Xent: each row shall find each other one of its label among the rows of other labels.

        loss = sum over i, p with labels_i = labels_p of weights_i log(1 + sum_n exp((s_in - s_ip) / temperature))
               / normalizer

    with the cosines s, and n the rows of other labels. With two rows of each label, an example's two views, it is the
    loss of SimCLR; with more, the other positives are not in the sum that one of them is compared with.

    Args:
      embeddings: (B, D) floating.
      labels: (B,) integers: the row's class.
      temperature: above 0. It may be traced, and learned: a gradient reaches it.
      weights: (B,) non-negative factors of the rows, or None for 1.
      normalizer: what divides the sum; None is the number of pairs (i, p), each weighing as its row i does.
      chunk_size, sharding: as in `info_nce`.

    ``weights`` and ``normalizer`` are constants: asking for their gradient raises an error.

    Returns:
      The loss, and metrics ``{"accuracy", "num_rows", "num_pairs"}``: the share of pairs more similar than the row is
      to any row of another label, normalised as the loss is; rows that count; and their pairs.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective" (NeurIPS 2016); Chen et al.,
    "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR, arXiv 2002.05709);
    ``optax.losses.ntxent``.

    Cosine 1 with the own view, 0 with both others: log(1 + 2 exp(-1)).

    >>> loss, metrics = nt_xent(jnp.repeat(jnp.eye(2), 2, axis=0), jnp.array([0, 0, 1, 1]), temperature=1.0)
    >>> print(f"{loss:.4f}, {metrics['num_pairs']:.0f} pairs")
    0.5514, 4 pairs
    """
    (embeddings,) = as_embeddings(embeddings=embeddings)
    check_classes(labels, embeddings)
    check_scalar("temperature", temperature, above=0)
    check_counting(embeddings, weights, normalizer)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)
    rows = {"embeddings": embeddings, "labels": labels, "weights": weights}
    shared = {"scale": 1 / temperature, "normalizer": normalizer}
    return over_devices(sharding, partial(_nt_xent, chunk_size), rows, shared)


def _nt_xent(
    chunk_size: int | None, devices: Devices, rows: dict[str, Any], shared: dict[str, Any]
) -> tuple[jax.Array, Metrics]:
    batch = labelled_rows(devices, rows)
    num_positives, _ = batch.num_partners()
    loss, sums = batch.sums(
        _pairs,
        CosineLogits(batch.embeddings, batch.everyone, scale=shared["scale"]),
        normalizer=batch.total(num_positives) if shared["normalizer"] is None else shared["normalizer"],
        chunk_size=chunk_size,
    )
    counted = {"num_rows": batch.number(batch.counts), "num_pairs": batch.number(num_positives)}
    return loss, metrics_of({"accuracy": sums["accuracy"]} | counted)


def _pairs(logits: Float[Array, "C B"], places: Int[Array, " C"], per_row: Any, shared: Any) -> tuple[Any, Any]:
    is_positive, is_negative = partners(places, per_row, shared)
    losses = jax.nn.softplus(masked_logsumexp(logits, is_negative)[:, None] - logits)
    nearest = jnp.max(jnp.where(is_negative, logits, -jnp.inf), axis=1, keepdims=True)
    is_first = is_positive & (logits > nearest)
    return jnp.sum(jnp.where(is_positive, losses, 0), axis=1), {"accuracy": jnp.sum(is_first, 1, logits.dtype)}


def _checked_directions(directions: Any, symmetric: bool) -> tuple[str, ...]:
    if isinstance(directions, str) or not set(directions) <= set(DIRECTIONS) or "query_to_doc" not in directions:
        raise ValueError(f'`directions` is {directions!r}; give "query_to_doc" and what else you want of {DIRECTIONS}')
    if symmetric and set(directions) != {"query_to_doc"}:
        raise ValueError("`symmetric` is the mean of two sums, `directions` make one; leave one of them out")
    return tuple(x for x in DIRECTIONS if x in directions)
