"""The divergence between teacher and student of every row without the (N, V) logits of either."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from jaxkd.divergences import AnyDivergence, check_divergence, forward_kl
from jaxkd.logits import Source
from jaxkd.loop import Sharding
from jaxkd.loop.checks import (
    check_row_arguments,
    check_same_rows,
    check_scalar,
    check_source,
    check_vocabulary,
)
from jaxkd.losses.flat_models import partitioning_of_models
from jaxkd.losses.token_values import token_values
from jaxkd.teachers import Teacher, check_teacher, rows_of


def token_divergences(
    student: Source,
    teacher: Teacher,
    labels: ArrayLike | None = None,
    *,
    divergence: AnyDivergence = forward_kl,
    temperature: ArrayLike = 1.0,
    mask: ArrayLike | None = None,
    ignore_index: int = -100,
    vocabulary: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    sharding: Sharding | None = None,
) -> jax.Array:
    """The soft loss of `distillation_loss` of every row, for weights that come later, such as a policy's advantages.

    Differentiable in all arrays of ``student``, each row with a gradient of its own: the backward pass forms the logits
    again, a chunk at a time (six products with the heads in all, where `distillation_loss` takes four); of each row a
    few sums are kept at most. A row that does not count has 0 and no gradient, and is never looked at.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`.
      teacher: any that `distillation_loss` takes. No gradient ever reaches it.
      labels: (...) integers or None: a row counts whose label is not ``ignore_index``. One outside the vocabulary gives
        NaN.
      divergence, temperature, vocabulary: as in `distillation_loss`; constants to differentiation.
      mask: (...) booleans or None: a row counts where it is True, too.
      ignore_index, chunk_size, implementation, sharding: as in `distillation_loss`.

    Returns:
      (...) float32 (float64 for float64).

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    >>> import jaxkd, jax.numpy as jnp
    >>> student = jaxkd.LinearLogits(jnp.ones((2, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> teacher = jaxkd.LinearLogits(jnp.ones((2, 1)), jnp.array([[0.0], [1.0], [3.0]]))
    >>> first, second = token_divergences(student, teacher, mask=jnp.array([True, False]))
    >>> print(f"{first:.4f} {second:.4f}")
    0.1834 0.0000
    """
    check_source(student, "student.")
    check_divergence(divergence)
    check_scalar("temperature", temperature, above=0)
    check_teacher(teacher, "teacher.", student, divergence, temperature)
    name = f"student.{student.ROWS}"
    check_same_rows(student, teacher, (name, f"teacher.{teacher.ROWS}"))
    check_row_arguments(student, name, labels=labels, mask=mask, ignore_index=ignore_index, chunk_size=chunk_size)
    check_vocabulary(vocabulary)
    rows = rows_of(teacher, temperature)
    partitioning = partitioning_of_models(sharding, student, teacher, rows, divergence, vocabulary)
    return token_values(
        partitioning,
        student,
        rows,
        divergence=divergence,
        labels=labels,
        mask=mask,
        ignore_index=ignore_index,
        temperature=temperature,
        vocabulary=vocabulary,
        chunk_size=chunk_size,
        implementation=implementation,
    )
