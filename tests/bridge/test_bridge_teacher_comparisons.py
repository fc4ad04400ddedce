"""A live and a cached teacher against the model's own logits; a teacher that leaves something out is told apart."""

from dataclasses import replace

import pytest

import jaxkd
from torch_bridge import comparisons_teacher
from torch_bridge.comparison import GRADIENT_BOUNDS, LOSS_BOUND, compare

CASES = comparisons_teacher.comparisons()


def exceeded(case):
    bounds = {"loss": LOSS_BOUND}
    return [name for name, error in compare(case).items() if not error <= bounds.get(name, GRADIENT_BOUNDS[case.dtype])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.loss}-{case.dtype}")
def test_errors_are_within_their_bounds(case):
    assert exceeded(case) == []


@pytest.mark.gpu
def test_errors_are_within_their_bounds_on_a_gpu():
    for case in comparisons_teacher.comparisons("cuda"):
        assert exceeded(case) == []


@pytest.mark.parametrize("part", ["bias", "scale", "softcap"])
def test_a_missing_part_of_the_head_is_told_apart(monkeypatch, part):
    whole = jaxkd.distillation_loss

    def without(student, teacher, *args, **options):
        return whole(student, replace(teacher, **{part: None}), *args, **options)

    monkeypatch.setattr(jaxkd, "distillation_loss", without)
    traced_anew = CASES[0]._replace(jax_loss=lambda inputs: CASES[0].jax_loss(inputs))
    assert exceeded(traced_anew) == ["loss", "hidden", "weight"]
