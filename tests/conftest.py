"""What every test shares: hypothesis without deadlines, GPU tests skipped without a GPU, the rest kept on the CPU."""

import importlib.util
import os

import hypothesis
import jax
import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*smollm2*.py", "bridge/*", "*test_bridge_example.py"]

hypothesis.settings.register_profile("jaxkd", deadline=None, derandomize="CI" in os.environ, database=None)
hypothesis.settings.load_profile("jaxkd")


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_configure():
    """Everything but the GPU tests runs on the CPU, also where there is a GPU: the same numbers on every machine."""
    if _has_gpu():
        jax.config.update("jax_default_device", jax.devices("cpu")[0])


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
