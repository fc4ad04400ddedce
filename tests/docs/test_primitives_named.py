"""docs/own_loss.md names what each kernel is not known to have, as the kernels' own tests find it."""

import re
import runpy
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "own_loss.md").read_text()
LACKING = runpy.run_path(str(TESTS / "kernels" / "own_terms.py"))["LACKING"]
SPELLED = {"float power": "power", "power": "power", "exact gelu": "gelu"}  # the rest of what is said stands beside it


@pytest.mark.parametrize(("kernel", "title"), [("triton", "Triton"), ("mosaic", "Mosaic GPU")])
def test_what_a_kernel_lacks(kernel, title):
    (row,) = re.findall(rf"^\| {title} \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == {SPELLED.get(name, name) for name in LACKING[kernel]}
