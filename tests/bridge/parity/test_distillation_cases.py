"""The cases that losses are compared on: every pair is met, the data is what it says."""

import itertools

import pytest
import torch

from torch_bridge.parity import distillation_cases as cases
from torch_bridge.parity import liger_peers
from torch_bridge.parity.distillation_cases import Case, Shape

SHAPE = Shape(20, 8, 12, 33, 35)


def test_every_pair_of_values_is_covered_without_the_full_product():
    rows = cases.pairwise_cases()
    for a, b in itertools.combinations(cases.FACTORS, 2):
        met = {(getattr(row, a), getattr(row, b)) for row in rows}
        assert met == set(itertools.product(cases.FACTORS[a], cases.FACTORS[b])), (a, b)
    assert len(rows) <= 1.5 * len(cases.DIVERGENCES) * len(cases.FACTORS["shape"])
    assert {row.divergence for row in cases.converging_cases()} == set(cases.DIVERGENCES)


@pytest.mark.parametrize("dtype", cases.FACTORS["dtype"])
def test_batch_has_the_shapes_and_scale_of_a_model(dtype):
    batch = cases.make_batch(Case("hellinger", Shape(400, 64, 96, 500, 600), dtype, head="bias"))
    assert batch.student["weight"].shape == (500, 64)
    assert batch.teacher["hidden"].shape == (400, 96)
    assert batch.teacher["bias"].shape == (600,)
    assert {x.dtype for x in (*batch.student.values(), *batch.teacher.values())} == {getattr(torch, dtype)}
    logits = (batch.student["hidden"] @ batch.student["weight"].T).float()
    assert logits[1::4].std().item() == pytest.approx(1, rel=0.1)
    assert logits[::4].std().item() == pytest.approx(6, rel=0.1)
    assert (batch.labels == -100).float().mean() == pytest.approx(0.4)


def test_the_same_case_gives_the_same_batch():
    case = Case("hellinger", SHAPE, "float32", mask="weighted", head="softcap")
    first, second = cases.make_batch(case), cases.make_batch(case)
    assert torch.equal(first.student["hidden"], second.student["hidden"])
    assert not torch.equal(first.student["hidden"], cases.make_batch(case, seed=1).student["hidden"])
    assert first.student["softcap"] == 10
    assert first.options["weights"].shape == (20,)


def test_masks_and_gap():
    poisoned = cases.make_batch(Case("hellinger", SHAPE, "float32", mask="poisoned"))
    for source in (poisoned.student, poisoned.teacher):
        assert torch.equal(source["hidden"].isnan().all(-1), poisoned.labels == -100)
    assert cases.make_batch(Case("hellinger", SHAPE, "float32", mask="none")).labels is None
    close = cases.make_batch(Case("hellinger", Shape(20, 8, 8, 33, 33), "float32", gap=0.02))
    moved = (close.teacher["weight"] - close.student["weight"]).norm() / close.student["weight"].norm()
    assert moved.item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(close.teacher["hidden"], close.student["hidden"])


def test_a_batch_takes_tensors_in_the_place_of_its_own():
    batch = cases.make_batch(Case("hellinger", SHAPE, "bfloat16", mask="weighted", head="softcap"))
    student, others = batch.tensors()
    assert student.keys() == {"hidden", "weight"}
    assert others.keys() == {"teacher_hidden", "teacher_weight", "labels", "weights"}
    doubled = batch.holding({name: 2 * x for name, x in (student | others).items()})
    for name, x in student.items():
        assert torch.equal(doubled.student[name], 2 * x)
        assert torch.equal(doubled.teacher[name], 2 * batch.teacher[name])
    assert torch.equal(doubled.labels, 2 * batch.labels)
    assert torch.equal(doubled.options.pop("weights"), 2 * batch.options["weights"])
    assert doubled.options.items() <= batch.options.items()
    assert doubled.student["softcap"] == doubled.teacher["softcap"] == 10


def test_which_cases_liger_can_run():
    same, different = Shape(20, 8, 12, 33, 33), SHAPE
    assert liger_peers.runs("Liger fused", Case("jensen_shannon(0.5)", same, "float32"))
    assert liger_peers.runs("Liger chunked", Case("jensen_shannon(0.1)", same, "float32", mask="none", head="bias"))
    for refused in (
        Case("forward_kl", same, "float32"),
        Case("jensen_shannon(0.5)", different, "float32"),
        Case("jensen_shannon(0.5)", same, "float32", mask="poisoned"),
        Case("jensen_shannon(0.5)", same, "float32", head="bias"),
    ):
        assert not liger_peers.runs("Liger fused", refused)
