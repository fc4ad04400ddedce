"""What `torch_bridge.benchmark` compares: one batch in memory that both libraries read, and every way to its loss.

A contender is a loss of that batch, as a function of its arrays and of labels (or None). `prepare` compiles it for a
`Task` into a function that runs it once and returns when the device is done.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

import jaxkd
from jaxkd.kernels.dispatch import Chunk, obstacle
from torch_bridge import reference
from torch_bridge.convert import borrow_as_jax

GAP = 0.02  # teacher = student + 2 % noise: where rounded logits lose the gradient
IGNORE_INDEX = -100
CHUNK_SIZES = (1024, 2048, 4096)
EXACT_LOGITS = 2**26  # that exist at a time in float64


class Shape(NamedTuple):
    """The hidden sizes of student and teacher, and the vocabulary of both."""

    hidden: int
    teacher_hidden: int
    vocabulary: int


class Divergence(NamedTuple):
    """A divergence as every contender knows it."""

    jax: jaxkd.Divergence
    exact: reference.Divergence
    plain: Callable[..., Any]  # (array namespace, log_p, log_q) -> (N,)
    liger_beta: float


@dataclass(frozen=True)
class Task:
    """What is computed: a loss, the gradients of the named arrays, and whether half of the rows are ignored."""

    divergence: str = "JSD"
    wanted: tuple[str, ...] = ("hidden", "weight")
    ignored: bool = False


TASKS = {
    "JSD": Task(),
    "JSD, loss alone": Task(wanted=()),
    "JSD, frozen head": Task(wanted=("hidden",)),
    "JSD, half of the rows ignored": Task(ignored=True),
    "forward KL": Task("forward KL"),
    "reverse KL": Task("reverse KL"),
}
MAIN_TASK = "JSD"  # the one that every contender runs


class Batch(NamedTuple):
    """bfloat16 states and heads, and labels that ignore half of the rows."""

    arrays: dict[str, torch.Tensor]  # hidden (N, D), weight (V, D), teacher_hidden (N, Dt), teacher_weight (V, Dt)
    labels: torch.Tensor  # (N,) int32


class Outputs(NamedTuple):
    loss: Any
    gradients: dict[str, Any]


class Prepared(NamedTuple):
    """`memory`: bytes beyond the inputs, results included; None where only a run can tell."""

    run: Callable[[], Outputs]
    memory: int | None


Prepare = Callable[[Batch, Task], Prepared]


def make_batch(shape: Shape, rows: int, device: str, seed: int = 0) -> Batch:
    """Heads N(0, 1) / sqrt(D), hidden states with every fourth row peaked, and a teacher 2 % from the student.

    Where the hidden sizes differ, the wider model holds the same vectors, turned into the space of its size, so that
    their logits stay as near.
    """
    generator = torch.Generator(device).manual_seed(seed)
    core = min(shape.hidden, shape.teacher_hidden)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    def model(hidden: torch.Tensor, weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        if size > core:
            basis = torch.linalg.qr(normal(size, core)).Q.T
            hidden, weight = hidden @ basis, weight @ basis
        return hidden.bfloat16(), weight.bfloat16()

    hidden = torch.where(torch.arange(rows, device=device) % 4 == 0, 6.0, 1.0)[:, None] * normal(rows, core)
    weight = normal(shape.vocabulary, core) / core**0.5
    student = model(hidden, weight, shape.hidden)
    weight += GAP * normal(shape.vocabulary, core) / core**0.5
    teacher = model(hidden, weight, shape.teacher_hidden)
    labels = torch.randint(shape.vocabulary, (rows,), generator=generator, device=device, dtype=torch.int32)
    prompt = torch.arange(rows, device=device) * 16 // rows % 2 == 0  # eight prompts, each with an answer as long
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    return Batch(dict(zip(names, student + teacher, strict=True)), labels.masked_fill(prompt, IGNORE_INDEX))


def exact_outputs(batch: Batch, divergence: str, ignored: bool) -> Outputs:
    """Loss and gradients of the dense loss in float64, some rows at a time; the gradients are rounded to float32."""
    student, head, teacher, teacher_head = (x.double() for x in batch.arrays.values())
    head.requires_grad_()
    counted = (batch.labels != IGNORE_INDEX).sum().item() if ignored else len(student)
    loss, d_hidden, d_head = 0.0, torch.empty_like(student), torch.zeros_like(head)
    for rows in torch.arange(len(student), device=student.device).split(max(1, EXACT_LOGITS // len(head))):
        hidden = student[rows].requires_grad_()
        part, _ = reference.distillation_loss(
            reference.LinearLogits(hidden, head),
            reference.LinearLogits(teacher[rows], teacher_head),
            batch.labels[rows] if ignored else None,
            divergence=DIVERGENCES[divergence].exact,
            normalizer=counted,
        )
        gradients = torch.autograd.grad(part, (hidden, head))
        loss += part.item()
        d_hidden[rows] = gradients[0]
        d_head += gradients[1]
    return Outputs(loss, {"hidden": d_hidden.float(), "weight": d_head.float()})


def contenders(shape: Shape, rows: int, device: str, compiled: bool = True) -> dict[str, Prepare]:
    """Every loss that can run here, by name; `compiled` says whether those that torch compiles are among them."""
    # First what takes most of JAX's memory: its pool grows in steps, and it never gives memory back to PyTorch.
    found: dict[str, Prepare] = {"JAX dense, jit": partial(prepare_jax, jax_dense)}
    for name in implementations(shape, rows, device):
        found[f"jaxkd {name}"] = partial(prepare_jax, partial(jax_fused, name, None))
    default = default_contender(shape, rows, device)
    for chunk_size in CHUNK_SIZES:
        if chunk_size < rows:
            fused = partial(jax_fused, default.removeprefix("jaxkd "), chunk_size)
            found[f"{default}, chunk {chunk_size}"] = partial(prepare_jax, fused)
    found["torch eager"] = partial(prepare_torch, torch_dense)
    if compiled:
        found["torch.compile"] = partial(
            prepare_torch, lambda chosen: torch.compile(torch_dense(chosen), dynamic=False)
        )
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["Liger fused"] = partial(prepare_torch, partial(liger_fused, None))
        found["Liger fused, fp32 sums"] = partial(prepare_torch, partial(liger_fused, torch.float32))
        for chunk_size in (1024, 4096) if compiled else ():
            chunked = partial(liger_chunked, chunk_size)
            found[f"Liger chunked, compiled, chunk {chunk_size}"] = partial(prepare_torch, chunked)
    return found


def implementations(shape: Shape, rows: int, device: str) -> list[str]:
    """jaxkd's implementations that can run this, the one it takes by itself first."""
    chunk = Chunk(min(rows, min(CHUNK_SIZES)), shape.vocabulary, shape.vocabulary, jnp.dtype(jnp.float32))
    kernels = [name for name in ("mosaic", "triton") if device == "cuda" and not obstacle(name, chunk)]
    return [*kernels, "xla"]


def default_contender(shape: Shape, rows: int, device: str) -> str:
    return f"jaxkd {implementations(shape, rows, device)[0]}"


def prepare_jax(make_loss: Callable[[Divergence], Callable[..., Any]], batch: Batch, task: Task) -> Prepared:
    loss = make_loss(DIVERGENCES[task.divergence])
    arrays = {name: borrow_as_jax(x) for name, x in batch.arrays.items()}
    labels = borrow_as_jax(batch.labels) if task.ignored else None

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


def prepare_torch(make_loss: Callable[[Divergence], Callable[..., Any]], batch: Batch, task: Task) -> Prepared:
    loss = make_loss(DIVERGENCES[task.divergence])
    arrays = {name: x.detach().requires_grad_(name in task.wanted) for name, x in batch.arrays.items()}
    labels = batch.labels.long() if task.ignored else None

    def run() -> Outputs:
        value = loss(arrays, labels)
        gradients = torch.autograd.grad(value, [arrays[name] for name in task.wanted]) if task.wanted else ()
        synchronize(value)
        return Outputs(value.detach(), dict(zip(task.wanted, gradients, strict=True)))

    return Prepared(run, None)


def prepare_products(batch: Batch, backward: bool) -> Prepared:
    """The floor: the matrix products that no exact loss can do without, in bfloat16, and nothing else."""
    hidden, head, teacher, teacher_head = batch.arrays.values()

    def run() -> Outputs:
        logits, other = hidden @ head.T, teacher @ teacher_head.T
        gradients = {"hidden": logits @ head, "weight": logits.T @ hidden} if backward else {}
        synchronize(other)
        return Outputs(None, gradients)

    return Prepared(run, None)


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def jax_fused(implementation: str, chunk_size: int | None, divergence: Divergence) -> Callable[..., Any]:
    def loss(x, labels):
        return jaxkd.distillation_loss(
            jaxkd.LinearLogits(x["hidden"], x["weight"]),
            jaxkd.LinearLogits(x["teacher_hidden"], x["teacher_weight"]),
            labels,
            divergence=divergence.jax,
            chunk_size=chunk_size,
            implementation=implementation,
        )[0]

    return loss


def jax_dense(divergence: Divergence) -> Callable[..., Any]:
    return _dense(jnp, lambda z: jax.nn.log_softmax(z.astype(jnp.float32)), divergence)


def torch_dense(divergence: Divergence) -> Callable[..., Any]:
    return _dense(torch, lambda z: torch.log_softmax(z.float(), -1), divergence)


def _dense(xp: Any, log_softmax: Callable[..., Any], divergence: Divergence) -> Callable[..., Any]:
    """The loss as one writes it without a library: bfloat16 logits of all rows, the rest in float32."""

    def loss(x, labels):
        log_p = log_softmax(x["teacher_hidden"] @ x["teacher_weight"].T)
        log_q = log_softmax(x["hidden"] @ x["weight"].T)
        rows = divergence.plain(xp, log_p, log_q)
        if labels is None:
            return rows.mean()
        counted = labels != IGNORE_INDEX
        return xp.where(counted, rows, 0.0).sum() / counted.sum()

    return loss


def liger_fused(accum_dtype: torch.dtype | None, divergence: Divergence) -> Callable[..., Any]:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=divergence.liger_beta, accum_dtype=accum_dtype)
    return lambda x, labels: loss(*x.values(), labels)


def liger_chunked(chunk_size: int, divergence: Divergence) -> Callable[..., Any]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    chunked = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,  # both weights default to 0.5
        weight_soft_loss=1.0,
        beta=divergence.liger_beta,
        chunk_size=chunk_size,
    )

    def loss(x, labels):
        hidden = x["hidden"]
        return chunked(*x.values(), hidden.new_zeros(len(hidden), dtype=torch.int64) if labels is None else labels)

    return loss


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
