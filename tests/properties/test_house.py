"""The rooms of the repository: arrows between them point downward, and names tell files apart."""

import ast
import re
from collections import Counter

import pytest
import source_tree

# From top to bottom: a module imports from lower lines and from its own room. What no line names is its package's.
ROOMS = [
    ["examples"],
    ["torch_bridge"],
    ["torch_bridge.benchmark", "torch_bridge.parity"],
    ["torch_bridge.reference", "torch_bridge.teachers"],
    ["torch_bridge.autograd"],
    ["torch_bridge.convert"],
    ["jaxkd"],
    ["jaxkd.preference", "jaxkd.embedding"],
    ["jaxkd.losses"],
    ["jaxkd.teachers"],
    ["jaxkd.kernels"],
    ["jaxkd.divergences"],
    ["jaxkd.loop"],
    ["jaxkd.logits"],
]
LINE = {room: line for line, rooms in enumerate(ROOMS) for room in rooms}
MODULES = [
    name for name, path in source_tree.files().items() if "tests" not in path.relative_to(source_tree.ROOT).parts
]
PACKAGES = [name for name in MODULES if source_tree.files()[name].stem == "__init__"]


def room(module):
    """The room with the longest name that ``module`` is in; none for what others wrote."""
    return max((x for x in LINE if module == x or module.startswith(f"{x}.")), key=len, default=None)


ARROWS = [
    (module, target)
    for module in MODULES
    for target in sorted(source_tree.imports(module))
    if room(target) is not None and target != module
]


def test_every_room_exists_and_every_folder_is_in_one():
    assert set(LINE) <= set(MODULES)
    folders = {name for name in PACKAGES if not name.startswith("examples")}
    assert folders <= set(LINE)


def test_arrows_point_downward():
    upward = [
        f"{module} imports {target}"
        for module, target in ARROWS
        if room(module) != room(target) and LINE[room(module)] >= LINE[room(target)]
    ]
    assert not upward, "\n".join(upward)


def test_no_cycle():
    graph = {module: {target for source, target in ARROWS if source == module} for module in MODULES}
    while free := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, {module: sorted(targets & graph.keys()) for module, targets in graph.items()}


@pytest.mark.parametrize("package", ["torch", "torch_bridge", "examples"])
def test_jaxkd_never_imports(package):
    guilty = [
        module
        for module in MODULES
        if module.split(".")[0] == "jaxkd" and any(x.split(".")[0] == package for x in source_tree.imports(module))
    ]
    assert not guilty


def test_no_two_files_share_a_name():
    names = Counter(path.name for folder in source_tree.FOLDERS for path in (source_tree.ROOT / folder).rglob("*.py"))
    shared = {name for name, count in names.items() if count > 1} - {"__init__.py", "__main__.py", "conftest.py"}
    assert not shared


def test_no_module_is_hidden_by_a_name_of_its_package():
    """``from jaxkd.mixture import mixture`` in ``jaxkd/__init__.py`` would hide the module ``jaxkd.mixture``."""
    hidden = [
        f"{package}.{name} is {target}"
        for package in PACKAGES
        for name, target in bound(package)
        if f"{package}.{name}" in MODULES and target != f"{package}.{name}"
    ]
    assert not hidden, "\n".join(hidden)


def bound(package):
    """(name, what it is) of each name that a package's `__init__` binds."""
    for node in source_tree.tree(package).body:
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, f"defined in {package}"
        elif isinstance(node, ast.Assign):
            yield from ((x.id, f"assigned in {package}") for x in node.targets if isinstance(x, ast.Name))


def test_every_room_says_what_it_is_for():
    silent = [name for name in PACKAGES if not ast.get_docstring(source_tree.tree(name))]
    assert not silent


def test_files_that_documents_name_exist():
    documents = [*source_tree.ROOT.glob("*.md"), *(source_tree.ROOT / "docs").rglob("*.md")]
    documents.remove(source_tree.ROOT / "CHANGELOG.md")  # which names what once was
    pattern = r"`((?:jaxkd|torch_bridge|tests|examples)/[\w/]+(?:\.py|/))`"
    named = [(document, name) for document in documents for name in re.findall(pattern, document.read_text())]
    assert named
    missing = [f"{document} names {name}" for document, name in named if not (source_tree.ROOT / name).exists()]
    assert not missing, "\n".join(missing)
