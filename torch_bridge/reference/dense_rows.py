"""Numbers of each row, and losses of hidden states, in plain PyTorch with every logit formed; float64-capable."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from torch_bridge.reference.dense_distillation import (
    Divergence,
    LinearLogits,
    Logits,
    as_float,
    forward_kl,
    label_losses,
    log_softmax,
    soft_losses,
)
from torch_bridge.reference.dense_row_divergences import RowDivergence, cosine_distance, mse

RowFunction = Callable[[Tensor, Tensor | None, Any, Any], Tensor]


def chunked_loss(
    function: RowFunction,
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
    values = _of_function(function, student, counted, labels, per_row, shared)
    return (_shares(values, counted, weights, normalizer) * values).sum(), {"num_rows": counted.sum()}


def chunked_rows(
    function: RowFunction,
    student: LinearLogits | Logits,
    labels: Tensor | None = None,
    *,
    per_row: Any = (),
    shared: Any = (),
    ignore_index: int = -100,
) -> Tensor:
    """``function(logits, labels, per_row, shared)`` of every row, 0 where it is ignored."""
    counted = _counted(student, labels, ignore_index)
    return _spread(_of_function(function, student, counted, labels, per_row, shared), counted, student)


def cross_entropy(
    student: LinearLogits | Logits,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``sum_n w_n ((1 - s) (-log q[label]) + s (-mean_v log q_v) + z (log Z)^2)_n / normalizer``.

    Over the rows whose label counts; s is the smoothing and z the factor of the squared log-normaliser.
    """
    counted = _counted(student, labels, ignore_index)
    logits, labels = as_float(student.rows(counted)), labels.flatten()[counted]
    hard, log_normalizer = label_losses(logits, labels), logits.logsumexp(-1)
    rows = hard
    if label_smoothing:
        rows = (1 - label_smoothing) * hard - label_smoothing * log_softmax(logits).mean(-1)
    rows = rows + z_loss * log_normalizer**2
    of_label = logits.gather(-1, labels.long().clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    shares = _shares(rows, counted, weights, normalizer)
    metrics = {"hard": hard, "log_normalizer": log_normalizer, "accuracy": of_label == logits.amax(-1)}
    values = {name: (shares * x).sum().detach() for name, x in metrics.items()}
    return (shares * rows).sum(), values | {"num_rows": counted.sum()}


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


def token_log_probs(
    student: LinearLogits | Logits, labels: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """log softmax(z / temperature)[label] of every row, 0 where it is ignored."""
    counted = _counted(student, labels, ignore_index)
    return _spread(-label_losses(student.rows(counted) / temperature, labels.flatten()[counted]), counted, student)


def sequence_log_probs(
    student: LinearLogits | Logits,
    labels: Tensor,
    *,
    average: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Their sum, or mean, over the last axis; 0 for a sequence without a label that counts."""
    total = token_log_probs(student, labels, temperature=temperature, ignore_index=ignore_index).sum(-1)
    return total / (labels != ignore_index).sum(-1).clamp(min=1) if average else total


def token_entropies(student: LinearLogits | Logits, *, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """-sum q log q of every row at the temperature, 0 where the mask is False."""
    counted = _counted(student, None, -100, mask)
    log_q = log_softmax(student.rows(counted) / temperature)
    closed = log_q == -torch.inf
    return _spread(-(log_q.exp() * log_q.masked_fill(closed, 0)).sum(-1), counted, student)


def token_divergences(
    student: LinearLogits | Logits,
    teacher: Any,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | RowDivergence = forward_kl,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocabulary: Literal["truncate", "mask"] = "truncate",
) -> Tensor:
    """The soft loss of every row of `distillation_loss`, 0 where the label is ignored or the mask is False."""
    counted = _counted(student, labels, ignore_index, mask)
    rows = soft_losses(student.rows(counted), teacher, counted, divergence, temperature, vocabulary)
    return _spread(rows, counted, student)


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
    top = z.argmax(-1)
    values = {
        "log_normalizer": z.logsumexp(-1),
        "entropy": token_entropies(student).flatten(),
        "top": top,
        "log_prob": token_log_probs(student, labels).flatten(),
        "correct": top == labels.flatten(),
        "soft": token_divergences(student, teacher, divergence=divergence, temperature=temperature).flatten(),
        "agrees": top == z_teacher.argmax(-1),
    }
    return {name: x.view(student[0].shape[:-1]) for name, x in values.items()}


def _counted(
    student: LinearLogits | Logits, labels: Tensor | None, ignore_index: int, mask: Tensor | None = None
) -> Tensor:
    first = student[0]
    counted = torch.ones(first.shape[:-1], dtype=torch.bool, device=first.device).flatten()
    if labels is not None:
        counted = labels.flatten() != ignore_index
    return counted if mask is None else counted & mask.flatten()


def _of_function(
    function: RowFunction,
    student: LinearLogits | Logits,
    counted: Tensor,
    labels: Tensor | None,
    per_row: Any,
    shared: Any,
) -> Tensor:
    """The function's numbers of the counted rows."""
    depth = student[0].ndim - 1

    def rows_of(x: Any) -> Any:
        if isinstance(x, LinearLogits | Logits):
            return x.rows(counted).detach()
        return tuple(rows_of(y) for y in x) if isinstance(x, tuple) else x.reshape(-1, *x.shape[depth:])[counted]

    own_labels = None if labels is None else labels.flatten()[counted]
    return function(student.rows(counted), own_labels, rows_of(per_row), shared)


def _shares(values: Tensor, counted: Tensor, weights: Tensor | None, normalizer: Tensor | float | None) -> Tensor:
    """What each counted row is multiplied by in the sum: its weight by the normaliser."""
    row_weights = torch.ones_like(values) if weights is None else weights.flatten()[counted].to(values.dtype)
    total = row_weights.sum() if normalizer is None else torch.as_tensor(normalizer, dtype=values.dtype)
    return row_weights / torch.where(total == 0, 1.0, total)


def _spread(values: Tensor, counted: Tensor, student: LinearLogits | Logits) -> Tensor:
    """The numbers of the counted rows among all, 0 in the others."""
    return values.new_zeros(counted.shape).masked_scatter(counted, values).view(student[0].shape[:-1])
