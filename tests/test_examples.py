"""The small Flax examples, a few steps of each: they run as they stand, and the student learns."""

import re

import numpy as np
import pytest

pytest.importorskip("flax")

from examples import train_linen, train_nnx
from examples.words import random_windows, read_words


@pytest.mark.parametrize("example", [train_nnx, train_linen])
def test_example(example, capsys):
    example.main(["--steps", "8"])
    output = capsys.readouterr().out
    before, after = (
        [float(x) for x in re.search(rf"held out, {when}: JSD (\S+), next-token loss (\S+)", output).groups()]
        for when in ("before", "after")
    )
    assert after[0] < before[0]
    assert after[1] < before[1]
    assert "student    8" in output


def test_words():
    train, held_out = read_words(vocabulary=500, held_out=1000)
    assert held_out.shape == (1000,)
    assert train.size > 50_000
    assert set(np.unique(held_out)) <= set(range(500))
    windows = random_windows(train, np.random.default_rng(0), count=3, length=10)
    assert windows.shape == (3, 11)
    text = np.asarray(train)
    assert all(any((text[i : i + 11] == row).all() for i in np.flatnonzero(text == row[0])) for row in windows)
