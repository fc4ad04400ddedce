"""The fused losses of Liger Kernel (checked against 0.8.5) and TRL (1.16.0), called as their own trainers call them."""

import contextlib
import importlib.util
import sys
import types
from functools import partial
from typing import Any

import torch

from torch_bridge.benchmark.batches import IGNORE_INDEX
from torch_bridge.benchmark.preparing import Loss, MakeLoss
from torch_bridge.benchmark.tasks import DIVERGENCES, ONE_HEAD, Kind, Task
from torch_bridge.benchmark.two_heads import total

TRL_VOCABULARY_CHUNK = 32768  # as trl.trainer.utils has it
HEADS = ("hidden", "weight", "teacher_hidden", "teacher_weight")


def peers(kind: Kind, device: str, compiled: bool) -> dict[str, MakeLoss]:
    """Those that are installed and can run this kind of task here, by name."""
    found = liger(kind, compiled) if device == "cuda" and importlib.util.find_spec("liger_kernel") else {}
    if importlib.util.find_spec("trl"):
        found["TRL chunked"] = trl_log_probs if kind in ONE_HEAD else trl_divergence
    return found


def liger(kind: Kind, compiled: bool) -> dict[str, MakeLoss]:
    """Liger's losses; it has no divergence whose rows have gradients of their own."""
    found: dict[str, MakeLoss] = {}
    if kind == "divergence":
        found["Liger fused"] = partial(liger_fused, None, "nvidia-triton")
        found["Liger fused, fp32 sums"] = partial(liger_fused, torch.float32, "nvidia-triton")
        if has_cute("jsd_loss_and_grad"):
            found["Liger fused, CuTe"] = partial(liger_fused, None, "nvidia-cutedsl")
            found["Liger fused, CuTe, fp32 sums"] = partial(liger_fused, torch.float32, "nvidia-cutedsl")
        for chunk_size in (1024, 4096) if compiled else ():
            found[f"Liger chunked, compiled, chunk {chunk_size}"] = partial(liger_chunked, chunk_size)
    if kind in ONE_HEAD:
        found["Liger fused"] = partial(liger_cross_entropy, None, None)
        found["Liger fused, fp32 sums"] = partial(liger_cross_entropy, torch.float32, None)
        if has_cute("cross_entropy_loss_and_grad"):
            found["Liger fused, CuTe"] = partial(liger_cross_entropy, None, "nvidia-cutedsl")
            if kind == "cross-entropy":
                found["Liger fused, CuTe, products too"] = liger_cute_cross_entropy
    return found


def has_cute(operation: str) -> bool:
    """Whether Liger can run its CuTe DSL kernel: nvidia-cutlass-dsl, apache-tvm-ffi and a Hopper GPU or newer."""
    if importlib.util.find_spec("cutlass") is None:
        return False
    import liger_kernel.functional  # noqa: F401  (declares the operations)
    from liger_kernel.backends import available_impls

    return "nvidia-cutedsl" in available_impls(operation)


def liger_fused(accum_dtype: torch.dtype | None, implementation: str, task: Task) -> Loss:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    # `LigerFusedLinearJSD` does the same, with CuTe DSL wherever it is installed.
    options = DIVERGENCES[task.divergence].beta, IGNORE_INDEX, 1.0, accum_dtype, implementation, None
    return lambda x, labels: LigerFusedLinearJSDFunction.apply(*(x[name] for name in HEADS), labels, *options)


def liger_chunked(chunk_size: int, task: Task) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    chunked = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,  # both weights default to 0.5
        weight_soft_loss=1.0,
        beta=DIVERGENCES[task.divergence].beta,
        chunk_size=chunk_size,
    )

    def loss(x, labels):
        hidden = x["hidden"]
        labels = hidden.new_zeros(len(hidden), dtype=torch.int64) if labels is None else labels
        return chunked(*(x[name] for name in HEADS), labels)

    return loss


def liger_cross_entropy(accum_dtype: torch.dtype | None, implementation: str | None, task: Task) -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    of_rows = task.kind == "token log-probs"
    options: tuple[Any, ...] = (None, None, IGNORE_INDEX, 0.0, 0.0, "none" if of_rows else "mean", None, False)
    options += (accum_dtype, False, False, False, implementation, None)

    def loss(x, labels):
        value = LigerFusedLinearCrossEntropyFunction.apply(x["hidden"], x["weight"], labels, *options)[0]
        return -value.mean() if of_rows else value

    return loss


def liger_cute_cross_entropy(task: Task) -> Loss:
    """Its kernel for Hopper alone: all rows' logits in bfloat16 at once, products in CuTe DSL too."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return lambda x, labels: liger_fused_linear_cross_entropy_sm90(x["hidden"], x["weight"], labels, IGNORE_INDEX)


def trl_divergence(task: Task) -> Loss:
    _stand_in_for_trainers()
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x, labels):
        counted = slice(None) if labels is None else labels != IGNORE_INDEX
        student, teacher = x["hidden"][counted], x["teacher_hidden"][counted]
        heads = student, x["weight"], None, teacher, x["teacher_weight"], None
        rows, _entropy = ChunkedDivergenceFunction.apply(*heads, DIVERGENCES[task.divergence].beta)
        return total(torch, rows, x, None)

    return loss


def trl_log_probs(task: Task) -> Loss:
    """Cross-entropy too: TRL's trainers take it from these."""
    _stand_in_for_trainers()
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(x, labels):
        counted = labels != IGNORE_INDEX
        options = 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ()
        arrays = x["hidden"][counted], x["weight"], None, labels[counted]
        mean = ChunkedLogProbFunction.apply(*arrays, *options)[0].mean()
        return -mean if task.kind == "cross-entropy" else mean

    return loss


def _stand_in_for_trainers() -> None:
    """TRL's kernels take one function, which does nothing without ZeRO-3, from a file that imports all it depends on.

    A stand-in for that file makes the kernels importable with PyTorch and transformers alone.
    """
    stand_in: Any = types.ModuleType("trl.trainer.utils")
    stand_in.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
    sys.modules.setdefault("trl.trainer.utils", stand_in)
