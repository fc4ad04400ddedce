"""What `torch_bridge.benchmark` measured: results, and the table, the JSON values and the picture of them."""

import importlib.metadata
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from torch_bridge.benchmark.contenders import MAIN_TASK, TASKS, Shape

Results = dict[str, list["Result"]]  # of each shape, by its name
FLOORS = {"four products": True, "two products": False}  # whether the two products of the gradients are among them


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


def floor_of(results: Sequence[Result], task: str) -> float | None:
    """The time of the matrix products a task consists of: the two forward ones for the loss alone, else all four."""
    name = "four products" if task == "products" or TASKS[task].wanted else "two products"
    return next(result.median for result in results if result.contender == name)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def of_full(results: Sequence[Result], result: Result) -> float | None:
    """The time of a task in parts of what the same contender needs for the whole JSD."""
    full = [r.median for r in results if r.task == MAIN_TASK and r.contender == result.contender]
    return ratio(result.median, full[0]) if full and result.task != MAIN_TASK else None


def table(title: str, results: Sequence[Result]) -> Table:
    view = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    for name in ("task", "contender"):
        view.add_column(name, no_wrap=True)
    names = ("ms", "min to max", "× products", "× full JSD", "GiB", "workspace", "loss error", "d_hidden", "d_weight")
    for name in names:
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("")

    def shown(value: float | None, form: str = ".2f", scale: float = 1) -> str:
        return "" if value is None else f"{value * scale:{form}}"

    for result in results:
        view.add_row(
            result.task,
            result.contender,
            shown(result.median, ".1f", 1e3),
            f"{min(result.times) * 1e3:.1f} to {max(result.times) * 1e3:.1f}" if result.times else "",
            shown(ratio(result.median, floor_of(results, result.task))),
            shown(of_full(results, result)),
            shown(result.memory, scale=2**-30),
            shown(result.workspace, scale=2**-30),
            *(shown(result.errors.get(name), ".1e") for name in ("loss", "hidden", "weight")),
            result.failure.replace("[", r"\["),
        )
    return view


def report(shapes: dict[str, Shape], results: Results) -> dict[str, Any]:
    """Everything that was measured, as JSON values."""
    return {
        "versions": {name: _version(name) for name in ("jax", "torch", "liger-kernel")},
        "shapes": {
            name: shapes[name]._asdict() | {"results": [_values(found, result) for result in found]}
            for name, found in results.items()
        },
    }


def _values(results: Sequence[Result], result: Result) -> dict[str, Any]:
    return asdict(result) | {
        "errors": {name: error if math.isfinite(error) else None for name, error in result.errors.items()},
        "median": result.median,
        "of_products": ratio(result.median, floor_of(results, result.task)),
        "of_full_jsd": of_full(results, result),
        "workspace": result.workspace,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def picture(title: str, results: Results) -> Figure:
    """Time, memory and the worse gradient error of every contender at the JSD with both gradients, a bar a shape."""
    main = {shape: [r for r in found if r.task == MAIN_TASK] for shape, found in results.items()}
    every = dict.fromkeys(r.contender for found in main.values() for r in found)
    names = [name for name in every if not (name.startswith("jaxkd") and "chunk" in name)]
    measures: dict[str, Callable[[list[Result], Result], float | None]] = {
        "time, multiple of the four products": lambda found, r: ratio(r.median, floor_of(found, r.task)),
        "memory beyond the inputs, GiB": lambda found, r: ratio(r.memory, 2**30),
        "relative gradient error, the worse of two": lambda found, r: max(
            (error for name, error in r.errors.items() if name != "loss"), default=None
        ),
    }
    figure = Figure(figsize=(13, 1.8 + 0.16 * len(names) * (len(results) + 1)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 3, sharey=True)
    height = 0.8 / len(results)
    for axis, (label, value) in zip(axes, measures.items(), strict=True):
        for i, (shape, found) in enumerate(results.items()):
            bars = {names.index(r.contender): value(found, r) for r in main[shape] if r.contender in names}
            bars = {y: x for y, x in bars.items() if x is not None}
            axis.barh([y + i * height for y in bars], list(bars.values()), height, label=shape)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].axvline(1, color="black", linewidth=1)
    axes[2].set_xscale("log")
    axes[2].set_xlim(left=1e-3)  # about what rounding a gradient to bfloat16 does to it
    axes[0].set_yticks([y + 0.4 - height / 2 for y in range(len(names))], names)
    axes[0].invert_yaxis()
    axes[2].legend()
    return figure
