"""Losses of embedding models at batches whose similarities would not fit in memory.

A batch of B rows has B x B similarities. Here a chunk of rows by all candidates is the most that exists at a time
(`info_nce`, `batch_hard_triplet`), or they are summed without being formed at all (`cosent`). Semantics are those of
sentence-transformers; where they differ, the docstring says so.

All take embeddings (B, D) of one floating type, compute in float32 (float64 for float64) and return ``(loss, metrics)``
with float32 metrics that carry no gradient. A row of ``weights`` 0 is not there: it adds exactly nothing to the loss or
to any gradient and is nobody's candidate, even when it holds NaN. A batch without a row that counts has loss 0.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.checks import check_integer, check_scalar, check_size, check_weights
from jaxkd.chunked import default_chunk_size
from jaxkd.logits import logits_dtype
from jaxkd.own_loss import chunked_loss
from jaxkd.row_arguments import weighted
from jaxkd.similarity import CosineLogits, Distance, cosine, cosine_similarity, euclidean, unit, widened

__all__ = ["Distance", "batch_hard_triplet", "cosent", "cosine", "euclidean", "info_nce", "matryoshka", "triplet"]

Metrics = dict[str, jax.Array]


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
    anchors, positives = _embeddings(anchors=anchors, positives=positives)
    if negatives is not None:
        negatives = _hard_negatives(negatives, anchors)
    check_scalar("scale", scale, above=0)
    _check_counting(anchors, weights, normalizer)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)

    counts = None
    if weights is not None:
        weights = jnp.asarray(weights, logits_dtype(anchors))
        counts = weights != 0
        anchors, positives = _only(counts, anchors), _only(counts, positives)
        negatives = None if negatives is None else _only(counts, negatives)

    def direction(queries: jax.Array, *candidates: jax.Array) -> tuple[jax.Array, Metrics]:
        there = counts
        if counts is not None:
            there = jnp.concatenate([jnp.repeat(counts, x.size // queries.size) for x in candidates])
        among = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in candidates])  # (M, D)
        num_rows = queries.shape[0]
        return chunked_loss(
            _cross_entropy,
            CosineLogits(queries, among, scale=scale),
            jnp.arange(num_rows, dtype=jnp.int32),
            shared=there,
            weights=weights,
            normalizer=normalizer,
            chunk_size=_chunk_size(num_rows, among.shape[0], logits_dtype(queries))
            if chunk_size is None
            else chunk_size,
        )

    loss, metrics = direction(anchors, positives, *(() if negatives is None else (negatives,)))
    if symmetric:
        backward_loss, backward = direction(positives, anchors)
        loss = (loss + backward_loss) / 2
        metrics = metrics | {"accuracy": (metrics["accuracy"] + backward["accuracy"]) / 2}
    num_rows = anchors.shape[0] if counts is None else jnp.sum(counts)
    return loss, _metrics(accuracy=metrics["accuracy"], num_rows=num_rows)


def _cross_entropy(logits: Float[Array, "C M"], labels: Int[Array, " C"], per_row: Any, there: Any) -> tuple[Any, Any]:
    if there is not None:
        logits = jnp.where(there, logits, -jnp.inf)
    positive = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    is_first = jax.lax.argmax(logits, 1, labels.dtype) == labels
    return jax.nn.logsumexp(logits, axis=1) - positive, {"accuracy": is_first.astype(logits.dtype)}


def cosent(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    *,
    scale: ArrayLike = 20.0,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, Metrics]:
    """CoSENT: pairs labelled as more similar shall be more similar.

        loss = log(1 + sum over i, j with labels_i < labels_j of weights_i weights_j exp(scale (s_i - s_j)))

    with ``s_i = cos(first_i, second_i)``. The B x B differences are never formed: sorted by their labels, rows need
    one cumulative log-sum-exp, and one more for the exact gradient. Time is O(B log B), memory O(B).

    Args:
      first, second: (B, D) floating; row i of one is compared with row i of the other.
      labels: (B,) numbers, of which only the order matters: how similar the two are. A NaN makes the loss NaN.
      scale: the inverse temperature, above 0; it may be traced, and a gradient reaches it.
      weights: (B,) non-negative factors of the rows, or None for 1. There is no normalizer: the loss is no mean.

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
    first, second = _embeddings(first=first, second=second)
    check_scalar("scale", scale, above=0)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.number) or jnp.shape(labels) != first.shape[:1]:
        raise ValueError(
            f"`labels` is {jnp.result_type(labels).name} {jnp.shape(labels)} but `first` has B={first.shape[0]}; "
            "give one number a row"
        )
    _check_counting(first, weights, None)

    row_weights, (first, second) = _row_weights(weights, first, second)
    labels = jnp.asarray(labels)
    scores = jnp.asarray(scale, row_weights.dtype) * cosine_similarity(first, second)
    scores = jnp.where(jnp.isnan(labels) & (row_weights != 0), jnp.nan, scores)
    order = jnp.argsort(labels)
    labels, scores, row_weights = labels[order], scores[order], row_weights[order]
    lower_end = jnp.searchsorted(labels, labels, side="left")
    higher_start = jnp.searchsorted(labels, labels, side="right")
    loss = _log_sum_of_pairs(scores, row_weights, lower_end, higher_start)

    counts = (row_weights != 0).astype(jnp.float32)
    before = jnp.concatenate([jnp.zeros_like(counts, shape=1), jnp.cumsum(counts)])
    num_pairs = jnp.sum(counts * before[lower_end])
    return loss, _metrics(num_rows=jnp.sum(counts), num_pairs=num_pairs)


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


def triplet(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    distance: Callable[[jax.Array, jax.Array], jax.Array] = euclidean,
    margin: ArrayLike | None = 5.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[jax.Array, Metrics]:
    """The triplet loss: an anchor shall be nearer to its positive than to its negative, by a margin.

        loss = sum_i weights_i max(d(a_i, p_i) - d(a_i, n_i) + margin, 0) / normalizer

    Args:
      anchors, positives, negatives: (B, D) floating.
      distance: `euclidean`, `cosine`, or a function of two (B, D) arrays to (B,).
      margin: a number; None is the soft margin, ``log(1 + exp(d(a, p) - d(a, n)))``.
      weights: (B,) non-negative factors of the rows, or None for 1.
      normalizer: what divides the sum; None is the sum of the weights.

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
    anchors, positives, negatives = _embeddings(anchors=anchors, positives=positives, negatives=negatives)
    if not callable(distance):
        raise TypeError(f"`distance` is {distance!r}; give jaxkd.embedding.euclidean, cosine or a function")
    _check_margin(margin)
    _check_counting(anchors, weights, normalizer)
    row_weights, (anchors, positives, negatives) = _row_weights(weights, anchors, positives, negatives)
    return _triplet(anchors, positives, negatives, distance, margin, row_weights, normalizer)


def batch_hard_triplet(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    distance: Distance = euclidean,
    margin: ArrayLike | None = 5.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
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
      chunk_size: as in `info_nce`.

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
    (embeddings,) = _embeddings(embeddings=embeddings)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer) or jnp.shape(labels) != embeddings.shape[:1]:
        raise ValueError(
            f"`labels` is {jnp.result_type(labels).name} {jnp.shape(labels)} but `embeddings` has "
            f"B={embeddings.shape[0]}; give one integer a row"
        )
    if not isinstance(distance, Distance):
        raise TypeError(f"`distance` is {distance!r}; give a jaxkd.embedding.Distance such as euclidean or cosine")
    _check_margin(margin)
    _check_counting(embeddings, weights, normalizer)
    num_rows = embeddings.shape[0]
    if chunk_size is None:
        chunk_size = _chunk_size(num_rows, num_rows, logits_dtype(embeddings))
    check_size("chunk_size", chunk_size)

    everyone = jax.lax.stop_gradient(embeddings)  # for the search, in the type of its product
    row_weights, (embeddings,) = _row_weights(weights, embeddings)
    labels, position = jnp.asarray(labels), jnp.arange(num_rows)

    def hardest(row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        embedding, label, i = row
        farness = distance.order(embedding, everyone)  # (B,)
        is_positive = (labels == label) & (position != i) & (row_weights != 0)
        is_negative = (labels != label) & (row_weights != 0)
        positive = jnp.argmax(jnp.where(is_positive, farness, -jnp.inf))
        negative = jnp.argmin(jnp.where(is_negative, farness, jnp.inf))
        return positive, negative, is_positive.any() & is_negative.any()

    rows = everyone, labels, position
    positive, negative, has_both = jax.lax.map(hardest, rows, batch_size=min(chunk_size, num_rows))
    row_weights = jnp.where(has_both, row_weights, 0)
    return _triplet(embeddings, embeddings[positive], embeddings[negative], distance, margin, row_weights, normalizer)


def matryoshka(
    loss: Callable[..., tuple[jax.Array, Metrics]],
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = True,
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """A loss summed over embeddings cut to several sizes, so that their first components are embeddings by themselves.

        loss = sum_k weights_k loss(embeddings[..., :dims_k])

    Args:
      loss: one of this module, or a function of yours that returns ``(loss, metrics)``.
      dims: the sizes, distinct, none larger than the embeddings. Name the full size too if it shall be trained.
      weights: one factor for each of ``dims``, or None for 1.
      normalize: whether cut embeddings are brought to length 1 first, in float32, as sentence-transformers does. It
        decides what a Euclidean distance means. `info_nce` and `cosent` do not see lengths: for them False gives the
        same, without the float32 copies.

    Returns:
      A function with the arguments of ``loss``, of which all floating arrays with two axes or more are embeddings. Its
      metrics are those of each size with the size in their name, and its loss: ``{"loss_64", "accuracy_64", ...}``.

    Raises:
      TypeError, ValueError: sizes or weights that do not fit.

    Sources: Kusupati et al., "Matryoshka Representation Learning" (arXiv 2205.13147); ``MatryoshkaLoss`` of
    sentence-transformers.

    >>> anchors, positives = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> loss, metrics = matryoshka(info_nce, dims=(2, 1))(anchors, positives, scale=1.0)
    >>> print(f"{loss:.4f} = {metrics['loss_2']:.4f} + {metrics['loss_1']:.4f}")
    1.1723 = 0.4791 + 0.6931
    """
    if not callable(loss):
        raise TypeError(f"`loss` is {loss!r}; give a function such as jaxkd.embedding.info_nce")
    for dim in dims:
        check_integer("dims", dim)
    if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
        raise ValueError(f"`dims` is {tuple(dims)}; give distinct positive sizes")
    factors = (1.0,) * len(dims) if weights is None else tuple(weights)
    if len(factors) != len(dims):
        raise ValueError(f"`weights` has {len(factors)} values but `dims` has {len(dims)}; give one for each")

    def is_embedding(x: Any) -> bool:
        return jnp.ndim(x) > 1 and jnp.issubdtype(jnp.result_type(x), jnp.floating)

    def cut(x: Any, dim: int) -> Any:
        if not is_embedding(x):
            return x
        if x.shape[-1] < dim:
            raise ValueError(f"`dims` has {dim} but embeddings have D={x.shape[-1]}; give sizes up to that")
        return unit(x[..., :dim]) if normalize else x[..., :dim]

    def total_loss(*arguments: Any, **options: Any) -> tuple[jax.Array, Metrics]:
        if normalize:  # widened before they are cut, so that gradients add up in float32
            arguments, options = jax.tree.map(lambda x: widened(x) if is_embedding(x) else x, (arguments, options))
        losses, metrics = [], Metrics()
        for dim, factor in zip(dims, factors, strict=True):
            args, kwargs = jax.tree.map(partial(cut, dim=dim), (arguments, options))
            value, parts = loss(*args, **kwargs)
            losses.append(factor * value)
            metrics |= {f"{name}_{dim}": x for name, x in {"loss": value, **parts}.items()}
        return sum(losses[1:], losses[0]), _metrics(**metrics)

    return total_loss


def _triplet(
    anchors: jax.Array,
    positives: jax.Array,
    negatives: jax.Array,
    distance: Callable[[jax.Array, jax.Array], jax.Array],
    margin: Any,
    weights: jax.Array,
    normalizer: Any,
) -> tuple[jax.Array, Metrics]:
    total = jnp.sum(weights) if normalizer is None else jnp.asarray(normalizer, weights.dtype)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(total == 0, 0, jnp.sum(weighted(weights, x)) / jnp.where(total == 0, 1, total))

    near, far = distance(anchors, positives), distance(anchors, negatives)
    loss = jax.nn.softplus(near - far) if margin is None else jax.nn.relu(near - far + jnp.asarray(margin, near.dtype))
    return mean(loss), _metrics(
        positive_distance=mean(near),
        negative_distance=mean(far),
        accuracy=mean((near < far).astype(near.dtype)),
        num_rows=jnp.sum(weights != 0),
    )


def _row_weights(weights: Any, *embeddings: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """A weight for each row, and embeddings in float32 or better in which a row that does not count holds zeros."""
    wide = [widened(x) for x in embeddings]
    if weights is None:
        return jnp.ones_like(wide[0][:, 0]), wide
    weights = jnp.asarray(weights, wide[0].dtype)
    return weights, [_only(weights != 0, x) for x in wide]


def _only(counts: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(counts.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def _chunk_size(num_rows: int, num_candidates: int, dtype: jnp.dtype) -> int:
    """At most an eighth of the rows, so that the whole never exists, and 2**28 bytes."""
    return min(default_chunk_size(num_rows, 8 * dtype.itemsize * num_candidates), -(-num_rows // 8))


def _metrics(**metrics: Any) -> Metrics:
    return {name: jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for name, x in metrics.items()}


def _embeddings(**embeddings: Any) -> list[jax.Array]:
    """The arguments as arrays of one shape (B, D) and one type."""
    (first, model), *rest = embeddings.items()
    for name, x in embeddings.items():
        _check_floating(name, x)
    if model.ndim != 2 or 0 in model.shape:
        raise ValueError(f"`{first}` has shape {model.shape}; give embeddings (B, D), of one row at least")
    for name, x in rest:
        if x.shape != model.shape:
            raise ValueError(f"`{name}` has shape {x.shape} but `{first}` has {model.shape}; give one row each")
        _check_same_type(name, x, first, model)
    return [jnp.asarray(x) for x in embeddings.values()]


def _hard_negatives(negatives: Any, anchors: jax.Array) -> jax.Array:
    _check_floating("negatives", negatives)
    num_rows, size = anchors.shape
    if negatives.ndim not in (2, 3) or (negatives.shape[0], negatives.shape[-1]) != (num_rows, size):
        raise ValueError(
            f"`negatives` has shape {negatives.shape} but `anchors` has {anchors.shape}; give ({num_rows}, {size}) or "
            f"({num_rows}, K, {size})"
        )
    _check_same_type("negatives", negatives, "anchors", anchors)
    return jnp.asarray(negatives)


def _check_floating(name: str, x: Any) -> None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{name}` is {getattr(x, 'dtype', type(x).__name__)}; give an array of floating type")


def _check_same_type(name: str, x: Any, other: str, y: Any) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"`{name}` is {x.dtype} but `{other}` is {y.dtype}; give one type")


def _check_margin(margin: Any) -> None:
    if margin is not None:
        check_scalar("margin", margin)


def _check_counting(embeddings: jax.Array, weights: Any, normalizer: Any) -> None:
    if weights is not None:
        check_weights(weights, embeddings.shape[:1], "embeddings")
    if normalizer is not None:
        check_scalar("normalizer", normalizer, above=0)
