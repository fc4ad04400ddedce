"""The embedding losses in both libraries, on batches as an embedding model makes them."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jaxkd import embedding
from torch_bridge.parity.comparison import Comparison, Tensors
from torch_bridge.reference import embedding as dense

ROWS, SIZE, CHUNK = 101, 48, 16
SIZES, FACTORS = (48, 8), (1.0, 0.25)


def comparisons(device: str = "cpu") -> list[Comparison]:
    """Every loss, with its options, in float32 and bfloat16."""
    return [case for dtype in (torch.float32, torch.bfloat16) for case in _comparisons(dtype, device)]


def _comparisons(dtype: torch.dtype, device: str) -> list[Comparison]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # As a model in training makes them: a direction common to all, lengths that vary, positives near their anchors.
    anchors = normal(ROWS, SIZE) + 0.5 * normal(1, SIZE)
    triplets = {
        "anchors": anchors * (1 + torch.rand(ROWS, 1, generator=generator)),
        "positives": anchors + 1.5 * normal(ROWS, SIZE),
        "negatives": anchors + 2.0 * normal(ROWS, SIZE),
    }
    triplets = {name: x.to(device, dtype) for name, x in triplets.items()}
    pairs = {name: triplets[name] for name in ("anchors", "positives")}
    graded = {"first": pairs["anchors"], "second": pairs["positives"]}
    learned = {"scale": torch.tensor(14.0, device=device)}
    rows = {"embeddings": triplets["positives"]}
    classes = torch.randint(30, (ROWS,), generator=generator).to(device)
    grades = (torch.randint(6, (ROWS,), generator=generator) / 5).to(device)
    weights = torch.randint(3, (ROWS,), generator=generator).to(device, torch.float32)  # a third does not count

    documents = torch.randint(60, (ROWS, 2), generator=generator).to(device)
    there = (torch.rand(ROWS, 1, generator=generator) < 0.7).to(device)
    allowed = (torch.rand(ROWS, 2 * ROWS, generator=generator) < 0.8).to(device)
    guide = [normal(ROWS, 12).to(device) + 0.5 for _ in range(3)]
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    scores = (3 * normal(ROWS, 2)).to(device)

    def case(loss: str, setting: str, inputs: Tensors, **options: Any) -> Comparison:
        def of_jax(arrays: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
            return _evaluate(embedding, loss, arrays, {name: _as_jax(x) for name, x in options.items()})

        def of_torch(tensors: Tensors) -> torch.Tensor:
            return _evaluate(dense, loss, tensors, {k: x for k, x in options.items() if k != "chunk_size"})

        return Comparison("embedding", loss, setting, inputs, of_jax, of_torch)

    return [
        case("info_nce", "pairs", pairs),
        case("info_nce", "hard negatives, weights", triplets, weights=weights, chunk_size=CHUNK),
        case("info_nce", "symmetric, learned scale", pairs | learned, symmetric=True, chunk_size=CHUNK),
        case("info_nce", "all directions", triplets, directions=every, chunk_size=CHUNK),
        case("info_nce", "masks, ids", triplets, negative_mask=there, candidate_mask=allowed, document_ids=documents),
        case("info_nce", "guide", triplets | learned, directions=every[:2], guide=guide, chunk_size=CHUNK),
        case("nt_xent", "classes", rows, labels=classes, chunk_size=CHUNK),
        case("nt_xent", "temperature 0.5, weights", rows, labels=classes, temperature=0.5, weights=weights),
        case("angle", "grades with ties, scale 2", graded, labels=grades, scale=2.0),
        case("cosent", "grades with ties", graded, labels=grades),
        case("cosent", "weights, learned scale", graded | learned, labels=grades, weights=weights),
        case("triplet", "Euclidean, margin 5", triplets),
        case("triplet", "cosine, weights", triplets, distance="cosine", margin=0.5, weights=weights),
        case("batch_hard_triplet", "Euclidean, margin 5", rows, labels=classes, chunk_size=CHUNK),
        case("batch_hard_triplet", "cosine, soft margin", rows, labels=classes, distance="cosine", margin=None),
        case("batch_semi_hard_triplet", "Euclidean, margin 5", rows, labels=classes, chunk_size=CHUNK),
        case("batch_semi_hard_triplet", "cosine, weights", rows, labels=classes, distance="cosine", weights=weights),
        case("batch_all_triplet", "Euclidean, margin 5", rows, labels=classes, chunk_size=CHUNK),
        case("batch_all_triplet", "cosine, weights", rows, labels=classes, distance="cosine", weights=weights),
        case("margin_mse", "ragged, weights", triplets, teacher_scores=scores, negative_mask=there, weights=weights),
        case("score_distillation", "temperature 4", triplets, teacher_scores=scores, temperature=4.0),
        case("matryoshka(info_nce)", "48, 8", pairs, chunk_size=CHUNK),
        case("matryoshka(cosent)", "48, 8", graded, labels=grades),
        case("matryoshka(triplet)", "48, 8", triplets, margin=1.0),
    ]


def _evaluate(library: ModuleType, loss: str, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    """The loss of that name in either library; a distance is given by its name too."""
    name = loss.removeprefix("matryoshka(").removesuffix(")")
    function = getattr(library, name)
    if name != loss:
        function = library.matryoshka(function, SIZES, FACTORS)
    if "distance" in options:
        options = options | {"distance": getattr(library, options["distance"])}
    if "guide" in options:
        options = options | {"guide": library.Guide(*options["guide"], margin=0.05)}
    return function(**inputs, **options)


def _as_jax(x: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x.cpu().numpy()) if isinstance(x, torch.Tensor) else x, x)
