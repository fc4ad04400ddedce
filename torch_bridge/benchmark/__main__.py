"""`python -m torch_bridge.benchmark`: time, memory and gradient error of jaxkd beside other ways to the same loss.

One process, one device, the same arrays in memory for both libraries (DLPack, uncopied). Each contender is compiled and
run once to take its memory and its errors against float64; then all of them run in turn, round after round, twice each:
the second run of a round is timed, and the median of a contender's rounds counts. A GPU's speed drifts with power and
temperature, so times are also given as multiples of the matrix products that the loss consists of, which run at the
start of every round and after the last.

Teacher and student are 2 % apart, as near the end of training: there it shows whether a gradient is right. Errors are
relative in L2. Memory is what a call needs beyond its inputs: the peak that PyTorch's allocator saw, or temporaries and
results by XLA's plan, so that neither counts the other's; the workspace leaves out the gradients that are returned.

``--training-step`` measures a whole step of training instead (``training_step.py``).
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from torch_bridge.benchmark.batches import Shape
from torch_bridge.benchmark.measurements import Case, Results, report
from torch_bridge.benchmark.measuring import Settings, measure
from torch_bridge.benchmark.tables import LEGEND, PICTURED, picture, rows_table, table
from torch_bridge.benchmark.tasks import TASKS
from torch_bridge.benchmark.training_step import MODELS, TOKENS, measure_steps, training_table, training_values
from torch_bridge.convert import obstacle_to_cuda

SHAPES = {
    "S1": Shape(4096, 4096, 128256),
    "S2": Shape(1024, 4096, 151936),
    "S3": Shape(2048, 4096, 128256),
    "S4": Shape(1152, 3840, 262144),
}
CPU_SHAPES = {"C1": Shape(256, 256, 16384), "C2": Shape(128, 256, 32000)}
QUICK_CPU_SHAPES = {"C0": Shape(32, 48, 2048)}
ROWS = {"cuda": 8192, "cpu": 512}


class UsageError(Exception):
    """What was asked for cannot be had."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no map of the memory when it runs out
    if not options.training_step:
        # JAX keeps the GPU memory it once took: it gets it step by step, and leaves PyTorch its share.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".45")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=max(Console().width, 200))  # rich cuts columns off where a terminal wraps
    try:
        if device == "cuda" and (reason := obstacle_to_cuda()):
            raise UsageError(f"--device cuda: {reason}, or use --device cpu")
        run = train if options.training_step else compare
        run(options, device, console)
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_bridge.benchmark",
        description="Time, memory and gradient error of distillation losses, side by side on one device.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch sees a GPU")
    parser.add_argument("--shapes", nargs="+", help=f"of {', '.join(SHAPES)}, or H/Ht/V; small ones on a CPU")
    parser.add_argument("--rows", nargs="+", type=positive, help=f"default: {ROWS['cuda']}, or {ROWS['cpu']} on a CPU")
    parser.add_argument("--repeats", type=positive, default=8, help="rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="timed a contender, then it sits out; %(default)s")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="contenders whose names have a WORD")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="; ".join(TASKS))
    parser.add_argument("--quick", action="store_true", help="one shape, an eighth of the rows, nothing torch compiles")
    parser.add_argument(
        "--training-step",
        action="store_true",
        help=f"a step of a student of Qwen3-0.6B's size, tiny on a CPU, for --rows tokens (default: {TOKENS['cuda']})",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write benchmark.json and benchmark.png there")
    return parser


def compare(options: argparse.Namespace, device: str, console: Console) -> None:
    """The losses side by side, at every shape and number of rows."""
    default = SHAPES if device == "cuda" else QUICK_CPU_SHAPES if options.quick else CPU_SHAPES
    shapes = parse_shapes(options.shapes or list(default)[: 1 if options.quick else None])
    counts = options.rows or [ROWS[device] // (8 if options.quick else 1)]
    cases = {
        name if len(counts) == 1 else f"{name}, {rows} rows": Case(shape, rows)
        for name, shape in shapes.items()
        for rows in counts
    }
    settings = Settings(
        device=device,
        repeats=options.repeats,
        seconds=options.seconds,
        compiled=not options.quick,
        only=options.only,
        tasks=options.tasks,
    )
    # A loss that Liger compiles meets several shapes: by default the second would get slower kernels for any shape.
    torch._dynamo.config.automatic_dynamic_shapes = False
    where = name_of(device)
    results: Results = {}
    for name, case in cases.items():
        start = time.perf_counter()
        results[name] = measure(case, settings, partial(console.print, markup=False, highlight=False))
        hidden, teacher_hidden, vocabulary = case.shape
        sizes = f"H={hidden}, Ht={teacher_hidden}, V={vocabulary}, {case.rows} rows, bfloat16"
        title = f"{name}: {sizes}, {where}; measured in {time.perf_counter() - start:.0f} s"
        console.print(table(title, results[name]))
        if options.out:  # after every case, so that a run which is cut short leaves what it has
            write(options.out, {"device": where, "settings": settings._asdict()} | report(cases, results))
            if any(result.task == PICTURED for found in results.values() for result in found):
                draw(options.out, where, cases, results)
    console.print(LEGEND, markup=False, highlight=False)
    if len(counts) > 1:
        console.print(rows_table(cases, results))


def train(options: argparse.Namespace, device: str, console: Console) -> None:
    """A whole step of training with each loss and without one."""
    model, tokens = MODELS[device], options.rows or TOKENS[device]
    if wrong := [n for n in tokens if n % model.length]:
        raise UsageError(f"--rows {wrong[0]}: tokens come in sequences of {model.length}")
    log = partial(console.print, markup=False, highlight=False)
    found = measure_steps(model, tokens, device, options.repeats, options.seconds, options.only, log)
    where = name_of(device)
    title = f"a training step, {model}, {found['attention']} attention, bfloat16, {where}"
    console.print(training_table(title, found["results"]))
    if options.out:
        write(options.out, {"training_step": {"device": where} | training_values(found)})


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def positive(word: str) -> int:
    if int(word) < 1:
        raise ValueError
    return int(word)


def parse_shapes(words: Sequence[str]) -> dict[str, Shape]:
    """Shapes by name, or given as H/Ht/V."""
    known = SHAPES | CPU_SHAPES | QUICK_CPU_SHAPES
    try:
        return {word: known[word] if word in known else Shape(*map(positive, word.split("/"))) for word in words}
    except (TypeError, ValueError):
        raise UsageError(f"--shapes {' '.join(words)}: give names of {', '.join(known)} or H/Ht/V") from None


def write(folder: Path, content: dict[str, Any]) -> None:
    """Adds to ``benchmark.json``: the losses and the training step are measured by processes of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmark.json"
    text = json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content, indent=1)
    path.write_text(re.sub(r"\[[^][{}]*\]", lambda values: " ".join(values[0].split()), text) + "\n")  # lists in a line


def draw(folder: Path, where: str, cases: Mapping[str, Case], results: Results) -> None:
    counts = sorted({cases[name].rows for name in results})
    rows = f"{counts[0]} rows" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} rows"
    title = f"JSD, loss and both gradients, {rows}, bfloat16, {where}"
    picture(title, results).savefig(folder / "benchmark.png", dpi=100)


if __name__ == "__main__":
    sys.exit(main())
