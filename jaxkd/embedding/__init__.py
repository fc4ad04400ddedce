"""Losses of embedding models at batches whose similarities would not fit in memory.

A batch of B rows has B x B similarities. Here a chunk of rows by all candidates is the most that exists at a time
(`info_nce`, `nt_xent`, the triplets of a batch), or they are summed without being formed at all (`cosent`, `angle`).
Semantics are those of sentence-transformers; where they differ, the docstring says so.

All take embeddings (B, D) of one floating type, compute in float32 (float64 for float64) and return ``(loss, metrics)``
with float32 metrics that carry no gradient. A row of ``weights`` 0 is not there: it adds exactly nothing to the loss or
to any gradient and is nobody's candidate, even when it holds NaN. A batch without a row that counts has loss 0.

This room holds the losses that compare whole embeddings with each other, one file a kind. It may import `jaxkd.losses`,
`jaxkd.loop`, `jaxkd.logits` and `jaxkd.divergences`, never `jaxkd.preference`; of jaxkd only ``jaxkd/__init__.py``
imports it.
"""

from jaxkd.embedding.candidates import Guide
from jaxkd.embedding.contrastive import info_nce, nt_xent
from jaxkd.embedding.distances import Distance, cosine, euclidean
from jaxkd.embedding.pair_triplets import batch_all_triplet, batch_semi_hard_triplet
from jaxkd.embedding.ranking import angle, cosent
from jaxkd.embedding.similarity import angle_similarity, cosine_similarity, dot
from jaxkd.embedding.sizes import matryoshka
from jaxkd.embedding.teacher_scores import margin_mse, score_distillation
from jaxkd.embedding.triplets import batch_hard_triplet, triplet

__all__ = [
    "Distance",
    "Guide",
    "angle",
    "angle_similarity",
    "batch_all_triplet",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "cosent",
    "cosine",
    "cosine_similarity",
    "dot",
    "euclidean",
    "info_nce",
    "margin_mse",
    "matryoshka",
    "nt_xent",
    "score_distillation",
    "triplet",
]
