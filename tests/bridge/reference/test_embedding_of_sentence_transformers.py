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
        from sentence_transformers.util import pairwise_cos_sim

    hard, soft = losses.BatchHardTripletLoss, losses.BatchHardSoftMarginTripletLoss
    ranking, dense = losses.MultipleNegativesRankingLoss, reference.embedding
    both_ways = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    semi_hard, of_all = losses.BatchSemiHardTripletLoss, losses.BatchAllTripletLoss
    cosine_of_all = losses.BatchHardTripletLossDistanceFunction.cosine_distance
    cosine = losses.TripletDistanceMetric.COSINE
    with_cosine, cosines = {"distance": dense.cosine, "margin": 0.1}, {"similarity": dense.cosine_similarity}
    model = torch.nn.Identity()
    return [
        (ranking(model), 3, None, dense.info_nce, {}),
        (ranking(model, scale=5.0, **both_ways), 3, None, dense.info_nce, {"scale": 5.0, "symmetric": True}),
        *(
            (ranking(model, directions=x), 3, None, dense.info_nce, {"directions": x})
            for x in (every[:2], every[::2], every[::3], every)
        ),
        (losses.CoSENTLoss(model), 2, "grades", dense.cosent, {}),
        (losses.AnglELoss(model, scale=3.0), 2, "grades", dense.angle, {"scale": 3.0}),
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
        (semi_hard(model, margin=0.5), 1, "classes", dense.batch_semi_hard_triplet, {"margin": 0.5}),
        (semi_hard(model, cosine_of_all, 0.1), 1, "classes", dense.batch_semi_hard_triplet, with_cosine),
        (of_all(model), 1, "classes", dense.batch_all_triplet, {}),
        (of_all(model, cosine_of_all, 0.1), 1, "classes", dense.batch_all_triplet, with_cosine),
        (losses.MarginMSELoss(model), 3, "scores", dense.margin_mse, {}),
        (losses.MarginMSELoss(model, pairwise_cos_sim), 3, "margins", dense.margin_mse, cosines),
        (losses.DistillKLDivLoss(model), 3, "scores", dense.score_distillation, {}),
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_sentence_transformers():
    """The dense twins are its losses, gradients included, on every class having two members."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(29, 11, generator=generator, dtype=torch.float64) for _ in range(3)]
    rows[1] += rows[0]
    scores = torch.randn(29, 2, generator=generator, dtype=torch.float64)
    labels = {
        None: None,
        "classes": torch.arange(29) % 5,
        "grades": torch.arange(29) % 4 / 3,
        "scores": scores,
        "margins": scores[:, 0] - scores[:, 1],
    }
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
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("with_negatives", [False, True])
def test_guide_of_sentence_transformers(strategy, with_negatives):
    """With negatives, theirs has no word for positives against them, which `directions` have: left out of both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
    generator = torch.Generator().manual_seed(1)
    texts = torch.randn(3, 2, 19, 7, generator=generator, dtype=torch.float64)
    texts[1] += texts[0]
    trained, guide = texts[: 2 + with_negatives].unbind(1)
    theirs = GISTEmbedLoss.__new__(GISTEmbedLoss)
    torch.nn.Module.__init__(theirs)
    vars(theirs).update(
        model=lambda features: {"sentence_embedding": features["trained"]},
        guide=lambda features: {"sentence_embedding": features["guide"]},
        must_retokenize=False,
        similarity_fct=torch.nn.CosineSimilarity(dim=-1),
        cross_entropy_loss=torch.nn.CrossEntropyLoss(),
        temperature=0.05,
        margin_strategy=strategy,
        margin=0.2,
        contrast_anchors=True,
        contrast_positives=not with_negatives,
        gather_across_devices=False,
    )
    margins = {"margin": 0.2} if strategy == "absolute" else {"relative_margin": 0.2}
    own = reference.embedding.Guide(*guide, **margins)
    directions = ("query_to_doc", "query_to_query", "doc_to_doc")[: 2 if with_negatives else 3]
    inputs = {str(i): x for i, x in enumerate(trained)}
    found = errors(
        loss_and_gradients(
            lambda x: reference.embedding.info_nce(*x.values(), temperature=0.05, directions=directions, guide=own),
            inputs,
        ),
        loss_and_gradients(
            lambda x: theirs([{"trained": x, "guide": y} for x, y in zip(x.values(), guide, strict=True)], None), inputs
        ),
    )
    assert max(found.values()) < 1e-9


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
