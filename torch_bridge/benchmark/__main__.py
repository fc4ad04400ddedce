"""`python -m torch_bridge.benchmark`: time, memory and gradient error of jaxkd beside other ways to the same loss.

One process, one device, the same arrays in memory for both libraries (DLPack, uncopied). Each contender is compiled and
run once to take its memory and its errors against float64; then all of them run in turn, round after round, twice each:
the second run of a round is timed, and the median of a contender's rounds counts. A GPU's speed drifts with power and
temperature, so times are also given as multiples of the matrix products that the loss consists of, which run at the
start of every round and after the last.

Teacher and student are 2 % apart, as near the end of training: there it shows whether a gradient is right. Errors are
relative in L2. Memory is what a call needs beyond its inputs: the peak that PyTorch's allocator saw, or temporaries and
results by XLA's plan, so that neither counts the other's; the workspace leaves out the gradients that are returned.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import jax
import torch
from rich.console import Console

from torch_bridge.benchmark.contenders import (
    MAIN_TASK,
    TASKS,
    Batch,
    Outputs,
    Prepared,
    Shape,
    contenders,
    default_contender,
    exact_outputs,
    make_batch,
    prepare_products,
)
from torch_bridge.benchmark.measurements import FLOORS, Result, Results, picture, report, table
from torch_bridge.convert import borrow_as_torch, obstacle_to_cuda

SHAPES = {
    "S1": Shape(4096, 4096, 128256),
    "S2": Shape(1024, 4096, 151936),
    "S3": Shape(2048, 4096, 128256),
    "S4": Shape(1152, 3840, 262144),
}
CPU_SHAPES = {"C1": Shape(256, 256, 16384), "C2": Shape(128, 256, 32000)}
QUICK_CPU_SHAPES = {"C0": Shape(32, 48, 2048)}
ROWS = {"cuda": 8192, "cpu": 512}

EVERYWHERE = "Liger fused"  # the other tasks are run by jaxkd's default and, as it compiles nothing, by this
MIN_RUNS = 3


class Settings(NamedTuple):
    device: str
    rows: int
    repeats: int
    seconds: float
    compiled: bool
    only: Sequence[str]
    tasks: Sequence[str]


Run = Callable[[], Outputs]


def measure(shape: Shape, settings: Settings, log: Callable[[str], None]) -> list[Result]:
    """All contenders on one shape: memory and errors of each first, then their times in turn."""
    batch = make_batch(shape, settings.rows, settings.device)
    results, runs = _prepare_all(shape, batch, settings, log)
    _run_in_turn(runs, settings)
    runs.clear()  # with what torch and JAX compiled for them
    torch.compiler.reset()
    jax.clear_caches()
    _release()
    return results


def _prepare_all(
    shape: Shape, batch: Batch, settings: Settings, log: Callable[[str], None]
) -> tuple[list[Result], list[tuple[Result, Run]]]:
    """Compiles every contender: the results, memory and errors in them, and the runs of those that work."""
    results, runs = [], []
    for result, prepare, exact in _plan(shape, batch, settings):
        start = time.perf_counter()
        with _failure_noted(result):
            prepared = prepare()
            _take_memory_and_errors(result, prepared, exact, settings.device)
            runs.append((result, prepared.run))
        _release()
        results.append(result)
        outcome = result.failure or f"ready after {time.perf_counter() - start:.1f} s"
        log(f"{result.task}: {result.contender}: {outcome}")
    return results, runs


def _plan(
    shape: Shape, batch: Batch, settings: Settings
) -> Iterator[tuple[Result, Callable[[], Prepared], Outputs | None]]:
    """What to measure, each with its truth: tasks with the same truth follow each other, so that only one is kept."""
    for name, backward in FLOORS.items():
        yield Result("products", name), partial(prepare_products, batch, backward), None
    every = contenders(shape, settings.rows, settings.device, settings.compiled)
    every = {k: v for k, v in every.items() if not settings.only or any(word in k for word in settings.only)}
    some = {default_contender(shape, settings.rows, settings.device), EVERYWHERE}
    wanted = [name for name in TASKS if name in settings.tasks]
    for (divergence, ignored), tasks in groupby(wanted, lambda name: (TASKS[name].divergence, TASKS[name].ignored)):
        exact = exact_outputs(batch, divergence, ignored)
        for task in tasks:
            for name, prepare in every.items():
                if task == MAIN_TASK or name in some:
                    yield Result(task, name), partial(prepare, batch, TASKS[task]), exact


def _take_memory_and_errors(result: Result, prepared: Prepared, exact: Outputs | None, device: str) -> None:
    outputs = prepared.run()
    result.memory = prepared.memory
    if prepared.memory is None and device == "cuda":  # once more: the first run compiles, and tries things out
        del outputs
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = prepared.run()
        result.memory = torch.cuda.max_memory_allocated() - before
    result.gradient_bytes = sum(x.nbytes for x in outputs.gradients.values())
    if exact is not None:
        result.errors = {"loss": abs(float(outputs.loss) - exact.loss) / abs(exact.loss)}
        for name, gradient in outputs.gradients.items():
            gradient = borrow_as_torch(gradient) if isinstance(gradient, jax.Array) else gradient
            truth = exact.gradients[name]
            result.errors[name] = ((gradient.float() - truth).norm() / truth.norm()).item()


def _run_in_turn(runs: Sequence[tuple[Result, Run]], settings: Settings) -> None:
    for number in range(settings.repeats + 1):  # in round 0 the allocators grow: not counted
        for result, run in runs:
            if _has_another_run(result, settings):
                _time(result, run, counted=number > 0)
    for result, run in runs:
        if result.contender in FLOORS:
            _time(result, run)


def _has_another_run(result: Result, settings: Settings) -> bool:
    if result.failure:
        return False
    return result.contender in FLOORS or len(result.times) < MIN_RUNS or sum(result.times) < settings.seconds


def _time(result: Result, run: Run, counted: bool = True) -> None:
    with _failure_noted(result):
        run()  # so that clocks and caches are as this contender leaves them, not the one before it
        start = time.perf_counter()
        run()
        if counted:
            result.times.append(time.perf_counter() - start)
    if result.failure:
        _release()


@contextlib.contextmanager
def _failure_noted(result: Result) -> Iterator[None]:
    """What runs out of memory, or does not run here, is reported in the table and stops nothing."""
    try:
        yield
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0]
        result.failure = f"{type(error).__name__}: {message}"[:160]


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torch_bridge.benchmark",
        description="Time, memory and gradient error of distillation losses, side by side on one device.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch sees a GPU")
    parser.add_argument("--shapes", nargs="+", help=f"of {', '.join(SHAPES)}, or H/Ht/V; small ones on a CPU")
    parser.add_argument("--rows", type=positive, help=f"default: {ROWS['cuda']}, or {ROWS['cpu']} on a CPU")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.7, help="timed a contender, then it sits out; %(default)s")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="contenders whose names have a WORD")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="; ".join(TASKS))
    parser.add_argument("--quick", action="store_true", help="one shape, an eighth of the rows, nothing torch compiles")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write benchmark.json and benchmark.png there")
    options = parser.parse_args(arguments)
    # JAX keeps the GPU memory it once took: it gets it step by step, and leaves PyTorch its share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".45")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no map of the memory when it runs out
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    default = SHAPES if device == "cuda" else QUICK_CPU_SHAPES if options.quick else CPU_SHAPES
    try:
        shapes = parse_shapes(options.shapes or list(default)[: 1 if options.quick else None])
        if device == "cuda" and (reason := obstacle_to_cuda()):
            raise ValueError(f"--device cuda: {reason}, or use --device cpu")
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2

    settings = Settings(
        device=device,
        rows=options.rows or ROWS[device] // (8 if options.quick else 1),
        repeats=options.repeats,
        seconds=options.seconds,
        compiled=not options.quick,
        only=options.only,
        tasks=options.tasks,
    )
    # A loss that Liger compiles meets several shapes: by default the second would get slower kernels for any shape.
    torch._dynamo.config.automatic_dynamic_shapes = False
    console = Console(width=max(Console().width, 200))  # rich cuts columns off where a terminal wraps
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    results: Results = {}
    for name, shape in shapes.items():
        start = time.perf_counter()
        results[name] = measure(shape, settings, partial(console.print, markup=False, highlight=False))
        sizes = f"H={shape.hidden}, Ht={shape.teacher_hidden}, V={shape.vocabulary}, {settings.rows} rows, bfloat16"
        title = f"{name}: {sizes}, {where}; measured in {time.perf_counter() - start:.0f} s"
        console.print(table(title, results[name]))
        if options.out:  # after every shape, so that a run which is cut short leaves what it has
            write(options.out, where, settings, shapes, results)
    return 0


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
        raise ValueError(f"--shapes {' '.join(words)}: give names of {', '.join(known)} or H/Ht/V") from None


def write(folder: Path, where: str, settings: Settings, shapes: dict[str, Shape], results: Results) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"device": where, "settings": settings._asdict()} | report(shapes, results)
    (folder / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n")
    title = f"JSD, loss and both gradients, {settings.rows} rows, bfloat16, {where}"
    picture(title, results).savefig(folder / "benchmark.png", dpi=100)


if __name__ == "__main__":
    sys.exit(main())
