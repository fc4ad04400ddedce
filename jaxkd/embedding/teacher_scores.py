"""Losses of a row's own documents, scored by a teacher: `margin_mse` and `score_distillation`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.divergences import AnyDivergence, forward_kl
from jaxkd.embedding.embedding_rows import (
    as_embeddings,
    as_negative_mask,
    as_negatives,
    check_counting,
    only,
    weigh_rows,
)
from jaxkd.embedding.over_devices import Devices, over_devices
from jaxkd.embedding.similarity import dot
from jaxkd.logits import Logits
from jaxkd.loop import Metrics, Sharding, metrics_of
from jaxkd.loop.checks import check_floating
from jaxkd.losses.distillation import distillation_loss

Similarity = Callable[[jax.Array, jax.Array], jax.Array]


def margin_mse(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    teacher_scores: ArrayLike,
    *,
    similarity: Similarity | None = None,
    negative_mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """MarginMSE: how much better the positive is than each negative shall be what the teacher says.

        loss = sum_i weights_i mean_k (s(a_i, p_i) - s(a_i, n_ik) - (t_i0 - t_ik))^2 / normalizer

    with s the similarity and t the teacher's scores, of a cross-encoder say, whose scale does not matter, only its
    unit.

    Args:
      anchors, positives: (B, D) floating; row i of one belongs to row i of the other.
      negatives: (B, D) or (B, K, D): each row's own.
      teacher_scores: (B, 1 + K) floating, of the positive and then the negatives; or the margins ``t_i0 - t_ik``,
        (B, K) or, for one negative each, (B,). No gradient reaches them.
      similarity: `cosine_similarity`, or a function of (..., D) arrays to (...); None is `dot`.
      negative_mask: (B, K) booleans, or (B,) for one negative each: the negatives that there are. A row without any
        does not count.
      weights: (B,) non-negative factors of the rows, or None for 1.
      normalizer: what divides the sum; None is the sum of the weights.
      sharding: as in `info_nce`; nothing is gathered.

    Returns:
      The loss, and metrics ``{"margin", "teacher_margin", "num_rows"}``: means of both margins, normalised as the loss
      is.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation" (arXiv 2010.02666); ``MarginMSELoss`` of sentence-transformers.

    Dot products 2 and 1, a margin of 1 where the teacher has 5 - 2 = 3.

    >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]])[:, None]
    >>> loss, _ = margin_mse(*x, jnp.array([[5.0, 2.0]]))
    >>> print(f"{loss:.0f}")
    4
    """
    similarity = dot if similarity is None else similarity
    rows = _scored_rows(anchors, positives, negatives, similarity, negative_mask, weights, normalizer)
    num_rows, num_negatives, _ = rows["negatives"].shape
    shapes = [(num_rows, 1 + num_negatives), (num_rows, num_negatives), *([(num_rows,)] if num_negatives == 1 else [])]
    rows["scores"] = _as_scores(teacher_scores, shapes)
    return over_devices(sharding, partial(_margin_mse, similarity), rows, {"normalizer": normalizer})


def _margin_mse(
    similarity: Similarity, devices: Devices, rows: dict[str, Any], shared: dict[str, Any]
) -> tuple[jax.Array, Metrics]:
    weights, scores, is_there = _scores_of(similarity, rows)
    taught = rows["scores"].astype(scores.dtype).reshape(scores.shape[0], -1)
    if taught.shape == scores.shape:
        taught = taught[:, :1] - taught[:, 1:]
    own, is_negative = scores[:, :1] - scores[:, 1:], is_there[:, 1:]
    number = jnp.maximum(jnp.sum(is_negative, axis=1, dtype=scores.dtype), 1)

    def of_row(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_negative, x, 0), axis=1) / number

    mean = devices.mean_by(weights, shared["normalizer"])
    error = jnp.where(is_negative, own - jnp.where(is_negative & (weights != 0)[:, None], taught, 0), 0)
    metrics = {
        "margin": mean(of_row(own)),
        "teacher_margin": mean(of_row(taught)),
        "num_rows": devices.total(jnp.sum(weights != 0)),
    }
    return mean(of_row(jnp.square(error))), metrics_of(metrics)


def score_distillation(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    teacher_scores: ArrayLike,
    *,
    divergence: AnyDivergence = forward_kl,
    temperature: ArrayLike = 1.0,
    similarity: Similarity | None = None,
    negative_mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """KL from a teacher's scores: a row's documents shall be as probable to the student as they are to the teacher.

        loss = sum_i weights_i D(softmax(t_i / temperature), softmax(s_i / temperature)) / normalizer

    over each row's positive and its own negatives, s being their similarities to the anchor: `jaxkd.distillation_loss`
    with 1 + K documents for a vocabulary. (With the documents of all rows, of both models' embeddings, it is that loss
    itself, of two `jaxkd.LinearLogits` whose heads are the documents.)

    Args:
      anchors, positives, negatives, similarity, negative_mask, weights, normalizer: as in `margin_mse`.
      teacher_scores: (B, 1 + K) floating, of the positive and then the negatives. No gradient reaches them.
      divergence: of the teacher and the student, such as `jaxkd.forward_kl` or `jaxkd.jensen_shannon`.
      temperature: above 0; divides both. Its square is not multiplied in, as nowhere in jaxkd. A teacher of another
        scale: hand over ``teacher_scores * scale``.
      sharding: as in `info_nce`; nothing is gathered.

    ``weights`` and ``normalizer`` are constants: asking for their gradient raises an error.

    Returns:
      The loss, and metrics ``{"accuracy", "num_rows"}``: how often the student's first document is the teacher's too,
      normalised as the loss is.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Sources: Lin et al., "Distilling Dense Representations for Ranking using Tightly-Coupled Teachers" (arXiv
    2010.11386); ``DistillKLDivLoss`` of sentence-transformers, which multiplies by the square of the temperature.

    Dot products 2 and 1, where the teacher has both alike: log 2 of it, less the student's mean log-probability.

    >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]])[:, None]
    >>> loss, _ = score_distillation(*x, jnp.array([[3.0, 3.0]]))
    >>> print(f"{loss:.4f}")
    0.1201
    """
    similarity = dot if similarity is None else similarity
    rows = _scored_rows(anchors, positives, negatives, similarity, negative_mask, weights, normalizer)
    num_rows, num_negatives, _ = rows["negatives"].shape
    rows["scores"] = _as_scores(teacher_scores, [(num_rows, 1 + num_negatives)])
    shared = {"normalizer": normalizer, "temperature": temperature}
    return over_devices(sharding, partial(_score_distillation, divergence, similarity), rows, shared)


def _score_distillation(
    divergence: AnyDivergence, similarity: Similarity, devices: Devices, rows: dict[str, Any], shared: dict[str, Any]
) -> tuple[jax.Array, Metrics]:
    weights, scores, is_there = _scores_of(similarity, rows)
    student, teacher = (jnp.where(is_there, x.astype(scores.dtype), -jnp.inf) for x in (scores, rows["scores"]))
    loss, _ = distillation_loss(
        Logits(student),
        Logits(teacher),
        divergence=divergence,
        temperature=shared["temperature"],
        weights=weights,
        normalizer=shared["normalizer"],
        sharding=devices.sharding,
    )
    is_same = jnp.argmax(student, axis=1) == jnp.argmax(teacher, axis=1)
    mean = devices.mean_by(weights, shared["normalizer"])
    num_rows = devices.total(jnp.sum(weights != 0))
    return loss, metrics_of({"accuracy": mean(is_same.astype(scores.dtype)), "num_rows": num_rows})


def _scored_rows(
    anchors: Any, positives: Any, negatives: Any, similarity: Any, negative_mask: Any, weights: Any, normalizer: Any
) -> dict[str, Any]:
    anchors, positives = as_embeddings(anchors=anchors, positives=positives)
    negatives = as_negatives("negatives", negatives, anchors)
    if not callable(similarity):
        raise TypeError(f"`similarity` is {similarity!r}; give jaxkd.embedding.dot, cosine_similarity or a function")
    check_counting(anchors, weights, normalizer)
    mask = as_negative_mask(negative_mask, negatives)
    return {"anchors": anchors, "positives": positives, "negatives": negatives, "weights": weights, "mask": mask}


def _as_scores(scores: Any, shapes: list[tuple[int, ...]]) -> jax.Array:
    check_floating("teacher_scores", scores)
    if scores.shape not in shapes:
        raise ValueError(f"`teacher_scores` has shape {scores.shape}; give {' or '.join(map(str, shapes))}")
    return jax.lax.stop_gradient(jnp.asarray(scores))


def _scores_of(similarity: Similarity, rows: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A weight for each row, the student's scores (B, 1 + K), and the documents that there are."""
    weights, (anchors, positives, negatives) = weigh_rows(
        rows["weights"], rows["anchors"], rows["positives"], rows["negatives"]
    )
    is_there = jnp.ones(negatives.shape[:2], bool) if rows["mask"] is None else rows["mask"]
    documents = jnp.concatenate([positives[:, None], only(is_there, negatives)], axis=1)
    weights = jnp.where(jnp.any(is_there, axis=1), weights, 0)
    is_there = jnp.concatenate([jnp.ones_like(is_there, shape=(is_there.shape[0], 1)), is_there], axis=1)
    return weights, similarity(anchors[:, None], documents), is_there
