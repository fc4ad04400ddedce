"""The repository's own files, read without running them: the pages, the modules, and what each of these imports."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("jaxkd", "torch_bridge", "examples", "tests")


@cache
def files() -> dict[str, Path]:
    """Each Python file by the name it is imported by: those of ``tests`` lie on the path themselves."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {_name(path): path for path in paths}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "tests":
        return path.stem
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(files()[module].read_text())


def imports(module: str, *, at_import=False) -> set[str]:
    """What ``module`` imports, each name as far as it names a module; ``at_import``: but for what functions import."""
    found = set()
    for node in _nodes(tree(module), into_functions=not at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = _package(module, node)
            found |= {name if (name := f"{package}.{alias.name}") in files() else package for alias in node.names}
    return found


def _nodes(node, into_functions):
    for child in ast.iter_child_nodes(node):
        if into_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _nodes(child, into_functions)


def _package(module: str, node: ast.ImportFrom) -> str:
    """The module that ``from`` names, a relative one included."""
    if not node.level:
        return node.module
    parts = module.split(".")
    if files()[module].stem != "__init__":
        parts = parts[:-1]
    parts = parts[: len(parts) - (node.level - 1)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def everything_imported(module: str) -> set[str]:
    """All that is imported when ``module`` is, parents of modules among it."""
    reached, waiting = set(), imports(module, at_import=True)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting |= {parent for parent in [name.rpartition(".")[0]] if parent}
            waiting |= imports(name, at_import=True) if name in files() else set()
    return reached
