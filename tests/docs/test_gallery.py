"""The gallery shows every program of the examples, and no other."""

import re

from source_tree import ROOT


def test_every_program_is_shown():
    programs = {path.stem for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()}
    page = (ROOT / "docs" / "gallery.md").read_text()
    assert set(re.findall(r"python -m examples\.(\w+)", page)) == programs
    assert set(re.findall(r"^\| \[(\w+)\]\(#", page, flags=re.MULTILINE)) == programs
