"""What `torch_bridge.benchmark` measured: results, what is derived of them, and their JSON values."""

import importlib.metadata
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch_bridge.benchmark.batches import Shape
from torch_bridge.benchmark.tasks import FLOORS, TASKS

Results = dict[str, list["Result"]]  # of each case, by its name
PACKAGES = ("jax", "torch", "triton", "liger-kernel", "trl", "nvidia-cutlass-dsl")


class Case(NamedTuple):
    """What all tasks are measured at."""

    shape: Shape
    rows: int


@dataclass
class Result:
    """One contender at one task; `failure` says in one line why it has no times, or no more of them."""

    task: str
    contender: str
    times: list[float] = field(default_factory=list)  # seconds
    memory: int | None = None  # bytes beyond the inputs
    gradient_bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.times) if self.times else None

    @property
    def workspace(self) -> int | None:
        return None if self.memory is None else max(self.memory - self.gradient_bytes, 0)


def floor_of(results: Sequence[Result], result: Result) -> float | None:
    """The time of the matrix products that a task consists of; those of the products themselves are their own."""
    name = result.contender if result.contender in FLOORS else TASKS[result.task].floor
    return next(other.median for other in results if other.contender == name)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def of_whole(results: Sequence[Result], result: Result) -> float | None:
    """The time of a task in parts of what the same contender needs for the whole one, as of the JSD."""
    whole = TASKS[result.task].part_of if result.task in TASKS else ""
    medians = [r.median for r in results if r.task == whole and r.contender == result.contender]
    return ratio(result.median, medians[0]) if medians else None


def report(cases: Mapping[str, Case], results: Results) -> dict[str, Any]:
    """Everything that was measured, as JSON values."""
    return {
        "versions": versions(),
        "shapes": {
            name: cases[name].shape._asdict()
            | {"rows": cases[name].rows, "results": [_values(found, result) for result in found]}
            for name, found in results.items()
        },
    }


def versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def _values(results: Sequence[Result], result: Result) -> dict[str, Any]:
    return values_of(result) | {
        "of_products": rounded(ratio(result.median, floor_of(results, result))),
        "of_whole": rounded(of_whole(results, result)),
    }


def values_of(result: Result) -> dict[str, Any]:
    return asdict(result) | {
        "times": [rounded(x) for x in result.times],
        "errors": {name: rounded(x) if math.isfinite(x) else None for name, x in result.errors.items()},
        "median": rounded(result.median),
        "workspace": result.workspace,
    }


def rounded(x: float | None) -> float | None:
    """To four digits, more than any measurement here repeats."""
    return None if x is None else float(f"{x:.4g}")
