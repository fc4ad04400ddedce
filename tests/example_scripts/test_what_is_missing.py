"""An example whose packages are not installed says which, and how they come."""

import os
import subprocess
import sys

import pytest

import examples


@pytest.mark.parametrize(("program", "missing"), [("train_nnx", "flax"), ("distill_smollm2", "torch")])
def test_it_names_what_to_install(program, missing, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    command = [sys.executable, "-m", f"examples.{program}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"error: {missing} is not installed: pip install {examples.NEEDED[missing]}\n"
