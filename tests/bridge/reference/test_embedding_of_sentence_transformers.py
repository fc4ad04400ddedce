"""The dense embedding losses against those of sentence-transformers, where it is installed."""

import importlib.util
import warnings

import numpy as np
import pytest
import torch

from torch_bridge import reference
from torch_bridge.parity.comparison import errors, loss_and_gradients


def cases_of_sentence_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.sentence_transformer import losses

    hard, soft = losses.BatchHardTripletLoss, losses.BatchHardSoftMarginTripletLoss
    ranking, dense = losses.MultipleNegativesRankingLoss, reference.embedding
    both_ways = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    cosine_of_all = losses.BatchHardTripletLossDistanceFunction.cosine_distance
    cosine = losses.TripletDistanceMetric.COSINE
    model = torch.nn.Identity()
    return [
        (ranking(model), 3, None, dense.info_nce, {}),
        (ranking(model, scale=5.0, **both_ways), 3, None, dense.info_nce, {"scale": 5.0, "symmetric": True}),
        (losses.CoSENTLoss(model), 2, "grades", dense.cosent, {}),
        (losses.TripletLoss(model), 3, None, dense.triplet, {}),
        (losses.TripletLoss(model, cosine, 0.5), 3, None, dense.triplet, {"distance": dense.cosine, "margin": 0.5}),
        (hard(model), 1, "classes", dense.batch_hard_triplet, {}),
        (
            soft(model, cosine_of_all),
            1,
            "classes",
            dense.batch_hard_triplet,
            {"distance": dense.cosine, "margin": None},
        ),
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_sentence_transformers():
    """The dense twins are its losses, gradients included, on every class having two members."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(29, 11, generator=generator, dtype=torch.float64) for _ in range(3)]
    rows[1] += rows[0]
    labels = {None: None, "classes": torch.arange(29) % 5, "grades": torch.arange(29) % 4 / 3}
    for theirs, count, kind, ours, options in cases_of_sentence_transformers():
        inputs = {str(i): x for i, x in enumerate(rows[:count])}
        given = () if kind is None else (labels[kind],)
        found = errors(
            loss_and_gradients(lambda x: ours(*x.values(), *given, **options), inputs),  # noqa: B023
            loss_and_gradients(lambda x: theirs.compute_loss_from_embeddings(list(x.values()), labels[kind]), inputs),  # noqa: B023
        )
        assert max(found.values()) < 1e-9, (theirs, found)


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_matryoshka_of_sentence_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.sentence_transformer.losses import matryoshka
    x = torch.tensor(np.random.default_rng(0).normal(size=(5, 8)))
    cut = reference.embedding.matryoshka(lambda x: (x * torch.arange(x.shape[1])).sum(), (8, 3), (1.0, 0.5))
    parts = [(matryoshka.shrink(x, dim) * torch.arange(dim)).sum() for dim in (8, 3)]
    assert float(cut(x)) == pytest.approx(float(parts[0] + 0.5 * parts[1]))
