"""The rows of one chunk as a Pallas kernel for Hopper, lowered through Mosaic GPU: each logit is read once.

The twin of `jaxkd.kernels.reference`, with its signature. A cluster of `PARTS` thread blocks takes one row: each block
copies its part of the student's and the teacher's logits into shared memory and stays there for all passes; the blocks
send each other a few sums (normalisers; then the loss and the sum of the slopes). Logarithms are to the base 2, which
the GPU has instructions for.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float, Int

from jaxkd.divergences.sums_over_tokens import Divergence
from jaxkd.kernels.cluster_reduce import (
    LANES,
    PARTS,
    SENDERS,
    STEP,
    STRIDED,
    block_barrier,
    cluster_wait,
    exchange,
    in_warp,
    set_up,
    spread,
)
from jaxkd.kernels.kernel_math import LN2, LOG2E, LOWEST, base_2_term_and_slope_of
from jaxkd.kernels.reference import RowOptions, RowResult, hard_loss
from jaxkd.logits.sources import Place

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
    return 2 * 4 * padded(part_width(width)) + 7 * 4 * SENDERS + 1024


def padded(columns: int) -> int:
    return -(-columns // STEP) * STEP


# Device code.


def _kernel(
    student,  # (N V,) and so on, in device memory
    teacher,
    labels,
    soft_scales,
    hard_scales,
    temperature,
    *refs,  # the divergence's parameters; of a gradient its first row (1,) and where it goes; outputs; shared memory
    term_and_slope: Callable[..., tuple[jax.Array, jax.Array]],
    slope_sum: float | None,
    num_parameters: int,
    options: RowOptions,
    width: int,
):
    has_gradient = options.gradient_dtype is not None
    parameter_refs, refs = refs[:num_parameters], refs[num_parameters:]
    target, refs = refs[: 2 * has_gradient], refs[2 * has_gradient :]
    soft_out, top_out, log_total_out, *shared = refs
    own, teachers, first_slot, second_slot, student_arrived, teacher_arrived, barriers = shared
    if has_gradient:
        own, gradient = own

    row, part = jax.lax.axis_index("row"), jax.lax.axis_index("part")
    columns, last_columns = part_width(width), last_part_width(width)
    is_last = part == PARTS - 1
    start = part * columns
    offset = row * width + start

    def copy_in(columns: int) -> None:
        for source, target, arrived in ((student, own, student_arrived), (teacher, teachers, teacher_arrived)):
            # A promise that holds, and that makes it one bulk copy of any length.
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            here = source.at[pl.ds(offset, columns)]
            plgpu.copy_gmem_to_smem(here, target.at[pl.ds(0, columns)], arrived, oob_mode=in_bounds)

    pl.when(is_last)(lambda: copy_in(last_columns))
    pl.when(~is_last)(lambda: copy_in(columns))
    set_up(barriers)
    inverse_temperature = 1 / temperature[0]
    parameters = [ref[0] for ref in parameter_refs]

    steps = padded(columns) // STEP

    def sweep(body: Callable[..., Any], carry: Any, first: int = 0) -> Any:
        return jax.lax.fori_loop(first, steps, lambda i, carry: body(i * STEP, carry), carry)

    def load(ref: Any, at: jax.Array | int) -> jax.Array:
        return plgpu.load(ref.at[pl.ds(at, STEP)], layout=STRIDED)  # type: ignore[call-arg]  # jax 0.10 wants an index

    def zeros(value: float = 0.0) -> jax.Array:
        return plgpu.layout_cast(jnp.full((STEP,), value, jnp.float32), STRIDED)

    def column(at: jax.Array | int) -> jax.Array:
        return at + plgpu.broadcasted_iota(jnp.int32, (STEP,), 0, layout=STRIDED)

    # What no column fills is -inf on both sides, where every term is 0: no pass needs a mask.
    def fill(ref: Any) -> None:
        def step(at, carry):
            inside = column(at) < jnp.where(is_last, last_columns, columns)
            ref[pl.ds(at, STEP)] = jnp.where(inside, load(ref, at), -jnp.inf)
            return carry

        sweep(step, (), last_columns // STEP)

    # Pass 1: normalisers of student and teacher at the temperature, and of the student without it.
    one_normalizer = not options.is_tempered or not options.has_labels
    tempered = inverse_temperature * LOG2E
    scales = [tempered] if one_normalizer else [tempered, LOG2E]

    def normalizer_of_warp(ref: Any, scales: list[Any]) -> list[jax.Array]:
        """The largest logit, and for each scale the sum of 2 ** ((z - largest) * scale)."""
        top = in_warp(sweep(lambda at, top: jnp.maximum(top, load(ref, at)), zeros(LOWEST)), arith.maximumf)
        everywhere = spread(top)

        def add(at, sums):
            z = load(ref, at) - everywhere
            return tuple(sum_ + jnp.exp2(z * scale) for sum_, scale in zip(sums, scales, strict=True))

        return [top, *(in_warp(x, arith.addf) for x in sweep(add, (zeros(),) * len(scales)))]

    def normalizer(tops: list[jax.Array], sums: list[jax.Array], scale: Any) -> tuple[jax.Array, jax.Array]:
        """Of the row, from those of all warps; the second as a logarithm to the base 2."""
        top = in_warp(functools.reduce(jnp.maximum, tops), arith.maximumf)
        shares = [x * jnp.exp2((t - top) * scale) for t, x in zip(tops, sums, strict=True)]
        return top, jnp.log2(in_warp(functools.reduce(jnp.add, shares), arith.addf))

    plgpu.barrier_wait(student_arrived)
    fill(own)
    student_sums = normalizer_of_warp(own, scales)
    plgpu.barrier_wait(teacher_arrived)
    fill(teachers)
    teacher_sums = normalizer_of_warp(teachers, [tempered])
    cluster_wait()
    tops, sums, *plain, teacher_tops, teacher_sums = exchange([*student_sums, *teacher_sums], first_slot, barriers, 0)
    student_normalizer = normalizer(tops, sums, tempered)
    plain_normalizer = student_normalizer if one_normalizer else normalizer(tops, plain[0], LOG2E)
    student_spread, plain_spread, teacher_spread = (
        tuple(map(spread, x))
        for x in (student_normalizer, plain_normalizer, normalizer(teacher_tops, teacher_sums, tempered))
    )

    def log2_probability(z: jax.Array, normalizer: tuple[jax.Array, ...], scale: Any) -> jax.Array:
        return (z - normalizer[0]) * scale - normalizer[1]  # in this order: exact where all logits are large

    def term_and_slope_at(at: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        log_p = log2_probability(load(teachers, at), teacher_spread, tempered)
        log_q = log2_probability(load(own, at), student_spread, tempered)
        return term_and_slope(log_p, log_q, *parameters)

    soft_scale, hard_scale = soft_scales[row] * inverse_temperature, hard_scales[row]
    label = labels[row] - start

    def probability(at: jax.Array | int) -> jax.Array:
        return jnp.exp2(log2_probability(load(own, at), student_spread, tempered))

    def gradient_at(at: jax.Array | int, q: jax.Array, slope: jax.Array, slope_sum: jax.Array | float) -> jax.Array:
        d = jnp.where(soft_scale == 0, 0.0, soft_scale * (slope - q * slope_sum))
        if options.has_labels:
            if not one_normalizer:
                q = jnp.exp2(log2_probability(load(own, at), plain_spread, LOG2E))
            d += jnp.where(hard_scale == 0, 0.0, hard_scale * jnp.where(column(at) == label, q - 1, q))
        return d.astype(options.gradient_dtype)

    def write(gradients: list[jax.Array]) -> None:
        """Into the memory of the student's logits, when all have read them, and from there out."""

        def copy_out(columns: int) -> None:
            first_row, rows = target
            place = rows.at[pl.ds(first_row[0] * width + offset, columns)]
            plgpu.copy_smem_to_gmem(gradient.at[pl.ds(0, columns)], place)

        block_barrier()
        for i, values in enumerate(gradients):
            gradient[pl.ds(i * STEP, STEP)] = values
        plgpu.commit_smem()
        pl.when(is_last)(lambda: copy_out(last_columns))
        pl.when(~is_last)(lambda: copy_out(columns))

    # Pass 2: the loss and the sum of the slopes. The slopes take the place of the teacher's logits, and the student's
    # probabilities that of its logits unless those without temperature are needed too.
    def add(at, sums):
        term, slope = term_and_slope_at(at)
        if has_gradient:
            teachers[pl.ds(at, STEP)] = slope
            if one_normalizer:
                own[pl.ds(at, STEP)] = probability(at)
        return tuple(sum_ + x for sum_, x in zip(sums, (term, slope), strict=False))

    if has_gradient and slope_sum is not None:  # no other pass is needed
        gradients, total = [], zeros()
        for at in range(0, steps * STEP, STEP):
            term, slope = term_and_slope_at(at)
            gradients.append(gradient_at(at, probability(at), slope, slope_sum))
            total += term
        write(gradients)
        totals = [total]
    else:
        totals = sweep(add, (zeros(),) * (2 if has_gradient else 1))
    received = exchange([in_warp(x, arith.addf) for x in totals], second_slot, barriers, 1)
    term_sum, *slope_sums = [in_warp(functools.reduce(jnp.add, x), arith.addf) for x in received]

    @pl.when(part == 0)
    def _():
        at = pl.ds(row * LANES, LANES)
        soft_out[at] = jnp.maximum(term_sum, 0.0)
        top_out[at] = plain_normalizer[0]
        log_total_out[at] = plain_normalizer[1] * LN2

    # Pass 3: the gradient.
    if slope_sums:
        everywhere = spread(slope_sums[0])
        q_at = partial(load, own) if one_normalizer else probability
        write([gradient_at(at, q_at(at), load(teachers, at), everywhere) for at in range(0, steps * STEP, STEP)])
    if has_gradient:
        plgpu.wait_smem_to_gmem(0)


# Host code.


def row_losses(
    student: Float[Array, "C V"],
    teacher: Float[Array, "C V"],
    labels: Int[Array, " C"],
    soft_scale: Float[Array, " C"],
    hard_scale: Float[Array, " C"],
    temperature: Float[Array, ""],
    divergence: Divergence,
    options: RowOptions,
    place: Place | None = None,
) -> RowResult:
    """`reference.row_losses` as one kernel: float32 logits in, losses and a gradient of any floating type out.

    The gradient is written to its place: no copy is made of the rows there.
    """
    rows, width = student.shape
    parameters = [jnp.asarray(x, jnp.float32).reshape(1) for x in divergence.parameters]
    buffer = plgpu.SMEM((padded(part_width(width)),), jnp.float32)
    slots = [plgpu.SMEM((count * SENDERS,), jnp.float32) for count in (5, 2)]
    arrived = plgpu.Barrier(num_arrivals=1)
    out_type = [jax.ShapeDtypeStruct((rows * LANES,), jnp.float32)] * 3
    own: Any = buffer
    target: list[jax.Array] = []
    if options.gradient_dtype is not None:
        place = place or Place.alone(rows, width, options.gradient_dtype)
        target = [jnp.reshape(place.first, (1,)), place.rows.reshape(-1)]
        own = plgpu.RefUnion(buffer, plgpu.SMEM(buffer.shape, place.rows.dtype))

    kernel = plgpu.kernel(
        partial(
            _kernel,
            term_and_slope=base_2_term_and_slope_of(divergence),
            slope_sum=divergence.slope_sum,
            num_parameters=len(parameters),
            options=options,
            width=width,
        ),
        out_type=out_type,
        scratch_types=[own, buffer, *slots, arrived, arrived, plgpu.SMEM((4,), jnp.uint32)],
        grid=(rows,),
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
        student.reshape(-1),
        teacher.reshape(-1),
        labels.astype(jnp.int32),
        soft_scale,
        hard_scale,
        jnp.reshape(temperature, (1,)),
        *parameters,
        *target,
    )
    soft, top, log_total = soft[::LANES], top[::LANES], log_total[::LANES]
    hard = hard_loss(student, top, log_total, labels) if options.has_labels else jnp.zeros_like(soft)
    return soft, hard, gradient[0].reshape(place.rows.shape) if place else None


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
