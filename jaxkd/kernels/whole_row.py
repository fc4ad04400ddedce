"""The rows of a chunk in XLA, for a divergence of whole rows of logits: the gradient is that of `jax.vjp`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.divergences.whole_rows import RowDivergence
from jaxkd.kernels.reference import RowOptions, RowResult, align, at_label
from jaxkd.logits.sources import Place, placed


def row_losses(
    student: Float[Array, "C V"],
    teacher: Float[Array, "C Vt"],
    labels: Int[Array, " C"],
    soft_scale: Float[Array, " C"],
    hard_scale: Float[Array, " C"],
    temperature: Float[Array, ""],
    divergence: RowDivergence,
    options: RowOptions,
    place: Place | None = None,
) -> RowResult:
    """As `jaxkd.kernels.reference.row_losses`, for a divergence of whole rows."""

    def soft(z: Float[Array, "C V"]) -> Float[Array, " C"]:
        common = divergence.vocabulary == "common"
        z_q, z_p = align(z, teacher, options.vocabulary) if common else (z, teacher)
        if options.is_tempered:
            z_q, z_p = z_q / temperature, z_p / temperature
        return divergence(z_p, z_q)

    def hard(z: Float[Array, "C V"]) -> Float[Array, " C"]:
        return -at_label(jax.nn.log_softmax(z), labels) if options.has_labels else jnp.zeros_like(hard_scale)

    losses, gradient = [], jnp.zeros_like(student)
    for function, scale in ((soft, soft_scale), (hard, hard_scale)):
        if options.gradient_dtype is None:
            losses.append(function(student))
        else:
            loss, pullback = jax.vjp(function, student)
            losses.append(loss)
            gradient = gradient + jnp.where(scale[:, None] == 0, 0, pullback(scale)[0])
    soft_loss, hard_loss = jnp.maximum(losses[0], 0), losses[1]  # only rounding takes it below 0
    if options.gradient_dtype is None:
        return soft_loss, hard_loss, None
    return soft_loss, hard_loss, placed(gradient.astype(options.gradient_dtype), place)
