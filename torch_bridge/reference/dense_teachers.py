"""Teachers of other kinds in plain PyTorch: every probability formed, by token, row after row; float64-capable."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_bridge.reference.dense_distillation import LinearLogits, Logits

Divergence = Callable[[Tensor, Tensor], Tensor]


class TopKLogProbs(NamedTuple):
    """Some tokens of each row with their log-probabilities; id -1 and log-probability -inf are padding."""

    log_probs: Tensor  # (..., K)
    token_ids: Tensor  # (..., K)
    temperature: float = 1.0
    tail: str = "bucket"

    @classmethod
    def of(
        cls,
        teacher: LinearLogits | Logits,
        k: int,
        *,
        chosen_by: LinearLogits | Logits | None = None,
        temperature: float = 1.0,
        tail: str = "bucket",
    ) -> "TopKLogProbs":
        """The k likeliest tokens of the teacher, or of the source that chooses."""
        every = torch.ones(teacher[0].shape[:-1], dtype=torch.bool, device=teacher[0].device).flatten()
        ids = (chosen_by or teacher).rows(every).topk(k).indices
        return cls((teacher.rows(every) / temperature).log_softmax(-1).gather(-1, ids), ids, temperature, tail)

    def soft(self, student: Tensor, counted: Tensor, temperature: float, divergence: Divergence) -> Tensor:
        """The soft loss of the counted rows, whose student logits are (n, V)."""
        alone = [[1.0]] * len(student)
        return _of_lists(
            student / temperature, alone, [self.lists(counted, student, temperature)], self.tail, divergence
        )

    def lists(self, counted: Tensor, student: Tensor, temperature: float) -> list[dict[int, Tensor]]:
        """The probability at the temperature of each token that a counted row lists."""
        log_probs, token_ids = (x.flatten(0, -2)[counted] for x in (self.log_probs.to(student.dtype), self.token_ids))
        width, ratio = student.shape[-1], self.temperature / temperature
        lists = []
        for ids, row in zip(token_ids.tolist(), log_probs * ratio, strict=True):
            known: dict[int, Tensor] = {}
            for token, log_p in zip(ids, row, strict=True):
                if token != -1 and log_p != -torch.inf:
                    known.setdefault(token, log_p.exp())
            total = sum(known.values()) if self.tail == "renormalize" or len(known) == width else 1.0
            lists.append({token: p / total for token, p in known.items()})
        return lists


def _of_lists(
    z: Tensor,
    weights: Sequence[Sequence[float]],
    teachers: Sequence[list[dict[int, Tensor]]],
    tail: str,
    divergence: Divergence,
) -> Tensor:
    """The loss of each row z of logits at the temperature, of what the teachers list there, mixed by its weights."""
    losses = []
    for row, shares, *lists in zip(z, weights, *teachers, strict=True):
        listing = [(share, known) for share, known in zip(shares, lists, strict=True) if share > 0 and known]
        total = sum(share for share, _ in listing)
        mixed: dict[int, Tensor] = {}
        for share, known in listing:
            for token, p_token in known.items():
                mixed[token] = mixed.get(token, 0) + share / total * p_token
        if not mixed:
            losses.append(row.sum() * 0)
            continue
        p, q = torch.stack(list(mixed.values())), row.softmax(-1)
        others = [token for token in range(len(row)) if token not in mixed]
        q_known, q_others = q[list(mixed)], q[others]
        if tail == "renormalize" or not others:
            p, q_known = p / p.sum(), q_known / q_known.sum()
        elif tail == "bucket":
            p, q_known = torch.cat([p, 1 - p.sum(0, keepdim=True)]), torch.cat([q_known, q_others.sum(0, keepdim=True)])
        losses.append(divergence(p.log(), q_known.log()))
    return torch.stack(losses)


class Mixture(NamedTuple):
    """p = sum_i w_i softmax(z_i / temperature) / sum_i w_i; weights (M,) or (..., M).

    Of `TopKLogProbs`, all tokens that one of them lists, 0 in the others, and the rest.
    """

    teachers: Sequence[LinearLogits | Logits | TopKLogProbs]
    weights: Tensor

    def soft(self, student: Tensor, counted: Tensor, temperature: float, divergence: Divergence) -> Tensor:
        weights = self.weights.to(student.dtype)
        weights = weights if weights.ndim == 1 else weights.flatten(0, -2)[counted]
        if tops := [x for x in self.teachers if isinstance(x, TopKLogProbs)]:
            lists = [x.lists(counted, student, temperature) for x in tops]
            by_row = weights.expand(len(student), -1).tolist()
            return _of_lists(student / temperature, by_row, lists, tops[0].tail, divergence)
        shares = (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)  # (M, 1) or (n, M, 1)
        sources = [x for x in self.teachers if not isinstance(x, TopKLogProbs)]
        each = [(x.rows(counted).to(student.dtype) / temperature).softmax(-1) for x in sources]
        p = (shares * torch.stack(each, -2)).sum(-2)
        return divergence(p.log().detach(), (student / temperature).log_softmax(-1))


class Routed(NamedTuple):
    """Each row has one of the teachers: the one that index (...) names."""

    teachers: Sequence[LinearLogits | Logits]
    index: Tensor  # type: ignore[assignment]  # not the tuple's method

    def soft(self, student: Tensor, counted: Tensor, temperature: float, divergence: Divergence) -> Tensor:
        each = torch.stack([x.rows(counted).to(student.dtype).detach() for x in self.teachers])
        own = each[self.index.flatten()[counted], torch.arange(len(student), device=student.device)]
        return divergence((own / temperature).log_softmax(-1), (student / temperature).log_softmax(-1))


class VocabularyMap(NamedTuple):
    """A teacher whose tokens ``teacher_ids`` are the student's ``student_ids``; the others are one bucket a side."""

    teacher: LinearLogits | Logits
    student_ids: Tensor
    teacher_ids: Tensor

    def soft(self, student: Tensor, counted: Tensor, temperature: float, divergence: Divergence) -> Tensor:
        teacher = self.teacher.rows(counted).to(student.dtype).detach()
        log_p, log_q = (
            _in_buckets((z / temperature).softmax(-1), ids).log()
            for z, ids in ((teacher, self.teacher_ids), (student, self.student_ids))
        )
        return divergence(log_p, log_q)


def _in_buckets(p: Tensor, ids: Tensor) -> Tensor:
    others = torch.ones(p.shape[-1], dtype=torch.bool, device=p.device)
    others[ids.long()] = False
    return torch.cat([p[:, ids.long()], p[:, others].sum(-1, keepdim=True)], -1)
