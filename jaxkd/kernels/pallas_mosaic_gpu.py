"""The rows of one chunk as a Pallas kernel for Hopper, lowered through Mosaic GPU: each logit is read once.

The twin of `reference`, with its signature, for one head and for two. A cluster of thread blocks takes one row: each
copies its part of the logits into shared memory, but for what its registers hold, and they stay there for all passes;
the blocks send each other a few sums (of exponentials; then the loss and the sum of the slopes). Logarithms are to the
base 2, which the GPU has instructions for.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from jaxkd.divergences import Divergence
from jaxkd.kernels.cluster_reduce import PARTS, cluster_all_gather, cluster_wait, exchange_memory, init_exchanges
from jaxkd.kernels.kernel_call import parameters_in, result_of, rows_in, rows_out, scalars_in
from jaxkd.kernels.kernel_math import LOG2E, base_2_term_and_slope_of, outer_and_slope_of
from jaxkd.kernels.reference import num_tokens
from jaxkd.kernels.row_parts import ALIGNMENT, BESIDE_LOGITS, Logits, Parts, Row
from jaxkd.kernels.running_log_sum_exp import RunningLogSumExp, merged
from jaxkd.kernels.signature import ChunkRows, RowOptions, RowResult
from jaxkd.kernels.thread_values import (
    STEP,
    columns_of,
    repeat_in_thread,
    step_of,
    store_below,
    store_first,
    thread_reduce,
    thread_value,
    warp_reduce,
)
from jaxkd.logits import Place

__all__ = ["ALIGNMENT", "PARTS", "SHARED_MEMORY", "last_part_width", "row_losses", "shared_memory"]

SHARED_MEMORY = 227 * 1024  # bytes of a block on Hopper


def last_part_width(width: int) -> int:
    return Parts.of(width, 2).last_columns


def shared_memory(width: int, num_heads: int = 2) -> int:
    """Bytes of shared memory of a block."""
    return num_heads * 4 * Parts.of(width, num_heads).memory_columns + BESIDE_LOGITS


# Device code.


class _Refs(NamedTuple):
    """What a block is given: device memory, of all rows, and its shared memory. What a call has no use for is None."""

    student: Any  # (N V,)
    parameters: Sequence[Any]  # of the divergence, (1,)
    temperature: Any  # (1,)
    top: Any  # an output, (N,), as all numbers of rows
    log_total: Any
    student_memory: Any
    exchange: Any  # shared memory too, for `cluster_all_gather`
    arrived: Any  # barriers of the copies
    teacher: Any = None
    teacher_memory: Any = None
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
    place: Any = None  # all its rows, flat


class _Numbers:
    """The scalars of a row. All are read before anything is waited for."""

    def __init__(self, refs: _Refs, row: Row, options: RowOptions):
        def of_row(ref: Any) -> Any:
            return None if ref is None else ref[row.index]

        def of_all(ref: Any) -> Any:
            return None if ref is None else ref[0]

        inverse = 1 / refs.temperature[0] if options.is_tempered else jnp.float32(1)
        self.parameters = [ref[0] for ref in refs.parameters]
        # What multiplies logits, and the loss of them.
        self.soft_factor, self.hard_factor = inverse * LOG2E, jnp.float32(LOG2E)
        self.soft_scale, self.hard_scale = of_row(refs.soft_scale), of_row(refs.hard_scale)
        if self.soft_scale is not None:
            self.soft_scale *= inverse
        if options.tempers_labels:
            self.hard_factor = self.soft_factor
            if self.hard_scale is not None:
                self.hard_scale *= inverse
        self.label, self.label_logit = of_row(refs.label), of_row(refs.label_logit)
        self.label_smoothing, self.z_loss = of_all(refs.label_smoothing), of_all(refs.z_loss)
        if refs.place is not None:
            self.place = refs.first_row[0] * row.parts.width + row.offset


class _Block:
    """One part of one row, and what is known of the row."""

    def __init__(self, refs: _Refs, options: RowOptions, parts: Parts, counts: Sequence[int], form: "_Soft | None"):
        self.refs, self.options, self.counts, self.form = refs, options, counts, form
        self.row = row = Row(parts)
        init_exchanges(refs.exchange, counts)
        self.student, self.teacher = Logits(row, refs.student, refs.student_memory), None
        self.sides = [self.student]
        if refs.teacher is not None:
            self.teacher = Logits(row, refs.teacher, refs.teacher_memory)
            self.sides.append(self.teacher)
        row.of_each_width(self._copy_in)
        for side in self.sides:
            side.hold()
        self.numbers = numbers = _Numbers(refs, row, options)

        # Which log-sum-exps are needed: of student and teacher at the temperature, and of the student as the hard loss
        # has it, if that is another.
        wanted = {"student": (self.student, numbers.soft_factor)} if form is not None else {}
        if self.teacher is not None:
            wanted["teacher"] = self.teacher, numbers.soft_factor
        if form is not None and not options.has_plain_sums:
            self.plain = "student"
        else:
            self.plain = "plain"
            wanted["plain"] = self.student, numbers.hard_factor
        self.wanted = wanted

    def _copy_in(self, columns: int) -> None:
        for copy in range(len(self.row.parts.copies(columns))):
            for side in self.sides:
                side.copy_in(copy, columns, self.refs.arrived.at[copy])

    def log_sum_exps(self) -> jax.Array | None:
        """Pass 1. Returns the sum of the distances to the label's logit, if that is asked for."""
        factors = [factor for _, factor in self.wanted.values()]
        has_distances = self.refs.distance_sum is not None

        def add_logits(step, carry):
            lses, distances = carry
            logits = {side: side.read(step) for side in self.sides}
            tops = {side: thread_reduce(z, arith.maximumf) for side, z in logits.items()}
            if has_distances:
                distance = logits[self.student] - self.numbers.label_logit
                distances += jnp.where(self.row.is_token(step), distance, 0.0)
            return [
                lse.add(logits[side], tops[side], factor)
                for lse, (side, factor) in zip(lses, self.wanted.values(), strict=True)
            ], distances

        carry: Any = [RunningLogSumExp.nothing(factor) for factor in factors], step_of(0.0) if has_distances else ()
        for step in range(self.row.parts.held):
            carry = add_logits(step, carry)
        copies = self.row.parts.copies(self.row.parts.columns)
        for copy, (first, end, _) in enumerate(copies):
            plgpu.barrier_wait(self.refs.arrived.at[copy])
            if copy == len(copies) - 1:
                for side in self.sides:
                    side.fill()
            carry = self.row.loop(first, end, add_logits, carry)

        lses, distances = carry
        values = [x for lse in merged([[lse] for lse in lses], factors) for x in (lse.top, lse.total)]
        if has_distances:
            values += warp_reduce([thread_reduce(distances, arith.addf)], arith.addf)
        cluster_wait()
        received = cluster_all_gather(values, self.refs.exchange, self.counts, 0)
        of_warps = [
            [RunningLogSumExp.of(top, total, factor) for top, total in zip(*received[2 * i : 2 * i + 2], strict=True)]
            for i, factor in enumerate(factors)
        ]
        self.lses: dict[str, RunningLogSumExp] = dict(zip(self.wanted, merged(of_warps, factors), strict=True))
        if not has_distances:
            return None
        return warp_reduce([functools.reduce(jnp.add, received[-1])], arith.addf)[0]

    def log2_probability(self, name: str, step: jax.Array | int) -> jax.Array:
        side, factor = self.wanted[name]
        return self.lses[name].log2_probability(side.read(step), factor)

    def soft(self, step: jax.Array | int) -> tuple[Any, Any, Any]:
        """Term, slope and the student's probabilities; None without a soft loss."""
        if self.form is None:
            return None, None, None
        log_q = self.log2_probability("student", step)
        log_p = log_q if self.teacher is None else self.log2_probability("teacher", step)
        return *self.form.term_and_slope(log_p, log_q, *self.numbers.parameters), jnp.exp2(log_q)

    def if_scaled(self, x: Any) -> Any:
        """0 where the scale of the soft loss is, whatever ``x`` is."""
        return None if x is None else jnp.where(self.numbers.soft_scale == 0, 0.0, x)

    def without_slope_sum(self, step: jax.Array | int, slope: Any, q: Any) -> Any:
        """The gradient but for what the sum of the slopes adds."""
        soft = None if slope is None else self.if_scaled(self.numbers.soft_scale * slope)
        if not self.options.has_labels:
            return soft
        hard = self._hard_gradient(step, jnp.exp2(self.log2_probability("plain", step)) if self.plain == "plain" else q)
        return hard if soft is None else soft + hard

    def _hard_gradient(self, step: jax.Array | int, q: jax.Array) -> jax.Array:
        numbers, scale, at_label = self.numbers, self.numbers.hard_scale, self.numbers.hard_scale
        d = scale * q
        if numbers.z_loss is not None:
            d *= repeat_in_thread(1 + 2 * numbers.z_loss * self.lses[self.plain].log_sum_exp())
        if numbers.label_smoothing is not None:
            d -= scale * numbers.label_smoothing / self.row.parts.num_tokens
            at_label *= 1 - numbers.label_smoothing
        is_label = columns_of(self.row.start + step * STEP) == numbers.label
        return jnp.where(scale == 0, 0.0, jnp.where(is_label, d - at_label, d))

    def write(self, step: jax.Array | int, known: jax.Array, q: Any, slope_sum: Any) -> None:
        gradient = known if q is None else known - q * (self.numbers.soft_scale * slope_sum)
        place = self.refs.place.at[pl.ds(self.numbers.place + step * STEP, STEP)]
        store_below(place, gradient.astype(self.options.gradient_dtype), self.row.columns - step * STEP)

    def sums(self) -> dict[str, jax.Array]:
        """What is returned of the log-sum-exps, by name."""
        results: dict[str, jax.Array] = {}
        for name, (_, factor) in self.wanted.items():
            lse = self.lses[name]
            results |= {f"{name}_top": lse.top, f"{name}_log_total": lse.log_total(factor)}
        return results | {part: results[f"{self.plain}_{part}"] for part in ("top", "log_total")}


class _Soft(NamedTuple):
    """What is computed of a divergence."""

    term_and_slope: Callable[..., tuple[jax.Array, jax.Array]]
    outer_and_slope: Callable[..., tuple[jax.Array, jax.Array]]
    slope_sum: float | None  # where it is known and nothing else is waited for
    has_outer: bool

    @classmethod
    def of(cls, divergence: Divergence) -> "_Soft":
        has_outer = divergence.outer is not None
        slope_sum = None if has_outer else divergence.slope_sum
        return cls(base_2_term_and_slope_of(divergence), outer_and_slope_of(divergence), slope_sum, has_outer)


def _kernel(
    *refs,
    names: Sequence[str],
    form: _Soft | None,
    options: RowOptions,
    parts: Parts,
    counts: Sequence[int],
):
    first_named = len(refs) - len(names)
    named = dict(zip(names, refs[first_named:], strict=True))
    block = _Block(_Refs(**named, parameters=refs[:first_named]), options, parts, counts, form)
    refs, row, has_gradient = block.refs, block.row, options.gradient_dtype is not None
    distance_sum = block.log_sum_exps()

    # Pass 2: the loss and the sum of the slopes. A gradient that waits for this sum alone takes the logits' place: what
    # is known of it that of the teacher's, and the student's probabilities that of the student's.
    sums_slopes = form is not None and form.slope_sum is None and (has_gradient or options.keeps_sums)
    waits = has_gradient and sums_slopes
    kept = None if form is None or form.has_outer or not waits else block.teacher

    def add(step, sums):
        term, slope, q = block.soft(step)
        if has_gradient and not waits:
            known = block.without_slope_sum(step, slope, q)
            block.write(step, known, block.if_scaled(q), block.if_scaled(form and form.slope_sum))
        elif kept is not None:
            kept.replace(step, block.without_slope_sum(step, slope, q))
            block.student.replace(step, block.if_scaled(q))
        return tuple(sum_ + x for sum_, x in zip(sums, (term, slope), strict=False))

    totals: list[jax.Array] = []
    if form is not None or has_gradient:
        sums = row.sweep(add, (step_of(0.0),) * ((form is not None) + sums_slopes))
        if sums:
            of_warp = warp_reduce([thread_reduce(x, arith.addf) for x in sums], arith.addf)
            received = cluster_all_gather(of_warp, refs.exchange, counts, 1)
            totals = warp_reduce([functools.reduce(jnp.add, x) for x in received], arith.addf)

    returned = block.sums() | ({} if distance_sum is None else {"distance_sum": distance_sum})
    if form is not None:
        soft, outer_slope = form.outer_and_slope(totals[0], *block.numbers.parameters)
        returned["soft"] = soft
        returned["outer_slope"] = outer_slope if form.has_outer else thread_value(1.0)
        returned["slope_sum"] = totals[1] if sums_slopes else thread_value(form.slope_sum or 0.0)

    # Pass 3: the gradient that waited.
    if waits:
        slope_sum = repeat_in_thread(block.if_scaled(totals[1]))
        if form and form.has_outer:
            block.numbers.soft_scale *= block.if_scaled(repeat_in_thread(returned["outer_slope"]))

        def write(step, carry):
            if kept is not None:
                known, q = kept.read(step), block.student.read(step)
            else:
                _, slope, q = block.soft(step)
                known, q = block.without_slope_sum(step, slope, q), block.if_scaled(q)
            block.write(step, known, q, slope_sum)
            return carry

        row.sweep(write, ())

    @pl.when(row.part == 0)
    def _():
        for name, value in returned.items():
            if (ref := getattr(refs, name, None)) is not None:
                store_first(ref.at[pl.ds(row.index, 1)], value)


# Host code.


def row_losses(rows: ChunkRows, options: RowOptions, place: Place | None = None) -> RowResult:
    """`reference.row_losses` as one kernel: float32 logits in, losses and a gradient of any floating type out.

    The gradient is written to its place: no copy is made of the rows there.
    """
    (num_rows, width), divergence = rows.student.shape, rows.divergence
    logits = {"student": rows.student} | ({} if rows.teacher is None else {"teacher": rows.teacher})
    inputs = {name: z.reshape(-1) for name, z in logits.items()}
    inputs |= rows_in(rows, options) | scalars_in(rows, options)
    out_names = rows_out(rows, options)
    if has_gradient := options.gradient_dtype is not None:
        place = place or Place.alone(num_rows, width, options.gradient_dtype)
        inputs |= {"first_row": jnp.reshape(place.first, (1,)), "place": place.rows.reshape(-1)}
    form = None if divergence is None else _Soft.of(divergence)
    parts = Parts.of(width, len(logits), num_tokens(rows, options))
    is_plain_soft = form is not None and not options.has_plain_sums
    num_lses = (form is not None) + (rows.teacher is not None) + (not is_plain_soft)
    counts = (2 * num_lses + ("distance_sum" in out_names), 2)  # of values that are exchanged
    scratch: dict[str, Any] = {f"{name}_memory": plgpu.SMEM((parts.memory_columns,), jnp.float32) for name in logits}
    scratch["exchange"] = plgpu.SMEM((exchange_memory(counts),), jnp.float32)
    num_copies = len(parts.copies(parts.columns))
    scratch["arrived"] = plgpu.Barrier(num_arrivals=len(logits), num_barriers=num_copies)

    kernel = plgpu.kernel(
        partial(
            _kernel,
            names=(*inputs, *out_names, *scratch),
            form=form,
            options=options,
            parts=parts,
            counts=counts,
        ),
        out_type=[jax.ShapeDtypeStruct((num_rows,), jnp.float32)] * len(out_names),
        scratch_types=list(scratch.values()),
        grid=(num_rows,),
        grid_names=("row",),
        cluster=(PARTS,),
        cluster_names=("part",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
    )
    outputs = (_in_place(kernel) if has_gradient else kernel)(*parameters_in(rows), *inputs.values())
    numbers = dict(zip(out_names, outputs, strict=False))
    if options.is_tempered:  # the kernel's largest logits are those that it was given
        tempered = {"student_top", "teacher_top"} | ({"top"} if is_plain_soft or options.tempers_labels else set())
        numbers |= {name: numbers[name] / rows.temperature for name in tempered & numbers.keys()}
    return result_of(rows, options, numbers, outputs[-1].reshape(place.rows.shape) if place else None)


def _in_place(kernel: Callable[..., Any]) -> Callable[..., tuple[jax.Array, ...]]:
    """``kernel``, which writes to its last argument, as a pure function that returns this too.

    One equation in a jaxpr: if the mutable array were seen outside, `jax.checkpoint` could drop the write to it.
    """

    @jax.custom_batching.custom_vmap
    def call(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        *others, rows = arguments
        target = jax.new_ref(rows)
        return *kernel(*others, target), jax.freeze(target)

    @jax.custom_batching.sequential_vmap
    def one_of_many(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        # XLA would fuse the kernel with the slices of a batch that it reads and writes, and such a fusion does not know
        # that a result is an argument: the gradient would be whatever its memory held.
        return jax.lax.optimization_barrier(call(*jax.lax.optimization_barrier(arguments)))

    @call.def_vmap
    def _(size: int, is_batched: list[bool], *arguments: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
        axes = [0 if x else None for x in is_batched]
        results = jax.vmap(one_of_many, axes, axis_size=size)(*arguments)
        return results, jax.tree.map(lambda _: True, results)

    return call
