"""The small Flax examples, a few steps of each with few words: they run to their end, and the student learns."""

import re

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")

from examples import align_dpo, train_embeddings, train_linen, train_nnx, your_own_loss
from examples.words import random_windows, read_words

FEW = {"VOCABULARY": 512, "LENGTH": 40, "HELD_OUT_WINDOWS": 8, "HELD_OUT_PAIRS": 32}


@pytest.fixture
def few_words(monkeypatch):
    for example in (align_dpo, train_linen, train_nnx, your_own_loss):
        for name, value in FEW.items():
            if hasattr(example, name):
                monkeypatch.setattr(example, name, value)


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("example", [train_nnx, train_linen])
def test_example(example, capsys):
    example.main(["--steps", "8"])
    output = capsys.readouterr().out
    teacher, before, after = (scores(output, name) for name in ("teacher", "student before", "student after"))
    assert teacher[1] == 0
    assert after[0] < before[0]
    assert after[1] < before[1]
    assert output.count("next-token loss") == 3, "a heading for the teacher, the student and the scores"


def scores(output, name):
    """The numbers in the last row of that name."""
    return [float(x.rstrip("%")) for x in re.findall(rf"^  {name}  +(.*)$", output, re.MULTILINE)[-1].split()]


@pytest.fixture(scope="module")
def passages():
    return train_embeddings.read_passages()


@pytest.mark.slow
def test_embeddings(tmp_path, capsys, passages, monkeypatch):
    assert passages.shape[1] == train_embeddings.PASSAGE
    assert len(np.unique(passages, axis=0)) == len(passages) > 10_000
    monkeypatch.setattr(train_embeddings, "read_passages", lambda: passages)
    plot = tmp_path / "plot.png"
    train_embeddings.main(["--steps", "4", "--batch", "2048", "--memory", "36", "--plot", str(plot)])
    output = capsys.readouterr().out
    assert scores(output, "dense similarities") == [48.0]
    found = [scores(output, size) for size in (64, 32, 16, 8)]
    assert sum(after for _, after in found) > sum(before for before, _ in found)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_embeddings_need_their_memory(tmp_path, passages, monkeypatch):
    monkeypatch.setattr(train_embeddings, "read_passages", lambda: passages)
    with pytest.raises(SystemExit):
        train_embeddings.main(["--batch", "256", "--memory", "0.1", "--plot", str(tmp_path / "plot.png")])


def test_words():
    train, held_out = read_words(vocabulary=500, held_out=1000)
    assert held_out.shape == (1000,)
    assert train.size > 50_000
    assert set(np.unique(held_out)) <= set(range(500))
    windows = random_windows(train, np.random.default_rng(0), count=3, length=10)
    assert windows.shape == (3, 11)
    text = np.asarray(train)
    assert all(any((text[i : i + 11] == row).all() for i in np.flatnonzero(text == row[0])) for row in windows)


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize(
    "loss", [pytest.param(loss, marks=() if loss == "dpo" else pytest.mark.slow) for loss in align_dpo.LOSSES]
)
def test_alignment(loss, capsys, tmp_path):
    align_dpo.main(["--loss", loss, "--steps", "8", "--plot", str(tmp_path / "align.png")])
    output = capsys.readouterr().out
    assert float(re.search(r"held-out pairs: .*margin (\S+) nats", output)[1]) > 0
    assert (tmp_path / "align.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("few_words")
def test_your_own_loss(tmp_path, capsys):
    your_own_loss.main(["--steps", "6", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    for name in ("forward KL", "decoupled KL"):
        before, after = (scores(output, f"{name}, {when}") for when in ("before", "after"))
        assert after[0] < before[0]
        assert after[1] < before[1]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_preference_pairs():
    """Same prompts, answers of many lengths; the chosen ones have the rarer words."""
    train, _ = read_words(align_dpo.VOCABULARY, held_out=1000)
    chosen, rejected = (np.asarray(x) for x in align_dpo.draw_pairs(train, np.random.default_rng(0), 50))
    prompt = slice(0, align_dpo.PROMPT)
    np.testing.assert_array_equal(chosen[:, prompt], rejected[:, prompt])
    assert len(np.unique((chosen == align_dpo.IGNORED).sum(1))) > 10

    def common(answers):
        return np.mean((answers[:, align_dpo.PROMPT :] > 0) & (answers[:, align_dpo.PROMPT :] < 10))

    assert common(chosen) < common(rejected)
