"""`jaxkd.distillation_loss` in every divergence of a sum over tokens, in both libraries and beside other losses.

Every two values of divergence, vocabulary shape, dtype, mask, head, temperature and chunk size meet in at least one
comparison (not the full product), and every divergence is met near convergence in bfloat16 besides. Beside each stands
the dense PyTorch loss in its dtype and, where they run, Liger Kernel's two JSD losses.
"""

from functools import partial
from typing import Any

import torch

import jaxkd
from torch_bridge import reference
from torch_bridge.parity import liger_peers
from torch_bridge.parity.comparison import Comparison, Tensors
from torch_bridge.parity.distillation_cases import DIVERGENCES, Case, converging_cases, make_batch, pairwise_cases

# The slope of |p - q| and of min(p, q) jumps where p = q, and a token whose p and q agree to the rounding of float32
# logits may be on either side. Near convergence there are such tokens: moving the logits of a case by 3e-6 of
# themselves turns one likely token over and moves the exact float64 gradient by 3.8e-2; moving them by 1e-6, nothing.
JUMPS_NEAR_CONVERGENCE = 5e-2


def comparisons(device: str = "cpu", implementation: str | None = None) -> list[Comparison]:
    return [comparison_of(case, device, implementation) for case in pairwise_cases() + converging_cases()]


def comparison_of(case: Case, device: str = "cpu", implementation: str | None = None) -> Comparison:
    batch = make_batch(case, device)
    inputs, given = batch.tensors()

    def of_jax(arrays: dict[str, Any]) -> Any:
        x = batch.holding(arrays)
        return jaxkd.distillation_loss(
            jaxkd.LinearLogits(**x.student),
            jaxkd.LinearLogits(**x.teacher),
            x.labels,
            divergence=DIVERGENCES[case.divergence].jax,
            chunk_size=case.chunk_size,
            implementation=implementation,
            **x.options,
        )

    def of_torch(tensors: Tensors) -> torch.Tensor:
        x = batch.holding(tensors)
        return reference.distillation_loss(
            reference.LinearLogits(**x.student),
            reference.LinearLogits(**x.teacher),
            x.labels,
            divergence=DIVERGENCES[case.divergence].torch,
            **x.options,
        )[0]

    def of_liger(loss: liger_peers.Loss, tensors: Tensors) -> torch.Tensor:
        return loss(case, batch.holding(tensors))

    liger = {k: partial(of_liger, loss) for k, loss in liger_peers.losses().items() if liger_peers.runs(k, case)}
    is_jumpy = case.divergence in ("total_variation", "overlap_nll") and case.gap is not None
    return Comparison(
        family="divergences",
        loss=case.divergence,
        setting=case.setting,
        inputs=inputs,
        jax_loss=of_jax,
        torch_loss=of_torch,
        given=given,
        peers={"dense torch": of_torch, **liger},
        gradient_bound=JUMPS_NEAR_CONVERGENCE if is_jumpy else None,
    )
