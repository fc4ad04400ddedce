"""Log-probabilities of labels without the (N, V) logits, a token or a sequence: what losses are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.logits import Source
from jaxkd.loop import Sharding
from jaxkd.loop.checks import check_row_arguments, check_scalar, check_source
from jaxkd.loop.flattening import check_sources
from jaxkd.loop.partitioning import partitioning_of
from jaxkd.losses.token_values import token_values


def token_log_probs(
    student: Source,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    implementation: str | None = None,
    sharding: Sharding | None = None,
) -> jax.Array:
    """log softmax(z / temperature)[label] of every row, and 0 where the label is ``ignore_index``.

    Differentiable in all arrays of ``student``. The backward pass forms the logits again, a chunk at a time (four
    products with the head in all, where `cross_entropy` takes three), so that each row may have a gradient of its own
    and memory beyond inputs and gradients stays that of a chunk; the log-normaliser of each row is kept. A row that
    does not count is never looked at, in either pass. Gradients of the head are summed in float32.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`.
      labels: (...) integers: ``labels[:, t]`` is the token after position t (`jaxkd.shift_labels`). One outside the
        vocabulary other than ``ignore_index`` gives NaN.
      temperature: divides the logits; a constant to differentiation.
      ignore_index: the label of a row that does not count.
      chunk_size: rows whose logits exist at a time, at most; None chooses by rows, bytes and platform.
      implementation, sharding: as in `distillation_loss`.

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
    check_scalar("temperature", temperature, above=0)
    partitioning = partitioning_of(sharding, student)
    check_sources(partitioning, student)
    return token_values(
        partitioning,
        student,
        labels=labels,
        ignore_index=ignore_index,
        temperature=temperature,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def sequence_log_probs(
    student: Source,
    labels: ArrayLike,
    *,
    average: bool = False,
    temperature: ArrayLike = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    implementation: str | None = None,
    sharding: Sharding | None = None,
) -> jax.Array:
    """The log-probability of each sequence: the sum of `token_log_probs` over the last axis of the labels.

    Args:
      student: hidden states (..., T, D) or logits (..., T, V).
      labels: (..., T) integers: ``labels[:, t]`` is the token after position t (`jaxkd.shift_labels`).
      average: whether to divide by the number of labels that count. A sequence without one has 0, not NaN.
      temperature, ignore_index, chunk_size, implementation, sharding: as in `token_log_probs`.

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
    log_probs = token_log_probs(
        student,
        labels,
        temperature=temperature,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        implementation=implementation,
        sharding=sharding,
    )
    total = jnp.sum(log_probs, axis=-1)
    if not average:
        return total
    count = jnp.sum(jnp.asarray(labels) != ignore_index, axis=-1)
    return total / jnp.maximum(count, 1).astype(total.dtype)
