"""The comparison of divergences at a tiny size, and its tables."""

import json

import pytest
from smollm2_cases import interrupt_after, records, save_tiny_teacher

from examples import which_divergence
from examples.smollm2 import flags, spread, text

STEPS = 8
ARMS = ("cross_entropy", "reverse_kl", "on_policy")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was stopped by Ctrl-C in its third student, and resumed."""
    folder = save_tiny_teacher(tmp_path_factory.mktemp("teacher"))
    out = folder / "run"
    paths = f"--teacher {folder} --text {folder / 'text.txt'} --cache {folder / 'cache'} --device cpu --out {out}"
    sizes = f"--steps {STEPS} --student-layers 2 --batch-size 2 --seq-len 12 --prompt-len 4 --learning-rate 0.01"
    often = "--held-out-windows 4 --train-windows 12 --eval-every 2 --checkpoint-every 8 --seeds 2"
    command = f"{paths} {sizes} {often} --arms {' '.join(ARMS)}".split()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2 * STEPS + 1, patch)
        assert which_divergence.main(command) == 130
    assert which_divergence.main([*command, "--resume"]) == 0
    return out


@pytest.mark.slow
def test_every_student_is_trained_and_scored(run):
    results = json.loads((run / "scores.json").read_text())
    untrained, *trained = results["students"]
    assert [(x["layers"], x["arm"], x["seed"]) for x in trained] == [(2, arm, seed) for arm in ARMS for seed in (0, 1)]
    assert len(records(run, "train")) == len(trained) * STEPS
    learned = {"cross_entropy": "next_token_loss", "reverse_kl": "jsd", "on_policy": "sampled_kl"}
    for student in trained:
        assert student[learned[student["arm"]]] < untrained[learned[student["arm"]]]
    assert trained[0]["jsd"] != trained[1]["jsd"]
    assert (run / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_batches_are_the_students_own_after_the_warm_up(run):
    rows = {r["step"]: r["num_rows"] for r in records(run, "train") if r["model"] == "2 layers, on_policy, seed 0"}
    assert all(rows[step] == 2 * 12 for step in (1, 2, 3, 4, 5, 7))
    assert all(rows[step] <= 2 * (12 + 1 - 4) for step in (6, 8))


def test_mean_and_spread_by_hand():
    assert spread.mean_and_spread("next_token_loss", [1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert spread.mean_and_spread("agreement", [0.5]) == "50.0%"


def test_standard_library_has_no_tests():
    files = text.standard_library()
    assert any(file.name == "argparse.py" for file in files)
    assert not any("site-packages" in file.parts or "test" in file.parts[-2:] for file in files)


def test_bad_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as raised:
        flags.parse_which_divergence(["--arms", "kl"])
    assert raised.value.code == 2
    assert "argument --arms: invalid choice: 'kl'" in capsys.readouterr().err
