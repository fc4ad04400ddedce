"""`python -m torch_bridge.parity`: jaxkd's loss and gradients against the float64 dense loss in PyTorch.

Both read the same memory: the tensors of a case cross to JAX by DLPack, uncopied, and the gradients come back the same
way. The cases are those of `torch_bridge.cases`: every two values of divergence, vocabulary shape, dtype, mask, head,
temperature and chunk size meet in at least one (not the full product), and every divergence is met near convergence in
bfloat16 besides. For comparison the table shows the worst gradient error of the dense PyTorch loss in the case's own
dtype and, where liger-kernel is installed and there is a GPU, of its two JSD losses. A second table has all other
losses, those of the ``comparisons_*`` modules, which run in XLA.

Gradient errors are relative in L2; `torch_bridge.comparison` has their bounds.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxkd
import jaxkd.kernels.dispatch
from torch_bridge import (
    comparisons_embedding,
    comparisons_preference,
    comparisons_rows,
    comparisons_teacher,
    comparisons_teachers,
    liger,
    reference,
)
from torch_bridge.autograd import torch_loss
from torch_bridge.cases import DIVERGENCES, Batch, Case, Loss, converging_cases, make_batch, pairwise_cases
from torch_bridge.comparison import GRADIENT_BOUNDS, LOSS_BOUND, Outcome, errors, loss_and_gradients, outcome

# The slope of |p - q| jumps where p = q, and a token whose p and q agree to the rounding of float32 logits may take
# either sign. Near convergence there are such tokens: moving the logits of that case by 3e-6 of themselves turns one
# likely token over and moves the exact float64 gradient by 3.8e-2; moving them by 1e-6 moves nothing.
TOTAL_VARIATION_NEAR_CONVERGENCE = 5e-2
GRADIENTS = ("hidden", "weight", "bias")
FAMILIES = (comparisons_rows, comparisons_teacher, comparisons_teachers, comparisons_preference, comparisons_embedding)
IMPLEMENTATIONS = [name for name in jaxkd.kernels.dispatch.NAMES if name]


@dataclass
class Row:
    """What was measured on a case. `errors` and `bounds` have "loss" and the student's tensors as keys."""

    case: Case
    errors: dict[str, float] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)  # worst gradient error of other losses
    exception: str | None = None
    refused: bool = False  # the named implementation is not for such a call, and says so

    @property
    def bounds(self) -> dict[str, float]:
        gradient = GRADIENT_BOUNDS[self.case.dtype]
        if self.case.divergence == "total_variation" and self.case.gap is not None:
            gradient = TOTAL_VARIATION_NEAR_CONVERGENCE
        return {name: LOSS_BOUND if name == "loss" else gradient for name in self.errors}

    @property
    def passed(self) -> bool:
        return bool(self.errors) and all(self.errors[name] <= bound for name, bound in self.bounds.items())

    @property
    def verdict(self) -> str:
        return "refused" if self.refused else "pass" if self.passed else "FAIL"


def measure(case: Case, device: str = "cpu", implementation: str | None = None) -> Row:
    """Runs a case in jaxkd, in float64 and in whatever else can run it."""

    def jax_loss(case: Case, batch: Batch) -> torch.Tensor:
        with jax.default_matmul_precision("highest"):  # float32 products are TF32 on a GPU otherwise
            return torch_loss(jaxkd.distillation_loss)(
                jaxkd.LinearLogits(**batch.student),
                jaxkd.LinearLogits(**batch.teacher),
                batch.labels,
                divergence=DIVERGENCES[case.divergence].jax,
                chunk_size=case.chunk_size,
                implementation=implementation,
                **batch.options,
            )[0]

    batch = make_batch(case, device)
    row = Row(case)
    exact = _loss_and_gradients(_dense_loss, case, batch.to(torch.float64))
    try:
        row.errors = errors(_loss_and_gradients(jax_loss, case, batch), exact)
    except Exception as error:  # a kernel that does not compile fails its row, not the table
        row.exception = f"{type(error).__name__}: {error}"
        row.refused = isinstance(error, ValueError) and "cannot run here" in str(error)
    peers = {"dense torch": _dense_loss} | {k: v for k, v in liger.losses().items() if liger.runs(k, case)}
    for name, loss in peers.items():
        try:
            found = errors(_loss_and_gradients(loss, case, batch), exact)
        except Exception:  # no verdict on us
            row.peers[name] = math.nan
        else:
            row.peers[name] = max(error for key, error in found.items() if key != "loss")
    return row


def _dense_loss(case: Case, batch: Batch) -> torch.Tensor:
    return reference.distillation_loss(
        reference.LinearLogits(**batch.student),
        reference.LinearLogits(**batch.teacher),
        batch.labels,
        divergence=DIVERGENCES[case.divergence].torch,
        **batch.options,
    )[0]


def _loss_and_gradients(loss: Loss, case: Case, batch: Batch) -> dict[str, torch.Tensor]:
    inputs = {k: batch.student[k] for k in GRADIENTS if k in batch.student}
    return loss_and_gradients(lambda tensors: loss(case, batch._replace(student=batch.student | tensors)), inputs)


def table(rows: Sequence[Row], title: str) -> Table:
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    result = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("divergence", "V/Vt", "dtype", "mask", "head", "tau", "chunk", "gap"):
        result.add_column(name, no_wrap=True)
    for name in ("loss", *(f"d_{name}" for name in GRADIENTS), "bound", "", *peers):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        case = row.case
        result.add_row(
            case.divergence,
            f"{case.shape.vocabulary}/{case.shape.teacher_vocabulary}",
            case.dtype,
            case.mask,
            case.head,
            f"{case.temperature:g}",
            "auto" if case.chunk_size is None else str(case.chunk_size),
            "" if case.gap is None else f"{case.gap:.0%}",
            *(f"{row.errors[name]:.1e}" if name in row.errors else "" for name in ("loss", *GRADIENTS)),
            f"{row.bounds['hidden']:.1e}" if row.errors else "",
            {"pass": "[green]pass", "FAIL": "[bold red]FAIL"}.get(row.verdict, row.verdict),
            *(f"{row.peers[name]:.1e}" if name in row.peers else "" for name in peers),
        )
    return result


def table_of_others(outcomes: Sequence[Outcome], title: str) -> Table:
    result = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("family", "loss", "case", "dtype"):
        result.add_column(name, no_wrap=True)
    for name in ("loss", "worst gradient", "bound", ""):
        result.add_column(name, justify="right", no_wrap=True)
    for x in outcomes:
        about = x.comparison
        numbers = [f"{x.errors['loss']:.1e}", f"{x.worst_gradient:.1e}", f"{x.bound:.1e}"] if x.errors else [""] * 3
        verdict = "[green]pass" if x.passed else "[bold red]FAIL"
        result.add_row(about.family, about.loss, about.setting, about.dtype, *numbers, verdict)
    return result


def summary(rows: Sequence[Row], seconds: float) -> str:
    worst = ", ".join(
        f"{dtype} {max(row.errors[name] for row in chosen for name in GRADIENTS if name in row.errors):.1e}"
        for dtype in GRADIENT_BOUNDS
        if (chosen := [row for row in rows if row.case.dtype == dtype and row.errors])
    )
    verdicts = Counter(row.verdict for row in rows)
    counts = ", ".join(f"{verdicts[name]} {name}" for name in ("pass", "FAIL", "refused") if verdicts[name])
    return f"{len(rows)} rows in {seconds:.0f} s: {counts}; worst gradient errors: {worst}"


def succeeded(rows: Sequence[Row]) -> bool:
    verdicts = Counter(row.verdict for row in rows)
    return verdicts["pass"] > 0 and verdicts["FAIL"] == 0


def report(rows: Sequence[Row], others: Sequence[Outcome], device: str, implementation: str | None) -> dict[str, Any]:
    """The results as JSON values, null for what is not finite."""

    def finite(values: dict[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "implementation": implementation,
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "passed": succeeded(rows) and all(x.passed for x in others),
        "rows": [
            asdict(row.case)
            | {"shape": row.case.shape._asdict(), "errors": finite(row.errors), "bounds": row.bounds}
            | {"verdict": row.verdict, "exception": row.exception, "peers": finite(row.peers)}
            for row in rows
        ],
        "others": [
            {name: getattr(x.comparison, name) for name in ("family", "loss", "setting", "dtype")}
            | {"errors": finite(x.errors), "bound": x.bound, "passed": x.passed, "exception": x.exception}
            for x in others
        ],
    }


def obstacle(device: str, implementation: str | None, json_path: Path | None) -> str | None:
    """Why the comparison cannot run as asked, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: this PyTorch sees no CUDA GPU; use --device cpu"
    if device == "cuda" and jax.default_backend() != "gpu":
        return f"--device cuda: JAX computes on {jax.default_backend()!r}; install jax[cuda13] or use --device cpu"
    if device == "cpu" and implementation not in (None, "xla"):
        return f"--implementation {implementation}: the kernel needs --device cuda"
    if json_path is not None and not json_path.resolve().parent.is_dir():
        return f"--json {json_path}: there is no folder {json_path.resolve().parent}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torch_bridge.parity",
        description="Compare jaxkd's losses and gradients with dense float64 PyTorch on the same buffers.",
        epilog="Exit status: 0 all rows pass, 1 a row fails (or none can run), 2 it cannot run as asked.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: the library's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument("--quick", action="store_true", help="every fifth row only")
    options = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave PyTorch its share of the GPU
    problem = obstacle(options.device, options.implementation, options.json)
    if problem:
        print(f"{parser.prog}: error: {problem}", file=sys.stderr)
        return 2

    start = time.perf_counter()
    console = Console(width=max(Console().width, 200))  # rich cuts columns off where a terminal wraps
    cases = (pairwise_cases() + converging_cases())[:: 5 if options.quick else 1]
    comparisons = [x for family in FAMILIES for x in family.comparisons(options.device)][:: 5 if options.quick else 1]
    if options.implementation:  # which they do not take
        comparisons = []
    show = partial(track, console=console, transient=True, disable=not console.is_terminal)
    rows = [measure(case, options.device, options.implementation) for case in show(cases, "comparing")]
    others = [outcome(comparison) for comparison in show(comparisons, "comparing the other losses")]
    console.print(
        table(rows, f"jaxkd on {options.device}: errors against float64 PyTorch, beside the worst gradient of others")
    )
    for row in rows:
        if row.exception:
            console.print(f"{row.verdict} {row.case}: {row.exception}", markup=False)
    if others:
        console.print(table_of_others(others, f"The other losses on {options.device}"))
    for x in others:
        if x.exception:
            console.print(f"FAIL {x.comparison.loss}, {x.comparison.setting}: {x.exception}", markup=False)
    console.print(summary(rows, time.perf_counter() - start))
    passed = sum(x.passed for x in others)
    if others:
        console.print(f"{len(others)} rows of other losses: {passed} pass, {len(others) - passed} FAIL")
    if options.json:
        content = report(rows, others, options.device, options.implementation)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if succeeded(rows) and passed == len(others) else 1


if __name__ == "__main__":
    sys.exit(main())
