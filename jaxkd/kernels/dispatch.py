"""The door to the row kernels: which implementation runs a call.

``None`` takes the fastest that is tested for the call; a name takes that one, or raises an error that says why not.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp

from jaxkd.divergences import AnyDivergence, Divergence, RowDivergence
from jaxkd.kernels import bucketed, reference, whole_row
from jaxkd.kernels.signature import ChunkRows, RowLosses, RowOptions, RowResult
from jaxkd.kernels.term_primitives import lacking
from jaxkd.logits import Place
from jaxkd.loop.collectives import is_checked
from jaxkd.loop.handed_functions import check_elementwise
from jaxkd.loop.platform import target_device, target_platform


def _too_old_for_mosaic() -> str | None:
    is_old = jax.__version_info__ < (0, 11)
    return f"it is tested from jax 0.11 on and this is {jax.__version__}" if is_old else None


_kernels: dict[str, ModuleType] = {}
_missing: dict[str, str] = {}
try:
    from jaxkd.kernels import pallas_mosaic_gpu

    _kernels["mosaic"] = pallas_mosaic_gpu
except ImportError as error:  # its interface is not stable yet
    _missing["mosaic"] = _too_old_for_mosaic() or (
        f"jax {jax.__version__} has no Pallas Mosaic GPU as this kernel needs it ({error})"
    )
try:
    from jaxkd.kernels import pallas_triton

    _kernels["triton"] = pallas_triton
except ImportError as error:  # deprecated in JAX 0.11
    _missing["triton"] = f"jax {jax.__version__} has no Pallas Triton backend ({error})"

NAMES = (None, "xla", "triton", "mosaic")
KERNELS = ("mosaic", "triton")  # the fastest first


class CannotRun(ValueError):
    """The implementation that was named is not for this call; the message says why and which is."""


@dataclass(frozen=True)
class Chunk:
    """The shape of the logits of a chunk, as far as it decides what can run."""

    rows: int
    student_width: int
    teacher_width: int | None  # None: one head
    dtype: jnp.dtype
    is_shard: bool = False  # whether other devices have the other columns


def row_losses_for(
    implementation: str | None, chunk: Chunk, divergence: AnyDivergence | None = None, in_buckets: bool = False
) -> RowLosses:
    """The function that computes the rows of a chunk; ``in_buckets`` if the teacher is a `bucketed.BucketTeacher`.

    Without a ``divergence`` it is a hard loss alone.

    Raises:
      ValueError: an unknown name, a term that is not elementwise. `CannotRun`: an implementation that cannot run this
        call, and why.
    """
    if implementation not in NAMES:
        raise ValueError(f"`implementation` is {implementation!r}; give one of {NAMES}")
    _check_term(divergence)
    whole_rows = isinstance(divergence, RowDivergence)
    only_xla = whole_rows or in_buckets
    if implementation == "xla" or (only_xla and implementation is None):
        return bucketed.row_losses if in_buckets else xla_row_losses(divergence)
    if only_xla:
        other = "divergence is a function of whole rows" if whole_rows else "teacher is compared by buckets of tokens"
        why = f"it sums a term of each token and this {other}"
        raise CannotRun(f'`implementation="{implementation}"` cannot run here: {why}; use "xla" or None')
    if implementation is None:
        return _on_cuda.get(fastest(chunk, divergence), reference.row_losses)
    if reason := obstacle(implementation, chunk, divergence):
        raise CannotRun(f'`implementation="{implementation}"` cannot run here: {reason}; use "xla" or None')
    return _kernels[implementation].row_losses


def fastest(chunk: Chunk, divergence: AnyDivergence | None = None) -> str:
    """The name of what None takes for logits in float32 and a sum over tokens."""
    kernels = KERNELS if target_platform() == "cuda" else ()
    return next((name for name in kernels if not obstacle(name, chunk, divergence)), "xla")


def aligned_width(implementation: str | None, chunk: Chunk, divergence: AnyDivergence | None = None) -> int:
    """How many columns logits are to have for this call: more than a vocabulary's if a kernel can copy these alone.

    Columns beyond the vocabulary are filling, as `VocabularyShards` has it.
    """
    width = chunk.student_width
    if implementation not in (None, "mosaic") or "mosaic" not in _kernels or isinstance(divergence, RowDivergence):
        return width
    aligned = -(-width // _kernels["mosaic"].ALIGNMENT) * _kernels["mosaic"].ALIGNMENT
    if chunk.teacher_width not in (None, width):
        return width
    teacher = None if chunk.teacher_width is None else aligned
    filled = replace(chunk, student_width=aligned, teacher_width=teacher)
    return width if obstacle("mosaic", filled, divergence) else aligned


def xla_row_losses(divergence: AnyDivergence | None) -> RowLosses:
    _check_term(divergence)
    return whole_row.row_losses if isinstance(divergence, RowDivergence) else reference.row_losses


def _check_term(divergence: AnyDivergence | None) -> None:
    """`whole_row` checks a function of whole rows itself, which it knows the widths for."""
    if isinstance(divergence, Divergence):
        term, slope, parameters = divergence.term, divergence.slope, divergence.parameters
        check_elementwise("divergence.term", term, parameters, is_differentiated=slope is None)
        if slope is not None:
            check_elementwise("divergence.slope", slope, parameters, is_differentiated=False)
        if (outer := divergence.outer) is not None:
            check_elementwise("divergence.outer", outer, parameters, is_differentiated=True, num_arrays=1)


def obstacle(implementation: str, chunk: Chunk, divergence: AnyDivergence | None = None) -> str | None:
    """Why a kernel cannot run a chunk, or None if it can."""
    if implementation in _missing:
        return _missing[implementation]
    kernel = _kernels[implementation]
    if not getattr(kernel, "INTERPRET", False) and target_platform() != "cuda":
        return f"it needs a CUDA GPU and JAX computes on {target_platform()!r}"
    if chunk.dtype != jnp.float32:
        return f"its logits are float32 and these are {jnp.dtype(chunk.dtype).name}"
    if chunk.is_shard:
        return "it sums over the vocabulary of one device and here several share it"
    if is_checked():
        return "in a shard_map its results lack the types of `check_vma`; under jit alone, with `sharding`, it runs"
    width = max(chunk.student_width, chunk.teacher_width or 0)
    if chunk.rows * width >= 2**31:
        return f"a chunk of {chunk.rows} rows by {width} columns needs 64-bit offsets; give a smaller `chunk_size`"
    if implementation == "mosaic" and (reason := _mosaic_obstacle(chunk)):
        return reason
    if isinstance(divergence, Divergence) and (lacks := lacking(implementation, divergence)):
        return f"its term, or slope, has {', '.join(lacks)}, which this kernel is not known to have"
    return None


def _mosaic_obstacle(chunk: Chunk) -> str | None:
    kernel, width = _kernels["mosaic"], chunk.student_width
    if reason := _too_old_for_mosaic():
        return reason
    if not any(name in target_device() for name in ("H100", "H200")):
        return f"it is tested on H100 and H200 and this is {target_device()!r}"
    if chunk.teacher_width not in (None, width):
        return f"the vocabularies differ in width ({width} and {chunk.teacher_width})"
    if width % kernel.ALIGNMENT:
        return f"V={width} is no multiple of {kernel.ALIGNMENT}, as its bulk copies need"
    if kernel.last_part_width(width) <= 0:
        return f"V={width} is too narrow to share between {kernel.PARTS} blocks"
    if kernel.shared_memory(width, 1 if chunk.teacher_width is None else 2) > kernel.SHARED_MEMORY:
        return f"a row of V={width} does not fit the shared memory of a cluster"
    return None


def _cuda_else_xla(name: str, rows: ChunkRows, options: RowOptions, place: Place | None = None) -> RowResult:
    """The kernel where the computation is compiled for CUDA, XLA where it is compiled for something else."""

    def call(row_losses: RowLosses, rows: ChunkRows, place: Place | None) -> RowResult:
        return row_losses(rows, options, place)

    return jax.lax.platform_dependent(
        rows, place, cuda=partial(call, _kernels[name].row_losses), default=partial(call, reference.row_losses)
    )


# One object each: the functions are part of what `jax.jit` caches on.
_on_cuda = {name: partial(_cuda_else_xla, name) for name in _kernels}
