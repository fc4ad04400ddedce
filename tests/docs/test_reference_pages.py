"""Every public name has its entry in docs/reference/, and every entry names something. PyTorch is not imported."""

import ast
import importlib
import re
from collections import Counter

import source_tree

PAGES = [page for page in source_tree.PAGES if page.parent.name == "reference"]
ENTRIES = Counter(name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE))
PACKAGES = ("jaxkd", "jaxkd.preference", "jaxkd.embedding", "torch_bridge")


def public_names():
    for package in PACKAGES:
        (names,) = (
            ast.literal_eval(node.value)
            for node in source_tree.tree(package).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        yield from (f"{package}.{name}" for name in names)


def test_every_public_name_has_an_entry():
    public = set(public_names()) - set(PACKAGES)
    assert len(public) > 100
    assert not public - ENTRIES.keys(), "add `::: NAME` to a page of docs/reference/"


def test_every_entry_names_something():
    for entry in ENTRIES.keys() - set(public_names()):
        module, _, name = entry.rpartition(".")
        assert hasattr(importlib.import_module(module), name), entry


def test_no_entry_comes_twice():
    assert [name for name, count in ENTRIES.items() if count > 1] == []
