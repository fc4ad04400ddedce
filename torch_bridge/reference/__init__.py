"""jaxkd's losses in plain PyTorch, dense and float64-capable: the truth that jaxkd is checked against."""

from torch_bridge.reference.distillation import (
    Divergence,
    LinearLogits,
    Logits,
    alpha_divergence,
    distillation_loss,
    forward_kl,
    hellinger,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    symmetric_kl,
    total_variation,
)

__all__ = [
    "Divergence",
    "LinearLogits",
    "Logits",
    "alpha_divergence",
    "distillation_loss",
    "forward_kl",
    "hellinger",
    "jensen_shannon",
    "reverse_kl",
    "skew_kl",
    "symmetric_kl",
    "total_variation",
]
