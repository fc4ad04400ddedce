"""What the comparisons gave, as a table a family, a legend, one line of summary and JSON values."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import torch
from rich import box
from rich.table import Table

from torch_bridge.parity.comparison import GRADIENT_BOUNDS, LOSS_BOUND, Result

LEGEND = f"""\
loss         |error| / max(|loss|, 0.1), at most {LOSS_BOUND:.0e}
gradient     the worst of all differentiated tensors, relative in L2; the bound is that of its type
dense, Liger the same error of PyTorch's dense loss in the case's own type, and of Liger Kernel's
V            tokens of the student, and of the teacher where it has others; of the cases of divergences
ignored      two rows in five have the ignored label; poisoned: these rows are NaN too; weighted: rows have weights
tau, chunk   the temperature and the rows of a chunk, where they are not 1 and chosen by the library
% apart      the teacher is the student, its head moved by so much noise"""
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def table(results: Sequence[Result]) -> Table:
    """Of the results of one family."""
    peers = list(dict.fromkeys(name for result in results for name in result.peers))
    title = f"{results[0].comparison.family}, {len(results)} of them"
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, int(len(peers) < 2), 0, 0))
    for name in ("loss", "case", "type"):
        view.add_column(name, no_wrap=True)
    for name in ("loss", "gradient", "bound", "", *(name.replace(" ", "\n") for name in peers)):
        view.add_column(name, justify="right", no_wrap=True)
    for result in results:
        about = result.comparison
        found = ["", "", ""]
        if result.errors:
            found = [
                f"{result.errors['loss']:.1e}",
                f"{result.worst_gradient:.1e}",
                f"{max(result.bounds.values()):.0e}",
            ]
        view.add_row(
            about.loss,
            about.setting,
            SHORT[about.dtype],
            *found,
            {"pass": "[green]pass", "FAIL": "[bold red]FAIL"}.get(result.verdict, result.verdict),
            *(f"{result.peers[name]:.0e}" if name in result.peers else "" for name in peers),
        )
    return view


def failures(results: Sequence[Result]) -> list[str]:
    """A line for each row that has not passed: why."""
    return [f"{x.verdict} {x.comparison}: {x.exception or _beyond(x)}" for x in results if not x.passed]


def _beyond(result: Result) -> str:
    """The errors that are not within their bounds, NaN among them."""
    wrong = {name: x for name, x in result.errors.items() if not x <= result.bounds[name]}
    return ", ".join(f"{name} {x:.1e}, the bound is {result.bounds[name]:.0e}" for name, x in wrong.items())


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
