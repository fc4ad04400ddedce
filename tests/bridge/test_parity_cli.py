"""`python -m torch_bridge.parity`: what it reports, and that it can fail."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import torch

from torch_bridge import parity, reference
from torch_bridge.cases import DIVERGENCES, Case, Pair, Shape
from torch_bridge.comparison import Comparison

SMALL = Case("jensen_shannon(0.5)", Shape(9, 8, 8, 21, 21), "bfloat16", chunk_size=4, gap=0.02)


@pytest.fixture
def only_small(monkeypatch):
    monkeypatch.setattr(parity, "pairwise_cases", lambda: [SMALL])
    monkeypatch.setattr(parity, "converging_cases", list)
    monkeypatch.setattr(parity, "FAMILIES", ())


def test_quick_run_passes_and_writes_its_results(tmp_path, capsys):
    path = tmp_path / "parity.json"
    assert parity.main(["--quick", "--json", str(path)]) == 0
    output = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["passed"]
    assert results["device"] == "cpu"
    count = len(results["rows"])
    assert f": {count} pass; worst gradient errors" in output
    others = results["others"]
    assert f"{len(others)} rows of other losses: {len(others)} pass, 0 FAIL" in output
    assert {"preference", "embedding", "distillation"} <= {x["family"] for x in others}
    assert all(x["loss"] in output and len(x["errors"]) > 1 for x in others)
    assert output.count(" pass ") == count + len(others)
    for row in results["rows"]:
        assert {"loss", "hidden", "weight"} <= row["errors"].keys() == row["bounds"].keys()
        assert row["divergence"] in output
    assert {row["dtype"] for row in results["rows"]} == {"float32", "bfloat16", "float16"}


def test_near_convergence_bfloat16_logits_would_fail():
    """What the bound is for: the dense loss on bfloat16 logits is far outside, ours inside."""
    row = parity.measure(SMALL)
    assert row.passed
    assert row.peers["dense torch"] > 10 * row.bounds["hidden"]


@pytest.mark.parametrize("wrong", [reference.jensen_shannon(0.6), reference.reverse_kl, reference.hellinger])
def test_another_divergence_fails(monkeypatch, wrong):
    monkeypatch.setitem(DIVERGENCES, SMALL.divergence, Pair(DIVERGENCES[SMALL.divergence].jax, wrong))
    apart = replace(SMALL, gap=None)  # near convergence all of these are the same quadratic form, up to a factor
    assert not parity.measure(apart).passed


def test_a_failing_row_sets_the_exit_status(monkeypatch, capsys, only_small):
    monkeypatch.setitem(DIVERGENCES, SMALL.divergence, Pair(DIVERGENCES[SMALL.divergence].jax, reference.forward_kl))
    assert parity.main([]) == 1
    output = capsys.readouterr().out
    assert "FAIL" in output
    assert ": 1 FAIL;" in output


def test_a_row_that_raises_fails_alone(monkeypatch, capsys, tmp_path, only_small):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(parity.jaxkd, "distillation_loss", broken)
    path = tmp_path / "parity.json"
    assert parity.main(["--json", str(path)]) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][0]["exception"] == "RuntimeError: no such kernel"


@pytest.mark.parametrize("fault", [2.0, None])
def test_another_loss_that_fails_sets_the_exit_status(monkeypatch, capsys, only_small, fault):
    def of_jax(inputs):
        if fault is None:
            raise RuntimeError("no such loss")
        return fault * jnp.sum(inputs["x"] ** 2), {}

    comparison = Comparison("family", "square", "plain", {"x": torch.ones(3)}, of_jax, lambda x: torch.sum(x["x"] ** 2))
    monkeypatch.setattr(parity, "FAMILIES", (SimpleNamespace(comparisons=lambda device: [comparison]),))
    assert parity.main([]) == 1
    output = capsys.readouterr().out
    assert "1 rows of other losses: 0 pass, 1 FAIL" in output
    assert fault is not None or "no such loss" in output
    assert parity.main(["--implementation", "xla"]) == 0  # these losses take no implementation


def test_an_implementation_that_refuses_every_row_has_not_passed(monkeypatch, capsys, only_small):
    def refuse(*args, **kwargs):
        raise ValueError('`implementation="mosaic"` cannot run here: V=21 is no multiple of 32')

    monkeypatch.setattr(parity.jaxkd, "distillation_loss", refuse)
    assert parity.main([]) == 1
    output = capsys.readouterr().out
    assert ": 1 refused;" in output
    assert "V=21 is no multiple of 32" in output
    refused, passed = parity.Row(SMALL, exception="x", refused=True), parity.Row(SMALL, errors={"loss": 0.0})
    assert parity.succeeded([refused, passed])


def test_a_gradient_that_is_not_finite_fails():
    row = parity.Row(SMALL, errors={"loss": 0.0, "hidden": float("nan")})
    assert not row.passed
    assert parity.report([row], [], "cpu", None)["rows"][0]["errors"]["hidden"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementation", "triton"], "--implementation triton: the kernel needs --device cuda"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: this PyTorch sees no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU"),
        ),
    ],
)
def test_what_cannot_run_is_one_line_and_status_2(capsys, arguments, message):
    assert parity.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_line():
    command = [sys.executable, "-m", "torch_bridge.parity"]
    result = subprocess.run([*command, "--device", "tpu"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "--device" in result.stderr
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert "Exit status" in result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "triton", "xla"])
def test_parity_on_cuda(implementation, tmp_path):
    path = tmp_path / "parity.json"
    named = [] if implementation is None else ["--quick", "--implementation", implementation]
    assert parity.main(["--device", "cuda", "--json", str(path), *named]) == 0
    results = json.loads(path.read_text())
    assert results["implementation"] == implementation
    assert {row["verdict"] for row in results["rows"]} == {"pass"}
