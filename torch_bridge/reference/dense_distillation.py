"""The distillation losses in plain PyTorch, with every logit formed: the truth that jaxkd is checked against.

The names and conventions are jaxkd's, the code is not: whole tensors, no chunks, gradients by autograd. Everything is
computed in the dtype of the inputs (softmaxes in float32 at least), so float64 inputs give a float64 truth.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torch_bridge.reference.dense_row_divergences import RowDivergence

Divergence = Callable[[Tensor, Tensor], Tensor]  # (log_p of the teacher, log_q of the student), (N, V) each -> (N,)


class LinearLogits(NamedTuple):
    """The logits z = softcap tanh(scale (h W^T + b) / softcap) of a head, formed for all rows at once."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: Tensor | float | None = None
    softcap: Tensor | float | None = None

    def rows(self, counted: Tensor) -> Tensor:
        z = self.hidden.flatten(0, -2)[counted] @ self.weight.to(self.hidden.dtype).T
        z = z if self.bias is None else z + self.bias
        z = z if self.scale is None else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class Logits(NamedTuple):
    """Logits that are there already."""

    values: Tensor  # (..., V)

    def rows(self, counted: Tensor) -> Tensor:
        return self.values.flatten(0, -2)[counted]


def distillation_loss(
    student: LinearLogits | Logits,
    teacher: Any,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | RowDivergence,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    vocabulary: Literal["truncate", "mask"] = "truncate",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``sum_n w_n (soft_weight soft_n + hard_weight hard_n) / normalizer`` over the rows whose label counts.

    ``soft_n`` is the divergence of teacher and student at the temperature, ``hard_n`` the cross-entropy of the student
    with the label. Arguments, defaults and results as in `jaxkd.distillation_loss`; `divergence` is one of this
    module's functions of ``(log_p, log_q)``, or a `RowDivergence`; ``teacher`` may also be one of
    `torch_bridge.reference.dense_teachers`.

    Returns:
      The loss and its parts ``soft``, ``hard`` and ``num_rows``, scalars.
    """
    first = student[0]
    counted = torch.ones(first.shape[:-1], dtype=torch.bool, device=first.device).flatten()
    if labels is not None:
        labels = labels.flatten()
        counted = labels != ignore_index
    student_logits = student.rows(counted)
    soft = soft_losses(student_logits, teacher, counted, divergence, temperature, vocabulary)
    hard = torch.zeros_like(soft) if labels is None else label_losses(student_logits, labels[counted])

    row_weights = torch.ones_like(soft) if weights is None else weights.flatten()[counted].to(soft.dtype)
    total = row_weights.sum() if normalizer is None else torch.as_tensor(normalizer, dtype=soft.dtype)
    shares = row_weights / torch.where(total == 0, 1.0, total)  # nothing counts: the sums below are 0
    soft, hard = (shares * soft).sum(), (shares * hard).sum()
    metrics = {"soft": soft.detach(), "hard": hard.detach(), "num_rows": counted.sum()}
    return soft_weight * soft + hard_weight * hard, metrics


def soft_losses(
    student: Tensor,
    teacher: Any,
    counted: Tensor,
    divergence: Divergence | RowDivergence,
    temperature: float,
    vocabulary: str,
) -> Tensor:
    """The soft loss of each of the counted rows, whose student logits are (n, V)."""
    if isinstance(teacher, LinearLogits | Logits):
        return _soft(student, teacher.rows(counted).detach(), divergence, temperature, vocabulary)
    return teacher.soft(as_float(student), counted, temperature, divergence)


def _soft(
    student: Tensor, teacher: Tensor, divergence: Divergence | RowDivergence, temperature: float, vocabulary: str
) -> Tensor:
    if not isinstance(divergence, RowDivergence) or divergence.is_common:
        student, teacher = _common_vocabulary(student, teacher, vocabulary)
    teacher, student = teacher / temperature, student / temperature
    if isinstance(divergence, RowDivergence):
        return divergence.function(as_float(teacher), as_float(student))
    return divergence(log_softmax(teacher), log_softmax(student))


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P‖Q) = sum p (log p - log q)."""
    return _kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(Q‖P) = sum q (log q - log p)."""
    return _kl(log_q, log_p)


def jensen_shannon(beta: float = 0.5) -> Divergence:
    """beta KL(P‖M) + (1 - beta) KL(Q‖M) with M = beta P + (1 - beta) Q; forward KL at 0 and reverse KL at 1."""
    if beta in (0, 1):
        return reverse_kl if beta else forward_kl

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mixture(log_p, log_q, beta)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)

    return divergence


def symmetric_kl(weight: float = 0.5) -> Divergence:
    """weight KL(P‖Q) + (1 - weight) KL(Q‖P)."""
    if weight in (0, 1):
        return forward_kl if weight else reverse_kl
    return lambda log_p, log_q: weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p)


def skew_kl(alpha: float = 0.1) -> Divergence:
    """KL(P‖alpha P + (1 - alpha) Q)."""
    return lambda log_p, log_q: _kl(log_p, _log_mixture(log_p, log_q, alpha))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1/2 sum |p - q|."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1/2 sum (sqrt p - sqrt q)^2, the squared distance."""
    return ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1) / 2


def alpha_divergence(alpha: float = 0.5) -> Divergence:
    """(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)); forward KL at 1 and reverse KL at 0."""
    if alpha in (0, 1):
        return forward_kl if alpha else reverse_kl

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        absent = (log_p == -torch.inf) & (log_q == -torch.inf)
        exponent = alpha * log_p.masked_fill(absent, 0) + (1 - alpha) * log_q.masked_fill(absent, 0)
        return (1 - exponent.exp().masked_fill(absent, 0).sum(-1)) / (alpha * (1 - alpha))

    return divergence


def alpha_beta(alpha: float, beta: float) -> Divergence:
    """-1 / (alpha beta) sum [p^alpha q^beta - alpha / s p^s - beta / s q^s], s = alpha + beta, both above 0."""
    s = alpha + beta

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        both = (alpha * log_p + beta * log_q).exp()  # not p**alpha, whose slope at 0 is infinite
        return (alpha / s * (s * log_p).exp() + beta / s * (s * log_q).exp() - both).sum(-1) / (alpha * beta)

    return divergence


def overlap_nll(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-log sum min(p, q)."""
    return -torch.minimum(log_p, log_q).exp().sum(-1).log()


def renyi(alpha: float = 0.5) -> Divergence:
    """log(sum p^alpha q^(1 - alpha)) / (alpha - 1); forward KL at 1."""
    if alpha == 1:
        return forward_kl
    amari = alpha_divergence(alpha)
    return lambda log_p, log_q: (1 - alpha * (1 - alpha) * amari(log_p, log_q)).log() / (alpha - 1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b), where a = 0 counts as 0 whatever b is."""
    absent = log_a == -torch.inf
    return (log_a.exp() * (log_a.masked_fill(absent, 0) - log_b.masked_fill(absent, 0))).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), -inf where both are."""
    if share in (0, 1):
        return log_p if share else log_q
    absent = (log_p == -torch.inf) & (log_q == -torch.inf)
    parts = log_p.masked_fill(absent, 0) + math.log(share), log_q.masked_fill(absent, 0) + math.log1p(-share)
    return torch.logaddexp(*parts).masked_fill(absent, -torch.inf)


def _common_vocabulary(student: Tensor, teacher: Tensor, vocabulary: str) -> tuple[Tensor, Tensor]:
    widths = student.shape[-1], teacher.shape[-1]
    if vocabulary == "truncate":
        return student[:, : min(widths)], teacher[:, : min(widths)]
    student, teacher = (
        torch.nn.functional.pad(z, (0, max(widths) - z.shape[-1]), value=-torch.inf) for z in (student, teacher)
    )
    return student, teacher


def log_softmax(z: Tensor) -> Tensor:
    return torch.log_softmax(as_float(z), -1)


def as_float(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def label_losses(z: Tensor, labels: Tensor) -> Tensor:
    """-log q[label]; NaN, gradient included, for a label outside the vocabulary."""
    inside = (labels >= 0) & (labels < z.shape[-1])
    chosen = log_softmax(z).gather(-1, torch.where(inside, labels, 0).long()[:, None])[:, 0]
    return -chosen * torch.where(inside, 1.0, torch.nan)
