"""A PyTorch student distilled with a loss of jaxkd: only the loss runs in JAX, the loop is plain PyTorch.

    python -m examples.torch_student

Teacher and student predict the next word from the last four, with different widths; the text is Python's documentation.
"""

import argparse
import re
from collections import Counter
from pydoc_data.topics import topics

import torch
from torch import nn

import jaxkd
from examples.printing import Table
from torch_bridge import reference, torch_loss


class WordModel(nn.Module):
    """Returns hidden states, not logits: the loss multiplies them with `head` itself, a chunk of rows at a time."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Conv1d(width, width, kernel_size=4)
        self.head = nn.Parameter(torch.randn(vocabulary, width) / width**0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        words = self.embedding(tokens).mT  # (B, D, T)
        return torch.tanh(self.mix(nn.functional.pad(words, (3, 0)))).mT


def read_text(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Word numbers of the training text and of a held-out tenth; number 0 stands for all rare words."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics)))
    numbers = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    tokens = torch.tensor([numbers.get(word, 0) for word in words])
    return tokens.tensor_split([len(tokens) * 9 // 10])  # type: ignore[return-value]


def batches(tokens: torch.Tensor, steps: int, seed: int, size: int = 16, length: int = 32):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (size,), generator=generator)
        windows = torch.stack([tokens[start : start + length + 1] for start in starts])
        yield windows[:, :-1], windows[:, 1:]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--vocabulary", type=int, default=2000)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    text, held_out = read_text(options.vocabulary)

    print(f"Python's manual: {len(text)} words to train on, {len(held_out)} held out; losses are in nats a word.")
    progress = Table("The teacher, 128 wide, learns the text: the loss of a batch", "step", "next-word loss")
    teacher = WordModel(options.vocabulary, width=128)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for step, (tokens, labels) in enumerate(batches(text, 2 * options.steps, seed=1)):
        loss = nn.functional.cross_entropy((teacher(tokens) @ teacher.head.T).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            progress.row(f"{step}", f"{loss.item():.3f}")
    teacher.requires_grad_(False)

    columns = "next-word loss", "JSD to the teacher"
    progress = Table("The student, 64 wide, learns from teacher and text: the losses of a batch", "step", *columns)
    student = WordModel(options.vocabulary, width=64)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    loss_fn = torch_loss(jaxkd.fused_linear_jsd, beta=0.5, soft_weight=4.0, hard_weight=1.0)
    for step, (tokens, labels) in enumerate(batches(text, options.steps, seed=2)):
        loss, metrics = loss_fn(student(tokens), student.head, teacher(tokens), teacher.head, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            progress.row(f"{step}", f"{metrics['hard'].item():.3f}", f"{metrics['soft'].item():.4f}")

    # The same loss with all logits formed, in PyTorch alone, on held-out text.
    tokens, labels = next(batches(held_out, 1, seed=3))
    with torch.no_grad():
        of_teacher = nn.functional.cross_entropy((teacher(tokens) @ teacher.head.T).flatten(0, 1), labels.flatten())
        fused, metrics = loss_fn(student(tokens), student.head, teacher(tokens), teacher.head, labels)
        dense, _ = reference.distillation_loss(
            reference.LinearLogits(student(tokens), student.head),
            reference.LinearLogits(teacher(tokens), teacher.head),
            labels,
            divergence=reference.jensen_shannon(0.5),
            soft_weight=4.0,
            hard_weight=1.0,
        )
    scores = Table("On held-out text", "model", *columns)
    scores.row("teacher", f"{of_teacher.item():.3f}", "0")
    scores.row("student", f"{metrics['hard'].item():.3f}", f"{metrics['soft'].item():.4f}")
    print("\nThe student's whole loss there, 4 JSD + next-word loss:", end=" ")
    print(f"jaxkd {fused.item():.6f}, dense PyTorch {dense.item():.6f}")
    return {"fused": fused.item(), "dense": dense.item(), "soft": metrics["soft"].item()}


if __name__ == "__main__":
    main()
