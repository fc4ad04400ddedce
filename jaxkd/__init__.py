"""Knowledge distillation over huge vocabularies in JAX: losses of two linear heads that never form their logits."""

from jaxkd import embedding, preference
from jaxkd.divergences import (
    Divergence,
    RowDivergence,
    alpha_divergence,
    cosine_distance,
    earth_mover,
    forward_kl,
    hellinger,
    jensen_shannon,
    kernel_distance,
    mse,
    reverse_kl,
    sinkhorn,
    skew_kl,
    symmetric_kl,
    total_variation,
)
from jaxkd.logits import LinearLogits, Logits, flax_logits
from jaxkd.loop import Sharding
from jaxkd.losses import (
    chunked_loss,
    distillation_loss,
    fused_linear_jsd,
    hidden_cosine,
    hidden_mse,
    sequence_log_probs,
    token_log_probs,
    token_statistics,
)
from jaxkd.teachers import Mixture, TopKLogProbs, VocabularyMap

__all__ = [
    "Divergence",
    "LinearLogits",
    "Logits",
    "Mixture",
    "RowDivergence",
    "Sharding",
    "TopKLogProbs",
    "VocabularyMap",
    "alpha_divergence",
    "chunked_loss",
    "cosine_distance",
    "distillation_loss",
    "earth_mover",
    "embedding",
    "flax_logits",
    "forward_kl",
    "fused_linear_jsd",
    "hellinger",
    "hidden_cosine",
    "hidden_mse",
    "jensen_shannon",
    "kernel_distance",
    "mse",
    "preference",
    "reverse_kl",
    "sequence_log_probs",
    "sinkhorn",
    "skew_kl",
    "symmetric_kl",
    "token_log_probs",
    "token_statistics",
    "total_variation",
]
