"""What a benchmark computes: its tasks, the arrays and products each consists of, and what is exactly right."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import jaxkd
from torch_bridge import reference
from torch_bridge.benchmark.batches import IGNORE_INDEX, Batch

EXACT_LOGITS = 2**26  # that exist at a time in float64

Kind = Literal["divergence", "token divergences", "cross-entropy", "token log-probs"]
ONE_HEAD: tuple[Kind, ...] = ("cross-entropy", "token log-probs")


@dataclass(frozen=True)
class Task:
    """A loss and the gradients of the named arrays.

    Of the second and the fourth kind each row has a gradient of its own: "token divergences" weighs rows that are known
    one at a time, "token log-probs" takes their mean.
    """

    kind: Kind = "divergence"
    divergence: str = "JSD"
    wanted: tuple[str, ...] = ("hidden", "weight")
    ignored: bool = False  # whether half of the rows are
    part_of: str = ""  # the task it is a part or a kind of; "" for one that every contender runs

    @property
    def floor(self) -> str:
        """The matrix products that the loss consists of. Those of a frozen head count as all."""
        if self.kind in ONE_HEAD:
            return "three products"
        return "four products" if self.wanted else "two products"

    def inputs(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """The arrays and the labels that a contender reads."""
        arrays = {name: x for name, x in batch.arrays.items() if self.kind not in ONE_HEAD or "teacher" not in name}
        if self.kind == "token divergences":
            arrays["cotangents"] = batch.cotangents
        if self.ignored:
            return arrays, batch.labels.masked_fill(batch.is_prompt, IGNORE_INDEX)
        return arrays, batch.labels if self.kind in ONE_HEAD else None


TASKS = {
    "JSD": Task(),
    "JSD, loss alone": Task(wanted=(), part_of="JSD"),
    "JSD, frozen head": Task(wanted=("hidden",), part_of="JSD"),
    "JSD, half of the rows ignored": Task(ignored=True, part_of="JSD"),
    "forward KL": Task(divergence="forward KL", part_of="JSD"),
    "reverse KL": Task(divergence="reverse KL", part_of="JSD"),
    "token divergences": Task("token divergences"),
    "cross-entropy": Task("cross-entropy"),
    "cross-entropy, half of the rows ignored": Task("cross-entropy", ignored=True, part_of="cross-entropy"),
    "token log-probs": Task("token log-probs"),
}
FLOORS = ("four products", "three products", "two products")


class Outputs(NamedTuple):
    loss: Any
    gradients: dict[str, Any]


class Divergence(NamedTuple):
    """A divergence as every contender knows it."""

    jax: jaxkd.Divergence
    exact: reference.Divergence
    plain: Callable[..., Any]  # (array namespace, log_p, log_q) -> (N,)
    beta: float  # the generalized JSD that Liger and TRL call it


def _plain_kl(xp, log_a, log_b):
    return (xp.exp(log_a) * (log_a - log_b)).sum(-1)


def _plain_jsd(xp, log_p, log_q):
    log_m = xp.logaddexp(log_p, log_q) - math.log(2)
    return (_plain_kl(xp, log_p, log_m) + _plain_kl(xp, log_q, log_m)) / 2


DIVERGENCES = {
    "JSD": Divergence(jaxkd.jensen_shannon(0.5), reference.jensen_shannon(0.5), _plain_jsd, 0.5),
    "forward KL": Divergence(jaxkd.forward_kl, reference.forward_kl, _plain_kl, 0.0),
    "reverse KL": Divergence(
        jaxkd.reverse_kl, reference.reverse_kl, lambda xp, log_p, log_q: _plain_kl(xp, log_q, log_p), 1.0
    ),
}


def exact_outputs(batch: Batch, task: Task) -> Outputs:
    """Loss and both gradients of the dense loss in float64, some rows at a time; the gradients rounded to float32."""
    arrays, labels = task.inputs(batch)
    arrays = {name: x.double() for name, x in arrays.items()}
    head = arrays["weight"].requires_grad_()
    rows_in_all = len(arrays["hidden"])
    counted = rows_in_all if labels is None else (labels != IGNORE_INDEX).sum().item()
    loss, d_hidden, d_head = 0.0, torch.empty_like(arrays["hidden"]), torch.zeros_like(head)
    for rows in torch.arange(rows_in_all, device=head.device).split(max(1, EXACT_LOGITS // len(head))):
        hidden = arrays["hidden"][rows].requires_grad_()
        part = _exact_sum(task, arrays, rows, reference.LinearLogits(hidden, head), labels)
        if task.kind != "token divergences":
            part = part / counted
        gradients = torch.autograd.grad(part, (hidden, head))
        loss += part.item()
        d_hidden[rows] = gradients[0]
        d_head += gradients[1]
    return Outputs(loss, {"hidden": d_hidden.float(), "weight": d_head.float()})


def _exact_sum(
    task: Task, arrays: dict[str, Tensor], rows: Tensor, student: reference.LinearLogits, labels: Tensor | None
) -> Tensor:
    """The sum of some rows' losses, weighed where the task does."""
    if task.kind in ONE_HEAD and labels is not None:
        total = reference.token_log_probs(student, labels[rows], ignore_index=IGNORE_INDEX).sum()
        return -total if task.kind == "cross-entropy" else total
    return reference.distillation_loss(
        student,
        reference.LinearLogits(arrays["teacher_hidden"][rows], arrays["teacher_weight"]),
        None if labels is None else labels[rows],
        divergence=DIVERGENCES[task.divergence].exact,
        weights=arrays["cotangents"][rows] if task.kind == "token divergences" else None,
        normalizer=1.0,
    )[0]
