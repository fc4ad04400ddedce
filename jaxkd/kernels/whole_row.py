"""The rows of a chunk in XLA, for a divergence of whole rows of logits: the gradient is that of `jax.vjp`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.divergences import RowDivergence
from jaxkd.kernels.reference import align, at_label
from jaxkd.kernels.signature import ChunkRows, RowOptions, RowResult
from jaxkd.logits import Place, placed
from jaxkd.loop.collectives import vary_like
from jaxkd.loop.handed_functions import check_row_function


def row_losses(rows: ChunkRows, options: RowOptions, place: Place | None = None) -> RowResult:
    """As `reference.row_losses`, for a divergence of whole rows."""

    def soft(z: Float[Array, "C V"]) -> Float[Array, " C"]:
        common = rows.divergence.vocabulary == "common"
        z_q, z_p = align(z, rows.teacher, options.vocabulary) if common else (z, rows.teacher)
        if options.is_tempered:
            z_q, z_p = z_q / rows.temperature, z_p / rows.temperature
        _check_function(rows.divergence, z_p, z_q)
        return rows.divergence(z_p, z_q)

    def hard(z: Float[Array, "C V"]) -> Float[Array, " C"]:
        return -at_label(jax.nn.log_softmax(z), rows.labels) if options.has_labels else jnp.zeros_like(rows.hard_scale)

    losses, gradient = [], jnp.zeros_like(rows.student)
    for function, scale in ((soft, rows.soft_scale), (hard, rows.hard_scale)):
        if options.gradient_dtype is None:
            losses.append(function(rows.student))
        else:
            loss, pullback = jax.vjp(function, rows.student)
            losses.append(loss)
            gradient = gradient + jnp.where(scale[:, None] == 0, 0, pullback(vary_like(scale, loss))[0])
    soft_loss, hard_loss = losses
    if rows.divergence.is_nonnegative:
        soft_loss = jnp.maximum(soft_loss, 0)  # only rounding takes it below
    if options.gradient_dtype is None:
        return soft_loss, hard_loss, None
    return soft_loss, hard_loss, placed(gradient.astype(options.gradient_dtype), place)


def _check_function(divergence: RowDivergence, teacher: jax.Array, student: jax.Array) -> None:
    def shapes(num_rows: int) -> tuple[Any, ...]:
        parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), divergence.parameters)
        logits = (jax.ShapeDtypeStruct((num_rows, z.shape[1]), z.dtype) for z in (teacher, student))
        return *logits, *parameters

    if check_row_function("divergence.function", divergence.function, shapes, student.shape[0]):
        raise TypeError("`divergence.function` returns metrics; give (C,) alone")
