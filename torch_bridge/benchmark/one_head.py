"""Losses of a student and labels, each as one writes it: with jaxkd, dense in JAX, dense in PyTorch."""

import jax
import jax.numpy as jnp
import torch

import jaxkd
from torch_bridge.benchmark.batches import IGNORE_INDEX
from torch_bridge.benchmark.preparing import Loss
from torch_bridge.benchmark.tasks import Task
from torch_bridge.benchmark.two_heads import jax_logits


def jaxkd_labels(implementation: str | None, chunk_size: int | None, task: Task) -> Loss:
    def loss(x, labels):
        student = jaxkd.LinearLogits(x["hidden"], x["weight"])
        if task.kind == "cross-entropy":
            return jaxkd.cross_entropy(student, labels, chunk_size=chunk_size, implementation=implementation)[0]
        return jaxkd.token_log_probs(student, labels, chunk_size=chunk_size, implementation=implementation).mean()

    return loss


def jax_dense_labels(exact: bool, task: Task) -> Loss:
    """All logits at once, exact or rounded as in `two_heads.jax_dense`."""

    def loss(x, labels):
        z = jax_logits(x["hidden"], x["weight"], exact)
        counted = labels != IGNORE_INDEX
        chosen = jnp.take_along_axis(z, jnp.where(counted, labels, 0)[:, None], axis=1)[:, 0]
        log_probs = jnp.where(counted, chosen - jax.nn.logsumexp(z, axis=1), 0.0)
        return _sign(task) * log_probs.sum() / counted.sum()

    return loss


def torch_dense_labels(task: Task) -> Loss:
    def loss(x, labels):
        logits = (x["hidden"] @ x["weight"].T).float()
        return -_sign(task) * torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)

    return loss


def torch_compiled_labels(task: Task) -> Loss:
    return torch.compile(torch_dense_labels(task), dynamic=False)


def _sign(task: Task) -> float:
    """Of the labels' mean log-probability in the loss."""
    return -1.0 if task.kind == "cross-entropy" else 1.0
