"""Losses of a student and a teacher, each as one writes it: with jaxkd, dense in JAX, dense in PyTorch."""

from typing import Any

import jax
import jax.numpy as jnp
import torch

import jaxkd
from torch_bridge.benchmark.batches import IGNORE_INDEX
from torch_bridge.benchmark.preparing import Loss
from torch_bridge.benchmark.tasks import DIVERGENCES, Task


def jaxkd_divergence(implementation: str | None, chunk_size: int | None, task: Task) -> Loss:
    options: dict[str, Any] = {
        "divergence": DIVERGENCES[task.divergence].jax,
        "chunk_size": chunk_size,
        "implementation": implementation,
    }

    def loss(x, labels):
        student = jaxkd.LinearLogits(x["hidden"], x["weight"])
        teacher = jaxkd.LinearLogits(x["teacher_hidden"], x["teacher_weight"])
        if "cotangents" in x:
            return jnp.sum(x["cotangents"] * jaxkd.token_divergences(student, teacher, labels, **options))
        return jaxkd.distillation_loss(student, teacher, labels, **options)[0]

    return loss


def jax_dense(exact: bool, task: Task) -> Loss:
    """All logits at once, in float32 where they are ``exact``, else rounded to the arrays' type.

    Exact ones make JAX multiply their float32 gradient by the bfloat16 arrays. On a CPU neither is rounded: XLA keeps
    the digits of a product in bfloat16 that is made float32 at once.
    """

    def log_softmax(hidden, weight):
        return jax.nn.log_softmax(jax_logits(hidden, weight, exact))

    return _dense(jnp, log_softmax, task)


def jax_logits(hidden: jax.Array, weight: jax.Array, exact: bool) -> jax.Array:
    if exact:
        return jnp.matmul(hidden, weight.T, preferred_element_type=jnp.float32)
    return (hidden @ weight.T).astype(jnp.float32)


def torch_dense(task: Task) -> Loss:
    return _dense(torch, lambda hidden, weight: torch.log_softmax((hidden @ weight.T).float(), -1), task)


def torch_compiled(task: Task) -> Loss:
    return torch.compile(torch_dense(task), dynamic=False)


def _dense(xp: Any, log_softmax: Any, task: Task) -> Loss:
    """The loss as one writes it without a library: the logits of all rows, the rest in float32."""

    def loss(x, labels):
        log_p = log_softmax(x["teacher_hidden"], x["teacher_weight"])
        log_q = log_softmax(x["hidden"], x["weight"])
        return total(xp, DIVERGENCES[task.divergence].plain(xp, log_p, log_q), x, labels)

    return loss


def total(xp: Any, rows: Any, x: dict[str, Any], labels: Any) -> Any:
    """What a task makes of its rows' losses: their weighted sum, or the mean of those that count."""
    if "cotangents" in x:
        return (x["cotangents"] * rows).sum()
    if labels is None:
        return rows.mean()
    counted = labels != IGNORE_INDEX
    return xp.where(counted, rows, 0.0).sum() / counted.sum()
