"""Losses of hidden states: a student's layer follows a teacher's, through a projection where they differ in width."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.divergences import RowDivergence, cosine_distance, mse
from jaxkd.logits import LinearLogits, Logits
from jaxkd.loop import Metrics, Sharding
from jaxkd.loop.checks import check_floating, check_integer, check_labels
from jaxkd.losses.chunked_losses import chunked_loss


def hidden_cosine(
    student_hidden: ArrayLike,
    teacher_hidden: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    projection: ArrayLike | None = None,
    ignore_index: int = -100,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """1 - cos of the student's hidden state, projected, and the teacher's, over the rows that count.

        loss = sum_n weights_n (1 - cos(W s_n, t_n)) / normalizer

    A row counts when its label is not ``ignore_index``; one that does not adds exactly nothing to the loss or to any
    gradient, whatever its states hold. The product runs in the type of the student's states, everything else and the
    sums in float32 (float64 for float64). A state of zeros has no direction: it is at distance 1, without gradient.

    Args:
      student_hidden: (..., D) floating; it gets a gradient.
      teacher_hidden: (..., Dt) floating, with the same leading axes; it gets none.
      labels: (...) integers or None: only ``ignore_index`` in it matters. ``labels[:, t]`` is the token after
        position t (`jaxkd.shift_labels`).
      projection: W, (Dt, D), which gets a gradient; a Flax ``Linear.kernel`` is (D, Dt): pass ``kernel.T``. None needs
        D = Dt.
      ignore_index, weights, normalizer, chunk_size: as in `distillation_loss`.
      sharding: as in `distillation_loss`; it may split rows.

    Returns:
      The loss, a float32 scalar (float64 for float64), and metrics ``{"num_rows"}``: the rows that count.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Source: DistilBERT (arXiv 1910.01108) trains with it.

    >>> student, teacher = jnp.array([[3.0, 4.0], [1.0, 1.0]]), jnp.array([[4.0, 3.0], [0.0, 1.0]])
    >>> loss, _ = hidden_cosine(student, teacher, jnp.array([7, -100]))
    >>> print(f"{loss:.4f}")
    0.0400
    """
    return _hidden_loss(
        cosine_distance,
        student_hidden,
        teacher_hidden,
        labels,
        projection=projection,
        ignore_index=ignore_index,
        weights=weights,
        normalizer=normalizer,
        chunk_size=chunk_size,
        sharding=sharding,
    )


def hidden_mse(
    student_hidden: ArrayLike,
    teacher_hidden: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    projection: ArrayLike | None = None,
    ignore_index: int = -100,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """The mean over the teacher's width of the squared difference of hidden states, over the rows that count.

        loss = sum_n weights_n |W s_n - t_n|^2 / Dt / normalizer

    Arguments, result and errors are those of `hidden_cosine`.

    Source: FitNets (arXiv 1412.6550), TinyBERT (arXiv 1909.10351), whose learned matrix is the projection.

    >>> student, teacher = jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 1.0], [0.0, 0.0]])
    >>> loss, _ = hidden_mse(student, teacher, projection=jnp.array([[1.0], [2.0]]))
    >>> print(f"{loss:.4f}")
    5.2500
    """
    return _hidden_loss(
        mse,
        student_hidden,
        teacher_hidden,
        labels,
        projection=projection,
        ignore_index=ignore_index,
        weights=weights,
        normalizer=normalizer,
        chunk_size=chunk_size,
        sharding=sharding,
    )


def _hidden_loss(
    divergence: RowDivergence,
    student_hidden: Any,
    teacher_hidden: Any,
    labels: Any,
    *,
    projection: Any,
    ignore_index: int,
    weights: Any,
    normalizer: Any,
    chunk_size: int | None,
    sharding: Sharding | None,
) -> tuple[jax.Array, Metrics]:
    _check_hidden(student_hidden, teacher_hidden, projection)
    check_integer("ignore_index", ignore_index)
    if labels is not None:
        check_labels(labels, jnp.shape(student_hidden)[:-1], "student_hidden")
        labels = jnp.where(jnp.asarray(labels) == ignore_index, -100, 0)

    # A projected hidden state is a row of "logits" of width Dt.
    student = Logits(student_hidden) if projection is None else LinearLogits(student_hidden, projection)
    teacher = jax.lax.stop_gradient(Logits(teacher_hidden))
    return chunked_loss(
        _of_rows,
        student,
        labels,
        per_row=teacher,
        shared=divergence,
        weights=weights,
        normalizer=normalizer,
        chunk_size=chunk_size,
        sharding=sharding,
    )


def _of_rows(student: jax.Array, labels: Any, teacher: jax.Array, divergence: RowDivergence) -> jax.Array:
    return divergence(teacher, student)


def _check_hidden(student: Any, teacher: Any, projection: Any) -> None:
    for name, x in (("student_hidden", student), ("teacher_hidden", teacher), ("projection", projection)):
        if x is None and name == "projection":
            continue
        check_floating(name, x)
        if x.ndim < 1 or (name == "projection" and x.ndim != 2):
            raise ValueError(f"`{name}` has shape {x.shape}; give {'(Dt, D)' if name == 'projection' else '(..., D)'}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"`teacher_hidden` has leading shape {teacher.shape[:-1]} but `student_hidden` has {student.shape[:-1]}; "
            "give one row each"
        )
    widths = (teacher.shape[-1], student.shape[-1])
    if projection is None and widths[0] != widths[1]:
        raise ValueError(
            f"`teacher_hidden` has D={widths[0]} but `student_hidden` has D={widths[1]}; give a `projection`"
        )
    if projection is not None and projection.shape != widths:
        hint = "; is it transposed? pass `projection.T`" if projection.shape == widths[::-1] else ""
        raise ValueError(
            f"`projection` has shape {projection.shape} but the states are of Dt={widths[0]} and D={widths[1]}{hint}"
        )
