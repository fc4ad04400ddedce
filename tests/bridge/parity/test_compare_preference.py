"""The preference losses in both libraries: within their bounds, and a twin that is wrong is told apart."""

import pytest
from comparison_params import by_turns
from preference_cases import LOSSES

from torch_bridge.parity.compare_preference import comparisons
from torch_bridge.parity.comparison import compare
from torch_bridge.reference import preference as dense

COMPARISONS = {str(comparison): comparison for comparison in comparisons()}


def test_every_loss_is_compared():
    compared = {row.loss.partition("(")[0] for row in COMPARISONS.values()}
    assert compared == set(LOSSES)


@pytest.mark.parametrize("comparison", by_turns(COMPARISONS.values()))
def test_comparison(comparison):
    result = compare(comparison)
    assert result.passed, result


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("dpo", dense.hinge), ("apo_down", dense.apo_zero), ("kto", dense.bco), ("dapo", dense.grpo)],
)
def test_a_wrong_twin_fails(name, wrong, monkeypatch):
    row = COMPARISONS[f"{name}, weighted, float32"]
    monkeypatch.setattr(dense, name, lambda *args, undesirable_weight=None, **kwargs: wrong(*args, **kwargs))
    result = compare(row)
    assert result.exception is None
    assert result.verdict == "FAIL"
