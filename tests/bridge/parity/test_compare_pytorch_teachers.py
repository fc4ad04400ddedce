"""A live and a cached teacher against the model's own logits; a teacher that leaves something out is told apart."""

from dataclasses import replace

import pytest
from comparison_params import by_turns

import jaxkd
from torch_bridge.parity import compare_pytorch_teachers
from torch_bridge.parity.comparison import compare

CASES = compare_pytorch_teachers.comparisons()


@pytest.mark.parametrize("comparison", by_turns(CASES))
def test_comparison(comparison):
    result = compare(comparison)
    assert result.passed, result


@pytest.mark.gpu
def test_errors_are_within_their_bounds_on_a_gpu():
    for case in compare_pytorch_teachers.comparisons("cuda"):
        result = compare(case)
        assert result.passed, result


@pytest.mark.parametrize("part", ["bias", "scale", "softcap"])
def test_a_missing_part_of_the_head_is_told_apart(monkeypatch, part):
    whole = jaxkd.distillation_loss

    def without(student, teacher, *args, **options):
        return whole(student, replace(teacher, **{part: None}), *args, **options)

    monkeypatch.setattr(jaxkd, "distillation_loss", without)
    traced_anew = CASES[0]._replace(jax_loss=lambda inputs: CASES[0].jax_loss(inputs))
    result = compare(traced_anew)
    assert all(result.errors[name] > bound for name, bound in result.bounds.items())
    assert result.errors.keys() == {"loss", "hidden", "weight"}
