"""How results are shown: a table of one case, a table of one task over the numbers of rows, and a picture."""

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from torch_bridge.benchmark.measurements import Case, Result, Results, floor_of, of_whole, ratio

PICTURED = "JSD"


def plain_table(title: str, text: Sequence[str], numbers: Sequence[str]) -> Table:
    view = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    for name in text:
        view.add_column(name, no_wrap=True)
    for name in numbers:
        view.add_column(name, justify="right", no_wrap=True)
    return view


def shown(value: float | None, form: str = ".2f", scale: float = 1) -> str:
    return "" if value is None else f"{value * scale:{form}}"


def of_bytes(value: float | None) -> str:
    """In GiB; what is small is in MiB, and says so."""
    if value is None:
        return ""
    return f"{value / 2**20:.1f} MiB" if value < 0.1 * 2**30 else f"{value / 2**30:.2f}"


def from_to(result: Result) -> str:
    return f"{min(result.times) * 1e3:.1f} to {max(result.times) * 1e3:.1f}" if result.times else ""


def as_text(failure: str) -> str:
    """A failure's own brackets are no markup."""
    return failure.replace("[", r"\[")


LEGEND = """\
ms, min to max  the median of the rounds, and their range; products: multiples of the bare matrix products of the task
whole           of the same contender's time without ignored rows
memory, work    GiB (MiB where it says so) beyond the inputs; the workspace leaves out the gradients that are returned
errors          relative in L2 against float64, of the loss and of both gradients"""


def table(title: str, results: Sequence[Result]) -> Table:
    """A section a task."""
    numbers = ("ms", "min to max", "products", "whole", "memory", "work", "loss", "d_hidden", "d_weight")
    view = plain_table(title, ("task, contender",), numbers)
    view.add_column("")
    task = None
    for result in results:
        if result.task != task:
            task = result.task
            view.add_row(f"[bold]{task}")
        view.add_row(
            f"  {result.contender}",
            shown(result.median, ".1f", 1e3),
            from_to(result),
            shown(ratio(result.median, floor_of(results, result))),
            shown(of_whole(results, result)),
            of_bytes(result.memory),
            of_bytes(result.workspace),
            *(shown(result.errors.get(name), ".1e") for name in ("loss", "hidden", "weight")),
            as_text(result.failure),
        )
    return view


def rows_table(cases: Mapping[str, Case], results: Results) -> Table:
    """Milliseconds and workspace of each contender at each number of rows, a line a shape and a task."""
    counts = sorted({cases[name].rows for name in results})
    title = "milliseconds (workspace in GiB) by rows"
    view = plain_table(title, ("H / Ht / V", "task", "contender"), [f"{n} rows" for n in counts])
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for name, found in results.items():
        shape, rows = cases[name]
        for result in found:
            key = (" / ".join(map(str, shape)), result.task, result.contender)
            cell = f"{shown(result.median, '.2f', 1e3)} ({of_bytes(result.workspace)})"
            lines.setdefault(key, {})[rows] = cell if result.times else as_text(result.failure.split(":")[0])
    for key, cells in lines.items():
        view.add_row(*key, *(cells.get(n, "") for n in counts))
    return view


def picture(title: str, results: Results) -> Figure:
    """Time, memory and the worse gradient error of every contender at the JSD with both gradients, a bar a case."""
    main = {case: [r for r in found if r.task == PICTURED] for case, found in results.items()}
    every = dict.fromkeys(r.contender for found in main.values() for r in found)
    names = [name for name in every if not (name.startswith("jaxkd") and "chunk" in name)]
    measures: dict[str, Callable[[list[Result], Result], float | None]] = {
        "time, multiple of the four products": lambda found, r: ratio(r.median, floor_of(found, r)),
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
        for i, (case, found) in enumerate(results.items()):
            bars = {names.index(r.contender): value(found, r) for r in main[case] if r.contender in names}
            bars = {y: x for y, x in bars.items() if x is not None}
            axis.barh([y + i * height for y in bars], list(bars.values()), height, label=case)
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
