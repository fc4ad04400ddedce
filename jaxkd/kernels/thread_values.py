"""What a warpgroup's threads compute for themselves, for `pallas_mosaic_gpu`: what Pallas has no operation for.

An array of `STEP` is spread over the threads of a warpgroup, 8 elements each. A "thread value" is an array of
`THREADS`, one element a thread; a scalar is the same in all of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, math, vector

# Knobs.
THREADS = 128  # of a warpgroup
STEP = 1024  # columns that a warpgroup takes at once: 8 a thread
WIDTH = 4  # neighbouring columns of a thread: 16 bytes of float32
WARP = 32
WORDS = {1: "", 2: "v2.", 4: "v4."}  # of an instruction that stores as many at once

STRIDED = plgpu.Layout.WG_STRIDED((STEP,), vec_size=WIDTH)
ONE_A_THREAD = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
SCALAR = plgpu.Layout.WG_SPLAT(())
STEP_VALUE = plgpu.ShapeDtypeStruct((STEP,), jnp.float32, layout=STRIDED)
THREAD_VALUE = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=ONE_A_THREAD)
I32, F32 = ir.IntegerType.get_signless, ir.F32Type.get  # called inside: types need MLIR's context


def step_of(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((STEP,), value, jnp.float32), STRIDED)


def thread_value(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((THREADS,), value, jnp.float32), ONE_A_THREAD)


def load(ref: Any, at: jax.Array | int) -> jax.Array:
    """The step of columns from ``at`` on, of shared or device memory."""
    return plgpu.load(ref.at[pl.ds(at, STEP)], layout=STRIDED)  # type: ignore[call-arg]  # jax 0.10 wants an index


def columns_of(at: jax.Array | int) -> jax.Array:
    return at + plgpu.broadcasted_iota(jnp.int32, (STEP,), 0, layout=STRIDED)


def thread_reduce(x: jax.Array, combine: Callable[..., Any]) -> jax.Array:
    """What ``combine`` (`arith.addf` or `arith.maximumf`) makes of the elements of a thread."""

    @plgpu.inline_mgpu(arg_types=(STRIDED,), return_type=THREAD_VALUE)
    def thread_reduce(_, x):
        *registers, last = x.registers.flat
        whole = functools.reduce(combine, registers, last)
        low, high = (combine(element(whole, i), element(whole, i + 1)) for i in range(0, WIDTH, 2))
        return of_threads(combine(low, high))

    return thread_reduce(x)


def warp_reduce(values: Sequence[jax.Array], combine: Callable[..., Any]) -> list[jax.Array]:
    """Of each thread value, what ``combine`` makes of those of a warp. Several at once wait for each other's shuffles
    only once."""

    @plgpu.inline_mgpu(arg_types=(ONE_A_THREAD,) * len(values), return_type=[THREAD_VALUE] * len(values))
    def warp_reduce(_, *values):
        own = [scalar_of(x) for x in values]
        for distance in (16, 8, 4, 2, 1):
            others = [mgpu.utils.shfl_bfly(x, distance) for x in own]
            own = [combine(x, y) for x, y in zip(own, others, strict=True)]
        return [of_threads(x) for x in own]

    return warp_reduce(*values)


def rounded_product(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Thread value times scalar, rounded here: no later subtraction is fused with it. Never below -3e38."""

    @plgpu.inline_mgpu(arg_types=(ONE_A_THREAD, SCALAR), return_type=THREAD_VALUE)
    def rounded_product(_, x, scale):
        code = "{ mul.rn.f32 $0, $1, $2; max.NaN.f32 $0, $0, 0fFF61B1E6; }"
        return of_threads(asm(F32(), [scalar_of(x), scale.registers.item()], code, "=f,f,f"))

    return rounded_product(x, scale)


def scaled_difference(z: jax.Array, scale: jax.Array, reference: jax.Array) -> jax.Array:
    """``z * scale - reference`` of a step, or of a thread value, with one rounding."""
    layout, result = (STRIDED, STEP_VALUE) if z.shape == (STEP,) else (ONE_A_THREAD, THREAD_VALUE)

    @plgpu.inline_mgpu(arg_types=(layout, SCALAR, ONE_A_THREAD), return_type=result)
    def scaled_difference(_, z, scale, reference):
        shape = ir.VectorType(z.registers.flat[0].type)
        scale = vector.broadcast(shape, scale.registers.item())
        minus = vector.broadcast(shape, arith.negf(scalar_of(reference)))
        registers = np.array([math.fma(x, scale, minus) for x in z.registers.flat], dtype=object)
        return mgpu.FragmentedArray(_registers=registers, _layout=z.layout, _is_signed=None)

    return scaled_difference(z, scale, reference)


def repeat_in_thread(x: jax.Array) -> jax.Array:
    """A thread value as a step: each thread repeats its own."""

    @plgpu.inline_mgpu(arg_types=(ONE_A_THREAD,), return_type=STEP_VALUE)
    def repeat_in_thread(_, x):
        register = vector.broadcast(ir.VectorType.get((WIDTH,), F32()), scalar_of(x))
        registers = np.array([register] * (STEP // (WIDTH * THREADS)), dtype=object)
        layout = mgpu.WGStridedFragLayout((STEP,), vec_size=WIDTH)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return repeat_in_thread(x)


def store_below(ref: Any, values: jax.Array, limit: jax.Array) -> None:
    """The first ``limit`` of a step (a multiple of `WIDTH`) to a window of device memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), STRIDED, SCALAR))
    def store_below(_, ref, values, limit):
        first = arith.muli(arith.remui(thread(), number(THREADS)), number(WIDTH))
        pointer = mgpu.utils.memref_ptr(ref)
        for i, register in enumerate(values.registers.flat):
            column = arith.addi(first, number(i * THREADS * WIDTH))
            is_below = arith.cmpi(arith.CmpIPredicate.slt, column, limit.registers.item())
            element_type = ir.VectorType(register.type).element_type
            place = llvm.ptrtoint(I32(64), mgpu.utils.getelementptr(pointer, [column], element_type))
            count = WIDTH * mgpu.utils.bitwidth(element_type) // 32
            words = vector.bitcast(ir.VectorType.get((count,), I32(32)), register)
            names = ", ".join(f"${k + 2}" for k in range(count))
            ptx(
                f"{{ .reg .b64 at; cvta.to.global.u64 at, $1; @$0 st.global.{WORDS[count]}b32 [at], {{{names}}}; }}",
                "b,l" + ",r" * count,
                [is_below, place, *(element(words, k) for k in range(count))],
            )

    store_below(ref, values, limit)


def store_first(ref: Any, value: jax.Array) -> None:
    """A thread value, of the first thread of a block, to a window of one element."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ONE_A_THREAD))
    def store_first(_, ref, value):
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread(), number(0))):
            llvm.store(scalar_of(value), mgpu.utils.memref_ptr(ref))

    store_first(ref, value)


# Inside `inline_mgpu`.


def element(register: ir.Value, i: int) -> ir.Value:
    return vector.extract(register, [], [i])


def scalar_of(x: mgpu.FragmentedArray) -> ir.Value:
    """What a thread has of a thread value."""
    return element(x.registers.flat[0], 0)


def of_threads(value: ir.Value) -> mgpu.FragmentedArray:
    register = vector.broadcast(ir.VectorType.get((1,), F32()), value)
    layout = mgpu.WGStridedFragLayout((THREADS,), vec_size=1)
    return mgpu.FragmentedArray(_registers=np.array([register], dtype=object), _layout=layout, _is_signed=None)


def number(x: int) -> ir.Value:
    return mgpu.c(x, I32(32))


def thread() -> ir.Value:
    """Of the block."""
    return arith.index_cast(I32(32), gpu.thread_id(gpu.Dimension.x))


def ptx(code: str, constraints: str, arguments: list[ir.Value]) -> None:
    """With side effects, and in this place among all accesses of memory."""
    constraints = ",".join(filter(None, [constraints, "~{memory}"]))
    asm(ir.Type.parse("!llvm.void"), arguments, code, constraints, has_side_effects=True)


asm: Callable[..., Any] = llvm.inline_asm  # its declared result may be many things
