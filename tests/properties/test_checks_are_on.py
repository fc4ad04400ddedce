"""Lists of names that pytest and setuptools are given: a stale one would switch a check off, or leave a file out."""

import fnmatch
import importlib
import tomllib
from collections import namedtuple

import conftest
import jax.numpy as jnp
import pytest
import source_tree
from jaxtyping import TypeCheckError

import jaxkd
from jaxkd.logits import low_rank

PROJECT = tomllib.loads((source_tree.ROOT / "pyproject.toml").read_text())
TEST_FILES = {
    name: path for name, path in source_tree.files().items() if path.is_relative_to(source_tree.ROOT / "tests")
}


def test_shapes_are_checked_in_every_module_listed(request):
    *modules, checker = request.config.getoption("jaxtyping_packages").split(",")
    assert modules
    assert checker == "beartype.beartype"
    for name in modules:
        loader = type(importlib.import_module(name).__spec__.loader)
        assert loader.__module__.startswith("jaxtyping"), f"{name} was imported by {loader}"


def test_wrong_shapes_are_errors():
    """Of a function, of one that a function makes, of a result."""
    with pytest.raises(TypeCheckError, match=r"parameters of .*low_rank_product"):
        low_rank.low_rank_product(jnp.ones((2, 3)), jnp.ones((4, 1)), jnp.ones((1, 5)), jnp.dtype(jnp.float32))
    _, pullback = jaxkd.LinearLogits(jnp.ones((2, 3)), jnp.ones((5, 3)), scale=2.0).logits_and_pullback()
    with pytest.raises(TypeCheckError, match=r"parameters of .*locals.*pullback"):
        pullback(jnp.ones(5), frozenset({"hidden"}))
    with pytest.raises(TypeCheckError, match="return value"):
        jaxkd.Logits(jnp.ones((2, 3, 4))).logits()


@pytest.mark.parametrize("top", ["jaxkd", "torch_bridge"])
def test_every_package_is_installed(top):
    listed = {name for name in PROJECT["tool"]["setuptools"]["packages"] if name.split(".")[0] == top}
    folders = {".".join(path.parent.relative_to(source_tree.ROOT).parts) for path in folder_inits(top)}
    assert listed == folders


def folder_inits(top):
    return (source_tree.ROOT / top).rglob("__init__.py")


def test_packages_installed_exist():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) <= set(source_tree.files())


def left_out_without_torch(path):
    """As pytest matches ``collect_ignore_glob``."""
    return [x for x in conftest.NEEDS_TORCH if fnmatch.fnmatch(str(path), str(source_tree.ROOT / "tests" / x))]


def test_what_is_left_out_without_torch_is_what_imports_it():
    needs = {
        name
        for name in TEST_FILES
        if "torch" in source_tree.everything_imported(name) | {x.split(".")[0] for x in source_tree.imports(name)}
    }
    left_out = {name for name, path in TEST_FILES.items() if left_out_without_torch(path)}
    assert needs <= left_out
    assert {name for name in left_out if name.startswith("test_")} <= needs


@pytest.mark.parametrize("pattern", conftest.NEEDS_TORCH)
def test_patterns_of_what_is_left_out_match(pattern):
    assert any(pattern in left_out_without_torch(path) for path in TEST_FILES.values())


@pytest.mark.parametrize("num_cases", [1, 5, 6, 40])
def test_every_test_is_run_with_some_of_its_cases(num_cases):
    names = [f"tests/test_{i}.py::test" for i in range(100)]
    Case = namedtuple("Case", "nodeid")
    items = [Case(f"{name}[{case}]") for name in names for case in range(num_cases)]
    left_out = {item.nodeid for item in conftest._other_cases([*items], 6)}
    run = [item.nodeid.rstrip("]").split("[") for item in items if item.nodeid not in left_out]
    assert {name for name, _ in run} == {*names}
    assert {int(case) for _, case in run} == {*range(num_cases)}, "no case is left out of all tests"
    assert len(run) <= 100 * -(-num_cases // 6)
    assert not conftest._other_cases([*items], 1)
