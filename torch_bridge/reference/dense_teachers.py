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

    def soft(self, student: Tensor, counted: Tensor, temperature: float, divergence: Divergence) -> Tensor:
        """The soft loss of the counted rows, whose student logits are (n, V)."""
        log_probs, token_ids = (x.flatten(0, -2)[counted] for x in (self.log_probs.to(student.dtype), self.token_ids))
        rows = zip(student / temperature, log_probs, token_ids.tolist(), strict=True)
        return torch.stack([self._row(*row, self.temperature / temperature, divergence) for row in rows])

    def _row(self, z: Tensor, log_probs: Tensor, ids: list[int], ratio: float, divergence: Divergence) -> Tensor:
        known: dict[int, Tensor] = {}
        for token, log_prob in zip(ids, log_probs, strict=True):
            if token != -1 and log_prob != -torch.inf:
                known.setdefault(token, log_prob)
        if not known:
            return z.sum() * 0
        p, q = torch.stack(list(known.values())).exp(), z.softmax(-1)
        others = [token for token in range(len(z)) if token not in known]
        q_known, q_others = q[list(known)], q[others]
        if self.tail == "renormalize" or not others:
            p = p**ratio
            p, q_known = p / p.sum(), q_known / q_known.sum()
        elif self.tail == "bucket":
            p, q_known = torch.cat([p, 1 - p.sum(0, keepdim=True)]), torch.cat([q_known, q_others.sum(0, keepdim=True)])
        return divergence(p.log(), q_known.log())


class Mixture(NamedTuple):
    """p = sum_i w_i softmax(z_i / temperature) / sum_i w_i; weights (M,) or (..., M)."""

    teachers: Sequence[LinearLogits | Logits]
    weights: Tensor

    def soft(self, student: Tensor, counted: Tensor, temperature: float, divergence: Divergence) -> Tensor:
        weights = self.weights.to(student.dtype)
        weights = weights if weights.ndim == 1 else weights.flatten(0, -2)[counted]
        shares = (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)  # (M, 1) or (n, M, 1)
        each = [(x.rows(counted).to(student.dtype) / temperature).softmax(-1) for x in self.teachers]
        p = (shares * torch.stack(each, -2)).sum(-2)
        return divergence(p.log().detach(), (student / temperature).log_softmax(-1))


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
