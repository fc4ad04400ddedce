"""`python -m torch_bridge.benchmark`: that it measures what it says, and goes on when a contender fails."""

import json

import pytest
import torch

from torch_bridge.benchmark import __main__ as benchmark
from torch_bridge.benchmark import contenders
from torch_bridge.benchmark.contenders import (
    DIVERGENCES,
    IGNORE_INDEX,
    Outputs,
    Prepared,
    Shape,
    exact_outputs,
    make_batch,
)
from torch_bridge.benchmark.measurements import Result, floor_of, of_full, picture, ratio, report, table

SMALL = Shape(8, 12, 64)
GRADIENTS = ("hidden", "weight")


def by_name(results):
    return {(result["task"], result["contender"]): result for result in results}


def test_quick_run_measures_every_task_and_writes_its_results(tmp_path, capsys):
    folder = tmp_path / "new"
    assert benchmark.main(["--quick", "--device", "cpu", "--repeats", "3", "--out", str(folder)]) == 0
    output = capsys.readouterr().out
    content = json.loads((folder / "benchmark.json").read_text())
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert content["device"] == "cpu"
    (shape,) = content["shapes"].values()
    results = by_name(shape["results"])
    for (task, contender), result in results.items():
        assert not result["failure"]
        assert len(result["times"]) == (4 if task == "products" else 3)
        assert contender in output
        assert f"{result['median'] * 1e3:.1f}" in output
    assert results["products", "four products"]["of_products"] == 1
    assert results["JSD", "JAX dense, jit"]["memory"] > results["JSD", "jaxkd xla"]["gradient_bytes"]

    tasks = {task for task, contender in results if contender == "jaxkd xla"}
    assert tasks == set(contenders.TASKS)
    for task in tasks:
        errors = results[task, "jaxkd xla"]["errors"]
        assert errors.keys() == {"loss", *contenders.TASKS[task].wanted}
        assert errors.pop("loss") < 1e-4
        assert all(1e-4 < error < 5e-3 for error in errors.values())
    rounded = results["JSD", "torch eager"]["errors"]  # bfloat16 logits, 2 % apart
    assert all(rounded[name] > 0.1 for name in GRADIENTS)


def test_a_contender_that_fails_stops_nothing(monkeypatch, capsys):
    def unfit(batch, task):
        raise ValueError("no such [kernel]\nsecond line")

    runs = []

    def exhausted(batch, task):
        def run():
            runs.append(task)
            if len(runs) > 5:
                raise MemoryError("none left")
            return Outputs(torch.tensor(1.0), {})

        return Prepared(run, 1234)

    every = contenders.contenders(SMALL, 16, "cpu", compiled=False)
    chosen = {"unfit": unfit, "exhausted": exhausted, "torch eager": every["torch eager"]}
    monkeypatch.setattr(benchmark, "contenders", lambda *_: chosen)
    lines = []
    settings = benchmark.Settings("cpu", rows=16, repeats=4, seconds=60, compiled=False, only=[], tasks=["JSD"])
    results = {r.contender: r for r in benchmark.measure(SMALL, settings, lines.append)}
    assert results["unfit"].failure == "ValueError: no such [kernel]"
    assert results["unfit"].times == []
    assert results["exhausted"].failure == "MemoryError: none left"
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
    settings = benchmark.Settings("cpu", rows=16, repeats=9, seconds=1.0, compiled=False, only=[], tasks=["JSD"])
    assert benchmark._has_another_run(Result("JSD", "slow", times=[2.0, 2.0]), settings)
    assert not benchmark._has_another_run(Result("JSD", "slow", times=[2.0, 2.0, 2.0]), settings)
    assert benchmark._has_another_run(Result("JSD", "quick", times=[0.1] * 8), settings)
    assert benchmark._has_another_run(Result("products", "four products", times=[2.0] * 8), settings)


def test_ratios_by_hand():
    jsd = Result("JSD", "jaxkd", [0.06, 0.05, 0.09], memory=700, gradient_bytes=300)
    alone, frozen = Result("JSD, loss alone", "jaxkd", [0.03]), Result("JSD, frozen head", "jaxkd", [0.045])
    other = Result("JSD, frozen head", "other", [0.045])
    products = [Result("products", "four products", [0.04, 0.08, 0.04]), Result("products", "two products", [0.02])]
    results = [*products, jsd, alone, frozen, other]
    assert jsd.workspace == 400
    assert [ratio(r.median, floor_of(results, r.task)) for r in (jsd, alone, frozen)] == pytest.approx(
        [1.5, 1.5, 1.125]
    )
    assert of_full(results, alone) == pytest.approx(0.5)
    assert of_full(results, frozen) == pytest.approx(0.75)
    assert of_full(results, jsd) is None
    assert of_full(results, other) is None


@pytest.mark.parametrize("shape", [Shape(8, 12, 640), Shape(12, 8, 640), Shape(8, 8, 640)])
def test_teacher_is_near_the_student_whatever_their_sizes(shape):
    batch = make_batch(shape, 64, "cpu")
    hidden, weight, teacher_hidden, teacher_weight = (x.float() for x in batch.arrays.values())
    assert (hidden.shape, weight.shape) == ((64, shape.hidden), (640, shape.hidden))
    assert (teacher_hidden.shape, teacher_weight.shape) == ((64, shape.teacher_hidden), (640, shape.teacher_hidden))
    logits = hidden @ weight.T
    gap = (teacher_hidden @ teacher_weight.T - logits).norm() / logits.norm()
    assert 0.018 < gap < 0.024  # 2 %, and the rounding to bfloat16
    assert (batch.labels == IGNORE_INDEX).sum() == 32
    assert ((batch.labels >= 0) & (batch.labels < 640)).sum() == 32


@pytest.mark.parametrize("ignored", [False, True])
def test_truth_does_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch, ignored):
    batch = make_batch(SMALL, 21, "cpu")
    whole = exact_outputs(batch, "JSD", ignored)
    monkeypatch.setattr(contenders, "EXACT_LOGITS", 5 * SMALL.vocabulary)
    parts = exact_outputs(batch, "JSD", ignored)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    for name in GRADIENTS:
        torch.testing.assert_close(parts.gradients[name], whole.gradients[name])


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_plain_divergences_are_those_of_the_reference(name):
    log_p, log_q = torch.randn(2, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(
        -1
    )
    torch.testing.assert_close(DIVERGENCES[name].plain(torch, log_p, log_q), DIVERGENCES[name].exact(log_p, log_q))


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
    for (_, contender), result in results.items():
        if contender.startswith("jaxkd") or contender in benchmark.FLOORS:
            assert not result["failure"]
            assert result["memory"] >= result["gradient_bytes"]
            assert all(error < 5e-3 for error in result["errors"].values())
