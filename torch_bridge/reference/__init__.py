"""jaxkd's losses in plain PyTorch, dense and float64-capable: the truth that jaxkd is checked against.

Names and conventions are jaxkd's, the code is not: whole tensors, no chunks, gradients by autograd. The twins of
`jaxkd.embedding` and `jaxkd.preference` are in `embedding` and `preference`. Imports neither jaxkd nor JAX.
"""

from torch_bridge.reference import dense_embedding as embedding
from torch_bridge.reference import dense_preference as preference
from torch_bridge.reference.dense_distillation import (
    Divergence,
    LinearLogits,
    Logits,
    alpha_beta,
    alpha_divergence,
    distillation_loss,
    forward_kl,
    hellinger,
    jensen_shannon,
    overlap_nll,
    renyi,
    reverse_kl,
    skew_kl,
    symmetric_kl,
    total_variation,
)
from torch_bridge.reference.dense_row_divergences import (
    RowDivergence,
    cosine_distance,
    earth_mover,
    kernel_distance,
    mse,
    sinkhorn,
)
from torch_bridge.reference.dense_rows import (
    chunked_loss,
    chunked_rows,
    cross_entropy,
    hidden_cosine,
    hidden_mse,
    sequence_log_probs,
    token_divergences,
    token_entropies,
    token_log_probs,
    token_statistics,
)
from torch_bridge.reference.dense_teachers import Mixture, Routed, TopKLogProbs, VocabularyMap

__all__ = [
    "Divergence",
    "LinearLogits",
    "Logits",
    "Mixture",
    "Routed",
    "RowDivergence",
    "TopKLogProbs",
    "VocabularyMap",
    "alpha_beta",
    "alpha_divergence",
    "chunked_loss",
    "chunked_rows",
    "cosine_distance",
    "cross_entropy",
    "distillation_loss",
    "earth_mover",
    "embedding",
    "forward_kl",
    "hellinger",
    "hidden_cosine",
    "hidden_mse",
    "jensen_shannon",
    "kernel_distance",
    "mse",
    "overlap_nll",
    "preference",
    "renyi",
    "reverse_kl",
    "sequence_log_probs",
    "sinkhorn",
    "skew_kl",
    "symmetric_kl",
    "token_divergences",
    "token_entropies",
    "token_log_probs",
    "token_statistics",
    "total_variation",
]
