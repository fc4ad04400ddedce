"""Who takes part in a benchmark: every way to a kind of loss that can run here, by name."""

from functools import partial

import jax.numpy as jnp

from jaxkd.kernels.dispatch import KERNELS, Chunk, obstacle
from torch_bridge.benchmark.batches import Shape
from torch_bridge.benchmark.one_head import jax_dense_labels, jaxkd_labels, torch_compiled_labels, torch_dense_labels
from torch_bridge.benchmark.peers import peers
from torch_bridge.benchmark.preparing import Prepare, prepare_jax, prepare_torch
from torch_bridge.benchmark.tasks import ONE_HEAD, Kind
from torch_bridge.benchmark.two_heads import jax_dense, jaxkd_divergence, torch_compiled, torch_dense

CHUNK_SIZES = (1024, 2048, 4096)
IN_PARTS = ("Liger fused", "TRL chunked")  # beside jaxkd's default: those that compile nothing large


def contenders(kind: Kind, shape: Shape, rows: int, device: str, compiled: bool = True) -> dict[str, Prepare]:
    """Every loss that can run here, by name; `compiled` says whether those that torch compiles are among them."""
    one_head = kind in ONE_HEAD
    dense, ours = (jax_dense_labels, jaxkd_labels) if one_head else (jax_dense, jaxkd_divergence)
    eager, whole = (torch_dense_labels, torch_compiled_labels) if one_head else (torch_dense, torch_compiled)
    # First what takes most of JAX's memory: its pool grows in steps, and it never gives memory back to PyTorch.
    found: dict[str, Prepare] = {
        "JAX dense, exact logits": partial(prepare_jax, partial(dense, True)),
        "JAX dense, rounded logits": partial(prepare_jax, partial(dense, False)),
    }
    for name in implementations(kind, shape, rows, device):
        found[f"jaxkd {name}"] = partial(prepare_jax, partial(ours, name, None))
    default = default_contender(kind, shape, rows, device)
    for chunk_size in CHUNK_SIZES:
        if chunk_size < rows and kind in ("divergence", "cross-entropy"):
            chunked = partial(ours, default.removeprefix("jaxkd "), chunk_size)
            found[f"{default}, chunk {chunk_size}"] = partial(prepare_jax, chunked)
    found["torch eager"] = partial(prepare_torch, eager)
    if compiled:
        found["torch.compile"] = partial(prepare_torch, whole)
    return found | {name: partial(prepare_torch, peer) for name, peer in peers(kind, device, compiled).items()}


def implementations(kind: Kind, shape: Shape, rows: int, device: str) -> list[str]:
    """jaxkd's implementations that can run this, the one it takes by itself first."""
    teacher_width = None if kind in ONE_HEAD else shape.vocabulary
    chunk = Chunk(min(rows, min(CHUNK_SIZES)), shape.vocabulary, teacher_width, jnp.dtype(jnp.float32))
    kernels = [name for name in KERNELS if device == "cuda" and not obstacle(name, chunk)]
    return [*kernels, "xla"]


def default_contender(kind: Kind, shape: Shape, rows: int, device: str) -> str:
    return f"jaxkd {implementations(kind, shape, rows, device)[0]}"
