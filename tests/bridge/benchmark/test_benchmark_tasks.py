"""The benchmark's data and its truth: a teacher near the student, and losses and gradients worked out another way."""

import math
from dataclasses import replace

import pytest
import torch

from torch_bridge.benchmark import tasks
from torch_bridge.benchmark.batches import IGNORE_INDEX, Shape, make_batch
from torch_bridge.benchmark.tasks import DIVERGENCES, TASKS, exact_outputs

SMALL = Shape(8, 12, 64)
GRADIENTS = ("hidden", "weight")


@pytest.mark.parametrize("shape", [Shape(8, 12, 640), Shape(12, 8, 640), Shape(8, 8, 640)])
def test_teacher_is_near_the_student_whatever_their_sizes(shape):
    batch = make_batch(shape, 64, "cpu")
    hidden, weight, teacher_hidden, teacher_weight = (x.float() for x in batch.arrays.values())
    assert (hidden.shape, weight.shape) == ((64, shape.hidden), (640, shape.hidden))
    assert (teacher_hidden.shape, teacher_weight.shape) == ((64, shape.teacher_hidden), (640, shape.teacher_hidden))
    logits = hidden @ weight.T
    gap = (teacher_hidden @ teacher_weight.T - logits).norm() / logits.norm()
    assert 0.018 < gap < 0.024  # 2 %, and the rounding to bfloat16
    assert batch.is_prompt.sum() == 32
    assert ((batch.labels >= 0) & (batch.labels < 640)).all()
    assert (batch.cotangents >= 0).all()
    assert batch.cotangents.sum().item() == pytest.approx(1, abs=0.3)


def test_tasks_read_what_they_are_made_of():
    batch = make_batch(SMALL, 16, "cpu")
    one, two = {"hidden", "weight"}, {"hidden", "weight", "teacher_hidden", "teacher_weight"}
    read = {name: (set(arrays), labels) for name, (arrays, labels) in ((k, t.inputs(batch)) for k, t in TASKS.items())}
    assert read["cross-entropy"][0] == read["token log-probs"][0] == one
    assert read["JSD"] == (two, None)
    assert read["token divergences"] == (two | {"cotangents"}, None)
    for name in ("JSD, half of the rows ignored", "cross-entropy, half of the rows ignored"):
        torch.testing.assert_close(read[name][1] == IGNORE_INDEX, batch.is_prompt)
    torch.testing.assert_close(read["cross-entropy"][1], batch.labels)
    floors = {name: task.floor for name, task in TASKS.items()}
    assert floors["JSD"] == floors["token divergences"] == floors["JSD, frozen head"] == "four products"
    assert floors["cross-entropy"] == floors["token log-probs"] == "three products"
    assert floors["JSD, loss alone"] == "two products"


@pytest.mark.parametrize("name", ["JSD", "JSD, half of the rows ignored", "token divergences", "cross-entropy"])
def test_truth_does_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch, name):
    batch = make_batch(SMALL, 21, "cpu")
    whole = exact_outputs(batch, TASKS[name])
    monkeypatch.setattr(tasks, "EXACT_LOGITS", 5 * SMALL.vocabulary)
    parts = exact_outputs(batch, TASKS[name])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    for gradient in GRADIENTS:
        torch.testing.assert_close(parts.gradients[gradient], whole.gradients[gradient])


def test_truth_of_labels_by_its_closed_form():
    """d(-log q[y]) / dz = q - [y], over the rows that count."""
    batch = make_batch(SMALL, 16, "cpu")
    hidden, weight = (batch.arrays[name].double() for name in GRADIENTS)
    q = (hidden @ weight.T).softmax(-1)
    for ignored in (False, True):
        shares = torch.where(batch.is_prompt, 0.0, 1 / 8) if ignored else torch.full((16,), 1 / 16)
        d_logits = shares[:, None] * (q - torch.nn.functional.one_hot(batch.labels.long(), 64))
        loss = -(shares * q[range(16), batch.labels.long()].log()).sum().item()
        exact = exact_outputs(batch, replace(TASKS["cross-entropy"], ignored=ignored))
        assert exact.loss == pytest.approx(loss)
        torch.testing.assert_close(exact.gradients["hidden"], (d_logits @ weight).float())
        torch.testing.assert_close(exact.gradients["weight"], (d_logits.T @ hidden).float())
    log_probs, labels = exact_outputs(batch, TASKS["token log-probs"]), exact_outputs(batch, TASKS["cross-entropy"])
    assert log_probs.loss == -labels.loss
    torch.testing.assert_close(log_probs.gradients["weight"], -labels.gradients["weight"])


def test_truth_of_weighed_rows_is_that_of_the_mean_where_all_weigh_the_same():
    batch = make_batch(SMALL, 16, "cpu")
    batch = batch._replace(cotangents=torch.full((16,), 1 / 16))
    rows, mean = exact_outputs(batch, TASKS["token divergences"]), exact_outputs(batch, TASKS["JSD"])
    assert rows.loss == pytest.approx(mean.loss)
    torch.testing.assert_close(rows.gradients["weight"], mean.gradients["weight"])
    doubled = exact_outputs(batch._replace(cotangents=2 * batch.cotangents), TASKS["token divergences"])
    assert doubled.loss == pytest.approx(2 * mean.loss)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_plain_divergences_are_those_of_the_reference(name):
    log_p, log_q = torch.randn(2, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(
        -1
    )
    torch.testing.assert_close(DIVERGENCES[name].plain(torch, log_p, log_q), DIVERGENCES[name].exact(log_p, log_q))


def test_plain_jsd_of_opposite_rows_is_log_2():
    log_p = torch.tensor([[0.0, -60.0]], dtype=torch.float64).log_softmax(-1)
    assert DIVERGENCES["JSD"].plain(torch, log_p, log_p.flip(-1)).item() == pytest.approx(math.log(2))
