"""Every Python block of README.md and docs/, as it stands there: those of a page one after the other.

A block that cannot run has the reason in a comment right before it, `<!-- not run: ... -->`. A text block after one is
what it prints, its words to the letter and its numbers to a tenth, unless `<!-- varies: ... -->` stands before it.
"""

import importlib.util
import itertools
import re
import textwrap
from typing import NamedTuple

import pytest
from source_tree import PAGES, ROOT

FENCE = re.compile(
    r"(?:^ *<!-- (?P<comment>(?:(?!-->).)*) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?")
OPTIONAL = {"equinox", "flax", "matplotlib", "optax", "orbax", "torch", "transformers"}  # of the extras


class Block(NamedTuple):
    language: str
    code: str
    comment: str
    line: int


def blocks(page):
    text = page.read_text()
    return [
        Block(
            language=match["language"],
            code=textwrap.dedent(match["code"]),
            comment=match["comment"] or "",
            line=text.count("\n", 0, match.start("code")) + 1,
        )
        for match in FENCE.finditer(text)
    ]


def same_output(printed, shown):
    """Whether words are the same, and numbers nearly."""
    texts = [[line.split() for line in NUMBER.sub("#", text).strip().splitlines()] for text in (printed, shown)]
    numbers = [[float(x.replace(",", "")) for x in NUMBER.findall(text)] for text in (printed, shown)]
    return texts[0] == texts[1] and numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=1e-5)


WITH_BLOCKS = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block, following in itertools.pairwise([*blocks(page), None]):
        if block.language != "python" or block.comment.startswith("not run: "):
            continue
        code = "\n" * (block.line - 1) + block.code  # so that an error names the page's own line
        try:
            exec(compile(code, page, "exec"), namespace)
        except ModuleNotFoundError as error:
            if error.name.split(".")[0] in OPTIONAL and importlib.util.find_spec(error.name.split(".")[0]) is None:
                pytest.skip(f"{error.name} is not installed")
            raise
        printed = capsys.readouterr().out
        if printed and following and following.language == "text" and not following.comment.startswith("varies: "):
            what = f"line {following.line} shows\n{following.code}\nand this is printed:\n{printed}"
            assert same_output(printed, following.code), what


@pytest.mark.parametrize(
    ("printed", "shown", "is_same"),
    [
        ("loss 1.234, 12 rows\n", "loss 1.235, 12 rows", True),
        ("loss 1.234, 12 rows\n", "loss 1.534, 12 rows", False),
        ("loss 1.234, 12 rows\n", "cost 1.234, 12 rows", False),
        ("{'soft': 2e-07}", "{'soft': 0.0}", True),
        ("1,024 rows", "2,048 rows", False),
    ],
)
def test_what_is_the_same_output(printed, shown, is_same):
    assert same_output(printed, shown) is is_same


PAGE = """
<!-- not run: needs keras -->
```python
x = 1
```

* in a list

  ```python
  y = 2
  ```

```text
2
```
"""


def test_what_a_block_is():
    assert [(m["comment"], m["language"], textwrap.dedent(m["code"])) for m in FENCE.finditer(PAGE)] == [
        ("not run: needs keras", "python", "x = 1\n"),
        (None, "python", "y = 2\n"),
        (None, "text", "2\n"),
    ]
