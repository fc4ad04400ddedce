"""The dense PyTorch cross-entropy and numbers of each row against torch's own functions and numbers worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from torch_bridge import reference
from torch_bridge.reference import LinearLogits, Logits

ln = math.log
WORKED = torch.tensor([[0.0, ln(2), ln(5)]], dtype=torch.float64)  # q = 1/8, 1/4, 5/8 and Z = 8
ENTROPY = ln(8) / 8 + ln(4) / 4 + 5 * ln(8 / 5) / 8


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 3, 4, 7, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 7, (3, 4), generator=generator)
    labels[:, 0] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("label", [0, 1, 2])
def test_worked_numbers(label):
    nll, mean = [ln(8), ln(4), ln(8 / 5)][label], (ln(8) + ln(4) + ln(8 / 5)) / 3
    loss, metrics = reference.cross_entropy(Logits(WORKED), torch.tensor([label]), label_smoothing=0.3, z_loss=0.01)
    assert loss.item() == pytest.approx(0.7 * nll + 0.3 * mean + 0.01 * ln(8) ** 2, rel=1e-12)
    assert metrics["hard"].item() == pytest.approx(nll, rel=1e-12)
    assert metrics["log_normalizer"].item() == pytest.approx(ln(8), rel=1e-12)
    assert (metrics["accuracy"], metrics["num_rows"]) == (label == 2, 1)
    # At the temperature 1/2 the logits are 0, ln 4, ln 25, and Z = 30.
    log_prob = reference.token_log_probs(Logits(WORKED), torch.tensor([label]), temperature=0.5)
    assert log_prob.item() == pytest.approx(ln([1, 4, 25][label] / 30), rel=1e-12)


def test_worked_entropies_and_divergences():
    assert reference.token_entropies(Logits(WORKED)).item() == pytest.approx(ENTROPY, rel=1e-12)
    uniform = Logits(torch.zeros(1, 3, dtype=torch.float64))
    got = reference.token_divergences(uniform, Logits(WORKED), divergence=reference.forward_kl)
    assert got.item() == pytest.approx(ln(3) - ENTROPY, rel=1e-12)


def test_a_tie_is_right():
    logits, labels = Logits(torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])), torch.tensor([0, 1, 1])
    assert reference.cross_entropy(logits, labels)[1]["accuracy"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
def test_cross_entropy_is_that_of_torch(problem, label_smoothing):
    student, _, labels = problem
    loss, metrics = reference.cross_entropy(Logits(student), labels, label_smoothing=label_smoothing)
    z, y = student.flatten(0, 1), labels.flatten()
    want = F.cross_entropy(z, y, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, want)))
    torch.testing.assert_close(metrics["hard"], F.cross_entropy(z, y).detach())
    assert metrics["num_rows"] == 9


def test_weights_and_normalizer(problem):
    student, _, labels = problem
    weights = torch.linspace(0, 2, 12, dtype=torch.float64).view(3, 4)
    rows = F.cross_entropy(student.flatten(0, 1), labels.flatten(), label_smoothing=0.2, reduction="none")
    rows = rows + 0.1 * (labels != -100).flatten() * student.flatten(0, 1).logsumexp(-1) ** 2
    total = (weights.flatten() * rows).sum()
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "weights": weights}
    mean, metrics = reference.cross_entropy(Logits(student), labels, **options)
    torch.testing.assert_close(mean, total / weights[:, 1:].sum())
    torch.testing.assert_close(
        reference.cross_entropy(Logits(student), labels, normalizer=5.0, **options)[0], total / 5
    )
    right = (student.argmax(-1) == labels).double()
    torch.testing.assert_close(metrics["accuracy"], (weights * right).sum() / weights[:, 1:].sum())


def test_nothing_counts(problem):
    student, _, _ = problem
    loss, metrics = reference.cross_entropy(Logits(student), torch.full((3, 4), -100), z_loss=0.1)
    assert loss == 0
    assert not any(metrics.values())
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_numbers_of_rows_are_those_of_torch(problem, temperature):
    student, teacher, labels = problem
    tempered = torch.distributions.Categorical(logits=student / temperature)
    mask = labels != -100
    log_probs = reference.token_log_probs(Logits(student), labels, temperature=temperature)
    torch.testing.assert_close(log_probs, torch.where(mask, tempered.log_prob(labels.clamp(min=0)), 0))
    entropies = reference.token_entropies(Logits(student), mask=mask, temperature=temperature)
    torch.testing.assert_close(entropies, torch.where(mask, tempered.entropy(), 0))
    both = mask & (torch.arange(4) < 3)
    divergences = reference.token_divergences(
        Logits(student), Logits(teacher), labels, temperature=temperature, mask=torch.arange(4).expand(3, 4) < 3
    )
    want = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=teacher / temperature), tempered)
    torch.testing.assert_close(divergences, torch.where(both, want, 0))


def test_gradients_are_derivatives(problem):
    student, teacher, labels = problem

    def numbers(z):
        rows = Logits(z)
        return (
            reference.cross_entropy(rows, labels, label_smoothing=0.3, z_loss=0.1)[0],
            reference.token_entropies(rows, temperature=0.7),
            reference.token_divergences(rows, Logits(teacher), labels, divergence=reference.hellinger),
        )

    torch.autograd.gradcheck(numbers, student)


def test_a_token_that_is_closed(problem):
    student, _, _ = problem
    closed = F.pad(student, (1, 2), value=-torch.inf)
    with_closed, without = (reference.token_entropies(Logits(z)).square().sum() for z in (closed, student))
    torch.testing.assert_close(with_closed, without)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (with_closed, without)))


def test_rows_of_ones_own_and_of_a_head():
    generator = torch.Generator().manual_seed(1)
    hidden, weight, table = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 3, 4), (7, 4), (2, 3, 7))
    )
    labels = torch.tensor([[1, -100, 2], [-100, 0, 6]])

    def product(logits, labels, per_row, factor):
        return factor * (logits * per_row).sum(-1) + labels

    got = reference.chunked_rows(product, LinearLogits(hidden, weight), labels, per_row=table, shared=3.0)
    want = 3.0 * ((hidden @ weight.T) * table).sum(-1) + labels
    torch.testing.assert_close(got, torch.where(labels == -100, 0, want))
    summed, _ = reference.chunked_loss(product, LinearLogits(hidden, weight), labels, per_row=table, shared=3.0)
    torch.testing.assert_close(summed, got.sum() / 4)
