"""The rows of one chunk in plain XLA: logits of student and teacher -> losses of each row and the logits' gradient.

`jaxkd.rows_triton` has the same function as a GPU kernel. This one is its twin and the definition of what it computes.
"""

from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.divergences import Divergence

RowResult: TypeAlias = tuple[Float[Array, " C"], Float[Array, " C"], Float[Array, "C V"] | None]


@dataclass(frozen=True)
class RowOptions:
    """What is decided at tracing.

    Args:
      vocabulary: "truncate" or "mask", for vocabularies of different width.
      has_labels: whether there is a hard loss.
      is_tempered: whether the temperature may differ from 1.
      gradient_dtype: the type of the logits' gradient, or None for the losses alone.
    """

    vocabulary: str = "truncate"
    has_labels: bool = True
    is_tempered: bool = True
    gradient_dtype: jnp.dtype | None = None


def row_losses(
    student: Float[Array, "C V"],
    teacher: Float[Array, "C Vt"],
    labels: Int[Array, " C"],
    soft_scale: Float[Array, " C"],
    hard_scale: Float[Array, " C"],
    temperature: Float[Array, ""],
    divergence: Divergence,
    options: RowOptions,
) -> RowResult:
    """Soft and hard loss of each row, and the gradient of ``sum(soft_scale * soft + hard_scale * hard)``.

    soft = D(softmax(teacher / temperature), softmax(student / temperature)) over the common vocabulary;
    hard = -log softmax(student)[label], over the student's, and 0 without labels.
    With ``slope = d term / d log q`` the gradient of soft is ``(slope - q sum(slope)) / temperature``.
    """
    width = student.shape[1]
    z_q, z_p = align(student, teacher, options.vocabulary)
    if options.is_tempered:
        z_q, z_p = z_q / temperature, z_p / temperature
    log_q, log_p = jax.nn.log_softmax(z_q), jax.nn.log_softmax(z_p)
    if options.gradient_dtype is None:
        term, slope = divergence.term(log_p, log_q, *divergence.parameters), None
    else:
        term, slope = divergence.term_and_slope(log_p, log_q)
    soft = jnp.maximum(jnp.sum(term, axis=1), 0)  # only rounding takes it below 0
    hard = jnp.zeros_like(soft)
    if options.has_labels:
        same = not options.is_tempered and z_q.shape == student.shape
        plain_log_q = log_q if same else jax.nn.log_softmax(student)
        hard = -at_label(plain_log_q, labels)
    if slope is None:
        return soft, hard, None

    d = slope - jnp.exp(log_q) * jnp.sum(slope, axis=1, keepdims=True)
    scale = (soft_scale / temperature)[:, None]
    d = jnp.where(scale == 0, 0, scale * d)[:, :width]
    d = jnp.pad(d, ((0, 0), (0, width - d.shape[1])))
    if options.has_labels:
        d_hard = jnp.exp(plain_log_q) - jax.nn.one_hot(labels, width, dtype=d.dtype)
        d = d + jnp.where(hard_scale[:, None] == 0, 0, hard_scale[:, None] * d_hard)
    return soft, hard, d.astype(options.gradient_dtype)


def align(student: jax.Array, teacher: jax.Array, vocabulary: str) -> tuple[jax.Array, jax.Array]:
    """Both over one vocabulary: the common one ("truncate"), or the wider one with -inf where a side has no token."""
    if vocabulary == "truncate":
        width = min(student.shape[1], teacher.shape[1])
        return student[:, :width], teacher[:, :width]
    width = max(student.shape[1], teacher.shape[1])
    pad = [jnp.pad(z, ((0, 0), (0, width - z.shape[1])), constant_values=-jnp.inf) for z in (student, teacher)]
    return pad[0], pad[1]


def at_label(x: Float[Array, "C V"], labels: Int[Array, " C"]) -> Float[Array, " C"]:
    """The column of the label; a label outside the vocabulary has been answered by a NaN weight before."""
    return jnp.take_along_axis(x, labels[:, None], axis=1, mode="clip")[:, 0]


def hard_loss(
    student: Float[Array, "C V"], top: Float[Array, " C"], log_total: Float[Array, " C"], labels: Int[Array, " C"]
) -> Float[Array, " C"]:
    """Cross-entropy with the label, from the row's largest logit and ``log sum exp(z - top)``."""
    return log_total - (at_label(student, labels) - top)
