"""How a contender becomes something to run: compiled for a batch and a task, and how much memory it takes.

A contender is a function of a `Task` that gives its loss: a function of the arrays by name and of labels (or None).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import torch

from torch_bridge.benchmark.batches import Batch
from torch_bridge.benchmark.tasks import Outputs, Task
from torch_bridge.convert import borrow_as_jax


class Prepared(NamedTuple):
    """`memory`: bytes beyond the inputs, results included; None where only a run can tell."""

    run: Callable[[], Outputs]  # returns when the device is done
    memory: int | None


Prepare = Callable[[Batch, Task], Prepared]
Loss = Callable[[dict[str, Any], Any], Any]
MakeLoss = Callable[[Task], Loss]


def prepare_jax(make_loss: MakeLoss, batch: Batch, task: Task) -> Prepared:
    loss = make_loss(task)
    given, given_labels = task.inputs(batch)
    arrays = {name: borrow_as_jax(x) for name, x in given.items()}
    labels = None if given_labels is None else borrow_as_jax(given_labels)

    @jax.jit
    def outputs(arrays, labels):
        if not task.wanted:
            return loss(arrays, labels), {}
        return jax.value_and_grad(lambda wanted: loss(arrays | wanted, labels))({k: arrays[k] for k in task.wanted})

    compiled = outputs.lower(arrays, labels).compile()
    memory: Any = compiled.memory_analysis()
    return Prepared(
        lambda: Outputs(*jax.block_until_ready(compiled(arrays, labels))),
        memory.temp_size_in_bytes + memory.output_size_in_bytes,
    )


def prepare_torch(make_loss: MakeLoss, batch: Batch, task: Task) -> Prepared:
    loss = make_loss(task)
    given, labels = task.inputs(batch)
    arrays = {name: x.detach().requires_grad_(name in task.wanted) for name, x in given.items()}
    labels = None if labels is None else labels.long()

    def run() -> Outputs:
        value = loss(arrays, labels)
        gradients = torch.autograd.grad(value, [arrays[name] for name in task.wanted]) if task.wanted else ()
        synchronize(value)
        return Outputs(value.detach(), dict(zip(task.wanted, gradients, strict=True)))

    return Prepared(run, None)


def prepare_products(batch: Batch, floor: str) -> Prepared:
    """The floor: the matrix products that no exact loss can do without, in bfloat16, and nothing else."""
    hidden, head, teacher, teacher_head = batch.arrays.values()

    def run() -> Outputs:
        logits = hidden @ head.T
        last = logits if floor == "three products" else teacher @ teacher_head.T
        gradients = {} if floor == "two products" else {"hidden": logits @ head, "weight": logits.T @ hidden}
        synchronize(last)
        return Outputs(None, gradients)

    return Prepared(run, None)


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
