"""Time, memory and traffic of a loss with its gradients on one device, and on all of them by each layout.

    python -m examples.measure_sharded

Its size is that of an 8B model's head; every array is made where it will lie. Memory is what a step takes of a device:
arrays, results and temporaries by XLA's plan. Traffic is read off the compiled program: the bytes of the results of its
collectives on one device, those in the loop times the chunks.
"""

import argparse
import math
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkd
from examples.printing import Table

LAYOUTS = {"rows": ("x", ()), "vocabulary": ((), "x"), "FSDP": ("x", "x")}  # the axes of rows and vocabulary
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}
# Of one that runs beside other work, the end: the result of its start has its operands too.
COLLECTIVE = re.compile(r"= (\S.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-done)?\(")


def make_arrays(sizes: argparse.Namespace, mesh: jax.sharding.Mesh, rows: Any, vocabulary: Any) -> tuple[Any, ...]:
    """Student and teacher as at the start of training, split over the mesh."""
    by_row, by_column = (NamedSharding(mesh, P(axes or None)) for axes in (rows, vocabulary))
    shardings = tuple(jaxkd.LinearLogits(by_row, by_column) for _ in range(2))

    def make():
        keys = iter(jax.random.split(jax.random.key(0), 4))
        return tuple(
            jaxkd.LinearLogits(
                jax.random.normal(next(keys), (sizes.rows, size), jnp.bfloat16),
                jax.random.normal(next(keys), (sizes.vocabulary, size), jnp.bfloat16) / math.sqrt(size),
            )
            for size in (sizes.hidden, sizes.teacher_hidden)
        )

    return jax.jit(make, out_shardings=shardings)()


def measure(sizes: argparse.Namespace, mesh: jax.sharding.Mesh, rows: Any, vocabulary: Any) -> dict[str, float]:
    sharding = jaxkd.Sharding(rows, vocabulary, mesh)
    arrays = make_arrays(sizes, mesh, rows, vocabulary)

    def loss(student, teacher):
        divergence = jaxkd.jensen_shannon(0.5)
        return jaxkd.distillation_loss(
            student, teacher, divergence=divergence, chunk_size=sizes.chunk_size, sharding=sharding
        )[0]

    step: Any = jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile()
    times = []
    for _ in range(sizes.repeats + 2):  # two to warm up
        began = time.perf_counter()
        jax.block_until_ready(step(*arrays))
        times.append(time.perf_counter() - began)
    memory, gib = step.memory_analysis(), 2**30
    return {
        "ms": 1e3 * statistics.median(times[2:]),
        "temporary GiB": memory.temp_size_in_bytes / gib,
        "all GiB": (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes) / gib,
        "moved MiB": moved_bytes(step.as_text()) / 2**20,
    }


def moved_bytes(program: str) -> float:
    """The bytes that the collectives of a program yield; a loop's count as often as it runs."""
    computations: dict[str, list[str]] = {}
    for line in program.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = computations["ENTRY" if header[1] else header[2]] = []
        elif computations:
            lines.append(line)

    def count(name: str) -> float:
        total = 0.0
        for line in computations.get(name, ()):
            if found := COLLECTIVE.search(line):
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
                total += sum(BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in shapes)
            trips = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|to_apply|calls)=%?([\w.-]+)", line):
                total += count(called) * (int(trips[1]) if trips else 1)
        return total

    return count("ENTRY")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure a loss on one device and on all.")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--teacher-hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--chunk-size", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    sizes = parser.parse_args(arguments)

    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}: JSD with all gradients, bfloat16")
    print(", ".join(f"{name} {value}" for name, value in vars(sizes).items()), flush=True)
    table: Table | None = None
    runs = [("one device", 1, ("x", ())), *((name, len(devices), LAYOUTS[name]) for name in sizes.layouts)]
    for name, count, axes in runs:
        mesh = jax.make_mesh((count,), ("x",), axis_types=(AxisType.Auto,), devices=devices[:count])
        figures = measure(sizes, mesh, *axes)
        table = table or Table("A step on each device", "layout, devices", *figures, first=20)
        table.row(f"{name}, {count}", *(f"{value:.4g}" for value in figures.values()))


if __name__ == "__main__":
    main()
