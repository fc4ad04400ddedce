"""The rows of a chunk in XLA, for a divergence of whole rows of logits: the gradient is that of `jax.vjp`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.divergences import RowDivergence
from jaxkd.kernels.reference import align, hard_gradient, hard_part
from jaxkd.kernels.signature import ChunkRows, RowOptions, RowResult, RowSums
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

    plain, hard = hard_part(rows, options)
    pullback = None
    if options.gradient_dtype is None:
        loss = soft(rows.student)
    else:
        loss, pullback = jax.vjp(soft, rows.student)
    if rows.divergence.is_nonnegative:
        loss = jnp.maximum(loss, 0)  # only rounding takes it below
    if pullback is None:
        return RowResult(loss, hard, RowSums(plain), None)
    (d,) = pullback(vary_like(rows.soft_scale, loss))
    d = jnp.where(rows.soft_scale[:, None] == 0, 0, d)
    if options.has_labels:
        d = d + hard_gradient(rows, options, rows.student, plain)
    return RowResult(loss, hard, RowSums(plain), placed(d.astype(options.gradient_dtype), place))


def _check_function(divergence: RowDivergence, teacher: jax.Array, student: jax.Array) -> None:
    def shapes(num_rows: int) -> tuple[Any, ...]:
        parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), divergence.parameters)
        logits = (jax.ShapeDtypeStruct((num_rows, z.shape[1]), z.dtype) for z in (teacher, student))
        return *logits, *parameters

    if check_row_function("divergence.function", divergence.function, shapes, student.shape[0]):
        raise TypeError("`divergence.function` returns metrics; give (C,) alone")
