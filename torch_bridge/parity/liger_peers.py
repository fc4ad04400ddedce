"""Liger Kernel's two JSD losses (checked against 0.8.5) on the cases they can run, shown beside ours."""

from collections.abc import Callable

import torch

from torch_bridge.parity.distillation_cases import Batch, Case

JSD_BETAS = {"jensen_shannon(0.5)": 0.5, "jensen_shannon(0.1)": 0.1}
Loss = Callable[[Case, Batch], torch.Tensor]


def losses() -> dict[str, Loss]:
    """The losses by name; none without liger-kernel or without a CUDA GPU, which its kernels need."""
    if not torch.cuda.is_available():
        return {}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        return {}

    def fused(case: Case, batch: Batch) -> torch.Tensor:
        loss = LigerFusedLinearJSD(jsd_beta=JSD_BETAS[case.divergence], temperature=case.temperature)
        return loss(*_heads(batch), batch.labels)

    def chunked(case: Case, batch: Batch) -> torch.Tensor:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,  # both weights default to 0.5
            weight_soft_loss=1.0,
            beta=JSD_BETAS[case.divergence],
            temperature=case.temperature,
            compiled=False,
        )
        hidden = batch.student["hidden"]
        labels = hidden.new_zeros(len(hidden), dtype=torch.int64) if batch.labels is None else batch.labels
        return loss(*_heads(batch), labels, batch.student.get("bias"), batch.teacher.get("bias"))

    return {"Liger fused": fused, "Liger chunked": chunked}


def runs(name: str, case: Case) -> bool:
    """Whether Liger's loss has what the case asks for: a JSD of equal vocabularies, no weights, no hard loss.

    A poisoned row spreads its NaN through Liger's head gradient, so those cases are left out too.
    """
    heads = {"Liger fused": ("plain",), "Liger chunked": ("plain", "bias")}
    return (
        case.divergence in JSD_BETAS
        and case.shape.vocabulary == case.shape.teacher_vocabulary
        and case.mask in ("none", "ignored")
        and case.head in heads[name]
    )


def _heads(batch: Batch) -> list[torch.Tensor]:
    return [source[name] for source in (batch.student, batch.teacher) for name in ("hidden", "weight")]
