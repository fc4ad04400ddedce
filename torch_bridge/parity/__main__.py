"""`python -m torch_bridge.parity`: jaxkd's losses and gradients against the float64 dense losses in PyTorch.

Both read the same memory: the tensors of a comparison cross to JAX by DLPack, uncopied, and the gradients come back the
same way. Gradient errors are relative in L2; `torch_bridge.parity.comparison` has their bounds. For comparison the
table shows the worst gradient error of other losses, where a comparison has such peers.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.progress import track

import jaxkd.kernels.dispatch
from torch_bridge.convert import obstacle_to_cuda
from torch_bridge.parity import (
    compare_divergences,
    compare_embedding,
    compare_one_number_a_row,
    compare_preference,
    compare_pytorch_teachers,
    compare_row_losses,
    compare_teacher_kinds,
)
from torch_bridge.parity.comparison import Comparison, Result, compare
from torch_bridge.parity.error_table import LEGEND, failures, report, succeeded, summary, table

IN_KERNELS = (compare_divergences, compare_one_number_a_row)
IN_XLA = (compare_row_losses, compare_pytorch_teachers, compare_teacher_kinds, compare_preference, compare_embedding)
SILENCE = 10  # seconds until a line says how far it is, where no terminal shows a bar
IMPLEMENTATIONS = [name for name in jaxkd.kernels.dispatch.NAMES if name]


def comparisons(device: str, implementation: str | None) -> list[Comparison]:
    """All of them, or those that take an implementation where one is named."""
    found = [x for family in IN_KERNELS for x in family.comparisons(device, implementation)]
    return found if implementation else found + [x for family in IN_XLA for x in family.comparisons(device)]


def obstacle(device: str, implementation: str | None, json_path: Path | None) -> str | None:
    """Why the comparison cannot run as asked, or None."""
    if device == "cuda" and (reason := obstacle_to_cuda()):
        return f"--device cuda: {reason}, or use --device cpu"
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
    say = partial(console.print, markup=False, highlight=False)
    say(f"jaxkd on {options.device}: errors against dense float64 PyTorch, on the same buffers")
    chosen = comparisons(options.device, options.implementation)[:: 5 if options.quick else 1]
    families = list(dict.fromkeys(x.family for x in chosen))
    chosen.sort(key=lambda x: families.index(x.family))
    shown = track(chosen, "comparing", console=console, transient=True, disable=not console.is_terminal)
    results: list[Result] = []
    last_said = start
    for family, of_family in groupby(shown, key=lambda x: x.family):
        for comparison in of_family:
            results.append(compare(comparison))
            now = time.perf_counter()
            if now - last_said > SILENCE and not console.is_terminal:
                say(f"{len(results)} of {len(chosen)} compared, {now - start:.0f} s")
                last_said = now
        console.print(table([x for x in results if x.comparison.family == family]))
    say(LEGEND)
    say()
    for line in failures(results):
        say(line)
    say(summary(results, time.perf_counter() - start))
    if options.json:
        content = report(results, options.device, options.implementation)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if succeeded(results) else 1


if __name__ == "__main__":
    sys.exit(main())
