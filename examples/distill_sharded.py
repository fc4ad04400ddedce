"""Distillation on a mesh of devices, beside the same steps on one: the same losses, a share of the memory.

    python -m examples.distill_sharded

Without GPUs there are eight virtual CPU devices. Batches are split over the mesh axis "data" and the heads of both
models over "vocabulary"; the argument ``sharding`` is all that the loss is told of it.
"""

import argparse
import os
from typing import Any

if not os.path.exists("/dev/nvidia0"):  # before JAX starts
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkd
from examples.printing import Table
from examples.train_nnx import BATCH, LENGTH, VOCABULARY, Decoder, teach
from examples.words import random_windows, read_words

CHUNK_SIZE = 64


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """Two groups of devices with rows of their own, where there are two; within a group each has a part of V."""
    data = 2 if len(devices) % 2 == 0 else 1
    return jax.make_mesh(
        (data, len(devices) // data), ("data", "vocabulary"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def make_step(student: Decoder, optimizer: optax.GradientTransformation, sharding: jaxkd.Sharding | None):
    graphdef = nnx.graphdef(student)

    def loss_of(params, batch, teacher_hidden, teacher_head):
        student = nnx.merge(graphdef, params)
        return jaxkd.distillation_loss(
            jaxkd.LinearLogits(student.hidden(batch[:, :-1]), student.head.kernel.T),
            jaxkd.LinearLogits(teacher_hidden, teacher_head),
            batch[:, 1:],
            divergence=jaxkd.jensen_shannon(0.5),
            hard_weight=0.5,
            chunk_size=CHUNK_SIZE,
            sharding=sharding,
        )

    @jax.jit
    def step(params, optimizer_state, batch, teacher_hidden, teacher_head):
        (loss, _), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, batch, teacher_hidden, teacher_head)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, loss

    return step


def train(mesh: Mesh, sharding: jaxkd.Sharding | None, batches, teacher_head) -> tuple[list[float], float]:
    """The loss of each step, and the MiB that a step takes of a device's memory."""

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    student = Decoder(64, 1, rngs=nnx.Rngs(1))
    params = jax.tree.map(put, nnx.state(student, nnx.Param))
    params["head"]["kernel"] = jax.tree.map(lambda x: put(x, None, "vocabulary"), params["head"]["kernel"])
    teacher_head = put(teacher_head, "vocabulary")
    optimizer = optax.adamw(3e-3)
    optimizer_state = jax.jit(optimizer.init)(params)

    batches = [[put(x, "data") for x in batch] for batch in batches]
    step: Any = (
        make_step(student, optimizer, sharding).lower(params, optimizer_state, *batches[0], teacher_head).compile()
    )
    losses = []
    for batch in batches:
        params, optimizer_state, loss = step(params, optimizer_state, *batch, teacher_head)
        losses.append(float(loss))
    sizes = step.memory_analysis()
    return losses, (sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes) / 2**20


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Distil a small decoder on a mesh of devices, and on one.")
    parser.add_argument("--steps", type=int, default=20, help="steps of the teacher, and then of each student")
    steps = parser.parse_args(arguments).steps

    mesh = make_mesh(jax.devices())
    print(f"The same {steps} steps of distillation on one device and on the mesh {dict(mesh.shape)}", flush=True)
    words, _ = read_words(VOCABULARY, held_out=1)
    rng = np.random.default_rng(0)
    teacher = Decoder(128, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(teacher, optax.adamw(3e-3), wrt=nnx.Param)
    for _ in range(steps):
        teach(teacher, optimizer, random_windows(words, rng, BATCH, LENGTH))
    hidden = nnx.jit(lambda teacher, batch: teacher.hidden(batch[:, :-1]))
    windows = [random_windows(words, rng, BATCH, LENGTH) for _ in range(steps)]
    batches = [(batch, hidden(teacher, batch)) for batch in windows]

    alone, memory_alone = train(make_mesh(jax.devices()[:1]), None, batches, teacher.head.kernel.T)
    losses, memory = train(mesh, jaxkd.Sharding("data", "vocabulary", mesh), batches, teacher.head.kernel.T)
    table = Table("The loss of a step, JSD + 0.5 cross-entropy", "step", "one device", f"{mesh.size} devices")
    for step in range(0, steps, max(steps // 5, 1)):
        table.row(f"{step + 1}", f"{alone[step]:.5f}", f"{losses[step]:.5f}")
    table.row("MiB a device", f"{memory_alone:.1f}", f"{memory:.1f}")
    print(f"\nLargest difference of {steps} losses: {max(abs(a - b) for a, b in zip(alone, losses, strict=True)):.1e}")


if __name__ == "__main__":
    main()
