"""What the blocks of a thread-block cluster on Hopper tell each other, for `pallas_mosaic_gpu`.

Mosaic GPU has clusters but no sum over their blocks: here each warp sends what it has to all blocks
(`cluster_all_gather`), which then reduce it.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jaxkd.kernels.thread_values import (
    F32,
    I32,
    ONE_A_THREAD,
    THREAD_VALUE,
    THREADS,
    WARP,
    asm,
    of_threads,
    ptx,
    scalar_of,
)

# Knobs.
PARTS = 16  # blocks of a cluster: the most Hopper allows
TOGETHER = 4  # values that one instruction sends
WARPS = THREADS // WARP
CLUSTER_WARPS = PARTS * WARPS  # warps of a cluster
EXCHANGES = 2


def exchange_memory(counts: Sequence[int]) -> int:
    """Floats of shared memory for as many exchanges of ``counts`` values each."""
    return _first_slot(counts, len(counts))


def _bytes_to_come(count: int) -> int:
    return -(-count // TOGETHER) * TOGETHER * CLUSTER_WARPS * 4


def _first_slot(counts: Sequence[int], which: int) -> int:
    """In floats; before all slots there are the barriers, 64 bits each."""
    return 2 * EXCHANGES + sum(map(_bytes_to_come, counts[:which])) // 4


def init_exchanges(memory: Any, counts: Sequence[int]) -> None:
    """Makes the barriers of `cluster_all_gather` ready, and tells the cluster so.

    The fence is all that the others' writes need: an arrival that orders other accesses too would wait for them.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init_exchanges(_, memory):
        code = ["{ .reg .pred p; .reg .b32 t; .reg .b64 state; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"]
        code += [f"@p mbarrier.init.shared::cta.b64 [$0+{8 * i}], 1;" for i in range(len(counts))]
        code += ["@p fence.mbarrier_init.release.cluster;"]
        code += [
            f"@p mbarrier.arrive.expect_tx.shared::cta.b64 state, [$0+{8 * i}], {_bytes_to_come(count)};"
            for i, count in enumerate(counts)
        ]
        ptx(" ".join([*code, "}", "barrier.cluster.arrive.relaxed.aligned;"]), "r", [_address(memory)])

    init_exchanges(memory)


@plgpu.inline_mgpu()
def cluster_wait(_):
    """Waits for all threads of the cluster to have set up."""
    ptx("barrier.cluster.wait.acquire.aligned;", "", [])


def cluster_all_gather(
    values: list[jax.Array], memory: Any, counts: Sequence[int], which: int
) -> list[list[jax.Array]]:
    """Each thread value from all warps of the cluster, as thread values that have them once a warp.

    The first lanes of a warp send `TOGETHER` of its values to one block each; a block's barrier counts the bytes that
    have come.
    """
    count, num_results = len(values), CLUSTER_WARPS // WARP
    slot, barrier = 4 * _first_slot(counts, which), 8 * which

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[ONE_A_THREAD] * count), return_type=[[THREAD_VALUE] * num_results] * count
    )
    def cluster_all_gather(_, memory, *values):
        here = _address(memory)
        scalars = [scalar_of(x) for x in values]
        scalars += [mgpu.c(0.0, F32())] * (-count % TOGETHER)
        groups = [scalars[i : i + TOGETHER] for i in range(0, len(scalars), TOGETHER)]
        for i, group in enumerate(groups):
            ptx(
                "{ .reg .pred p; .reg .b32 place, barrier, lane, rank, warp;"
                "mov.u32 lane, %laneid; mov.u32 rank, %cluster_ctarank; mov.u32 warp, %tid.x; shr.u32 warp, warp, 5;"
                f"mad.lo.u32 place, rank, {WARPS}, warp; shl.b32 place, place, 4; add.u32 place, place, $0;"
                f"add.u32 place, place, {slot + i * 16 * CLUSTER_WARPS}; add.u32 barrier, $0, {barrier};"
                f"setp.lt.u32 p, lane, {PARTS};"
                "@p mapa.shared::cluster.u32 place, place, lane; @p mapa.shared::cluster.u32 barrier, barrier, lane;"
                "@p st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [place], {$1, $2, $3, $4}, [barrier];"
                "}",
                "r,f,f,f,f",
                [here, *group],
            )
        ptx(
            "{ .reg .pred p; WAIT:"
            f"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0+{barrier}], 0; @!p bra WAIT; }}",
            "r",
            [here],
        )

        def received(first: int, i: int) -> list[ir.Value]:
            four = llvm.StructType.get_literal([F32()] * TOGETHER)
            at = slot + 16 * (i * CLUSTER_WARPS + first)
            code = (
                "{ .reg .b32 at; mov.u32 at, %laneid; shl.b32 at, at, 4; add.u32 at, at, $4;"
                f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [at+{at}]; }}"
            )
            result = asm(four, [here], code, "=f,=f,=f,=f,r,~{memory}", has_side_effects=True)
            return [llvm.extractvalue(F32(), result, [k]) for k in range(TOGETHER)]

        results = [
            [x for i in range(len(groups)) for x in received(first, i)] for first in range(0, CLUSTER_WARPS, WARP)
        ]
        return [[of_threads(result[k]) for result in results] for k in range(count)]

    return cluster_all_gather(memory, *values)


def _address(memory: ir.Value) -> ir.Value:
    """Of shared memory."""
    return llvm.ptrtoint(I32(32), mgpu.utils.memref_ptr(memory))
