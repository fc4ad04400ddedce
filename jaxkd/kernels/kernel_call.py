"""What the GPU kernels have in common on the host: which arrays go in and which numbers come out, each by its name."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.kernels.reference import at_label, hard_losses, num_tokens
from jaxkd.kernels.signature import ChunkRows, HardLosses, RowOptions, RowResult, RowSums, names_of_sums


def rows_in(rows: ChunkRows, options: RowOptions) -> dict[str, jax.Array]:
    """Numbers of each row, (C,), that a kernel is given beside the logits."""
    numbers: dict[str, jax.Array] = {}
    if options.has_labels:
        numbers |= {"label": rows.labels.astype(jnp.int32), "hard_scale": rows.hard_scale}
        if rows.label_smoothing is not None:
            numbers["label_logit"] = at_label(rows.student, rows.labels)
    if rows.divergence is not None:
        numbers["soft_scale"] = rows.soft_scale
    return numbers


def scalars_in(rows: ChunkRows, options: RowOptions) -> dict[str, jax.Array]:
    """Numbers of all rows, (1,), without the divergence's parameters."""
    numbers: dict[str, jax.Array | None] = {"temperature": rows.temperature}
    if options.has_labels:
        numbers |= {"label_smoothing": rows.label_smoothing, "z_loss": rows.z_loss}
    return {name: jnp.reshape(x, (1,)) for name, x in numbers.items() if x is not None}


def parameters_in(rows: ChunkRows) -> list[Float[Array, "1"]]:
    if rows.divergence is None:
        return []
    return [jnp.asarray(x, jnp.float32).reshape(1) for x in rows.divergence.parameters]


def rows_out(rows: ChunkRows, options: RowOptions) -> tuple[str, ...]:
    """Numbers of each row, (C,) in float32, that a kernel returns.

    The sums by the names of `RowSums`; ``distance_sum`` is that of `reference.hard_losses`, of untempered logits.
    """
    has_soft = rows.divergence is not None
    names = names_of_sums(has_soft, rows.teacher is not None) if options.keeps_sums else names_of_sums(False, False)
    soft = ("soft",) if has_soft else ()
    distances = ("distance_sum",) if options.has_labels and rows.label_smoothing is not None else ()
    return (*names, *soft, *distances)


def result_of(
    rows: ChunkRows, options: RowOptions, numbers: dict[str, Float[Array, " C"]], gradient: jax.Array | None
) -> RowResult:
    """Of what a kernel returned."""
    nothing = jnp.zeros_like(numbers["top"])
    sums = RowSums.of(numbers)
    hard = HardLosses(nothing, nothing, nothing)
    if options.has_labels:
        label_logit = at_label(rows.student, rows.labels)
        if options.is_tempered and options.tempers_labels:
            label_logit = label_logit / rows.temperature
        hard = hard_losses(rows, sums.plain, label_logit, numbers.get("distance_sum"), num_tokens(rows, options))
    return RowResult(numbers.get("soft", nothing), hard, sums, gradient)
