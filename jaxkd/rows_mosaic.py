"""The rows of one chunk as a Pallas kernel for Hopper, lowered through Mosaic GPU: each logit is read once.

The twin of `jaxkd.rows.row_losses`, with its signature. A cluster of `PARTS` thread blocks takes one row: each block
copies its part of the student's and the teacher's logits into shared memory and stays there for all passes; the blocks
exchange a few sums through each other's shared memory (normalisers; then the loss and the sum of the slopes).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, vector
from jaxtyping import Array, Float, Int

from jaxkd.divergences import Divergence
from jaxkd.kernel_math import LOWEST, log_probability, term_and_slope_of
from jaxkd.rows import RowOptions, RowResult, hard_loss

# Knobs.
PARTS = 16  # blocks of a cluster: the most Hopper allows
STEP = 1024  # columns of a step: 8 a thread
LANES = 128  # threads of a block: one warpgroup
ALIGNMENT = 32  # columns: bulk copies are multiples of 128 bytes
SHARED_MEMORY = 227 * 1024  # bytes of a block on Hopper


def part_width(width: int) -> int:
    """Columns of a part; the last one has what is left."""
    return -(-width // (PARTS * ALIGNMENT)) * ALIGNMENT


def last_part_width(width: int) -> int:
    return width - (PARTS - 1) * part_width(width)


def shared_memory(width: int) -> int:
    """Bytes of shared memory of a block."""
    return 2 * 4 * padded(part_width(width)) + 2 * 4 * LANES + 4096


def padded(columns: int) -> int:
    return -(-columns // STEP) * STEP


# Device code.
STRIDED = plgpu.Layout.WG_STRIDED((STEP,), vec_size=4)
SLOT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


@plgpu.inline_mgpu()
def _cluster_arrive(_):
    """Tells the cluster that this thread is here, and makes its writes to shared memory seen."""
    nvvm.cluster_arrive(aligned=True)


@plgpu.inline_mgpu()
def _cluster_arrive_relaxed(_):
    """Tells the cluster that this thread is here, and nothing of its writes."""
    nvvm.cluster_arrive_relaxed(aligned=True)


@plgpu.inline_mgpu()
def _cluster_wait(_):
    """Waits for all threads of the cluster to arrive."""
    nvvm.cluster_wait(aligned=True)


def _from_cluster(values: list[jax.Array], slot: Any) -> list[jax.Array]:
    """Each of the scalars from all blocks of the cluster, in arrays of `LANES` that repeat the `PARTS` values in turn.

    A block's slot holds the first value in lanes 0 to 15, the second in lanes 16 to 31, and so on.
    """
    lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=SLOT)
    packed = plgpu.layout_cast(jnp.full((LANES,), values[0], jnp.float32), SLOT)
    for k, value in enumerate(values[1:], start=1):
        packed = jnp.where(lane < k * PARTS, packed, value)
    slot[...] = packed
    _cluster_arrive()
    _cluster_wait()

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=[plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout=SLOT)] * len(values),
    )
    def gather(_, ref):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
        part = arith.remui(thread, mgpu.c(PARTS, i32))
        base = mgpu.utils.get_cluster_ptr(mgpu.utils.memref_ptr(ref), part)
        arrays = []
        for k in range(len(values)):
            address = mgpu.utils.getelementptr(base, [k * PARTS], f32)
            register = vector.broadcast(ir.VectorType.get((1,), f32), llvm.load(f32, address))
            layout = mgpu.WGStridedFragLayout((LANES,), vec_size=1)
            registers = np.array([register], dtype=object)
            arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
        return arrays

    return gather(slot)


def _kernel(
    student,  # (N V,) and so on, in device memory
    teacher,
    labels,
    soft_scales,
    hard_scales,
    temperature,
    *refs,
    term_and_slope: Callable[..., tuple[jax.Array, jax.Array]],
    num_parameters: int,
    options: RowOptions,
    width: int,
):
    has_gradient = options.gradient_dtype is not None
    parameter_refs, refs = refs[:num_parameters], refs[num_parameters:]
    soft_out, top_out, log_total_out, *gradient_out = refs[: 3 + has_gradient]
    own, teachers, first_slot, second_slot, arrived = refs[3 + has_gradient :]
    if has_gradient:
        own, gradient = own

    row, part = jax.lax.axis_index("row"), jax.lax.axis_index("part")
    columns, last_columns = part_width(width), last_part_width(width)
    is_last = part == PARTS - 1
    start = part * columns
    offset = row * width + start

    def copy_in(columns: int) -> None:
        for source, target in ((student, own), (teacher, teachers)):
            # A promise that holds, and that makes it one bulk copy of any length.
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            here = source.at[pl.ds(offset, columns)]
            plgpu.copy_gmem_to_smem(here, target.at[pl.ds(0, columns)], arrived, oob_mode=in_bounds)

    pl.when(is_last)(lambda: copy_in(last_columns))
    pl.when(~is_last)(lambda: copy_in(columns))
    inverse_temperature = 1 / temperature[0]
    parameters = [ref[0] for ref in parameter_refs]
    plgpu.barrier_wait(arrived)

    def sweep(body: Callable[..., Any], carry: Any, first: int = 0) -> Any:
        steps = padded(columns) // STEP
        return jax.lax.fori_loop(first, steps, lambda i, carry: body(i * STEP, carry), carry)

    def load(ref: Any, at: jax.Array) -> jax.Array:
        return plgpu.load(ref.at[pl.ds(at, STEP)], layout=STRIDED)  # type: ignore[call-arg]  # jax 0.10 wants an index

    def zeros(value: float = 0.0) -> jax.Array:
        return plgpu.layout_cast(jnp.full((STEP,), value, jnp.float32), STRIDED)

    def column(at: jax.Array) -> jax.Array:
        return at + plgpu.broadcasted_iota(jnp.int32, (STEP,), 0, layout=STRIDED)

    # What no column fills is -inf on both sides, where every term is 0: no pass needs a mask.
    def fill(at, carry):
        inside = column(at) < jnp.where(is_last, last_columns, columns)
        for ref in (own, teachers):
            ref[pl.ds(at, STEP)] = jnp.where(inside, load(ref, at), -jnp.inf)
        return carry

    sweep(fill, (), last_columns // STEP)

    # Pass 1: normalisers of student and teacher at the temperature, and of the student without it.
    one_normalizer = not options.is_tempered or not options.has_labels

    def largest(at, tops):
        return jnp.maximum(tops[0], load(own, at)), jnp.maximum(tops[1], load(teachers, at))

    student_top, teacher_top = map(jnp.max, sweep(largest, (zeros(LOWEST), zeros(LOWEST))))
    tops = [student_top * inverse_temperature, teacher_top * inverse_temperature, student_top]

    def total(at, sums):
        z_q, z_p = load(own, at), load(teachers, at)
        exponents = z_q * inverse_temperature - tops[0], z_p * inverse_temperature - tops[1], z_q - tops[2]
        return tuple(sum_ + jnp.exp(x) for sum_, x in zip(sums, exponents, strict=False))

    sums = sweep(total, (zeros(),) * (2 if one_normalizer else 3))
    scalars = [x for top, sum_ in zip(tops, sums, strict=False) for x in (top, jnp.sum(sum_))]
    everywhere = _from_cluster(scalars, first_slot)
    normalizers = []
    for tops_, sums_ in zip(everywhere[::2], everywhere[1::2], strict=True):
        top = jnp.max(tops_)
        normalizers.append((top, jnp.log(jnp.sum(sums_ * jnp.exp(tops_ - top)) * (PARTS / LANES))))
    student_normalizer, teacher_normalizer = normalizers[:2]
    plain_normalizer = student_normalizer if one_normalizer else normalizers[2]

    # Pass 2: the loss and the sum of the slopes; the slopes take the place of the teacher's logits.
    def add(at, sums):
        log_q = log_probability(load(own, at) * inverse_temperature, student_normalizer)
        log_p = log_probability(load(teachers, at) * inverse_temperature, teacher_normalizer)
        term, slope = term_and_slope(log_p, log_q, *parameters)
        if has_gradient:
            teachers[pl.ds(at, STEP)] = slope
        return sums[0] + term, sums[1] + slope

    sums = [jnp.sum(x) for x in sweep(add, (zeros(), zeros()))]
    term_sum, slope_sum = [jnp.sum(x) * (PARTS / LANES) for x in _from_cluster(sums, second_slot)]

    _cluster_arrive_relaxed()

    @pl.when(part == 0)
    def _():
        at = pl.ds(row * LANES, LANES)
        soft_out[at] = jnp.full((LANES,), jnp.maximum(term_sum, 0.0), jnp.float32)
        top_out[at] = jnp.full((LANES,), plain_normalizer[0], jnp.float32)
        log_total_out[at] = jnp.full((LANES,), plain_normalizer[1], jnp.float32)

    # Pass 3: the gradient, into the memory of the student's logits. A step writes where all have read.
    if has_gradient:
        soft_scale, hard_scale = soft_scales[row] * inverse_temperature, hard_scales[row]
        label = labels[row] - start

        def write(at, carry):
            z = load(own, at)
            q = jnp.exp(log_probability(z * inverse_temperature, student_normalizer))
            d = load(teachers, at) - q * slope_sum
            d = jnp.where(soft_scale == 0, 0.0, d * soft_scale)
            if options.has_labels:
                q = jnp.exp(log_probability(z, plain_normalizer))
                d += jnp.where(hard_scale == 0, 0.0, hard_scale * jnp.where(column(at) == label, q - 1, q))
            gradient[pl.ds(at, STEP)] = d.astype(options.gradient_dtype)
            return carry

        def copy_out(columns: int) -> None:
            plgpu.copy_smem_to_gmem(gradient.at[pl.ds(0, columns)], gradient_out[0].at[pl.ds(offset, columns)])

        sweep(write, ())
        plgpu.commit_smem()
        pl.when(is_last)(lambda: copy_out(last_columns))
        pl.when(~is_last)(lambda: copy_out(columns))
        plgpu.wait_smem_to_gmem(0)
    _cluster_wait()  # no block ends while another reads its slots


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
) -> RowResult:
    """`jaxkd.rows.row_losses` as one kernel: float32 logits in, losses and a gradient of any floating type out."""
    rows, width = student.shape
    parameters = [jnp.asarray(x, jnp.float32).reshape(1) for x in divergence.parameters]
    buffer = plgpu.SMEM((padded(part_width(width)),), jnp.float32)
    slot = plgpu.SMEM((LANES,), jnp.float32)
    out_type = [jax.ShapeDtypeStruct((rows * LANES,), jnp.float32)] * 3
    own: Any = buffer
    if options.gradient_dtype is not None:
        out_type.append(jax.ShapeDtypeStruct((rows * width,), options.gradient_dtype))
        own = plgpu.RefUnion(buffer, plgpu.SMEM(buffer.shape, options.gradient_dtype))

    soft, top, log_total, *gradient = plgpu.kernel(
        partial(
            _kernel,
            term_and_slope=term_and_slope_of(divergence),
            num_parameters=len(parameters),
            options=options,
            width=width,
        ),
        out_type=out_type,
        scratch_types=[own, buffer, slot, slot, plgpu.Barrier(num_arrivals=2)],
        grid=(rows,),
        grid_names=("row",),
        cluster=(PARTS,),
        cluster_names=("part",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(
        student.reshape(-1),
        teacher.reshape(-1),
        labels.astype(jnp.int32),
        soft_scale,
        hard_scale,
        jnp.reshape(temperature, (1,)),
        *parameters,
    )
    soft, top, log_total = soft[::LANES], top[::LANES], log_total[::LANES]
    hard = hard_loss(student, top, log_total, labels) if options.has_labels else jnp.zeros_like(soft)
    return soft, hard, gradient[0].reshape(rows, width) if gradient else None
