"""Every kind of teacher in both libraries, on data like a model's: what is kept of one, several, another tokenizer."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import torch

import jaxkd
from torch_bridge import reference
from torch_bridge.parity.comparison import Comparison, Tensors, as_jax
from torch_bridge.parity.distillation_cases import DIVERGENCES, Case, Shape, make_batch

ROWS, HIDDEN, TEACHER_HIDDEN, VOCABULARY, CHUNK, K, SHARED = 68, 48, 40, 509, 16, 24, 300
SAME = Shape(ROWS, HIDDEN, TEACHER_HIDDEN, VOCABULARY, VOCABULARY)
OTHER = SAME._replace(teacher_vocabulary=521)
Make = Callable[[ModuleType, dict[str, Any], dict[str, Any]], Any]


def comparisons(device: str = "cpu") -> list[Comparison]:
    """Each kind in float32 and bfloat16, with ignored rows, and weights or NaN states where they are ignored."""
    return [case for dtype in ("float32", "bfloat16") for case in _comparisons(dtype, device)]


def _comparisons(dtype: str, device: str) -> list[Comparison]:
    def case(kind: str, setting: str, make: Make, mask: str, divergence: str, shape: Shape = SAME) -> Comparison:
        batch = make_batch(Case(divergence, shape, dtype, mask=mask, temperature=2.0), device)
        given = _given(batch.teacher, shape, device)
        pair = DIVERGENCES[divergence]
        head, arrays, labels, options = jax.tree.map(as_jax, (batch.teacher, given, batch.labels, batch.options))

        def of_jax(inputs: dict[str, Any]) -> Any:
            return jaxkd.distillation_loss(
                jaxkd.LinearLogits(**inputs),
                make(jaxkd, head, arrays),
                labels,
                divergence=pair.jax,
                chunk_size=CHUNK,
                **options,
            )

        def of_torch(inputs: Tensors) -> torch.Tensor:
            teacher = make(reference, {name: x.to(inputs["hidden"].dtype) for name, x in batch.teacher.items()}, given)
            student = reference.LinearLogits(**inputs)
            return reference.distillation_loss(student, teacher, batch.labels, divergence=pair.torch, **batch.options)[
                0
            ]

        return Comparison("teacher", kind, f"{divergence}, {setting}", batch.student, of_jax, of_torch)

    jsd = "jensen_shannon(0.1)"
    return [
        case("TopKLogProbs", "bucket, weights", _top_k("bucket"), "weighted", jsd),
        case("TopKLogProbs", "bucket, NaN states", _top_k("bucket"), "poisoned", "reverse_kl"),
        case("TopKLogProbs", "renormalize, captured at 1", _top_k("renormalize", 1.0), "weighted", "skew_kl(0.1)"),
        case("TopKLogProbs", "zero, NaN states", _top_k("zero"), "poisoned", "forward_kl"),
        case("TopKLogProbs.of", "chosen by another, weights", _top_k_of, "weighted", jsd),
        case("Mixture", "weights", _mixture("shares"), "weighted", jsd),
        case("Mixture", "by row, NaN states", _mixture("shares_by_row"), "poisoned", "reverse_kl"),
        case("Mixture of TopKLogProbs", "NaN states", _mixture_of_lists("bucket"), "poisoned", jsd),
        case("Mixture of TopKLogProbs", "renormalize", _mixture_of_lists("renormalize"), "weighted", "reverse_kl"),
        case("Routed", "weights", _routed, "weighted", jsd),
        case("Routed", "NaN states", _routed, "poisoned", "reverse_kl"),
        case("VocabularyMap", "weights", _vocabulary_map, "weighted", jsd, OTHER),
        case("VocabularyMap", "NaN states", _vocabulary_map, "poisoned", "forward_kl", OTHER),
    ]


def _given(teacher: dict[str, Any], shape: Shape, device: str) -> dict[str, Any]:
    """What the kinds need besides a head. Rows list between K and K - 5 tokens, one of them twice."""
    generator = torch.Generator().manual_seed(1)
    teacher_ids, student_ids = (
        torch.randperm(width, generator=generator)[:SHARED].to(device)
        for width in (shape.teacher_vocabulary, shape.vocabulary)
    )
    logits = teacher["hidden"].double() @ teacher["weight"].double().T
    given = {"teacher_ids": teacher_ids, "student_ids": student_ids}
    for name, temperature in (("", 2.0), ("_at_1", 1.0)):
        log_probs, token_ids = (logits / temperature).log_softmax(-1).topk(K)
        log_probs, token_ids = log_probs[:, torch.randperm(K, generator=generator)].float(), token_ids.clone()
        token_ids[:, 7], log_probs[:, 8] = token_ids[:, 3], -torch.inf
        token_ids[torch.arange(K, device=device) >= K - torch.arange(ROWS, device=device)[:, None] % 5] = -1
        given |= {f"log_probs{name}": log_probs, f"token_ids{name}": token_ids}
    shares = torch.rand(ROWS, 3, generator=generator).to(device)
    given |= {"shares": shares[0], "shares_by_row": shares * (shares > shares.amin(1, keepdim=True))}
    return given | {"index": torch.randint(3, (ROWS,), generator=generator).to(device)}


def _top_k(tail: str, temperature: float = 2.0) -> Make:
    name = "_at_1" if temperature == 1 else ""

    def make(library: ModuleType, teacher: dict[str, Any], given: dict[str, Any]) -> Any:
        arrays = given[f"log_probs{name}"], given[f"token_ids{name}"]
        return library.TopKLogProbs(*arrays, temperature=temperature, tail=tail)

    return make


def _mixture(shares: str) -> Make:
    def make(library: ModuleType, teacher: dict[str, Any], given: dict[str, Any]) -> Any:
        return library.Mixture(_three(library, teacher), given[shares])

    return make


def _mixture_of_lists(tail: str) -> Make:
    """Two lists of other tokens than one another's, and one that is not as long."""

    def make(library: ModuleType, teacher: dict[str, Any], given: dict[str, Any]) -> Any:
        log_probs, token_ids = given["log_probs"], given["token_ids"]
        lists = (log_probs, token_ids), (log_probs, given["student_ids"][token_ids % SHARED]), (log_probs, token_ids)
        sizes = K, K - 7, K // 2
        tops = [
            library.TopKLogProbs(*(x[:, :size] for x in arrays), temperature=2.0, tail=tail)
            for arrays, size in zip(lists, sizes, strict=True)
        ]
        return library.Mixture(tops, given["shares_by_row"])

    return make


def _top_k_of(library: ModuleType, teacher: dict[str, Any], given: dict[str, Any]) -> Any:
    of, by, _ = _three(library, teacher)
    return library.TopKLogProbs.of(of, K, chosen_by=by, temperature=2.0)


def _routed(library: ModuleType, teacher: dict[str, Any], given: dict[str, Any]) -> Any:
    return library.Routed(_three(library, teacher), given["index"])


def _three(library: ModuleType, teacher: dict[str, Any]) -> list[Any]:
    hidden, weight = teacher["hidden"], teacher["weight"]
    few = hidden.shape[1] // 2
    return [library.LinearLogits(*x) for x in ((hidden, weight), (hidden[:, :few], weight[:, :few]), (-hidden, weight))]


def _vocabulary_map(library: ModuleType, teacher: dict[str, Any], given: dict[str, Any]) -> Any:
    return library.VocabularyMap(library.LinearLogits(**teacher), given["student_ids"], given["teacher_ids"])
