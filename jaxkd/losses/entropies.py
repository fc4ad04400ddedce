"""The entropy of every row's distribution without the (N, V) logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.divergences import Divergence, weigh
from jaxkd.logits import Source
from jaxkd.loop import Sharding
from jaxkd.loop.checks import check_row_arguments, check_scalar, check_source
from jaxkd.loop.flattening import check_sources
from jaxkd.loop.partitioning import partitioning_of
from jaxkd.losses.token_values import token_values


def _entropy_term(_: jax.Array, log_q: jax.Array) -> jax.Array:
    return -weigh(jnp.exp(log_q), log_q)


ENTROPY = Divergence(_entropy_term, is_nonnegative=True)  # a sum over the tokens of one head


def token_entropies(
    student: Source,
    *,
    mask: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    chunk_size: int | None = None,
    implementation: str | None = None,
    sharding: Sharding | None = None,
) -> jax.Array:
    """-sum_v q_v log q_v of every row, in nats, with q = softmax(z / temperature), and 0 where ``mask`` is False.

    Differentiable in all arrays of ``student``: the gradient to the logits is ``-q (log q + entropy) / temperature``.
    Passes, memory and rows that do not count are as in `token_log_probs`. An entropy bonus is its mean.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`.
      mask: (...) booleans, the rows that count, or None for all.
      temperature: divides the logits; a constant to differentiation.
      chunk_size: rows whose logits exist at a time, at most; None chooses by rows, bytes and platform.
      implementation, sharding: as in `distillation_loss`.

    Returns:
      (...) float32 (float64 for float64), from 0 to log V.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    >>> import jaxkd
    >>> student = jaxkd.LinearLogits(jnp.ones((2, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> first, second = token_entropies(student, mask=jnp.array([True, False]))
    >>> print(f"{first:.4f} {second:.4f}")
    0.9753 0.0000
    """
    check_source(student, "student.")
    check_row_arguments(student, f"student.{student.ROWS}", mask=mask, chunk_size=chunk_size)
    check_scalar("temperature", temperature, above=0)
    partitioning = partitioning_of(sharding, student)
    check_sources(partitioning, student)
    return token_values(
        partitioning,
        student,
        divergence=ENTROPY,
        mask=mask,
        temperature=temperature,
        chunk_size=chunk_size,
        implementation=implementation,
    )
