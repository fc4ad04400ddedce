"""The entropy of every row's distribution without the (N, V) logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.divergences import Divergence, weigh
from jaxkd.logits import Source
from jaxkd.loop import Sharding, count_rows
from jaxkd.loop.checks import check_row_arguments, check_scalar, check_source, known_to_be
from jaxkd.loop.flattening import check_sources, on_auto_axes
from jaxkd.loop.partitioning import Partitioning, partitioning_of
from jaxkd.losses.flat_models import flat_models
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
      chunk_size: rows whose logits exist at a time, at most; None chooses by rows, bytes and
        platform.
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
    is_tempered = not known_to_be(temperature, 1)
    of_arrays = partial(_entropies_of_arrays, partitioning, is_tempered, chunk_size, implementation)
    return on_auto_axes(partitioning, of_arrays, student, mask, temperature, gives_rows=True)


def _entropies_of_arrays(
    partitioning: Partitioning,
    is_tempered: bool,
    chunk_size: int | None,
    implementation: str | None,
    student: Any,
    mask: Any,
    temperature: Any,
) -> jax.Array:
    models = flat_models(
        partitioning, student, chunk_size=chunk_size, implementation=implementation, divergence=ENTROPY
    )
    rows = count_rows(partitioning, models.leading_shape, models.width, student.dtype, weights=mask)
    return token_values(
        models,
        rows,
        divergence=ENTROPY,
        temperature=temperature,
        is_tempered=is_tempered,
        implementation=implementation,
    )
