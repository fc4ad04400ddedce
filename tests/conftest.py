"""What every test shares: how it is compiled and kept, which tests run where, hypothesis without deadlines.

Most of the suite's time is XLA's. On the CPU, tests skip most of its optimizations, and what is compiled is kept for
the next run under `.pytest_cache` (`pytest --cache-clear` drops it); programs that tests start inherit both.
"""

import collections
import gc
import hashlib
import importlib.util
import inspect
import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

NEEDS_TORCH = ["bridge/*", "*smollm2*.py", "*test_bridge_example.py", "*test_on_policy.py", "*test_which_divergence.py"]

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = NEEDS_TORCH

# `pytest --hypothesis-profile=fuzz` draws other examples in every run, and keeps those that fail in `.hypothesis`.
hypothesis.settings.register_profile("jaxkd", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("fuzz", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("jaxkd")

# The emitters before XLA's fusion emitters compile in half the time, in a jaxlib that still has them. A program is one
# LLVM module, where by default it is cut into many for idle cores: a quarter less, while every core has a worker.
QUICK_TO_COMPILE = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
EVERY = 6  # of a test's cases one in so many is run where every test is
MOST_WORKERS = 8


def _quick_to_compile():
    """Before JAX starts its backend. jaxlib ends at a flag that it does not know, and so another process tries each."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # inherits what is set here
        return
    parse = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    for flag in QUICK_TO_COMPILE:
        if subprocess.run(parse, env={**os.environ, "XLA_FLAGS": flag}, capture_output=True).returncode == 0:
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def _check_shapes_where_they_are_said():
    """jaxtyping wraps every function of the modules in pyproject.toml, most of which say no shape: half of tracing."""
    checked = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker):
        def decorated(x):
            annotations = inspect.get_annotations(x.__init__ if inspect.isclass(x) else x).values()
            return checked(x, typechecker=typechecker) if "jaxtyping." in str([*annotations]) else x

        return decorated

    jaxtyping.jaxtyped = jaxtyped


_quick_to_compile()
_check_shapes_where_they_are_said()
jax.config.update("jax_num_cpu_devices", 8)  # for the tests of meshes; all others see the first


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _processor() -> str:
    """A name for this type of processor: what is compiled for one need not run on another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features"))} or lines)
    return hashlib.sha256("\n".join([platform.machine(), *kind]).encode()).hexdigest()[:16]


def _keep_what_is_compiled(config):
    """Shared by all workers: JAX takes an entry that another has not yet written in full for one that is not there."""
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    options = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax") / f"{jax.__version__}-{_processor()}"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for programs that are started by tests


def pytest_addoption(parser):
    what = f"of the cases of a test run one in N; default: {EVERY} where every test is run, else 1"
    parser.addoption("--every", type=int, metavar="N", help=what)


def pytest_configure(config):
    """Everything but the GPU tests runs on the CPU, also where there is a GPU: the same numbers on every machine."""
    if _has_gpu():
        jax.config.update("jax_default_device", jax.devices("cpu")[0])
    else:
        _keep_what_is_compiled(config)


def pytest_sessionstart():
    """Tracing makes many objects and few cycles: a tenth of the time is the collector's otherwise."""
    gc.set_threshold(200_000, 20, 20)


def pytest_collection_finish():
    """What tests import stays until the end: no collection of garbage goes through it before."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else extension modules take it for leaks


def pytest_xdist_auto_num_workers(config):
    """As many as there are cores; none for one file, whose tests share compiled programs, and where there is a GPU."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    files = {Path(argument.split("::")[0]) for argument in config.args}
    one_file = len(files) == 1 and next(iter(files)).suffix == ".py"
    if one_file or config.option.keyword or config.option.collectonly or _has_gpu():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def pytest_collection_modifyitems(config, items):
    if not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
    # Those that are compiled otherwise come together: nothing that was compiled before serves them.
    items.sort(key=lambda item: item.get_closest_marker("optimized") is not None)
    # Slow tests run where they are asked for: by an expression of markers, or by name.
    if not config.option.markexpr and not any("::" in argument for argument in config.args):
        _deselect(config, items, [item for item in items if item.get_closest_marker("slow")])
    chosen = config.option.markexpr or config.option.keyword or config.args != config.getini("testpaths")
    _deselect(config, items, _other_cases(items, config.option.every or (1 if chosen else EVERY)))


def _other_cases(items, every):
    """What is left out if of a test's cases one in ``every`` is run, and at least one.

    Which it is differs from test to test, so that each divergence, teacher and layout stays in some.
    """
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for name, group in cases.items():
        kept.update(group[zlib.crc32(name.encode()) % min(every, len(group)) :: every])
    return [item for item in items if item not in kept]


def _deselect(config, items, left_out):
    config.hook.pytest_deselected(items=left_out)
    left_out = set(left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture of the test, which may compile too."""
    optimized = any(item.get_closest_marker(name) for name in ("optimized", "gpu"))
    if jax.config.read("jax_disable_most_optimizations") == optimized:
        jax.clear_caches()  # `jax.jit` does not compile again for this option
        jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """What a file has compiled serves few others: kept to the end, a worker holds gigabytes, and is no quicker."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _device(request):
    if request.node.get_closest_marker("gpu"):
        with jax.default_device(jax.devices("gpu")[0]):
            yield
    else:
        yield


@pytest.fixture
def x64():
    """float64 in JAX, for comparison with the float64 truth to many digits."""
    with jax.enable_x64(True):
        yield
