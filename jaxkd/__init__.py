"""Knowledge distillation over huge vocabularies in JAX: losses of two linear heads that never form their logits."""

from jaxkd import embedding, preference
from jaxkd.divergences.sums_over_tokens import (
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
from jaxkd.divergences.whole_rows import RowDivergence, cosine_distance, earth_mover, kernel_distance, mse, sinkhorn
from jaxkd.logits.flax_heads import flax_logits
from jaxkd.logits.sources import LinearLogits, Logits
from jaxkd.loop.partitioning import Sharding
from jaxkd.losses.chunked_losses import chunked_loss
from jaxkd.losses.distillation import distillation_loss, fused_linear_jsd
from jaxkd.losses.hidden_states import hidden_cosine, hidden_mse
from jaxkd.losses.log_probs import sequence_log_probs, token_log_probs, token_statistics
from jaxkd.teachers.mixture import Mixture
from jaxkd.teachers.top_k import TopKLogProbs
from jaxkd.teachers.vocabulary_map import VocabularyMap

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
