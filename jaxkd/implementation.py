"""The door to the row kernels: which implementation runs a call.

``None`` takes the fastest that is tested for the call; a name takes that one, or raises an error that says why not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd import rows

try:
    from jaxkd import rows_triton
except ImportError as error:  # Pallas' Triton backend is deprecated and will leave JAX
    rows_triton = None  # type: ignore[assignment]
    _missing = f"this JAX ({jax.__version__}) has no Pallas Triton backend ({error})"

IMPLEMENTATIONS = (None, "xla", "triton")

RowLosses = Callable[..., rows.RowResult]


def row_losses_for(
    implementation: str | None, chunk_size: int, student_width: int, teacher_width: int, dtype: jnp.dtype
) -> RowLosses:
    """The function that computes the rows of a chunk.

    Raises:
      ValueError: an unknown name, or an implementation that cannot run this call, and why.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` is {implementation!r}; give one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return rows.row_losses
    obstacle = triton_obstacle(chunk_size, student_width, teacher_width, dtype)
    if implementation == "triton":
        if obstacle:
            raise ValueError(f'`implementation="triton"` cannot run here: {obstacle}; use "xla" or None')
        return rows_triton.row_losses
    return rows.row_losses if obstacle else _triton_on_cuda


def triton_obstacle(chunk_size: int, student_width: int, teacher_width: int, dtype: jnp.dtype) -> str | None:
    """Why the Triton kernel cannot run a chunk, or None if it can."""
    if rows_triton is None:
        return _missing
    if not rows_triton.INTERPRET and target_platform() != "cuda":
        return f"it needs a CUDA GPU and JAX computes on {target_platform()!r}"
    if dtype != jnp.float32:
        return f"its logits are float32 and these are {jnp.dtype(dtype).name}"
    if chunk_size * max(student_width, teacher_width) >= 2**31:
        return f"a chunk of {chunk_size} rows by {max(student_width, teacher_width)} columns needs 64-bit offsets"
    return None


def target_platform() -> str:
    """The platform that is compiled for: that of the abstract mesh in use, if it names one, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower() else backend


def _triton_on_cuda(*arguments: Any) -> rows.RowResult:
    """The kernel where the computation is compiled for CUDA, XLA where it is compiled for something else."""
    *arrays, options = arguments
    return jax.lax.platform_dependent(
        *arrays, cuda=partial(_call, rows_triton.row_losses, options), default=partial(_call, rows.row_losses, options)
    )


def _call(row_losses: RowLosses, options: rows.RowOptions, *arrays: Any) -> rows.RowResult:
    return row_losses(*arrays, options)
