"""`python -m torch_bridge.benchmark`: that it measures what it says, and goes on when a contender fails."""

import json

import pytest
import torch

from torch_bridge.benchmark import __main__ as benchmark
from torch_bridge.benchmark import measuring
from torch_bridge.benchmark.batches import Shape
from torch_bridge.benchmark.contenders import contenders
from torch_bridge.benchmark.measurements import Case, Result, floor_of, of_whole, ratio, report
from torch_bridge.benchmark.preparing import Prepared
from torch_bridge.benchmark.tables import picture, rows_table, table
from torch_bridge.benchmark.tasks import FLOORS, ONE_HEAD, TASKS, Outputs

SMALL = Case(Shape(8, 12, 64), 16)
GRADIENTS = ("hidden", "weight")
WHOLE = [name for name, task in TASKS.items() if not task.part_of]
SETTINGS = measuring.Settings("cpu", repeats=4, seconds=60, compiled=False, only=[], tasks=["JSD"])


def by_name(results):
    return {(result["task"], result["contender"]): result for result in results}


def test_quick_run_measures_every_task_and_writes_its_results(tmp_path, capsys):
    folder = tmp_path / "new"
    only = ["jaxkd xla", "exact logits", "eager"]
    arguments = ["--quick", "--device", "cpu", "--repeats", "3", "--only", *only, "--out", str(folder)]
    assert benchmark.main(arguments) == 0
    output = capsys.readouterr().out
    content = json.loads((folder / "benchmark.json").read_text())
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert content["device"] == "cpu"
    (shape,) = content["shapes"].values()
    assert shape["rows"] == 64
    results = by_name(shape["results"])
    for (task, contender), result in results.items():
        assert not result["failure"]
        assert len(result["times"]) == (4 if task == "products" else 3)
        assert contender in output
    for floor in FLOORS:
        assert results["products", floor]["of_products"] == 1
    jsd = results["JSD", "jaxkd xla"]
    near = [jsd["median"] * 1e3 + off for off in (-0.05, 0, 0.05)]  # what is written has four digits
    assert any(f"{x:.1f}" in output for x in near)
    assert results["JSD", "JAX dense, exact logits"]["memory"] > jsd["gradient_bytes"]

    assert {task for task, contender in results if contender == "jaxkd xla"} == set(TASKS)
    for contender in ("JAX dense, exact logits", "torch eager"):
        assert {task for task, name in results if name == contender} == set(WHOLE)
    for (task, contender), result in results.items():
        if task == "products":
            continue
        errors = result["errors"]
        assert errors.keys() == {"loss", *TASKS[task].wanted}
        if contender != "torch eager":
            assert errors.pop("loss") < 1e-4
            assert all(1e-4 < error < 5e-3 for error in errors.values())
        elif task in ONE_HEAD:  # rounded logits, whose gradient is one of labels
            assert all(1e-3 < errors[name] < 2e-2 for name in GRADIENTS)
        else:  # and of two models that are 2 % apart
            assert all(0.05 < errors[name] < 1 for name in GRADIENTS)


def test_several_numbers_of_rows_are_measured_in_one_run(tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--repeats", "1", "--tasks", "cross-entropy", "--only", "eager"]
    assert benchmark.main([*arguments, "--rows", "8", "16", "--shapes", "8/12/64", "--out", str(tmp_path)]) == 0
    shapes = json.loads((tmp_path / "benchmark.json").read_text())["shapes"]
    assert {name: found["rows"] for name, found in shapes.items()} == {"8/12/64, 8 rows": 8, "8/12/64, 16 rows": 16}
    assert [r["contender"] for r in shapes["8/12/64, 8 rows"]["results"]] == ["three products", "torch eager"]
    assert not (tmp_path / "benchmark.png").exists()  # which is of the JSD
    assert "milliseconds (workspace in GiB) by rows" in capsys.readouterr().out


def test_rows_side_by_side(capsys):
    cases = {"a": Case(Shape(1, 2, 3), 8), "b": Case(Shape(1, 2, 3), 16)}
    fast = [Result("JSD", "jaxkd", [t], memory=3 * 2**30, gradient_bytes=2**30) for t in (0.001, 0.0024)]
    full = Result("JSD", "dense", failure="out of memory")
    benchmark.Console(width=200).print(rows_table(cases, {"a": [fast[0]], "b": [fast[1], full]}))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "1 / 2 / 3 JSD jaxkd 1.00 (2.00) 2.40 (2.00)" in lines
    assert "1 / 2 / 3 JSD dense out of memory" in lines


def test_a_contender_that_fails_stops_nothing(monkeypatch, capsys):
    def unfit(batch, task):
        raise ValueError("no such [kernel]\nsecond line")

    runs = []

    def exhausted(batch, task):
        def run():
            runs.append(task)
            if len(runs) > 5:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
            return Outputs(torch.tensor(1.0), {})

        return Prepared(run, 1234)

    every = contenders("divergence", *SMALL, "cpu", compiled=False)
    chosen = {"unfit": unfit, "exhausted": exhausted, "torch eager": every["torch eager"]}
    monkeypatch.setattr(measuring, "contenders", lambda *_: chosen)
    lines = []
    results = {r.contender: r for r in measuring.measure(SMALL, SETTINGS, lines.append)}
    assert results["unfit"].failure == "ValueError: no such [kernel]"
    assert results["unfit"].times == []
    assert results["exhausted"].failure == "out of memory"
    assert len(results["exhausted"].times) == 1  # after the one for its memory, the two of round 0 and one before it
    assert results["exhausted"].memory == 1234
    assert len(results["torch eager"].times) == 4
    assert len(results["four products"].times) == 5
    assert any("no such [kernel]" in line for line in lines)
    benchmark.Console(width=200).print(table("title", list(results.values())))
    assert "ValueError: no such [kernel]" in capsys.readouterr().out
    values = by_name(report({"s": SMALL}, {"s": list(results.values())})["shapes"]["s"]["results"])
    assert values["JSD", "unfit"]["of_products"] is None


def test_the_time_of_slow_contenders_is_limited():
    assert measuring.has_another_run(Result("JSD", "slow", times=[2.0, 2.0]), seconds=1)
    assert not measuring.has_another_run(Result("JSD", "slow", times=[2.0, 2.0, 2.0]), seconds=1)
    assert measuring.has_another_run(Result("JSD", "quick", times=[0.1] * 8), seconds=1)
    assert measuring.has_another_run(Result("products", "four products", times=[2.0] * 8), seconds=1)


def test_ratios_by_hand():
    jsd = Result("JSD", "jaxkd", [0.06, 0.05, 0.09], memory=700, gradient_bytes=300)
    alone, frozen = Result("JSD, loss alone", "jaxkd", [0.03]), Result("JSD, frozen head", "jaxkd", [0.045])
    labels = Result("cross-entropy", "jaxkd", [0.045])
    half = Result("cross-entropy, half of the rows ignored", "jaxkd", [0.027])
    other = Result("JSD, frozen head", "other", [0.045])
    times = {"four products": [0.04, 0.08, 0.04], "three products": [0.03], "two products": [0.02]}
    products = [Result("products", name, found) for name, found in times.items()]
    results = [*products, jsd, alone, frozen, labels, half, other]
    assert jsd.workspace == 400
    measured = (jsd, alone, frozen, labels, half, products[1])
    assert [ratio(r.median, floor_of(results, r)) for r in measured] == pytest.approx([1.5, 1.5, 1.125, 1.5, 0.9, 1])
    assert of_whole(results, alone) == pytest.approx(0.5)
    assert of_whole(results, frozen) == pytest.approx(0.75)
    assert of_whole(results, half) == pytest.approx(0.6)
    assert [of_whole(results, r) for r in (jsd, labels, other, products[0])] == [None] * 4


def test_picture_leaves_out_chunk_sizes_and_what_has_no_times():
    def found():
        products = [Result("products", "four products", [1.0]), Result("products", "two products", [0.5])]
        names = ("jaxkd xla", "jaxkd xla, chunk 1024", "Liger chunked, chunk 1024")
        good = [Result("JSD", name, [2.0], memory=2**30, errors={"loss": 9.0, "hidden": 0.1}) for name in names]
        return [
            *products,
            *good,
            Result("JSD", "broken", failure="MemoryError"),
            Result("forward KL", "jaxkd xla", [1.0]),
        ]

    time, memory, error = picture("title", {"a": found(), "b": found()}).axes
    assert [label.get_text() for label in time.get_yticklabels()] == [
        "jaxkd xla",
        "Liger chunked, chunk 1024",
        "broken",
    ]
    assert [bar.get_width() for bar in time.patches] == [2.0] * 4
    assert [bar.get_width() for bar in memory.patches] == [1.0] * 4
    assert [bar.get_width() for bar in error.patches] == [0.1] * 4


def test_shapes_by_name_or_by_sizes(capsys):
    assert benchmark.parse_shapes(["S2", "3/4/5"]) == {"S2": Shape(1024, 4096, 151936), "3/4/5": Shape(3, 4, 5)}
    for wrong in ("S9", "3/4", "3/0/5", "3/4/x"):
        assert benchmark.main(["--device", "cpu", "--shapes", wrong]) == 2
        error = capsys.readouterr().err
        assert f"--shapes {wrong}: give names of S1" in error
    with pytest.raises(SystemExit):
        benchmark.main(["--rows", "0"])


@pytest.mark.gpu
def test_quick_run_on_cuda(tmp_path):
    assert benchmark.main(["--quick", "--device", "cuda", "--shapes", "256/384/32000", "--out", str(tmp_path)]) == 0
    (shape,) = json.loads((tmp_path / "benchmark.json").read_text())["shapes"].values()
    results = by_name(shape["results"])
    assert ("JSD", "jaxkd triton") in results
    for (task, contender), result in results.items():
        is_ours = contender.startswith("jaxkd") or contender in FLOORS
        if is_ours:
            assert not result["failure"]
            assert result["memory"] >= result["gradient_bytes"]
        if not result["failure"]:
            is_exact = is_ours or "exact" in contender or "Liger fused" in contender or "TRL" in contender
            largest = 2e-2 if not is_ours and task != "products" and TASKS[task].kind in ONE_HEAD else 5e-3
            assert all(error < (largest if is_exact else 1) for error in result["errors"].values())
