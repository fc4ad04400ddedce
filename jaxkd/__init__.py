"""Knowledge distillation over huge vocabularies in JAX: losses of two linear heads that never form their logits."""

from jaxkd.distillation import distillation_loss, fused_linear_jsd
from jaxkd.divergences import (
    Divergence,
    alpha_divergence,
    forward_kl,
    hellinger,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    symmetric_kl,
    total_variation,
)
from jaxkd.logits import LinearLogits, Logits

__all__ = [
    "Divergence",
    "LinearLogits",
    "Logits",
    "alpha_divergence",
    "distillation_loss",
    "forward_kl",
    "fused_linear_jsd",
    "hellinger",
    "jensen_shannon",
    "reverse_kl",
    "skew_kl",
    "symmetric_kl",
    "total_variation",
]
