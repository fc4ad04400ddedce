"""Numbers of each row, and losses of hidden states, in plain PyTorch with every logit formed; float64-capable."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_bridge.reference.dense_distillation import Divergence, LinearLogits, Logits, distillation_loss, forward_kl
from torch_bridge.reference.dense_row_divergences import RowDivergence, cosine_distance, mse


def chunked_loss(
    function: Callable[[Tensor, Tensor | None, Any, Any], Tensor],
    student: LinearLogits | Logits,
    labels: Tensor | None = None,
    *,
    per_row: Any = (),
    shared: Any = (),
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``sum_n w_n function(logits, labels, per_row, shared)_n / normalizer`` over the rows that count.

    ``per_row`` is one array (..., *rest) or one `LinearLogits` or `Logits`, or a tuple of these; the rest as in
    `jaxkd.chunked_loss`.
    """
    counted = _counted(student, labels, ignore_index)
    depth = student[0].ndim - 1

    def rows_of(x: Any) -> Any:
        if isinstance(x, LinearLogits | Logits):
            return x.rows(counted).detach()
        return tuple(rows_of(y) for y in x) if isinstance(x, tuple) else x.reshape(-1, *x.shape[depth:])[counted]

    values = function(
        student.rows(counted), None if labels is None else labels.flatten()[counted], rows_of(per_row), shared
    )
    row_weights = torch.ones_like(values) if weights is None else weights.flatten()[counted].to(values.dtype)
    total = row_weights.sum() if normalizer is None else torch.as_tensor(normalizer, dtype=values.dtype)
    return (row_weights * values).sum() / torch.where(total == 0, 1.0, total), {"num_rows": counted.sum()}


def hidden_cosine(student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
    """The mean of 1 - cos(W s, t) over the rows that count; options as in `jaxkd.hidden_cosine`."""
    return _hidden_loss(cosine_distance.function, student_hidden, teacher_hidden, labels, **options)


def hidden_mse(student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
    """The mean of |W s - t|^2 / Dt over the rows that count; options as in `jaxkd.hidden_mse`."""
    return _hidden_loss(mse.function, student_hidden, teacher_hidden, labels, **options)


def _hidden_loss(function, student_hidden, teacher_hidden, labels, *, projection=None, **options) -> Any:
    student = Logits(student_hidden) if projection is None else LinearLogits(student_hidden, projection)

    def of_rows(student: Tensor, labels: Tensor | None, teacher: Tensor, shared: Any) -> Tensor:
        return function(teacher, student)

    return chunked_loss(of_rows, student, labels, per_row=Logits(teacher_hidden), **options)


def token_log_probs(student: LinearLogits | Logits, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """log softmax(z)[label] of every row, 0 where it is ignored."""
    counted = _counted(student, labels, ignore_index)
    log_q = student.rows(counted).log_softmax(-1)
    chosen = log_q.gather(-1, labels.flatten()[counted].long()[:, None])[:, 0]
    return chosen.new_zeros(counted.shape).masked_scatter(counted, chosen).view(labels.shape)


def sequence_log_probs(
    student: LinearLogits | Logits, labels: Tensor, *, average: bool = False, ignore_index: int = -100
) -> Tensor:
    """Their sum, or mean, over the last axis; 0 for a sequence without a label that counts."""
    total = token_log_probs(student, labels, ignore_index=ignore_index).sum(-1)
    return total / (labels != ignore_index).sum(-1).clamp(min=1) if average else total


def token_statistics(
    student: LinearLogits | Logits,
    labels: Tensor,
    teacher: LinearLogits | Logits,
    *,
    divergence: Divergence | RowDivergence = forward_kl,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """`jaxkd.token_statistics` of rows that all count, one at a time."""
    everything = _counted(student, None, -100)
    z, z_teacher = student.rows(everything), teacher.rows(everything)
    q, top = z.softmax(-1), z.argmax(-1)
    soft = [
        distillation_loss(Logits(a), Logits(b), divergence=divergence, temperature=temperature)[0]
        for a, b in zip(z.split(1), z_teacher.split(1), strict=True)
    ]
    values = {
        "log_normalizer": z.logsumexp(-1),
        "entropy": torch.special.entr(q).sum(-1),
        "top": top,
        "log_prob": token_log_probs(student, labels).flatten(),
        "correct": top == labels.flatten(),
        "soft": torch.stack(soft),
        "agrees": top == z_teacher.argmax(-1),
    }
    return {name: x.view(student[0].shape[:-1]) for name, x in values.items()}


def _counted(student: LinearLogits | Logits, labels: Tensor | None, ignore_index: int) -> Tensor:
    first = student[0]
    if labels is None:
        return torch.ones(first.shape[:-1], dtype=torch.bool, device=first.device).flatten()
    return labels.flatten() != ignore_index
