"""The rows of one chunk as a Pallas kernel, lowered through Triton: one program a row, for any sum over tokens.

The twin of `reference`, with its signature. It reads a row of float32 logits once for the log-sum-exps, once more for
the sums of the term and of the slope of a soft loss, and once for a gradient, which it writes once, in the type of the
matrix products that follow.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxkd.kernels.kernel_call import parameters_in, result_of, rows_in, rows_out, scalars_in
from jaxkd.kernels.kernel_math import LOWEST, outer_and_slope_of, term_and_slope_of
from jaxkd.kernels.signature import ChunkRows, LogSumExp, RowOptions, RowResult
from jaxkd.logits import Place

# Knobs. Block size and warps change an H100's time by less than 10 %.
BLOCK = 2048  # columns in flight, a power of two
NUM_WARPS = 8
NUM_STAGES = 2
INTERPRET = False  # run the kernel as JAX operations on any device, to debug it

# Device code.


class _Refs(NamedTuple):
    """What a program is given: its row, or what serves all rows. What a call has no use for is None."""

    student: Any  # (V,)
    top: Any  # (), as all numbers
    log_total: Any
    temperature: Any
    teacher: Any = None  # (Vt,)
    parameters: Sequence[Any] = ()  # of the divergence
    soft_scale: Any = None
    soft: Any = None
    student_top: Any = None
    student_log_total: Any = None
    teacher_top: Any = None
    teacher_log_total: Any = None
    slope_sum: Any = None
    outer_slope: Any = None
    label: Any = None
    label_logit: Any = None
    hard_scale: Any = None
    label_smoothing: Any = None
    z_loss: Any = None
    distance_sum: Any = None
    first_row: Any = None  # of the gradient's place
    gradient: Any = None  # all rows of the place


class _Segment(NamedTuple):
    """A range of columns."""

    start: int
    stop: int
    in_student: bool
    in_teacher: bool
    is_compared: bool  # softly


def _segments(student_width: int, teacher_width: int | None, vocabulary: str) -> list[_Segment]:
    if teacher_width is None:
        return [_Segment(0, student_width, True, False, True)]
    common = min(student_width, teacher_width)
    is_compared = vocabulary == "mask"
    segments = [_Segment(0, common, True, True, True)]
    if student_width > common:
        segments.append(_Segment(common, student_width, True, False, is_compared))
    if teacher_width > common and is_compared:
        segments.append(_Segment(common, teacher_width, False, True, is_compared))
    return segments


def _sweep(segment: _Segment, block: int, body: Callable[..., Any], carry: Any) -> Any:
    """``body(start, mask, carry)`` over the blocks of a segment. The last block is moved back to end with the segment,
    and its mask leaves out the columns that were seen: no access is ever outside the row."""

    def step(i: jax.Array, carry: Any) -> Any:
        first = segment.start + i * block
        at = jnp.minimum(first, segment.stop - block)
        return body(at, at + jnp.arange(block, dtype=jnp.int32) >= first, carry)

    return jax.lax.fori_loop(0, pl.cdiv(segment.stop - segment.start, block), step, carry)


class _RunningSum(NamedTuple):
    """Of each lane: the largest logit so far, and the sum of exp(z - it)."""

    largest: jax.Array  # (block,)
    total: jax.Array

    def add(self, z: jax.Array) -> "_RunningSum":
        """With one exponential an element."""
        d = z - self.largest
        e = jnp.exp(-jnp.abs(d))
        return _RunningSum(jnp.maximum(self.largest, z), jnp.where(d > 0, self.total * e + 1, self.total + e))

    def log_sum_exp(self) -> LogSumExp:
        """Of the row."""
        top = jnp.max(self.largest)
        return LogSumExp(top, jnp.log(jnp.sum(self.total * jnp.exp(self.largest - top))))


def _kernel(
    *refs,
    in_names: Sequence[str],
    out_names: Sequence[str],
    term_and_slope: Callable[..., tuple[jax.Array, jax.Array]] | None,
    outer_and_slope: Callable[..., tuple[jax.Array, jax.Array]] | None,
    options: RowOptions,
    block: int,
):
    first_out = len(refs) - len(out_names)  # before the outputs come the divergence's parameters
    named = dict(zip(in_names, refs, strict=False)) | dict(zip(out_names, refs[first_out:], strict=True))
    named.pop("place", None)  # an output too
    row = _Refs(**named, parameters=refs[len(in_names) : first_out])
    parameters = [ref[...] for ref in row.parameters]
    teacher_width = None if row.teacher is None else row.teacher.shape[0]
    segments = _segments(row.student.shape[0], teacher_width, options.vocabulary)
    inverse_temperature = 1 / row.temperature[...]
    has_soft = term_and_slope is not None
    hard_factor = inverse_temperature if options.tempers_labels else 1.0
    # Whether the student's softmax is the same for the soft and the hard loss.
    is_same = has_soft and not options.has_plain_sums and all(segment.is_compared for segment in segments)

    def load(ref: Any, at: jax.Array, mask: jax.Array, present: bool) -> jax.Array:
        if not present:
            return jnp.full((block,), -jnp.inf, jnp.float32)
        return plgpu.load(ref.at[pl.ds(at, block)], mask=mask, other=-jnp.inf)

    # Pass 1: log-sum-exps of student and teacher at the temperature, and of the student as the hard loss has it.
    zeros = jnp.zeros((block,), jnp.float32)
    start = _RunningSum(jnp.full((block,), LOWEST, jnp.float32), zeros)
    sums = (start, start, start, zeros)
    for segment in segments:

        def add_logits(at, mask, sums, segment=segment):
            student_sum, teacher_sum, plain_sum, distance_sum = sums
            if segment.in_student:
                z = load(row.student, at, mask, True)
                if has_soft and segment.is_compared:
                    student_sum = student_sum.add(z * inverse_temperature)
                if not is_same:
                    plain_sum = plain_sum.add(z * hard_factor)
                if row.distance_sum is not None:
                    distance_sum += jnp.where(mask, z - row.label_logit[...], 0)
            if segment.in_teacher:
                teacher_sum = teacher_sum.add(load(row.teacher, at, mask, True) * inverse_temperature)
            return student_sum, teacher_sum, plain_sum, distance_sum

        sums = _sweep(segment, block, add_logits, sums)
    student_lse, teacher_lse = sums[0].log_sum_exp(), sums[1].log_sum_exp()
    plain_lse = student_lse if is_same else sums[2].log_sum_exp()
    row.top[...], row.log_total[...] = plain_lse
    if row.distance_sum is not None:
        row.distance_sum[...] = jnp.sum(sums[3])
    if row.student_top is not None:
        row.student_top[...], row.student_log_total[...] = student_lse
    if row.teacher_top is not None:
        row.teacher_top[...], row.teacher_log_total[...] = teacher_lse

    def log_probabilities(at, mask, segment):
        log_q = student_lse.log_probability(load(row.student, at, mask, segment.in_student) * inverse_temperature)
        if row.teacher is None:
            return log_q, log_q
        z_p = load(row.teacher, at, mask, segment.in_teacher) * inverse_temperature
        return teacher_lse.log_probability(z_p), log_q

    # Pass 2: the loss and the sum of the slopes.
    term_sum, slope_sum = zeros, zeros
    for segment in segments if has_soft else ():
        if not segment.is_compared:
            continue

        def add(at, mask, sums, segment=segment):
            assert term_and_slope is not None
            term, slope = term_and_slope(*log_probabilities(at, mask, segment), *parameters)
            return sums[0] + jnp.where(mask, term, 0), sums[1] + jnp.where(mask, slope, 0)

        term_sum, slope_sum = _sweep(segment, block, add, (term_sum, slope_sum))
    slope_total = jnp.sum(slope_sum)
    outer_slope: Any = 1.0
    if outer_and_slope is not None:
        row.soft[...], outer_slope = outer_and_slope(jnp.sum(term_sum), *parameters)
    if row.outer_slope is not None:
        row.outer_slope[...] = outer_slope
    if row.slope_sum is not None:
        row.slope_sum[...] = slope_total
    if row.gradient is None:
        return

    # Pass 3: the gradient.
    place = row.first_row[...] + pl.program_id(0)
    if has_soft:
        soft_scale = row.soft_scale[...] * inverse_temperature
        soft_scale = jnp.where(soft_scale == 0, 0.0, soft_scale * outer_slope)
    if options.has_labels:
        label, hard_scale, smoothing, q_factor = row.label[...], row.hard_scale[...] * hard_factor, 0.0, 1.0
        if row.label_smoothing is not None:
            smoothing = row.label_smoothing[...]
        if row.z_loss is not None:
            q_factor = 1 + 2 * row.z_loss[...] * plain_lse.value
        elsewhere = smoothing / row.student.shape[0]  # what smoothing makes of the target
        at_label = 1 - smoothing + elsewhere
    for segment in segments:
        if not segment.in_student:
            continue

        def write(at, mask, carry, segment=segment):
            d = zeros
            if term_and_slope is not None and segment.is_compared:
                log_p, log_q = log_probabilities(at, mask, segment)
                _, slope = term_and_slope(log_p, log_q, *parameters)
                d = jnp.where(soft_scale == 0, 0, soft_scale * (slope - jnp.exp(log_q) * slope_total))
            if options.has_labels:
                z = load(row.student, at, mask, True) * hard_factor
                q = jnp.exp(plain_lse.log_probability(z)) * q_factor
                one_hot = at + jnp.arange(block, dtype=jnp.int32) == label
                d = d + jnp.where(hard_scale == 0, 0, hard_scale * jnp.where(one_hot, q - at_label, q - elsewhere))
            plgpu.store(row.gradient.at[place, pl.ds(at, block)], d.astype(row.gradient.dtype), mask=mask)
            return carry

        _sweep(segment, block, write, 0)


# Host code.


def row_losses(rows: ChunkRows, options: RowOptions, place: Place | None = None) -> RowResult:
    """`reference.row_losses` as one kernel: float32 logits in, losses and a gradient of any floating type out."""
    num_rows, width = rows.student.shape
    logits = {"student": rows.student} | ({} if rows.teacher is None else {"teacher": rows.teacher})
    block = min(BLOCK, largest_power_of_two(min(z.shape[1] for z in logits.values())))
    each_row = pl.BlockSpec((None,), lambda i: (i,))
    everywhere = pl.BlockSpec((None,), lambda i: (0,))

    inputs, specs = (
        dict(logits),
        {name: pl.BlockSpec((None, z.shape[1]), lambda i: (i, 0)) for name, z in logits.items()},
    )
    for numbers, spec in ((rows_in(rows, options), each_row), (scalars_in(rows, options), everywhere)):
        inputs |= numbers
        specs |= dict.fromkeys(numbers, spec)
    out_names = list(rows_out(rows, options))
    out_shape: list[Any] = [jax.ShapeDtypeStruct((num_rows,), jnp.float32)] * len(out_names)
    out_specs, aliases = [each_row] * len(out_names), {}
    if options.gradient_dtype is not None:
        place = place or Place.alone(num_rows, width, options.gradient_dtype)
        all_rows = pl.BlockSpec(place.rows.shape, lambda i: (0, 0))
        inputs |= {"first_row": jnp.reshape(place.first, (1,)), "place": place.rows}
        specs |= {"first_row": everywhere, "place": all_rows}
        aliases = {len(inputs) - 1: len(out_names)}  # the rows of the place, of which no copy is made
        out_names.append("gradient")
        out_shape.append(jax.ShapeDtypeStruct(place.rows.shape, place.rows.dtype))
        out_specs.append(all_rows)
    parameters = parameters_in(rows)

    outputs = pl.pallas_call(
        partial(
            _kernel,
            in_names=tuple(inputs),
            out_names=tuple(out_names),
            term_and_slope=None if rows.divergence is None else term_and_slope_of(rows.divergence),
            outer_and_slope=None if rows.divergence is None else outer_and_slope_of(rows.divergence),
            options=options,
            block=block,
        ),
        grid=(num_rows,),
        in_specs=[*specs.values(), *[everywhere] * len(parameters)],
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
        interpret=INTERPRET,
        name="jaxkd_rows",
    )(*inputs.values(), *parameters)
    numbers = dict(zip(out_names, outputs, strict=True))
    gradient = numbers.pop("gradient", None)
    return result_of(rows, options, numbers, gradient)


def largest_power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)
