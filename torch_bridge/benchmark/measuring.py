"""The measuring itself: memory and errors of every contender first, then their times in turn, round after round."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import torch

from torch_bridge.benchmark.batches import Batch, make_batch
from torch_bridge.benchmark.contenders import IN_PARTS, contenders, default_contender
from torch_bridge.benchmark.measurements import Case, Result
from torch_bridge.benchmark.preparing import Prepared, prepare_products
from torch_bridge.benchmark.tasks import FLOORS, TASKS, Outputs, exact_outputs
from torch_bridge.convert import borrow_as_torch

MIN_RUNS = 3


class Settings(NamedTuple):
    device: str
    repeats: int
    seconds: float
    compiled: bool
    only: Sequence[str]
    tasks: Sequence[str]


Run = Callable[[], object]


def measure(case: Case, settings: Settings, log: Callable[[str], None]) -> list[Result]:
    """All contenders at one case: memory and errors of each first, then their times in turn."""
    batch = make_batch(case.shape, case.rows, settings.device)
    results, runs = _prepare_all(case, batch, settings, log)
    run_in_turn(runs, settings.repeats, settings.seconds)
    runs.clear()  # with what torch and JAX compiled for them
    torch.compiler.reset()
    jax.clear_caches()
    release()
    return results


def _prepare_all(
    case: Case, batch: Batch, settings: Settings, log: Callable[[str], None]
) -> tuple[list[Result], list[tuple[Result, Run]]]:
    """Compiles every contender: the results, memory and errors in them, and the runs of those that work."""
    results: list[Result] = []
    runs: list[tuple[Result, Run]] = []
    for result, prepare, exact in _plan(case, batch, settings):
        start = time.perf_counter()
        with failure_noted(result):
            prepared = prepare()
            _take_memory_and_errors(result, prepared, exact, settings.device)
            runs.append((result, prepared.run))
        release()
        results.append(result)
        outcome = result.failure or f"ready after {time.perf_counter() - start:.1f} s"
        log(f"{result.task}: {result.contender}: {outcome}")
    return results, runs


def _plan(
    case: Case, batch: Batch, settings: Settings
) -> Iterator[tuple[Result, Callable[[], Prepared], Outputs | None]]:
    """What to measure, each with its truth: tasks with the same truth follow each other, so that only one is kept."""
    shape, rows = case
    wanted = [name for name in TASKS if name in settings.tasks]
    for floor in FLOORS:
        if any(TASKS[name].floor == floor for name in wanted):
            yield Result("products", floor), partial(prepare_products, batch, floor), None
    for _, names in groupby(wanted, lambda name: (TASKS[name].kind, TASKS[name].divergence, TASKS[name].ignored)):
        tasks = list(names)
        exact = exact_outputs(batch, TASKS[tasks[0]])
        for task in tasks:
            kind = TASKS[task].kind
            some = {default_contender(kind, shape, rows, settings.device), *IN_PARTS}
            every = contenders(kind, shape, rows, settings.device, settings.compiled)
            for name, prepare in every.items():
                is_chosen = not settings.only or any(word in name for word in settings.only)
                if is_chosen and (name in some or not TASKS[task].part_of):
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


def run_in_turn(runs: Sequence[tuple[Result, Run]], repeats: int, seconds: float) -> None:
    for number in range(repeats + 1):  # in round 0 the allocators grow: not counted
        for result, run in runs:
            if has_another_run(result, seconds):
                _time(result, run, counted=number > 0)
    for result, run in runs:
        if result.contender in FLOORS:
            _time(result, run)


def has_another_run(result: Result, seconds: float) -> bool:
    if result.failure:
        return False
    return result.contender in FLOORS or len(result.times) < MIN_RUNS or sum(result.times) < seconds


def _time(result: Result, run: Run, counted: bool = True) -> None:
    with failure_noted(result):
        run()  # so that clocks and caches are as this contender leaves them, not the one before it
        start = time.perf_counter()
        run()
        if counted:
            result.times.append(time.perf_counter() - start)
    if result.failure:
        release()


@contextlib.contextmanager
def failure_noted(result: Result) -> Iterator[None]:
    """What runs out of memory, or does not run here, is reported in the table and stops nothing."""
    try:
        yield
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0]
        is_full = "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()
        result.failure = "out of memory" if is_full else f"{type(error).__name__}: {message}"[:160]


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
