"""The kinds of teacher in both libraries: within their bounds, and a twin that is wrong is told apart."""

import math

import pytest
import torch
from comparison_params import by_turns

from torch_bridge import reference
from torch_bridge.parity import compare_teacher_kinds
from torch_bridge.parity.comparison import compare

CASES = compare_teacher_kinds.comparisons()


@pytest.mark.parametrize("comparison", by_turns(CASES))
def test_comparison(comparison):
    result = compare(comparison)
    assert result.passed, result


@pytest.mark.gpu
def test_errors_are_within_their_bounds_on_a_gpu():
    for case in compare_teacher_kinds.comparisons("cuda"):
        result = compare(case)
        assert result.passed, result


WRONG = {
    "the rest left out": ("TopKLogProbs", {"tail": "renormalize"}),
    "padding counted": ("TopKLogProbs", {"token_ids": lambda ids: ids.clamp(min=0)}),
    "equal weights": ("Mixture", {"weights": torch.ones_like}),
    "another teacher": ("Routed", {"index": lambda index: 2 - index}),
    "one list alone": ("Mixture of TopKLogProbs", {"teachers": lambda teachers: [teachers[0]] * len(teachers)}),
    "tokens in another order": ("VocabularyMap", {"teacher_ids": lambda ids: ids.flip(0)}),
}


@pytest.mark.parametrize(("kind", "changes"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_twin_is_told_apart(monkeypatch, kind, changes):
    whole = reference.distillation_loss

    def wrong(student, teacher, *arguments, **options):
        changed = {name: x(getattr(teacher, name)) if callable(x) else x for name, x in changes.items()}
        return whole(student, teacher._replace(**changed), *arguments, **options)

    monkeypatch.setattr(reference, "distillation_loss", wrong)
    result = compare(next(case for case in CASES if case.loss == kind))
    assert result.exception is None
    assert not result.passed


def test_worked_numbers_of_the_twins():
    """Those of jaxkd's docstrings."""
    options = {"divergence": reference.forward_kl}
    uniform = reference.Logits(torch.zeros(1, 4, dtype=torch.float64))
    known = torch.tensor([[0.25, 0.5]]).double().log(), torch.tensor([[1, 0]])
    for tail, value in (
        ("bucket", 0.25 * math.log(2)),
        ("renormalize", (2 * math.log(4 / 3) + math.log(2 / 3)) / 3),
        ("zero", 0.5 * math.log(2)),
    ):
        loss = reference.distillation_loss(uniform, reference.TopKLogProbs(*known, tail=tail), **options)[0]
        assert loss.item() == pytest.approx(value, rel=1e-12)
    p = [torch.tensor([x]).double().log() for x in ([0.5, 0.5, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0])]
    mixture = reference.Mixture([reference.Logits(x) for x in p], torch.tensor([1.0, 3.0]))
    loss = reference.distillation_loss(uniform, mixture, **options)[0]
    assert loss.item() == pytest.approx(
        math.log(4) + 5 / 16 * math.log(5 / 16) + 11 / 16 * math.log(11 / 16), rel=1e-12
    )
    other = torch.zeros(1, 2).double().log_softmax(-1), torch.tensor([[1, -1]])
    lists = [reference.TopKLogProbs(*known), reference.TopKLogProbs(*other)]
    loss = reference.distillation_loss(uniform, reference.Mixture(lists, torch.ones(2)), **options)[0]
    assert loss.item() == pytest.approx(3 / 8 * math.log(3 / 4) + 3 / 8 * math.log(3 / 2), rel=1e-12)
    routed = reference.Routed([reference.Logits(x) for x in p], torch.tensor([1]))
    loss = reference.distillation_loss(uniform, routed, **options)[0]
    assert loss.item() == pytest.approx(math.log(4) + 1 / 4 * math.log(1 / 4) + 3 / 4 * math.log(3 / 4), rel=1e-12)
    teacher = reference.Logits(torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64).log())
    mapped = reference.VocabularyMap(teacher, torch.tensor([0, 2]), torch.tensor([1, 0]))
    loss = reference.distillation_loss(uniform, mapped, **options)[0]
    assert loss.item() == pytest.approx(0.2 * math.log(0.8) + 0.5 * math.log(2) + 0.3 * math.log(0.6), rel=1e-12)
