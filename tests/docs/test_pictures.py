"""The pictures of the documentation can be drawn again, and each is in its folder."""

import re

import pytest
from source_tree import PAGES

pytest.importorskip("matplotlib")

from examples import pictures


def draw(name, folder):
    pictures.main([name, "--out", str(folder)])
    assert (folder / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["training_step", "time_against_vocabulary", "scaling", "which_divergence"])
def test_drawn_again(name, tmp_path):
    draw(name, tmp_path)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["memory_against_rows", "gradient_error", "divergences"])
def test_computed_again(name, tmp_path):
    draw(name, tmp_path)


def test_an_unknown_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pictures.main(["portrait", "--out", str(tmp_path)])
    assert "no picture is named portrait" in capsys.readouterr().err


def test_every_picture_is_there():
    """Those that are drawn, and those that a page shows."""
    there = {path.name for path in pictures.FOLDER.iterdir()}
    assert {f"{name}.png" for name in pictures.PICTURES} <= there
    shown = {name for page in PAGES for name in re.findall(r"pictures/([\w.-]+)\)", page.read_text())}
    assert shown <= there
