"""The rows of one chunk as a Pallas kernel, lowered through Triton: one program a row, for any divergence.

The twin of `jaxkd.kernels.reference`, with its signature. It reads a row of float32 logits three times (normalisers; sums
of the term and of the slope; gradient) and writes the gradient once, in the type of the matrix products that follow.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxkd.divergences.sums_over_tokens import Divergence
from jaxkd.kernels.kernel_math import LOWEST, log_probability, term_and_slope_of
from jaxkd.kernels.reference import RowOptions, RowResult, hard_loss
from jaxkd.logits.sources import Place

# Knobs. Block size and warps change an H100's time by less than 10 %.
BLOCK = 2048  # columns in flight, a power of two
NUM_WARPS = 8
NUM_STAGES = 2
INTERPRET = False  # run the kernel as JAX operations on any device, to debug it

# Device code. A `Segment` is a range of columns (start, stop, student has them, teacher has them, softly compared).
Segment = tuple[int, int, bool, bool, bool]


def _segments(student_width: int, teacher_width: int, vocabulary: str) -> list[Segment]:
    common = min(student_width, teacher_width)
    compared = vocabulary == "mask"
    segments = [(0, common, True, True, True)]
    if student_width > common:
        segments.append((common, student_width, True, False, compared))
    if teacher_width > common and compared:
        segments.append((common, teacher_width, False, True, compared))
    return segments


def _sweep(segment: Segment, block: int, body: Callable[..., Any], carry: Any) -> Any:
    """``body(start, mask, carry)`` over the blocks of a segment. The last block is moved back to end with the segment,
    and its mask leaves out the columns that were seen: no access is ever outside the row."""
    start, stop = segment[:2]

    def step(i: jax.Array, carry: Any) -> Any:
        first = start + i * block
        at = jnp.minimum(first, stop - block)
        return body(at, at + jnp.arange(block, dtype=jnp.int32) >= first, carry)

    return jax.lax.fori_loop(0, pl.cdiv(stop - start, block), step, carry)


def _add_to_normalizer(z: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Running maximum and sum of exponentials of each lane, at one exponential an element."""
    largest, total = state
    d = z - largest
    e = jnp.exp(-jnp.abs(d))
    return jnp.maximum(largest, z), jnp.where(d > 0, total * e + 1, total + e)


def _normalizer(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The row's largest logit and the logarithm of the sum of exp(z - it)."""
    largest, total = state
    top = jnp.max(largest)
    return top, jnp.log(jnp.sum(total * jnp.exp(largest - top)))


def _kernel(
    student_ref,  # (V,) one row
    teacher_ref,  # (Vt,)
    label_ref,  # () and so on: scalars
    soft_scale_ref,
    hard_scale_ref,
    temperature_ref,
    *refs,  # the divergence's parameters; the place of the gradient, its first row () and all rows there; outputs: soft
    # (), top (), log_total () and these rows once more
    term_and_slope: Callable[..., tuple[jax.Array, jax.Array]],
    num_parameters: int,
    options: RowOptions,
    block: int,
):
    has_gradient = options.gradient_dtype is not None
    parameters, refs = [ref[...] for ref in refs[:num_parameters]], refs[num_parameters:]
    target, refs = refs[: 2 * has_gradient], refs[2 * has_gradient :]
    soft_ref, top_ref, log_total_ref, *gradient_ref = refs
    segments = _segments(student_ref.shape[0], teacher_ref.shape[0], options.vocabulary)
    inverse_temperature = 1 / temperature_ref[...]
    one_normalizer = not options.is_tempered and all(compared for *_, compared in segments)

    def load(ref: Any, at: jax.Array, mask: jax.Array, present: bool) -> jax.Array:
        if not present:
            return jnp.full((block,), -jnp.inf, jnp.float32)
        return plgpu.load(ref.at[pl.ds(at, block)], mask=mask, other=-jnp.inf)

    # Pass 1: normalisers of student and teacher at the temperature, and of the student without it.
    start = jnp.full((block,), LOWEST, jnp.float32), jnp.zeros((block,), jnp.float32)
    student_state, teacher_state, plain_state = start, start, start
    for segment in segments:
        *_, in_student, in_teacher, compared = segment

        def normalize(at, mask, states, in_student=in_student, in_teacher=in_teacher, compared=compared):
            student_state, teacher_state, plain_state = states
            if in_student:
                z = load(student_ref, at, mask, True)
                if compared:
                    student_state = _add_to_normalizer(z * inverse_temperature, student_state)
                if not one_normalizer and options.has_labels:
                    plain_state = _add_to_normalizer(z, plain_state)
            if in_teacher:
                teacher_state = _add_to_normalizer(
                    load(teacher_ref, at, mask, True) * inverse_temperature, teacher_state
                )
            return student_state, teacher_state, plain_state

        student_state, teacher_state, plain_state = _sweep(
            segment, block, normalize, (student_state, teacher_state, plain_state)
        )
    student_normalizer, teacher_normalizer = _normalizer(student_state), _normalizer(teacher_state)
    plain_normalizer = student_normalizer if one_normalizer else _normalizer(plain_state)
    top_ref[...], log_total_ref[...] = plain_normalizer

    def log_probabilities(at, mask, in_student, in_teacher):
        z_q = load(student_ref, at, mask, in_student) * inverse_temperature
        z_p = load(teacher_ref, at, mask, in_teacher) * inverse_temperature
        return log_probability(z_p, teacher_normalizer), log_probability(z_q, student_normalizer)

    # Pass 2: the loss and the sum of the slopes.
    term_sum, slope_sum = jnp.zeros((block,), jnp.float32), jnp.zeros((block,), jnp.float32)
    for segment in segments:
        *_, in_student, in_teacher, compared = segment
        if not compared:
            continue

        def add(at, mask, sums, in_student=in_student, in_teacher=in_teacher):
            term, slope = term_and_slope(*log_probabilities(at, mask, in_student, in_teacher), *parameters)
            return sums[0] + jnp.where(mask, term, 0), sums[1] + jnp.where(mask, slope, 0)

        term_sum, slope_sum = _sweep(segment, block, add, (term_sum, slope_sum))
    soft_ref[...] = jnp.maximum(jnp.sum(term_sum), 0)
    if not gradient_ref:
        return

    # Pass 3: the gradient.
    row = target[0][...] + pl.program_id(0)
    slope_total = jnp.sum(slope_sum)
    label, hard_scale = label_ref[...], hard_scale_ref[...]
    soft_scale = soft_scale_ref[...] * inverse_temperature
    for segment in segments:
        *_, in_student, in_teacher, compared = segment
        if not in_student:
            continue

        def write(at, mask, carry, in_teacher=in_teacher, compared=compared):
            d = jnp.zeros((block,), jnp.float32)
            if compared:
                log_p, log_q = log_probabilities(at, mask, True, in_teacher)
                _, slope = term_and_slope(log_p, log_q, *parameters)
                d = jnp.where(soft_scale == 0, 0, soft_scale * (slope - jnp.exp(log_q) * slope_total))
            if options.has_labels:
                q = jnp.exp(log_probability(load(student_ref, at, mask, True), plain_normalizer))
                one_hot = at + jnp.arange(block, dtype=jnp.int32) == label
                d = d + jnp.where(hard_scale == 0, 0, hard_scale * jnp.where(one_hot, q - 1, q))
            plgpu.store(gradient_ref[0].at[row, pl.ds(at, block)], d.astype(gradient_ref[0].dtype), mask=mask)
            return carry

        _sweep(segment, block, write, 0)


# Host code.


def row_losses(
    student: Float[Array, "C V"],
    teacher: Float[Array, "C Vt"],
    labels: Int[Array, " C"],
    soft_scale: Float[Array, " C"],
    hard_scale: Float[Array, " C"],
    temperature: Float[Array, ""],
    divergence: Divergence,
    options: RowOptions,
    place: Place | None = None,
) -> RowResult:
    """`reference.row_losses` as one kernel: float32 logits in, losses and a gradient of any floating type out."""
    rows, width = student.shape
    teacher_width = teacher.shape[1]
    block = min(BLOCK, largest_power_of_two(min(width, teacher_width)))
    parameters = [jnp.asarray(x, jnp.float32).reshape(1) for x in divergence.parameters]

    def row(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, width), lambda i: (i, 0))

    each_row = pl.BlockSpec((None,), lambda i: (i,))
    everywhere = pl.BlockSpec((None,), lambda i: (0,))
    numbers = jax.ShapeDtypeStruct((rows,), jnp.float32)
    out_shape, out_specs = [numbers] * 3, [each_row] * 3
    target: list[jax.Array] = []
    target_specs, aliases = [], {}
    if options.gradient_dtype is not None:
        place = place or Place.alone(rows, width, options.gradient_dtype)
        all_rows = pl.BlockSpec(place.rows.shape, lambda i: (0, 0))
        target, target_specs = [jnp.reshape(place.first, (1,)), place.rows], [everywhere, all_rows]
        aliases = {6 + len(parameters) + 1: len(out_shape)}  # no copy is made of the rows
        out_shape.append(jax.ShapeDtypeStruct(place.rows.shape, place.rows.dtype))
        out_specs.append(all_rows)

    soft, top, log_total, *gradient = pl.pallas_call(
        partial(
            _kernel,
            term_and_slope=term_and_slope_of(divergence),
            num_parameters=len(parameters),
            options=options,
            block=block,
        ),
        grid=(rows,),
        in_specs=[row(width), row(teacher_width), each_row, each_row, each_row, everywhere]
        + [everywhere] * len(parameters)
        + target_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
        interpret=INTERPRET,
        name="jaxkd_rows",
    )(
        student,
        teacher,
        labels.astype(jnp.int32),
        soft_scale,
        hard_scale,
        jnp.reshape(temperature, (1,)),
        *parameters,
        *target,
    )
    hard = hard_loss(student, top, log_total, labels) if options.has_labels else jnp.zeros_like(soft)
    return soft, hard, gradient[0] if gradient else None


def largest_power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)
