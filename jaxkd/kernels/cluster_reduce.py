"""What the threads of a thread-block cluster on Hopper tell each other, for `pallas_mosaic_gpu`.

Mosaic GPU has clusters but no sum over their blocks: here a warp reduces what its threads have (`warp_reduce`)
and sends the result to all blocks (`cluster_all_gather`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, vector

# Knobs.
PARTS = 16  # blocks of a cluster: the most Hopper allows
STEP = 1024  # columns of a step: 8 a thread
THREADS = 128  # threads of a block: one warpgroup
WARP = 32
WARPS = THREADS // WARP
CLUSTER_WARPS = PARTS * WARPS  # warps of a cluster

# Device code. A "thread value" is an array of `THREADS`, one element a thread; the four warps work without waiting for
# each other, and a barrier stands where one reads what another wrote.
STRIDED = plgpu.Layout.WG_STRIDED((STEP,), vec_size=4)
STEP_VALUE = plgpu.ShapeDtypeStruct((STEP,), jnp.float32, layout=STRIDED)
ONE_A_THREAD = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
THREAD_VALUE = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=ONE_A_THREAD)
I32, F32 = ir.IntegerType.get_signless, ir.F32Type.get  # called inside: types need MLIR's context


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
def init_barriers(_, barriers):
    """Makes the two barriers of `cluster_all_gather` ready, and tells the cluster so."""
    for which in range(2):
        nvvm.mbarrier_init(_barrier(barriers, which), mgpu.c(1, I32(32)), predicate=_is_first(_thread()))
    _ptx("fence.mbarrier_init.release.cluster;", "", [])
    nvvm.cluster_arrive(aligned=True)


@plgpu.inline_mgpu()
def cluster_wait(_):
    """Waits for all threads of the cluster to have set up."""
    nvvm.cluster_wait(aligned=True)


@plgpu.inline_mgpu()
def block_barrier(_):
    """Waits for all threads of the block."""
    mgpu.warpgroup_barrier()


def warp_reduce(x: jax.Array, combine: Callable[..., Any]) -> jax.Array:
    """A thread value: what ``combine`` (`arith.addf` or `arith.maximumf`) makes of the elements of a warp."""
    layout = STRIDED if x.shape == (STEP,) else ONE_A_THREAD

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=THREAD_VALUE)
    def reduce(_, x):
        elements = [
            vector.extract(register, [], [i])
            for register in x.registers.flat
            for i in range(ir.VectorType(register.type).shape[0])
        ]
        value = functools.reduce(combine, elements)
        for distance in (16, 8, 4, 2, 1):
            value = combine(value, mgpu.utils.shfl_bfly(value, distance))
        return _thread_value(value)

    return reduce(x)


def repeat_in_thread(x: jax.Array) -> jax.Array:
    """A thread value as an array of `STEP`: each thread repeats its own."""

    @plgpu.inline_mgpu(arg_types=(ONE_A_THREAD,), return_type=STEP_VALUE)
    def repeat_in_thread(_, x):
        register = vector.broadcast(ir.VectorType.get((4,), F32()), vector.extract(x.registers.flat[0], [], [0]))
        registers = np.array([register] * (STEP // (4 * THREADS)), dtype=object)
        layout = mgpu.WGStridedFragLayout((STEP,), vec_size=4)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return repeat_in_thread(x)


def cluster_all_gather(values: list[jax.Array], slot: Any, barriers: Any, which: int) -> list[list[jax.Array]]:
    """Each thread value from all warps of the cluster, as thread values that have them once a warp.

    Half of a warp sends one value to the `PARTS` blocks, the other half the next; a block's barrier counts the bytes
    that have come.
    """
    count = len(values)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), *[ONE_A_THREAD] * count),
        return_type=[[THREAD_VALUE] * (CLUSTER_WARPS // WARP)] * count,
    )
    def cluster_all_gather(_, slot, barriers, *values):
        here, barrier, thread = mgpu.utils.memref_ptr(slot), _barrier(barriers, which), _thread()
        bytes_to_come = mgpu.c(4 * CLUSTER_WARPS * count, I32(32))
        nvvm.mbarrier_arrive_expect_tx(barrier, bytes_to_come, predicate=_is_first(thread))

        def number(x: int) -> ir.Value:
            return mgpu.c(x, I32(32))

        lane, part = arith.remui(thread, number(WARP)), arith.remui(thread, number(PARTS))
        own_part = arith.index_cast(I32(32), gpu.cluster_block_id(gpu.Dimension.x))
        sender = arith.addi(arith.muli(own_part, number(WARPS)), arith.divui(thread, number(WARP)))
        is_low = arith.cmpi(arith.CmpIPredicate.ult, lane, number(PARTS))
        scalars = [vector.extract(x.registers.flat[0], [], [0]) for x in values]
        for k in range(0, count, 2):
            low, high = scalars[k], scalars[min(k + 1, count - 1)]
            k_of_thread = arith.select(is_low, number(k), number(k + 1))
            index = arith.addi(arith.muli(k_of_thread, number(CLUSTER_WARPS)), sender)
            place = mgpu.utils.getelementptr(here, [index], F32())
            _ptx(
                "{ .reg .b32 place, barrier; "
                "mapa.shared::cluster.u32 place, $1, $3; mapa.shared::cluster.u32 barrier, $2, $3; "
                "@$0 st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], $4, [barrier]; }",
                "b,r,r,r,f",
                [
                    arith.cmpi(arith.CmpIPredicate.ult, k_of_thread, number(count)),
                    llvm.ptrtoint(I32(32), place),
                    llvm.ptrtoint(I32(32), barrier),
                    part,
                    arith.select(is_low, low, high),
                ],
            )
        nvvm.mbarrier_try_wait_parity(barrier, number(0), number(10_000_000))

        def received(k: int, first: int) -> mgpu.FragmentedArray:
            place = mgpu.utils.getelementptr(here, [arith.addi(lane, number(k * CLUSTER_WARPS + first))], F32())
            return _thread_value(llvm.load(F32(), place, volatile_=True))  # volatile: stays behind the wait

        return [[received(k, first) for first in range(0, CLUSTER_WARPS, WARP)] for k in range(count)]

    return cluster_all_gather(slot, barriers, *values)


def _thread_value(value: ir.Value) -> mgpu.FragmentedArray:
    register = vector.broadcast(ir.VectorType.get((1,), F32()), value)
    layout = mgpu.WGStridedFragLayout((THREADS,), vec_size=1)
    return mgpu.FragmentedArray(_registers=np.array([register], dtype=object), _layout=layout, _is_signed=None)


def _thread() -> ir.Value:
    return arith.index_cast(I32(32), gpu.thread_id(gpu.Dimension.x))


def _is_first(thread: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, thread, mgpu.c(0, I32(32)))


def _barrier(barriers: ir.Value, which: int) -> ir.Value:
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(barriers), [which], I32(64))


def _ptx(code: str, constraints: str, arguments: list[ir.Value]) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), arguments, code, constraints, has_side_effects=True)
