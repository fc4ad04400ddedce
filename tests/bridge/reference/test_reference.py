"""The dense PyTorch losses against torch's own kl_div and cross_entropy, numbers worked by hand, and laws."""

import math

import pytest
import torch
import torch.nn.functional as F

from torch_bridge import reference
from torch_bridge.reference import LinearLogits, Logits, distillation_loss

P, Q = (0.5, 0.5), (0.25, 0.75)
LOG_P, LOG_Q = (torch.tensor([x], dtype=torch.float64).log() for x in (P, Q))
LOG_4_3 = math.log(4 / 3)  # KL(P||Q) = log(4/3) / 2 and KL(Q||P) = 3/4 log 3 - log 2
ALL = {
    "forward_kl": (reference.forward_kl, LOG_4_3 / 2),
    "reverse_kl": (reference.reverse_kl, 0.75 * math.log(3) - math.log(2)),
    "jensen_shannon": (  # M = (3/8, 5/8)
        reference.jensen_shannon(0.5),
        (math.log(4 / 3) + math.log(4 / 5)) / 4 + (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)) / 2,
    ),
    "jensen_shannon at 0": (reference.jensen_shannon(0), LOG_4_3 / 2),
    "jensen_shannon at 1": (reference.jensen_shannon(1), 0.75 * math.log(3) - math.log(2)),
    "jensen_shannon(0.2)": (  # M = (0.3, 0.7)
        reference.jensen_shannon(0.2),
        0.1 * (math.log(5 / 3) + math.log(5 / 7)) + 0.8 * (0.25 * math.log(5 / 6) + 0.75 * math.log(15 / 14)),
    ),
    "symmetric_kl": (reference.symmetric_kl(0.5), LOG_4_3 / 4 + (0.75 * math.log(3) - math.log(2)) / 2),
    "skew_kl": (reference.skew_kl(0.5), (math.log(4 / 3) + math.log(4 / 5)) / 2),
    "total_variation": (reference.total_variation, 0.25),
    "hellinger": (reference.hellinger, 1 - math.sqrt(1 / 8) - math.sqrt(3 / 8)),
    "alpha_divergence": (reference.alpha_divergence(0.5), 4 * (1 - math.sqrt(1 / 8) - math.sqrt(3 / 8))),
    "alpha_divergence(2)": (reference.alpha_divergence(2.0), (0.25 / 0.25 + 0.25 / 0.75 - 1) / 2),
}


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 12, 7, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 7, (12,), generator=generator)
    labels[::3] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("name", ALL)
def test_worked_numbers(name):
    divergence, expected = ALL[name]
    torch.testing.assert_close(divergence(LOG_P, LOG_Q), torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("name", ALL)
def test_zero_at_equality_positive_elsewhere_and_gradient_is_the_derivative(name, problem):
    divergence, _ = ALL[name]
    student, teacher, _ = problem
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    assert divergence(log_p, log_p).abs().max() < 1e-12
    assert (divergence(log_p, log_q) > 1e-3).all()
    torch.autograd.gradcheck(lambda z: divergence(log_p, z.log_softmax(-1)), student)


@pytest.mark.parametrize("name", ALL)
def test_a_token_neither_side_can_emit_adds_nothing(name, problem):
    divergence, _ = ALL[name]
    student, teacher, _ = problem
    masked_student, masked_teacher = (F.pad(z, (1, 2), value=-torch.inf) for z in (student, teacher))
    masked = divergence(masked_teacher.log_softmax(-1), masked_student.log_softmax(-1)).sum()
    plain = divergence(teacher.log_softmax(-1), student.log_softmax(-1)).sum()
    torch.testing.assert_close(masked, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (masked, plain)))


def test_a_token_one_side_cannot_emit(problem):
    student, teacher, _ = (x.detach() for x in problem)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    without = torch.tensor([True] + 6 * [False])
    no_p, no_q = (z.masked_fill(without, -torch.inf).log_softmax(-1) for z in (teacher, student))
    assert reference.forward_kl(no_p, log_q).isfinite().all()
    assert (reference.reverse_kl(no_p, log_q) == torch.inf).all()
    assert (reference.forward_kl(log_p, no_q) == torch.inf).all()
    assert reference.jensen_shannon(0.3)(no_p, log_q).isfinite().all()
    assert reference.jensen_shannon(0.3)(log_p, no_q).isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_and_hard_loss_are_those_of_torch(problem, temperature):
    student, teacher, labels = problem
    loss, metrics = distillation_loss(
        Logits(student),
        Logits(teacher),
        labels,
        divergence=reference.forward_kl,
        temperature=temperature,
        soft_weight=0.3,
        hard_weight=0.7,
    )
    counted = labels != -100
    soft = F.kl_div(
        (student[counted] / temperature).log_softmax(-1),
        (teacher[counted] / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(student, labels)
    torch.testing.assert_close(loss, 0.3 * soft + 0.7 * hard)
    torch.testing.assert_close(metrics["soft"], soft.detach())
    torch.testing.assert_close(metrics["hard"], hard.detach())
    assert metrics["num_rows"] == 8


def test_weights_and_normalizer(problem):
    student, teacher, labels = problem
    weights = torch.linspace(0, 2, 12, dtype=torch.float64)
    rows = [
        distillation_loss(Logits(student[i : i + 1]), Logits(teacher[i : i + 1]), divergence=reference.hellinger)[0]
        for i in range(12)
        if labels[i] != -100
    ]
    kept = weights[labels != -100]

    def weighted(normalizer):
        return distillation_loss(
            Logits(student),
            Logits(teacher),
            labels,
            divergence=reference.hellinger,
            weights=weights,
            normalizer=normalizer,
        )[0]

    torch.testing.assert_close(weighted(None), (kept * torch.stack(rows)).sum() / kept.sum())
    torch.testing.assert_close(weighted(5.0), (kept * torch.stack(rows)).sum() / 5)


def test_vocabularies_of_different_width(problem):
    student, teacher, labels = problem
    narrow = student[:, :5]

    def loss(vocabulary):
        return distillation_loss(
            Logits(narrow), Logits(teacher), divergence=reference.jensen_shannon(0.5), vocabulary=vocabulary
        )[0]

    torch.testing.assert_close(
        loss("truncate"),
        distillation_loss(Logits(narrow), Logits(teacher[:, :5]), divergence=reference.jensen_shannon(0.5))[0],
    )
    padded = F.pad(narrow, (0, 2), value=-torch.inf)
    torch.testing.assert_close(
        loss("mask"),
        distillation_loss(Logits(padded), Logits(teacher), divergence=reference.jensen_shannon(0.5))[0],
    )
    # The hard loss sees all of the student's vocabulary, also what the teacher has not.
    hard = distillation_loss(Logits(student), Logits(teacher[:, :5]), labels, divergence=reference.forward_kl)[1]
    torch.testing.assert_close(hard["hard"], F.cross_entropy(student, labels).detach())


def test_head_with_bias_scale_and_softcap():
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 3, 4), (7, 4), (7,))
    )
    z = 5 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 5)
    loss, _ = distillation_loss(
        LinearLogits(hidden, weight, bias, scale=0.5, softcap=5.0), Logits(z), divergence=reference.forward_kl
    )
    assert abs(loss) < 1e-14


def test_rows_that_do_not_count_may_hold_anything():
    generator = torch.Generator().manual_seed(2)
    hidden, weight, teacher = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((6, 4), (7, 4), (6, 7))
    )
    labels = torch.tensor([1, -100, 2, 3, -100, 0])
    weight.requires_grad_()

    def gradient(hidden, labels):
        student = LinearLogits(hidden, weight)
        loss, _ = distillation_loss(
            student, Logits(teacher[: len(hidden)]), labels, divergence=reference.forward_kl, hard_weight=1.0
        )
        return loss.detach(), *torch.autograd.grad(loss, weight)

    poisoned = hidden.masked_fill((labels == -100)[:, None], torch.nan)
    torch.testing.assert_close(gradient(poisoned, labels), gradient(hidden, labels))
    nothing, no_gradient = gradient(poisoned, torch.full((6,), -100))
    assert nothing == 0
    assert not no_gradient.any()


def test_a_label_outside_the_vocabulary_gives_nan(problem):
    student, teacher, labels = problem
    labels[1] = 7
    loss, _ = distillation_loss(Logits(student), Logits(teacher), labels, divergence=reference.forward_kl)
    assert loss.isnan()
    assert torch.autograd.grad(loss, student)[0].isnan().any()


def test_half_precision_logits_are_compared_in_float32(problem):
    student, teacher, _ = (x.detach() for x in problem)
    loss, _ = distillation_loss(Logits(student.bfloat16()), Logits(teacher.bfloat16()), divergence=reference.forward_kl)
    exact, _ = distillation_loss(
        Logits(student.bfloat16().double()), Logits(teacher.bfloat16().double()), divergence=reference.forward_kl
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
