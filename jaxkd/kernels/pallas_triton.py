"""The rows of one chunk as a Pallas kernel, lowered through Triton: one program a row, for any sum over tokens.

The twin of `reference`, with its signature. It reads a row of float32 logits three times (log-sum-exps; sums of the
term and of the slope; gradient) and writes the gradient once, in the type of the matrix products that follow.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxkd.kernels.kernel_math import LOWEST, LogSumExp, log_probability, term_and_slope_of
from jaxkd.kernels.reference import hard_loss
from jaxkd.kernels.signature import ChunkRows, RowOptions, RowResult
from jaxkd.logits import Place

# Knobs. Block size and warps change an H100's time by less than 10 %.
BLOCK = 2048  # columns in flight, a power of two
NUM_WARPS = 8
NUM_STAGES = 2
INTERPRET = False  # run the kernel as JAX operations on any device, to debug it

# Device code.


class _Refs(NamedTuple):
    """What a program is given: its row, or what serves all rows."""

    student: Any  # (V,)
    teacher: Any  # (Vt,)
    label: Any  # () and so on: scalars
    soft_scale: Any
    hard_scale: Any
    temperature: Any
    parameters: Sequence[Any]  # of the divergence
    first_row: Any  # of the gradient's place, (); None without a gradient
    soft: Any  # outputs, ()
    top: Any
    log_total: Any
    gradient: Any  # all rows of the place; None without a gradient

    @classmethod
    def of(cls, refs: Sequence[Any], num_parameters: int, has_gradient: bool) -> "_Refs":
        """From the order in which the kernel is called: inputs, the place as an input, outputs."""
        rows, refs = refs[:6], refs[6:]
        parameters, refs = refs[:num_parameters], refs[num_parameters:]
        if not has_gradient:
            return cls._make((*rows, parameters, None, *refs, None))
        first_row, _, *outputs = refs  # the rows of the place are an output too
        return cls._make((*rows, parameters, first_row, *outputs))


class _Segment(NamedTuple):
    """A range of columns."""

    start: int
    stop: int
    in_student: bool
    in_teacher: bool
    is_compared: bool  # softly


def _segments(student_width: int, teacher_width: int, vocabulary: str) -> list[_Segment]:
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
    term_and_slope: Callable[..., tuple[jax.Array, jax.Array]],
    is_nonnegative: bool,
    num_parameters: int,
    options: RowOptions,
    block: int,
):
    row = _Refs.of(refs, num_parameters, options.gradient_dtype is not None)
    parameters = [ref[...] for ref in row.parameters]
    segments = _segments(row.student.shape[0], row.teacher.shape[0], options.vocabulary)
    inverse_temperature = 1 / row.temperature[...]
    is_same = not options.is_tempered and all(segment.is_compared for segment in segments)  # softly and hard

    def load(ref: Any, at: jax.Array, mask: jax.Array, present: bool) -> jax.Array:
        if not present:
            return jnp.full((block,), -jnp.inf, jnp.float32)
        return plgpu.load(ref.at[pl.ds(at, block)], mask=mask, other=-jnp.inf)

    # Pass 1: log-sum-exps of student and teacher at the temperature, and of the student without it.
    start = _RunningSum(jnp.full((block,), LOWEST, jnp.float32), jnp.zeros((block,), jnp.float32))
    sums = (start, start, start)
    for segment in segments:

        def add_logits(at, mask, sums, segment=segment):
            student_sum, teacher_sum, plain_sum = sums
            if segment.in_student:
                z = load(row.student, at, mask, True)
                if segment.is_compared:
                    student_sum = student_sum.add(z * inverse_temperature)
                if not is_same and options.has_labels:
                    plain_sum = plain_sum.add(z)
            if segment.in_teacher:
                teacher_sum = teacher_sum.add(load(row.teacher, at, mask, True) * inverse_temperature)
            return student_sum, teacher_sum, plain_sum

        sums = _sweep(segment, block, add_logits, sums)
    student_lse, teacher_lse = sums[0].log_sum_exp(), sums[1].log_sum_exp()
    plain_lse = student_lse if is_same else sums[2].log_sum_exp()
    row.top[...], row.log_total[...] = plain_lse

    def log_probabilities(at, mask, segment):
        z_q = load(row.student, at, mask, segment.in_student) * inverse_temperature
        z_p = load(row.teacher, at, mask, segment.in_teacher) * inverse_temperature
        return log_probability(z_p, teacher_lse), log_probability(z_q, student_lse)

    # Pass 2: the loss and the sum of the slopes.
    term_sum, slope_sum = jnp.zeros((block,), jnp.float32), jnp.zeros((block,), jnp.float32)
    for segment in segments:
        if not segment.is_compared:
            continue

        def add(at, mask, sums, segment=segment):
            term, slope = term_and_slope(*log_probabilities(at, mask, segment), *parameters)
            return sums[0] + jnp.where(mask, term, 0), sums[1] + jnp.where(mask, slope, 0)

        term_sum, slope_sum = _sweep(segment, block, add, (term_sum, slope_sum))
    soft = jnp.sum(term_sum)
    row.soft[...] = jnp.maximum(soft, 0) if is_nonnegative else soft
    if row.gradient is None:
        return

    # Pass 3: the gradient.
    place = row.first_row[...] + pl.program_id(0)
    slope_total = jnp.sum(slope_sum)
    label, hard_scale = row.label[...], row.hard_scale[...]
    soft_scale = row.soft_scale[...] * inverse_temperature
    for segment in segments:
        if not segment.in_student:
            continue

        def write(at, mask, carry, segment=segment):
            d = jnp.zeros((block,), jnp.float32)
            if segment.is_compared:
                log_p, log_q = log_probabilities(at, mask, segment)
                _, slope = term_and_slope(log_p, log_q, *parameters)
                d = jnp.where(soft_scale == 0, 0, soft_scale * (slope - jnp.exp(log_q) * slope_total))
            if options.has_labels:
                q = jnp.exp(log_probability(load(row.student, at, mask, True), plain_lse))
                one_hot = at + jnp.arange(block, dtype=jnp.int32) == label
                d = d + jnp.where(hard_scale == 0, 0, hard_scale * jnp.where(one_hot, q - 1, q))
            plgpu.store(row.gradient.at[place, pl.ds(at, block)], d.astype(row.gradient.dtype), mask=mask)
            return carry

        _sweep(segment, block, write, 0)


# Host code.


def row_losses(rows: ChunkRows, options: RowOptions, place: Place | None = None) -> RowResult:
    """`reference.row_losses` as one kernel: float32 logits in, losses and a gradient of any floating type out."""
    num_rows, width = rows.student.shape
    teacher_width = rows.teacher.shape[1]
    block = min(BLOCK, largest_power_of_two(min(width, teacher_width)))
    parameters = [jnp.asarray(x, jnp.float32).reshape(1) for x in rows.divergence.parameters]

    def row(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, width), lambda i: (i, 0))

    each_row = pl.BlockSpec((None,), lambda i: (i,))
    everywhere = pl.BlockSpec((None,), lambda i: (0,))
    numbers = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    out_shape, out_specs = [numbers] * 3, [each_row] * 3
    target: list[jax.Array] = []
    target_specs, aliases = [], {}
    if options.gradient_dtype is not None:
        place = place or Place.alone(num_rows, width, options.gradient_dtype)
        all_rows = pl.BlockSpec(place.rows.shape, lambda i: (0, 0))
        target, target_specs = [jnp.reshape(place.first, (1,)), place.rows], [everywhere, all_rows]
        aliases = {6 + len(parameters) + 1: len(out_shape)}  # the rows of the place, of which no copy is made
        out_shape.append(jax.ShapeDtypeStruct(place.rows.shape, place.rows.dtype))
        out_specs.append(all_rows)

    soft, top, log_total, *gradient = pl.pallas_call(
        partial(
            _kernel,
            term_and_slope=term_and_slope_of(rows.divergence),
            is_nonnegative=rows.divergence.is_nonnegative,
            num_parameters=len(parameters),
            options=options,
            block=block,
        ),
        grid=(num_rows,),
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
        rows.student,
        rows.teacher,
        rows.labels.astype(jnp.int32),
        rows.soft_scale,
        rows.hard_scale,
        jnp.reshape(rows.temperature, (1,)),
        *parameters,
        *target,
    )
    hard = hard_loss(rows, LogSumExp(top, log_total), options)
    return soft, hard, gradient[0] if gradient else None


def largest_power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)
