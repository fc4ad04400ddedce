"""Distillation losses to compare, as a table of cases, and data that looks like a model's for each of them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import jaxkd
from torch_bridge import reference


class Pair(NamedTuple):
    """A divergence in both libraries."""

    jax: jaxkd.Divergence
    torch: reference.Divergence


class Shape(NamedTuple):
    """N rows; hidden sizes and vocabularies of student and teacher."""

    rows: int
    hidden: int
    teacher_hidden: int
    vocabulary: int
    teacher_vocabulary: int
    when_different: str = "truncate"


DIVERGENCES = {
    "forward_kl": Pair(jaxkd.forward_kl, reference.forward_kl),
    "reverse_kl": Pair(jaxkd.reverse_kl, reference.reverse_kl),
    "jensen_shannon(0.5)": Pair(jaxkd.jensen_shannon(0.5), reference.jensen_shannon(0.5)),
    "jensen_shannon(0.1)": Pair(jaxkd.jensen_shannon(0.1), reference.jensen_shannon(0.1)),
    "symmetric_kl(0.5)": Pair(jaxkd.symmetric_kl(0.5), reference.symmetric_kl(0.5)),
    "skew_kl(0.1)": Pair(jaxkd.skew_kl(0.1), reference.skew_kl(0.1)),
    "total_variation": Pair(jaxkd.total_variation, reference.total_variation),
    "hellinger": Pair(jaxkd.hellinger, reference.hellinger),
    "alpha_divergence(0.3)": Pair(jaxkd.alpha_divergence(0.3), reference.alpha_divergence(0.3)),
    "alpha_beta(0.3, 0.6)": Pair(jaxkd.alpha_beta(0.3, 0.6), reference.alpha_beta(0.3, 0.6)),
    "overlap_nll": Pair(jaxkd.overlap_nll, reference.overlap_nll),
    "renyi(0.5)": Pair(jaxkd.renyi(0.5), reference.renyi(0.5)),
}
FACTORS: dict[str, Sequence[Any]] = {
    "divergence": tuple(DIVERGENCES),
    "shape": (
        Shape(37, 32, 32, 123, 123),
        Shape(64, 48, 80, 1024, 1024),
        Shape(41, 64, 40, 257, 251),
        Shape(29, 40, 64, 509, 521, "mask"),
    ),
    "dtype": ("float32", "bfloat16", "float16"),
    "mask": ("none", "ignored", "poisoned", "weighted"),
    "head": ("plain", "bias", "softcap"),
    "temperature": (1.0, 2.0, 0.7),
    "chunk_size": (None, 16),
}


@dataclass(frozen=True)
class Case:
    """One loss on one batch.

    `mask` is "none" (no labels), "ignored" (two rows in five have the ignored label), "poisoned" (the states of these
    rows are NaN besides) or "weighted" (weights and a normalizer besides); in the last two the hard loss takes part.
    `head` adds a bias, or a scale and a softcap. With `gap` the teacher is the student, its head moved by that share of
    noise: training that has nearly converged.
    """

    divergence: str
    shape: Shape
    dtype: str
    mask: str = "ignored"
    head: str = "plain"
    temperature: float = 1.0
    chunk_size: int | None = None
    gap: float | None = None

    @property
    def setting(self) -> str:
        """All but the divergence and the dtype, in a few words: those that say nothing special are left out."""
        widths = dict.fromkeys((self.shape.vocabulary, self.shape.teacher_vocabulary))
        words = {
            f"V {'/'.join(map(str, widths))}": True,
            self.mask: self.mask != "none",
            self.head: self.head != "plain",
            f"tau {self.temperature:g}": self.temperature != 1,
            f"chunk {self.chunk_size}": self.chunk_size is not None,
            f"{self.gap or 0:.0%} apart": self.gap is not None,
        }
        return ", ".join(word for word, is_special in words.items() if is_special)


class Batch(NamedTuple):
    """The arguments of a case for `distillation_loss`, in either library."""

    student: dict[str, Any]  # the fields of LinearLogits
    teacher: dict[str, Any]
    labels: Any  # (N,), or None
    options: dict[str, Any]

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """By their names: those of the student, and all others."""
        others = {f"teacher_{name}": x for name, x in self.teacher.items()} | {"labels": self.labels} | self.options
        student, others = (
            {name: x for name, x in values.items() if isinstance(x, torch.Tensor)} for values in (self.student, others)
        )
        return student, others

    def holding(self, tensors: Mapping[str, Any]) -> "Batch":
        """The same with ``tensors``, or arrays, of these names in the place of its own."""

        def replaced(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
            return {name: tensors.get(prefix + name, x) for name, x in values.items()}

        student, teacher, options = (replaced(self.student), replaced(self.teacher, "teacher_"), replaced(self.options))
        return Batch(student, teacher, tensors.get("labels"), options)


def pairwise_cases() -> list[Case]:
    """Cases in which every two values of different factors meet at least once, instead of the full product."""
    return [Case(**values) for values in cover_pairs(FACTORS)]


def converging_cases() -> list[Case]:
    """Every divergence in bfloat16 with teacher and student 2 % apart, and the JSD on its way there."""
    shape = Shape(64, 96, 96, 1024, 1024)
    gaps = [("jensen_shannon(0.5)", 1.0), ("jensen_shannon(0.5)", 0.1), *((name, 0.02) for name in DIVERGENCES)]
    return [Case(name, shape, "bfloat16", temperature=2.0, gap=gap) for name, gap in gaps]


def cover_pairs(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few choices of one value a factor, such that every two values of two factors are in one of them together."""
    names = list(factors)
    open_pairs = {
        ((a, x), (b, y)): None for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }
    choices = []
    while open_pairs:
        choice = dict(next(iter(open_pairs)))
        for name in names:
            if name not in choice:
                covered = [len(_pairs(choice | {name: x}, names) & open_pairs.keys()) for x in factors[name]]
                choice[name] = factors[name][covered.index(max(covered))]
        for pair in _pairs(choice, names):
            open_pairs.pop(pair, None)
        choices.append({name: choice[name] for name in names})
    return choices


def _pairs(choice: dict[str, Any], names: list[str]) -> set[Any]:
    return set(itertools.combinations([(name, choice[name]) for name in names if name in choice], 2))


def make_batch(case: Case, device: str = "cpu", seed: int = 0) -> Batch:
    """Hidden states of unit variance, every fourth row peaked; heads N(0, 1) / sqrt(D). The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    shape = case.shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def head(width: int, hidden: int) -> dict[str, Any]:
        values: dict[str, Any] = {"weight": normal(width, hidden) / hidden**0.5}
        if "bias" in case.head:
            values["bias"] = normal(width) / 2
        if "softcap" in case.head:
            values |= {"scale": 0.8, "softcap": 10.0}
        return values

    peaks = torch.where(torch.arange(shape.rows) % 4 == 0, 6.0, 1.0)[:, None]
    student = {"hidden": peaks * normal(shape.rows, shape.hidden), **head(shape.vocabulary, shape.hidden)}
    if case.gap is None:
        teacher_hidden = peaks * normal(shape.rows, shape.teacher_hidden)
        teacher = {"hidden": teacher_hidden, **head(shape.teacher_vocabulary, shape.teacher_hidden)}
    else:
        moved = student["weight"] + case.gap * normal(shape.vocabulary, shape.hidden) / shape.hidden**0.5
        teacher = student | {"weight": moved}

    labels = torch.randint(shape.vocabulary, (shape.rows,), generator=generator)
    ignored = torch.arange(shape.rows) % 5 < 2
    options: dict[str, Any] = {"temperature": case.temperature, "vocabulary": shape.when_different}
    if case.mask in ("poisoned", "weighted"):
        options |= {"soft_weight": 0.7, "hard_weight": 0.3}
    if case.mask == "poisoned":
        student["hidden"][ignored] = torch.nan
        teacher["hidden"] = teacher["hidden"].masked_fill(ignored[:, None], torch.nan)
    if case.mask == "weighted":
        options |= {"weights": 2 * torch.rand(shape.rows, generator=generator).to(device), "normalizer": 20.5}

    labels = labels.masked_fill(ignored, -100).to(device)
    to = {"device": device, "dtype": getattr(torch, case.dtype)}
    return Batch(_cast(student, **to), _cast(teacher, **to), None if case.mask == "none" else labels, options)


def _cast(values: dict[str, Any], **to: Any) -> dict[str, Any]:
    return {name: x.to(**to) if isinstance(x, torch.Tensor) else x for name, x in values.items()}
