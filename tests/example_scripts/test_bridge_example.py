"""The PyTorch example at a tiny size."""

import pytest

from examples import torch_student


def test_torch_student_learns_and_agrees_with_the_dense_loss(capsys):
    short = torch_student.main(["--steps", "1", "--vocabulary", "150"])
    longer = torch_student.main(["--steps", "25", "--vocabulary", "150"])
    assert longer["fused"] == pytest.approx(longer["dense"], rel=1e-5)
    assert longer["fused"] < 0.9 * short["fused"]
    assert "held out" in capsys.readouterr().out
