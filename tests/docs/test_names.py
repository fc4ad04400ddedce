"""What README and docs name exists: functions and their arguments, files, headings; and the README fits on a page."""

import importlib
import inspect
import re

import pytest
from source_tree import PAGES, ROOT

IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")
# And the arguments of a call, if it is one. NAME stands for any.
NAME = re.compile(r"(?<![\w./-])((?:jaxkd|torch_bridge)(?:\.(?!NAME)\w+)+)(?:\(([^()]*))?")


def found(name):
    """What a dotted name stands for."""
    package, *parts = name.split(".")
    thing = importlib.import_module(package)
    for part in parts:
        if not hasattr(thing, part) and inspect.ismodule(thing):
            importlib.import_module(f"{thing.__name__}.{part}")  # a command, which nothing imports
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_names_exist(page):
    missing = []
    for name, arguments in NAME.findall(LINK.sub("", page.read_text())):
        if name.startswith("torch_bridge"):
            pytest.importorskip("torch")
        try:
            thing = found(name)
        except (AttributeError, ModuleNotFoundError):
            missing.append(name)
            continue
        if keywords := re.findall(r"(\w+)=(?!=)", arguments):
            known = inspect.signature(thing).parameters
            takes_any = any(x.kind == x.VAR_KEYWORD for x in known.values())
            missing += [f"{name}({x}=)" for x in keywords if not takes_any and x not in known]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(page.read_text()):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    assert not broken


def headings(page):
    """As a link has them: lower case, dashes for spaces, without punctuation."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 150
