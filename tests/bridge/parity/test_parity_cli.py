"""`python -m torch_bridge.parity`: what it reports, and that it can fail."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import pytest
import torch
from rich.console import Console

from torch_bridge import reference
from torch_bridge.parity import __main__ as parity
from torch_bridge.parity.compare_divergences import comparison_of
from torch_bridge.parity.comparison import Comparison, Result, compare
from torch_bridge.parity.distillation_cases import DIVERGENCES, Case, Pair, Shape
from torch_bridge.parity.error_table import LEGEND, report, succeeded, table

SMALL = Case("jensen_shannon(0.5)", Shape(9, 8, 8, 21, 21), "bfloat16", chunk_size=4, gap=0.02)
# Near convergence every divergence is the same quadratic form, up to a factor.
APART = comparison_of(replace(SMALL, gap=None))


def square(factor=1.0, exception=None):
    """A comparison that is right with factor 1."""

    def of_jax(inputs):
        if exception is not None:
            raise exception
        return factor * jnp.sum(inputs["x"] ** 2), {}

    return Comparison("family", "square", "plain", {"x": torch.ones(3)}, of_jax, lambda x: torch.sum(x["x"] ** 2))


def run(monkeypatch, comparisons, *arguments):
    monkeypatch.setattr(parity, "comparisons", lambda device, implementation: comparisons)
    return parity.main(arguments)


def check_all_passed(path, output):
    results = json.loads(path.read_text())
    rows = results["rows"]
    assert results["passed"]
    assert results["device"] == "cpu"
    assert f"{len(rows)} rows in" in output
    assert f": {len(rows)} pass; worst gradient errors: float32" in output
    assert output.count(" pass ") == len(rows)
    for row in rows:
        assert row["verdict"] == "pass"
        assert len(row["errors"]) > 1
        assert row["errors"].keys() == row["bounds"].keys()
        assert row["loss"] in output
        assert row["setting"] in output
    return rows


def test_rows_of_two_families(monkeypatch, tmp_path, capsys):
    every = {}
    for comparison in parity.comparisons("cpu", None):
        every.setdefault(comparison.family, comparison)
    assert every.keys() == {
        *("divergences", "cross-entropy", "one number a row", "distillation", "hidden states", "teacher"),
        *("preference", "embedding"),
    }
    named = parity.comparisons("cpu", "xla")  # the others take no implementation
    assert {comparison.family for comparison in named} == {"divergences", "cross-entropy", "one number a row"}
    assert {comparison.dtype for comparison in named} == {"float32", "bfloat16", "float16"}

    path = tmp_path / "parity.json"
    assert run(monkeypatch, [every["divergences"], every["preference"]], "--json", str(path)) == 0
    divergence, preference = check_all_passed(path, capsys.readouterr().out)
    assert (divergence["family"], preference["family"]) == ("divergences", "preference")
    assert {"loss", "hidden", "weight"} <= divergence["errors"].keys()
    assert divergence["peers"].keys() == {"dense torch"}


def test_tables_fit_a_terminal():
    """Also with the peers that run on a GPU alone."""
    families = {}
    for x in parity.comparisons("cpu", None):
        peers = dict.fromkeys(["dense torch", "Liger fused", "Liger chunked"] if x.peers else [], 0.5)
        families.setdefault(x.family, []).append(Result(x, {"loss": 1e-7, **dict.fromkeys(x.inputs, 2e-7)}, peers))
    console = Console(width=200, file=io.StringIO())
    for results in families.values():
        console.print(table(results))
    text = console.file.getvalue()
    assert "…" not in text
    assert max(len(line.rstrip()) for line in [*text.splitlines(), *LEGEND.splitlines()]) <= 120


def test_where_no_terminal_shows_a_bar_lines_say_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(parity, "SILENCE", 0)
    assert run(monkeypatch, [square()] * 3) == 0
    output = capsys.readouterr().out
    assert output.startswith("jaxkd on cpu: errors against dense float64 PyTorch")
    assert [f"{n} of 3 compared" in output for n in (1, 2, 3)] == [True] * 3
    assert LEGEND in output


@pytest.mark.slow
def test_quick_run_passes_and_writes_its_results(tmp_path, capsys):
    assert parity.main(["--quick", "--json", str(tmp_path / "parity.json")]) == 0
    rows = check_all_passed(tmp_path / "parity.json", capsys.readouterr().out)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}


def test_quick_takes_every_fifth_row(monkeypatch, capsys):
    assert run(monkeypatch, [square()] * 11, "--quick") == 0
    assert "3 rows in" in capsys.readouterr().out


def test_near_convergence_bfloat16_logits_would_fail():
    """What the bound is for: the dense loss on bfloat16 logits is far outside, ours inside."""
    result = compare(comparison_of(SMALL))
    assert result.passed
    assert result.peers["dense torch"] > 10 * result.bounds["hidden"]


@pytest.mark.parametrize("wrong", [reference.jensen_shannon(0.6), reference.reverse_kl, reference.hellinger])
def test_another_divergence_fails(monkeypatch, wrong):
    assert compare(APART).passed
    monkeypatch.setitem(DIVERGENCES, SMALL.divergence, Pair(DIVERGENCES[SMALL.divergence].jax, wrong))
    result = compare(APART)
    assert result.exception is None
    assert result.verdict == "FAIL"


def test_a_failing_row_sets_the_exit_status(monkeypatch, capsys):
    assert run(monkeypatch, [square(), square(factor=2.0)]) == 1
    output = capsys.readouterr().out
    assert ": 1 pass, 1 FAIL;" in output
    assert "FAIL square, plain, float32: loss 1.0e+00, the bound is 1e-05, x 1.0e+00, the bound is 2e-05" in output


def test_a_row_that_raises_fails_alone(monkeypatch, capsys, tmp_path):
    path = tmp_path / "parity.json"
    comparisons = [square(exception=RuntimeError("no such kernel")), square()]
    assert run(monkeypatch, comparisons, "--json", str(path)) == 1
    output = capsys.readouterr().out
    assert "FAIL square, plain, float32: RuntimeError: no such kernel" in output
    assert ": 1 pass, 1 FAIL;" in output
    rows = json.loads(path.read_text())["rows"]
    assert [row["exception"] for row in rows] == ["RuntimeError: no such kernel", None]


def test_an_implementation_that_refuses_every_row_has_not_passed(monkeypatch, capsys):
    refused = comparison_of(SMALL, implementation="triton")  # without a GPU
    assert run(monkeypatch, [refused]) == 1
    output = capsys.readouterr().out
    assert ": 1 refused;" in output
    assert '`implementation="triton"` cannot run here' in output
    assert run(monkeypatch, [refused, square()]) == 0
    assert ": 1 pass, 1 refused;" in capsys.readouterr().out


def test_another_error_of_the_same_type_is_no_refusal():
    assert compare(square(exception=ValueError("it cannot run here"))).verdict == "FAIL"


def test_a_gradient_that_is_not_finite_fails():
    result = Result(square(), errors={"loss": 0.0, "x": float("nan"), "y": 0.0})
    assert not result.passed
    assert not succeeded([result, Result(square(), errors={"loss": 0.0, "x": 0.0})])
    assert report([result], "cpu", None)["rows"][0]["errors"]["x"] is None
    assert result.worst_gradient != result.worst_gradient  # NaN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementation", "triton"], "--implementation triton: the kernel needs --device cuda"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: this PyTorch sees no CUDA GPU: install one that does, or use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU"),
        ),
    ],
)
def test_what_cannot_run_is_one_line_and_status_2(capsys, arguments, message):
    assert parity.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_line(capsys):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "torch_bridge.parity", "--device", "tpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "argument --device: invalid choice: 'tpu'" in result.stderr
    with pytest.raises(SystemExit, match="0"):
        parity.main(["--help"])
    assert "Exit status" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "triton", "xla"])
def test_parity_on_cuda(implementation, tmp_path):
    path = tmp_path / "parity.json"
    named = [] if implementation is None else ["--quick", "--implementation", implementation]
    assert parity.main(["--device", "cuda", "--json", str(path), *named]) == 0
    results = json.loads(path.read_text())
    assert results["implementation"] == implementation
    assert {row["verdict"] for row in results["rows"]} == {"pass"}
