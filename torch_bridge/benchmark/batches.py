"""The data of a benchmark: one batch in memory, which both libraries read."""

from typing import NamedTuple

import torch

GAP = 0.02  # teacher = student + 2 % noise: where rounded logits lose the gradient
IGNORE_INDEX = -100


class Shape(NamedTuple):
    """The hidden sizes of student and teacher, and the vocabulary of both."""

    hidden: int
    teacher_hidden: int
    vocabulary: int


class Batch(NamedTuple):
    """bfloat16 states and heads, and what is said of each row."""

    arrays: dict[str, torch.Tensor]  # hidden (N, D), weight (V, D), teacher_hidden (N, Dt), teacher_weight (V, Dt)
    labels: torch.Tensor  # (N,) int32
    is_prompt: torch.Tensor  # (N,) bool, half of the rows
    cotangents: torch.Tensor  # (N,) float32: what each row weighs where the rows have gradients of their own


def make_batch(shape: Shape, rows: int, device: str, seed: int = 0) -> Batch:
    """Heads N(0, 1) / sqrt(D), hidden states with every fourth row peaked, and a teacher 2 % from the student.

    Where the hidden sizes differ, the wider model holds the same vectors, turned into the space of its size, so that
    their logits stay as near.
    """
    generator = torch.Generator(device).manual_seed(seed)
    core = min(shape.hidden, shape.teacher_hidden)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    def model(hidden: torch.Tensor, weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        if size > core:
            basis = torch.linalg.qr(normal(size, core)).Q.T
            hidden, weight = hidden @ basis, weight @ basis
        return hidden.bfloat16(), weight.bfloat16()

    hidden = torch.where(torch.arange(rows, device=device) % 4 == 0, 6.0, 1.0)[:, None] * normal(rows, core)
    weight = normal(shape.vocabulary, core) / core**0.5
    student = model(hidden, weight, shape.hidden)
    weight += GAP * normal(shape.vocabulary, core) / core**0.5
    teacher = model(hidden, weight, shape.teacher_hidden)
    labels = torch.randint(shape.vocabulary, (rows,), generator=generator, device=device, dtype=torch.int32)
    prompt = torch.arange(rows, device=device) * 16 // rows % 2 == 0  # eight prompts, each with an answer as long
    cotangents = torch.rand(rows, generator=generator, device=device) * (2 / rows)  # 1 / N on average, as in a mean
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    return Batch(dict(zip(names, student + teacher, strict=True)), labels, prompt, cotangents)
