"""For the reference pages: a docstring's doctests as code, and the names in it that have an entry as links."""

import re
from pathlib import Path

import griffe

PAGES = Path(__file__).parent / "reference"
ENTRIES = {name for page in PAGES.glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)}
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
NAME = re.compile(r"(?<!`)`([\w.]+)`(?!`)")


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is None:
            return
        package = ".".join(obj.path.split(".")[:2])  # jaxkd.preference, say

        def link(match: re.Match[str]) -> str:
            names = [prefix + match[1] for prefix in ("", "jaxkd.", f"{package}.")]
            return next((f"[{match[0]}][{name}]" for name in names if name in ENTRIES), match[0])

        text = NAME.sub(link, obj.docstring.value)
        obj.docstring.value = DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text)
