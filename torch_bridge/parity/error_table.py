"""What the comparisons gave, as a table, one line of summary and JSON values."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import torch
from rich import box
from rich.table import Table

from torch_bridge.parity.comparison import GRADIENT_BOUNDS, Result


def table(results: Sequence[Result], title: str) -> Table:
    peers = list(dict.fromkeys(name for result in results for name in result.peers))
    view = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("family", "loss", "case", "dtype"):
        view.add_column(name, no_wrap=True)
    for name in ("loss", "worst gradient", "bound", "", *peers):
        view.add_column(name, justify="right", no_wrap=True)
    for result in results:
        about = result.comparison
        found = (result.errors["loss"], result.worst_gradient, max(result.bounds.values())) if result.errors else ()
        view.add_row(
            about.family,
            about.loss,
            about.setting,
            about.dtype,
            *(f"{number:.1e}" for number in found or ()),
            *([""] * (3 - len(found))),
            {"pass": "[green]pass", "FAIL": "[bold red]FAIL"}.get(result.verdict, result.verdict),
            *(f"{result.peers[name]:.1e}" if name in result.peers else "" for name in peers),
        )
    return view


def summary(results: Sequence[Result], seconds: float) -> str:
    worst = ", ".join(
        f"{dtype} {max(result.worst_gradient for result in chosen):.1e}"
        for dtype in GRADIENT_BOUNDS
        if (chosen := [result for result in results if result.comparison.dtype == dtype and result.errors])
    )
    verdicts = Counter(result.verdict for result in results)
    counts = ", ".join(f"{verdicts[name]} {name}" for name in ("pass", "FAIL", "refused") if verdicts[name])
    return f"{len(results)} rows in {seconds:.0f} s: {counts}; worst gradient errors: {worst}"


def succeeded(results: Sequence[Result]) -> bool:
    verdicts = Counter(result.verdict for result in results)
    return verdicts["pass"] > 0 and verdicts["FAIL"] == 0


def report(results: Sequence[Result], device: str, implementation: str | None) -> dict[str, Any]:
    """The results as JSON values, null for what is not finite."""

    def finite(values: dict[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "implementation": implementation,
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "passed": succeeded(results),
        "rows": [
            {name: getattr(x.comparison, name) for name in ("family", "loss", "setting", "dtype")}
            | {"errors": finite(x.errors), "bounds": x.bounds, "peers": finite(x.peers)}
            | {"verdict": x.verdict, "exception": x.exception}
            for x in results
        ],
    }
