"""One number a row without the (N, V) logits: log-probabilities of labels, which losses are made of, and statistics."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.divergences import AnyDivergence, check_divergence, forward_kl, weigh
from jaxkd.kernels import ChunkRows, RowOptions, at_label, xla_row_losses
from jaxkd.logits import Source
from jaxkd.loop import count_rows, map_rows, rows_of_chunk
from jaxkd.loop.checks import check_row_arguments, check_same_rows, check_scalar, check_source, check_vocabulary
from jaxkd.losses.chunked_losses import FunctionLoss, names_of_metrics


def token_log_probs(
    student: Source, labels: ArrayLike, *, ignore_index: int = -100, chunk_size: int | None = None
) -> jax.Array:
    """log softmax(z)[label] of every row, and 0 where the label is ``ignore_index``.

    Differentiable in all arrays of ``student``. The backward pass forms the logits again, a chunk at a time (four
    products with the head in all, where `distillation_loss` takes three), so that each row may have a gradient of its
    own and memory beyond inputs and gradients stays that of a chunk. A row that does not count is never looked at, in
    either pass. Gradients of the head are summed in float32.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`.
      labels: (...) integers. One outside the vocabulary other than ``ignore_index`` gives NaN.
      ignore_index: the label of a row that does not count.
      chunk_size: rows whose logits exist at a time, at most; None chooses by the width of the vocabulary.

    Returns:
      (...) float32 (float64 for float64).

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    >>> import jaxkd
    >>> student = jaxkd.LinearLogits(jnp.ones((3, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> print(token_log_probs(student, jnp.array([0, 2, -100])).round(4))
    [-1.5514 -0.5514  0.    ]
    """
    check_source(student, "student.")
    check_row_arguments(
        student, f"student.{student.ROWS}", labels=labels, ignore_index=ignore_index, chunk_size=chunk_size
    )
    shape, student = student.leading_shape, student.flat()
    rows = count_rows(student, labels, ignore_index=ignore_index)
    loss = FunctionLoss(_log_prob, rows.labels, rows.weights)
    values = map_rows(loss, student, rows.is_counted, rows_of_chunk(chunk_size, student))
    return jnp.reshape(values["loss"], shape)


def sequence_log_probs(
    student: Source,
    labels: ArrayLike,
    *,
    average: bool = False,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> jax.Array:
    """The log-probability of each sequence: the sum of `token_log_probs` over the last axis of the labels.

    Args:
      student: hidden states (..., T, D) or logits (..., T, V).
      labels: (..., T) integers.
      average: whether to divide by the number of labels that count. A sequence without one has 0, not NaN.
      ignore_index, chunk_size: as in `token_log_probs`.

    Returns:
      (...) float32 (float64 for float64).

    Raises:
      TypeError, ValueError: as in `token_log_probs`, or labels without an axis to sum over.

    >>> import jaxkd
    >>> student = jaxkd.LinearLogits(jnp.ones((2, 3, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> labels = jnp.array([[0, 2, -100], [-100, -100, -100]])
    >>> print(sequence_log_probs(student, labels).round(4), sequence_log_probs(student, labels, average=True).round(4))
    [-2.1029  0.    ] [-1.0514  0.    ]
    """
    if jnp.ndim(labels) < 1:
        raise ValueError(f"`labels` has shape {jnp.shape(labels)}; give sequences of them, (..., T)")
    log_probs = token_log_probs(student, labels, ignore_index=ignore_index, chunk_size=chunk_size)
    total = jnp.sum(log_probs, axis=-1)
    if not average:
        return total
    count = jnp.sum(jnp.asarray(labels) != ignore_index, axis=-1)
    return total / jnp.maximum(count, 1).astype(total.dtype)


def token_statistics(
    student: Source,
    labels: ArrayLike | None = None,
    teacher: Source | None = None,
    *,
    divergence: AnyDivergence = forward_kl,
    temperature: ArrayLike = 1.0,
    vocabulary: str = "truncate",
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> dict[str, jax.Array]:
    """What there is to know of every row's distribution, for logging; it carries no gradient.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`.
      labels: (...) integers or None. One outside the vocabulary other than ``ignore_index`` gives NaN.
      teacher: the same with leading axes equal to the student's and a width of its own, or None.
      divergence, temperature, vocabulary: of the soft loss, as in `distillation_loss`; the rest is untempered.
      ignore_index, chunk_size: as in `token_log_probs`.

    Returns:
      A dict of (...) float32 (float64 for float64), 0 in a row that does not count:
      "log_normalizer", log sum exp(z); "entropy", -sum q log q, in nats; "top", the token of the largest logit (int32,
      -1 in a row that does not count); with labels "log_prob", log q[label], and "correct", 1 where it is the top one;
      with a teacher "soft", the divergence, and "agrees", 1 where both models have the same top token.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    >>> import jaxkd
    >>> student = jaxkd.LinearLogits(jnp.ones((2, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> statistics = token_statistics(student, jnp.array([2, -100]))
    >>> for name, x in statistics.items():
    ...     print(f"{name} {x[0]:.4f} {x[1]:.4f}")
    correct 1.0000 0.0000
    entropy 0.9753 0.0000
    log_normalizer 2.5514 0.0000
    log_prob -0.5514 0.0000
    top 2.0000 -1.0000
    """
    check_source(student, "student.")
    name = f"student.{student.ROWS}"
    if teacher is not None:
        check_source(teacher, "teacher.")
        check_same_rows(student, teacher, (name, f"teacher.{teacher.ROWS}"))
    check_row_arguments(student, name, labels=labels, ignore_index=ignore_index, chunk_size=chunk_size)
    check_divergence(divergence)
    check_scalar("temperature", temperature, above=0)
    check_vocabulary(vocabulary)

    student, teacher = jax.lax.stop_gradient((student, teacher))
    shape, student = student.leading_shape, student.flat()
    teachers = () if teacher is None else (teacher.flat().prepared(),)
    rows = count_rows(student, labels, ignore_index=ignore_index)
    chunks = rows_of_chunk(chunk_size, student, *teachers)
    shared = jnp.asarray(temperature, student.dtype), jax.tree.map(lambda x: jnp.asarray(x, student.dtype), divergence)
    loss = FunctionLoss(_Statistics(vocabulary), rows.labels, rows.weights, teachers, shared)
    loss = replace(loss, metrics=names_of_metrics(loss, student, chunks.piece))
    values = map_rows(loss, student, rows.is_counted, chunks)
    # float32 holds token ids up to 2**24.
    values["top"] = jnp.where(rows.weights == 1, values["top"], -1).astype(jnp.int32)
    return {name: jnp.reshape(values[name], shape) for name in loss.metrics}


def _log_prob(logits: jax.Array, labels: jax.Array, per_row: Any, shared: Any) -> jax.Array:
    return at_label(jax.nn.log_softmax(logits), labels)


@dataclass(frozen=True)
class _Statistics:
    vocabulary: str

    def __call__(self, logits: jax.Array, labels: Any, teachers: Any, shared: Any) -> tuple[jax.Array, Any]:
        log_q = jax.nn.log_softmax(logits)
        top = jnp.argmax(logits, axis=1)
        log_normalizer = jax.nn.logsumexp(logits, axis=1)
        entropy = -jnp.sum(weigh(jnp.exp(log_q), log_q), axis=1)
        values = {"log_normalizer": log_normalizer, "entropy": entropy, "top": top}
        if labels is not None:
            values |= {"log_prob": at_label(log_q, labels), "correct": top == labels}
        for teacher in teachers:
            temperature, divergence = shared
            one, options = jnp.ones_like(entropy), RowOptions(self.vocabulary, has_labels=False)
            rows = ChunkRows(logits, teacher, top, one, one, temperature, divergence)
            soft, _, _ = xla_row_losses(divergence)(rows, options, None)
            values |= {"soft": soft, "agrees": top == jnp.argmax(teacher, axis=1)}
        return log_normalizer, values
