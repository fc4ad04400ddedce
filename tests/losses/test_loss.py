"""Loss, metrics and every gradient against the float64 truth: divergences by what the loss is asked for."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import only

import jaxkd
from jaxkd.divergences import weigh
from jaxkd.kernels import pallas_triton

N, D, D_TEACHER, V = 23, 12, 9, 123
LABELS = cases.some_labels(3, N, V)
WEIGHTS = np.random.default_rng(4).uniform(0.2, 2, size=N)

# With every number known at tracing, or traced: then what differs in numbers alone shares one program.
PLAIN = {}
WEIGHTED = {"labels": LABELS, "weights": WEIGHTS, "normalizer": 40.0, "hard_weight": 0.5, "temperature": 2.0}
TRACED = {
    "tempered": {"temperature": 2.5, "soft_weight": 1.0, "hard_weight": 0.0, "weights": np.ones(N), "normalizer": 15.0},
    "hard": {"temperature": 0.7, "soft_weight": 0.3, "hard_weight": 0.7, "weights": np.ones(N), "normalizer": 17.0},
    "weighted": {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.5, "weights": WEIGHTS, "normalizer": 40.0},
}


def inputs(dtype, **head):
    student = cases.head(0, N, D, V, **head).astype(dtype)
    teacher = cases.head(1, N, D_TEACHER, V, **head).astype(dtype)
    return student, teacher


# What does not depend on the divergence, by three: one whose slopes have a known sum, one more, one that is not smooth.
THREE = ["forward_kl", "jensen_shannon", "total_variation"]
A_FEW = only(THREE, cases.ONE_OF_EACH)


def compare(student, teacher, name, labels=None, *, loss, gradient, run=cases.value_and_grad, **options):
    result = run(student, teacher, labels, divergence=cases.DIVERGENCES[name].make(), chunk_size=8, **options)
    truth = cases.distillation(cases.twin(student), cases.twin(teacher), labels, divergence=name, **options)
    cases.check(result, truth, loss=loss, gradient=gradient)
    return result


@pytest.mark.parametrize("name", A_FEW)
def test_float64(name, x64):
    result = compare(*inputs(jnp.float64), name, **PLAIN, loss=1e-12, gradient=1e-11)
    (loss, _), gradient = result
    assert {x.dtype for x in jax.tree.leaves((loss, gradient))} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_float64_of_traced_numbers(name, x64):
    run = cases.traced_value_and_grad
    for numbers in TRACED.values():
        (loss, _), gradient = compare(
            *inputs(jnp.float64), name, LABELS, **numbers, loss=1e-12, gradient=1e-11, run=run
        )
        assert {x.dtype for x in jax.tree.leaves((loss, gradient))} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("name", A_FEW)
def test_float64_of_transformed_logits(name, x64):
    student, teacher = inputs(jnp.float64, bias=True, scale=0.7, softcap=5.0)
    compare(student, teacher, name, **WEIGHTED, loss=1e-12, gradient=1e-11)


@pytest.mark.parametrize(
    "setting", [pytest.param(PLAIN, marks=pytest.mark.slow, id="plain"), pytest.param(WEIGHTED, id="weighted")]
)
@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_float32(name, setting):
    student, teacher = inputs(jnp.float32)
    (loss, metrics), gradient = compare(student, teacher, name, **setting, loss=3e-6, gradient=1e-5)
    assert {x.dtype for x in jax.tree.leaves((loss, metrics, gradient))} == {jnp.dtype(jnp.float32)}
    assert set(metrics) >= {"soft", "hard", "num_rows"}


def test_finite_differences_through_the_loss(x64):
    """The library against itself, moved along one field at a time: needs no truth."""
    student, teacher = inputs(jnp.float64, bias=True, scale=0.7, softcap=5.0)

    @jax.jit
    @jax.value_and_grad
    def loss(student):
        return jaxkd.distillation_loss(
            student,
            teacher,
            LABELS,
            divergence=jaxkd.jensen_shannon(0.3),
            temperature=1.5,
            hard_weight=0.5,
            chunk_size=8,
        )[0]

    _, gradient = loss(student)
    rng, step = np.random.default_rng(5), 1e-5
    for field in ("hidden", "weight", "bias", "scale", "softcap"):
        x = getattr(student, field)
        direction = rng.normal(size=x.shape)
        above, below = (
            loss(dataclasses.replace(student, **{field: x + sign * step * direction}))[0] for sign in (1, -1)
        )
        slope = jnp.vdot(getattr(gradient, field), direction)
        np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-7, err_msg=field)


FUSED = {
    "plain": {},
    "end": {"beta": 0.0},
    "all": {
        "labels": LABELS,
        "beta": 0.7,
        "temperature": 2.0,
        "soft_weight": 0.3,
        "hard_weight": 0.7,
        "weights": WEIGHTS,
        "normalizer": 30.0,
        "chunk_size": 5,
    },
}


@pytest.mark.parametrize(("setting", "biased"), [("plain", False), ("end", True), ("all", True)])
def test_fused_linear_jsd_is_the_same_in_one_line(setting, biased):
    student, teacher = inputs(jnp.float32, bias=biased)
    options = dict(FUSED[setting])
    labels, beta = options.pop("labels", None), options.pop("beta", 0.5)

    def fused(hidden, weight, bias):
        return jaxkd.fused_linear_jsd(
            hidden,
            weight,
            teacher.hidden,
            teacher.weight,
            labels,
            beta=beta,
            student_bias=bias,
            teacher_bias=teacher.bias,
            **options,
        )

    arguments = (student.hidden, student.weight, student.bias)
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(fused, argnums=(0, 1, 2), has_aux=True))(*arguments)
    (want, want_metrics), want_gradient = cases.value_and_grad(
        student, teacher, labels, divergence=jaxkd.jensen_shannon(beta), **options
    )
    np.testing.assert_array_equal(loss, want)
    assert metrics.keys() == want_metrics.keys()
    for name, gradient in zip(("hidden", "weight", "bias"), gradients, strict=True):
        if gradient is not None:
            np.testing.assert_array_equal(gradient, getattr(want_gradient, name))


def test_formed_logits():
    student, teacher = (np.float32(x) for x in np.random.default_rng(0).normal(scale=3, size=(2, N, V)))
    options = {"temperature": 1.5, "hard_weight": 0.5}
    result = cases.value_and_grad(
        jaxkd.Logits(student),
        jaxkd.Logits(teacher),
        LABELS,
        divergence=jaxkd.reverse_kl,
        chunk_size=8,
        **options,
    )
    truth = cases.distillation(
        student.astype(np.float64), teacher.astype(np.float64), LABELS, divergence="reverse_kl", **options
    )
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


def test_head_against_formed_logits():
    """A student that hands over its head, a teacher of which only the logits exist."""
    student, teacher = inputs(jnp.float32)
    formed = jaxkd.Logits(jnp.asarray(cases.twin(teacher).logits, jnp.float32))
    result = cases.value_and_grad(student, formed, LABELS, divergence=jaxkd.forward_kl, chunk_size=8)
    truth = cases.distillation(cases.twin(student), cases.twin(teacher), LABELS, divergence="forward_kl")
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


WIDE = jaxkd.Logits(np.array([[np.log(0.5), np.log(0.3), np.log(0.2), -np.inf]], np.float32))


def test_widths_that_differ_are_compared_as_said():
    """P = (1/2, 3/10, 1/5, 0), Q = (1/4, 3/4): KL(5/8, 3/8 ‖ Q), and 1/2 (1/4 + 9/20 + 1/5)."""
    student = jaxkd.Logits(np.log(np.array([[0.25, 0.75]], np.float32)))
    cut, _ = jaxkd.distillation_loss(student, WIDE, vocabulary="truncate")
    np.testing.assert_allclose(cut, 0.625 * np.log(2.5) + 0.375 * np.log(0.5), rtol=1e-6)
    masked, _ = jaxkd.distillation_loss(student, WIDE, divergence=jaxkd.total_variation, vocabulary="mask")
    np.testing.assert_allclose(masked, 0.45, rtol=1e-6)


def test_widths_need_not_be_said_where_tokens_are_not_compared():
    """Sorted, (1/4, 3/4) and (0, 1/5, 3/10, 1/2) are 0 + 1/5 + 1/20 + 1/4 apart; half of it is the earth mover's."""
    student = jaxkd.Logits(np.log(np.array([[0.25, 0.75]], np.float32)))
    moved, _ = jaxkd.distillation_loss(student, WIDE, divergence=jaxkd.earth_mover)
    np.testing.assert_allclose(moved, 0.25, rtol=1e-6)
    known = jaxkd.TopKLogProbs(WIDE.values[:, :1], np.array([[0]]))
    listed, _ = jaxkd.distillation_loss(student, known)
    np.testing.assert_allclose(listed, 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6)
    mapped, _ = jaxkd.distillation_loss(student, jaxkd.VocabularyMap(WIDE, np.array([0]), np.array([0])))
    np.testing.assert_allclose(mapped, listed, rtol=1e-6)


def test_forward_kl_is_the_default_divergence():
    student, teacher = inputs(jnp.float32)
    default, _ = jaxkd.distillation_loss(student, teacher)
    named, _ = jaxkd.distillation_loss(student, teacher, divergence=jaxkd.forward_kl)
    assert default == named


@pytest.mark.parametrize("labels", [np.full(N, -100), LABELS])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_normalizer_of_0_is_an_empty_batch(labels, compiled):
    """What a micro-batch without a row that counts hands over as the count of its tokens: 0, and no error."""
    student, teacher = inputs(jnp.float32)

    def loss(student, normalizer):
        return jaxkd.distillation_loss(student, teacher, labels, normalizer=normalizer, hard_weight=0.5, chunk_size=8)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), gradient = (jax.jit(value_and_grad) if compiled else value_and_grad)(student, 0)
    assert float(metrics.pop("num_rows")) == (labels != -100).sum()
    assert not any(np.any(x) for x in jax.tree.leaves((value, metrics, gradient)))


def test_temperature_squared_is_not_multiplied_in():
    """At a high temperature tau^2 KL tends to half the variance of the logits' difference, so KL falls as tau^-2."""
    student, teacher = inputs(jnp.float32)
    cold, hot = (float(jaxkd.distillation_loss(student, teacher, temperature=tau)[0]) for tau in (50.0, 100.0))
    assert cold / hot == pytest.approx(4, rel=0.05)


def test_outside_implementation():
    torch = pytest.importorskip("torch")
    student, teacher = inputs(jnp.float32, bias=True)
    tau, labels = 2.0, torch.tensor(LABELS)
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (student.hidden, student.weight, student.bias)]
    z = torch.nn.functional.linear(*leaves)
    z_teacher = torch.nn.functional.linear(
        *(torch.tensor(np.asarray(x)) for x in (teacher.hidden, teacher.weight, teacher.bias))
    )
    counted = labels != -100
    log_p, log_q = (torch.log_softmax(x[counted] / tau, -1) for x in (z_teacher, z))
    soft = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    want = 0.3 * soft + 0.7 * torch.nn.functional.cross_entropy(z, labels, ignore_index=-100)
    want.backward()

    (loss, _), gradient = cases.value_and_grad(
        student, teacher, LABELS, temperature=tau, soft_weight=0.3, hard_weight=0.7, chunk_size=8
    )
    np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
    for leaf, name in zip(leaves, ("hidden", "weight", "bias"), strict=True):
        assert cases.relative_error(getattr(gradient, name), leaf.grad.numpy()) < 1e-5


# KL(P‖Q) less the entropy of Q. With P = (1/2, 1/4, 1/8, 1/8) and Q uniform that is 1/4 log 2 - 2 log 2, and the
# gradient to the logits q - p.
KNOWN = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
NEGATIVE, SLOPE = -1.75 * np.log(2), np.array([[-0.25, 0.0, 0.125, 0.125]])


def _less_entropy_term(log_p, log_q):
    return weigh(jnp.exp(log_p), log_p - log_q) + weigh(jnp.exp(log_q), log_q)


def _less_entropy(teacher, student):
    return jnp.sum(_less_entropy_term(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)), axis=-1)


ALL_TOKENS = np.arange(4)
NEGATIVE_BY = {
    "xla": (jaxkd.Logits(KNOWN), jaxkd.Divergence(_less_entropy_term), "xla"),
    "triton": (jaxkd.Logits(KNOWN), jaxkd.Divergence(_less_entropy_term), "triton"),
    "whole_rows": (jaxkd.Logits(KNOWN), jaxkd.RowDivergence(_less_entropy), "xla"),
    "top_k": (jaxkd.TopKLogProbs(KNOWN, ALL_TOKENS[None]), jaxkd.Divergence(_less_entropy_term), "xla"),
    "vocabulary_map": (
        jaxkd.VocabularyMap(jaxkd.Logits(KNOWN), ALL_TOKENS, ALL_TOKENS),
        jaxkd.Divergence(_less_entropy_term),
        "xla",
    ),
}


@pytest.mark.parametrize("case", NEGATIVE_BY)
def test_a_divergence_of_ones_own_may_be_negative(case, monkeypatch):
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    teacher, divergence, implementation = NEGATIVE_BY[case]
    (loss, metrics), gradient = jax.value_and_grad(jaxkd.distillation_loss, has_aux=True)(
        jaxkd.Logits(jnp.zeros((1, 4))), teacher, divergence=divergence, implementation=implementation
    )
    np.testing.assert_allclose(loss, NEGATIVE, rtol=1e-6)
    np.testing.assert_allclose(metrics["soft"], NEGATIVE, rtol=1e-6)
    np.testing.assert_allclose(gradient.values, SLOPE, atol=1e-7)
    alone, _ = jaxkd.distillation_loss(
        jaxkd.Logits(jnp.zeros((1, 4))), teacher, divergence=divergence, implementation=implementation
    )
    np.testing.assert_allclose(alone, NEGATIVE, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_a_built_in_divergence_is_never_negative(name, implementation, monkeypatch):
    """Rounding would take some of these below 0: the two models are equal but for one rounding of a logit."""
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    z = np.random.default_rng(0).normal(scale=3, size=(4, 64)).astype(np.float32)
    student, teacher = jaxkd.Logits(jnp.asarray(z)), jaxkd.Logits(jnp.asarray(np.nextafter(z, 100 * z)))
    divergence = cases.DIVERGENCES[name].make()
    for row in range(4):
        one = [jaxkd.Logits(x.values[row : row + 1]) for x in (student, teacher)]
        loss, metrics = jaxkd.distillation_loss(*one, divergence=divergence, implementation=implementation)
        assert 0 <= loss <= 1e-6
        assert 0 <= metrics["soft"] <= 1e-6
