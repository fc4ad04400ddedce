"""`python -m jaxkd.doctor`: what it says of this machine, and of others."""

import re
import shutil
from importlib import metadata
from types import SimpleNamespace

import jax
import pytest

import jaxkd
from jaxkd import doctor

SMALL = doctor.Problem(rows=64, student_hidden=16, teacher_hidden=16, vocabulary=256)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.0)


@pytest.mark.usefixtures("quick")
def test_a_healthy_machine(capsys):
    assert doctor.main([], large=SMALL, small=SMALL, timed=SMALL) == 0
    said = capsys.readouterr().out
    assert f"jaxkd {jaxkd.__version__}\n" in said
    assert f"jax {jax.__version__}" in said
    assert "  xla     runs\n" in said
    assert re.search(r"triton  cannot: it needs a CUDA GPU and JAX computes on 'cpu'", said)
    assert re.search(r"jaxkd +\d+ MiB\n  dense formula +\d+ MiB", said)
    assert re.search(r"float32 +loss \S+, hidden gradient \S+, head gradient \S+: right", said)
    assert re.search(r"alone \S+ ms, jaxkd \S+ ms: \S+ times", said)
    assert "Advice" in said
    assert all(len(line) <= 120 for line in said.splitlines()[: said[: said.index("Advice")].count("\n")])


@pytest.mark.usefixtures("quick")
def test_a_wrong_loss_is_said(monkeypatch, capsys):
    right = doctor.chunked_loss
    monkeypatch.setattr(doctor, "chunked_loss", lambda *arrays: 1.1 * right(*arrays))
    assert doctor.main([], large=SMALL, small=SMALL, timed=SMALL) == 1
    said = capsys.readouterr().out
    assert "WRONG" in said
    assert "`implementation='xla'` is the first suspect" in said


@pytest.mark.usefixtures("quick")
def test_too_little_memory_is_said(monkeypatch, capsys):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(doctor, "time_loss", exhausted)
    assert doctor.main([], large=SMALL, small=SMALL, timed=SMALL) == 0
    assert "not enough memory to measure" in capsys.readouterr().out


def test_advice_for_a_gpu_that_jax_does_not_see(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "target_platform", lambda: "cpu")
    for asked, meant in ((None, "pip install 'jax[cuda13]'"), ("cpu", "JAX_PLATFORMS=cpu")):
        monkeypatch.setattr(jax, "config", SimpleNamespace(jax_platforms=asked, jax_enable_x64=False))
        assert any(meant in line for line in doctor.advice())


def test_advice_for_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "target_platform", lambda: "cuda")
    monkeypatch.setattr(doctor, "target_device", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: name)
    monkeypatch.delenv(doctor.PREALLOCATE, raising=False)
    said = "\n".join(doctor.advice(is_tf32=True))
    assert "JAX 0.11 and newer" in said
    assert "TF32" in said
    assert f"{doctor.PREALLOCATE}=false" in said
    monkeypatch.setenv(doctor.PREALLOCATE, "false")
    assert doctor.PREALLOCATE not in "\n".join(doctor.advice())


def test_advice_for_another_chip_and_another_package(monkeypatch):
    monkeypatch.setattr(doctor, "target_platform", lambda: "tpu")
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"jaxkd": ["jaxkd", "jaxkd-distillation"]})
    said = "\n".join(doctor.advice())
    assert "pip uninstall jaxkd" in said
    assert "nobody has measured" in said
