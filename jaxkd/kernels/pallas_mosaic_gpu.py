"""The rows of one chunk as a Pallas kernel for Hopper, lowered through Mosaic GPU: each logit is read once.

The twin of `reference`, with its signature. A cluster of `PARTS` thread blocks takes one row: each block copies its
part of the student's and the teacher's logits into shared memory and stays there for all passes; the blocks send each
other a few sums (of exponentials; then the loss and the sum of the slopes). Logarithms are to the base 2, which the GPU
has instructions for.
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

from jaxkd.kernels.cluster_reduce import (
    CLUSTER_WARPS,
    PARTS,
    STEP,
    STRIDED,
    THREADS,
    block_barrier,
    cluster_all_gather,
    cluster_wait,
    init_barriers,
    repeat_in_thread,
    warp_reduce,
)
from jaxkd.kernels.kernel_call import result_of
from jaxkd.kernels.kernel_math import LN2, LOG2E, LOWEST, base_2_term_and_slope_of
from jaxkd.kernels.signature import ChunkRows, LogSumExp, RowOptions, RowResult
from jaxkd.logits import Place

# Knobs.
ALIGNMENT = 32  # columns: bulk copies are multiples of 128 bytes
SHARED_MEMORY = 227 * 1024  # bytes of a block on Hopper


def part_width(width: int) -> int:
    """Columns of a part; the last one has what is left."""
    return -(-width // (PARTS * ALIGNMENT)) * ALIGNMENT


def last_part_width(width: int) -> int:
    return width - (PARTS - 1) * part_width(width)


def shared_memory(width: int) -> int:
    """Bytes of shared memory of a block."""
    return 2 * 4 * padded(part_width(width)) + 7 * 4 * CLUSTER_WARPS + 1024


def padded(columns: int) -> int:
    return -(-columns // STEP) * STEP


# Device code.


class _Refs(NamedTuple):
    """What a block is given: ``gmem`` is device memory, all rows of it, ``smem`` its own shared memory."""

    student_gmem: Any  # (N V,)
    teacher_gmem: Any
    labels_gmem: Any  # (N,)
    soft_scales_gmem: Any
    hard_scales_gmem: Any
    temperature_gmem: Any  # (1,)
    parameters_gmem: Sequence[Any]  # of the divergence, (1,)
    first_row_gmem: Any  # of the gradient's place, (1,); None without a gradient
    gradient_gmem: Any  # all rows of the place, flat; None without a gradient
    soft_gmem: Any  # outputs, (N THREADS,): the first of each row's counts
    top_gmem: Any
    log_total_gmem: Any
    student_smem: Any  # (part,), padded to whole steps
    gradient_smem: Any  # over the student's; None without a gradient
    teacher_smem: Any
    first_slot_smem: Any  # where the warps' values of the first exchange arrive, and of the second
    second_slot_smem: Any
    student_arrived: Any  # barriers of the two copies
    teacher_arrived: Any
    exchange_barriers_smem: Any

    @classmethod
    def of(cls, refs: Sequence[Any], num_parameters: int, has_gradient: bool) -> "_Refs":
        """From the order in which the kernel is called: inputs, the gradient's place, outputs, shared memory."""
        rows, refs = refs[:6], refs[6:]
        parameters, refs = refs[:num_parameters], refs[num_parameters:]
        place, refs = (refs[:2], refs[2:]) if has_gradient else ((None, None), refs)
        outputs, (own, *rest) = refs[:3], refs[3:]
        student, gradient = own if has_gradient else (own, None)
        return cls._make((*rows, parameters, *place, *outputs, student, gradient, *rest))


class _Row:
    """The part of a row that a block has, and what is known of the row so far."""

    def __init__(self, refs: _Refs, options: RowOptions, width: int):
        self.refs, self.options = refs, options
        self.index, self.part = jax.lax.axis_index("row"), jax.lax.axis_index("part")
        self.columns, self.last_columns = part_width(width), last_part_width(width)
        self.is_last = self.part == PARTS - 1
        self.start = self.part * self.columns
        self.offset = self.index * width + self.start
        self.num_steps = padded(self.columns) // STEP
        self.width = width
        # Whether the student's softmax is the same for the soft and the hard loss.
        self.is_same = not options.is_tempered or not options.has_labels

    def of_each_width(self, function: Callable[[int], Any]) -> None:
        """``function`` of the columns that the part has: copies have a static size."""
        pl.when(self.is_last)(lambda: function(self.last_columns))
        pl.when(~self.is_last)(lambda: function(self.columns))

    def copy_in(self, columns: int) -> None:
        refs = self.refs
        for source, target, arrived in (
            (refs.student_gmem, refs.student_smem, refs.student_arrived),
            (refs.teacher_gmem, refs.teacher_smem, refs.teacher_arrived),
        ):
            # A promise that holds, and that makes it one bulk copy of any length.
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            here = source.at[pl.ds(self.offset, columns)]
            plgpu.copy_gmem_to_smem(here, target.at[pl.ds(0, columns)], arrived, oob_mode=in_bounds)

    def sweep(self, body: Callable[..., Any], carry: Any, first: int = 0) -> Any:
        return jax.lax.fori_loop(first, self.num_steps, lambda i, carry: body(i * STEP, carry), carry)

    def unrolled(self) -> range:
        return range(0, self.num_steps * STEP, STEP)

    def column(self, at: jax.Array | int) -> jax.Array:
        return at + plgpu.broadcasted_iota(jnp.int32, (STEP,), 0, layout=STRIDED)

    def fill(self, smem: Any) -> None:
        """What no column fills is -inf on both sides, where every term is 0: no pass needs a mask."""

        def step(at, carry):
            inside = self.column(at) < jnp.where(self.is_last, self.last_columns, self.columns)
            smem[pl.ds(at, STEP)] = jnp.where(inside, _load(smem, at), -jnp.inf)
            return carry

        self.sweep(step, (), self.last_columns // STEP)

    def log_sum_exp_of_warp(self, smem: Any, scales: list[Any]) -> list[jax.Array]:
        """The largest logit, and for each scale the sum of 2 ** ((z - largest) * scale)."""
        top = warp_reduce(
            self.sweep(lambda at, top: jnp.maximum(top, _load(smem, at)), _step_of(LOWEST)), arith.maximumf
        )
        everywhere = repeat_in_thread(top)

        def add(at, sums):
            z = _load(smem, at) - everywhere
            return tuple(sum_ + jnp.exp2(z * scale) for sum_, scale in zip(sums, scales, strict=True))

        return [top, *(warp_reduce(x, arith.addf) for x in self.sweep(add, (_step_of(0.0),) * len(scales)))]

    def copy_out(self, columns: int) -> None:
        refs = self.refs
        place = refs.gradient_gmem.at[pl.ds(refs.first_row_gmem[0] * self.width + self.offset, columns)]
        plgpu.copy_smem_to_gmem(refs.gradient_smem.at[pl.ds(0, columns)], place)

    def write(self, gradients: list[jax.Array]) -> None:
        """Into the memory of the student's logits, when all have read them, and from there out."""
        block_barrier()
        for i, values in enumerate(gradients):
            self.refs.gradient_smem[pl.ds(i * STEP, STEP)] = values
        plgpu.commit_smem()
        self.of_each_width(self.copy_out)


def _load(smem: Any, at: jax.Array | int) -> jax.Array:
    return plgpu.load(smem.at[pl.ds(at, STEP)], layout=STRIDED)  # type: ignore[call-arg]  # jax 0.10 wants an index


def _step_of(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((STEP,), value, jnp.float32), STRIDED)


def _log_sum_exp(tops: list[jax.Array], sums: list[jax.Array], scale: Any) -> LogSumExp:
    """Of the row, from those of all warps; the second part as a logarithm to the base 2."""
    top = warp_reduce(functools.reduce(jnp.maximum, tops), arith.maximumf)
    shares = [x * jnp.exp2((t - top) * scale) for t, x in zip(tops, sums, strict=True)]
    return LogSumExp(top, jnp.log2(warp_reduce(functools.reduce(jnp.add, shares), arith.addf)))


def _log2_probability(z: jax.Array, lse: LogSumExp, scale: Any) -> jax.Array:
    return (z - lse.top) * scale - lse.log_total  # in this order: exact where all logits are large


def _kernel(
    *refs,
    term_and_slope: Callable[..., tuple[jax.Array, jax.Array]],
    slope_sum: float | None,
    is_nonnegative: bool,
    num_parameters: int,
    options: RowOptions,
    width: int,
):
    has_gradient = options.gradient_dtype is not None
    named = _Refs.of(refs, num_parameters, has_gradient)
    row = _Row(named, options, width)
    student, teacher = named.student_smem, named.teacher_smem

    row.of_each_width(row.copy_in)
    init_barriers(named.exchange_barriers_smem)
    inverse_temperature = 1 / named.temperature_gmem[0]
    parameters = [ref[0] for ref in named.parameters_gmem]

    # Pass 1: log-sum-exps of student and teacher at the temperature, and of the student without it.
    tempered = inverse_temperature * LOG2E
    scales = [tempered] if row.is_same else [tempered, LOG2E]
    plgpu.barrier_wait(named.student_arrived)
    row.fill(student)
    student_sums = row.log_sum_exp_of_warp(student, scales)
    plgpu.barrier_wait(named.teacher_arrived)
    row.fill(teacher)
    teacher_sums = row.log_sum_exp_of_warp(teacher, [tempered])
    cluster_wait()
    tops, sums, *plain, teacher_tops, teacher_sums = cluster_all_gather(
        [*student_sums, *teacher_sums], named.first_slot_smem, named.exchange_barriers_smem, 0
    )
    student_lse = _log_sum_exp(tops, sums, tempered)
    plain_lse = student_lse if row.is_same else _log_sum_exp(tops, plain[0], LOG2E)
    student_everywhere, plain_everywhere, teacher_everywhere = (
        LogSumExp(*map(repeat_in_thread, x))
        for x in (student_lse, plain_lse, _log_sum_exp(teacher_tops, teacher_sums, tempered))
    )

    def term_and_slope_at(at: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        log_p = _log2_probability(_load(teacher, at), teacher_everywhere, tempered)
        log_q = _log2_probability(_load(student, at), student_everywhere, tempered)
        return term_and_slope(log_p, log_q, *parameters)

    soft_scale, hard_scale = (
        named.soft_scales_gmem[row.index] * inverse_temperature,
        named.hard_scales_gmem[row.index],
    )
    label = named.labels_gmem[row.index] - row.start

    def probability(at: jax.Array | int) -> jax.Array:
        return jnp.exp2(_log2_probability(_load(student, at), student_everywhere, tempered))

    def gradient_at(at: jax.Array | int, q: jax.Array, slope: jax.Array, slope_sum: jax.Array | float) -> jax.Array:
        d = jnp.where(soft_scale == 0, 0.0, soft_scale * (slope - q * slope_sum))
        if options.has_labels:
            if not row.is_same:
                q = jnp.exp2(_log2_probability(_load(student, at), plain_everywhere, LOG2E))
            d += jnp.where(hard_scale == 0, 0.0, hard_scale * jnp.where(row.column(at) == label, q - 1, q))
        return d.astype(options.gradient_dtype)

    # Pass 2: the loss and the sum of the slopes. The slopes take the place of the teacher's logits, and the student's
    # probabilities that of its logits unless those without temperature are needed too.
    def add(at, sums):
        term, slope = term_and_slope_at(at)
        if has_gradient:
            teacher[pl.ds(at, STEP)] = slope
            if row.is_same:
                student[pl.ds(at, STEP)] = probability(at)
        return tuple(sum_ + x for sum_, x in zip(sums, (term, slope), strict=False))

    if has_gradient and slope_sum is not None:  # no other pass is needed
        gradients, total = [], _step_of(0.0)
        for at in row.unrolled():
            term, slope = term_and_slope_at(at)
            gradients.append(gradient_at(at, probability(at), slope, slope_sum))
            total += term
        row.write(gradients)
        totals = [total]
    else:
        totals = row.sweep(add, (_step_of(0.0),) * (2 if has_gradient else 1))
    received = cluster_all_gather(
        [warp_reduce(x, arith.addf) for x in totals], named.second_slot_smem, named.exchange_barriers_smem, 1
    )
    term_sum, *slope_sums = [warp_reduce(functools.reduce(jnp.add, x), arith.addf) for x in received]

    @pl.when(row.part == 0)
    def _():
        at = pl.ds(row.index * THREADS, THREADS)
        named.soft_gmem[at] = jnp.maximum(term_sum, 0.0) if is_nonnegative else term_sum
        named.top_gmem[at] = plain_lse.top
        named.log_total_gmem[at] = plain_lse.log_total * LN2

    # Pass 3: the gradient.
    if slope_sums:
        everywhere = repeat_in_thread(slope_sums[0])
        q_at = partial(_load, student) if row.is_same else probability
        row.write([gradient_at(at, q_at(at), _load(teacher, at), everywhere) for at in row.unrolled()])
    if has_gradient:
        plgpu.wait_smem_to_gmem(0)


# Host code.


def row_losses(rows: ChunkRows, options: RowOptions, place: Place | None = None) -> RowResult:
    """`reference.row_losses` as one kernel: float32 logits in, losses and a gradient of any floating type out.

    The gradient is written to its place: no copy is made of the rows there.
    """
    num_rows, width = rows.student.shape
    parameters = [jnp.asarray(x, jnp.float32).reshape(1) for x in rows.divergence.parameters]
    buffer = plgpu.SMEM((padded(part_width(width)),), jnp.float32)
    slots = [plgpu.SMEM((count * CLUSTER_WARPS,), jnp.float32) for count in (5, 2)]
    arrived = plgpu.Barrier(num_arrivals=1)
    out_type = [jax.ShapeDtypeStruct((num_rows * THREADS,), jnp.float32)] * 3
    own: Any = buffer
    target: list[jax.Array] = []
    if options.gradient_dtype is not None:
        place = place or Place.alone(num_rows, width, options.gradient_dtype)
        target = [jnp.reshape(place.first, (1,)), place.rows.reshape(-1)]
        own = plgpu.RefUnion(buffer, plgpu.SMEM(buffer.shape, place.rows.dtype))

    kernel = plgpu.kernel(
        partial(
            _kernel,
            term_and_slope=base_2_term_and_slope_of(rows.divergence),
            slope_sum=rows.divergence.slope_sum,
            is_nonnegative=rows.divergence.is_nonnegative,
            num_parameters=len(parameters),
            options=options,
            width=width,
        ),
        out_type=out_type,
        scratch_types=[own, buffer, *slots, arrived, arrived, plgpu.SMEM((4,), jnp.uint32)],
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
    soft, top, log_total, *gradient = (_in_place(kernel) if target else kernel)(
        rows.student.reshape(-1),
        rows.teacher.reshape(-1),
        rows.labels.astype(jnp.int32),
        rows.soft_scale,
        rows.hard_scale,
        jnp.reshape(rows.temperature, (1,)),
        *parameters,
        *target,
    )
    numbers = {"soft": soft[::THREADS], "top": top[::THREADS], "log_total": log_total[::THREADS]}
    return result_of(rows, options, numbers, gradient[0].reshape(place.rows.shape) if place else None)


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
