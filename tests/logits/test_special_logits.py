"""Logits of -inf, vocabularies of different width, and what stands between the product and the softmax."""

import cases
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

INF = np.inf
FINITE_WHERE_CLOSED = ["jensen_shannon", "skew_kl", "total_variation", "hellinger", "alpha_divergence"]


def logits(seed, *closed, rows=3, vocabulary=11):
    """Random logits with the columns ``closed`` at -inf."""
    z = np.random.default_rng(seed).normal(scale=2, size=(rows, vocabulary)).astype(np.float32)
    z[:, list(closed)] = -INF
    return z


def run(name, student, teacher, labels=None, **options):
    divergence = cases.DIVERGENCES[name].make()
    options = {"temperature": 1.0} | options  # traced, as all numbers: one program for most tests of a divergence
    result = cases.traced_value_and_grad(
        jaxkd.Logits(student), jaxkd.Logits(teacher), labels, divergence=divergence, chunk_size=2, **options
    )
    truth = cases.distillation(
        student.astype(np.float64), teacher.astype(np.float64), labels, divergence=name, **options
    )
    return result, truth


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", *FINITE_WHERE_CLOSED])
def test_teacher_closed(name, temperature):
    result, truth = run(name, logits(0), logits(1, 2, 5, 10), temperature=temperature)
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


@pytest.mark.parametrize("name", FINITE_WHERE_CLOSED)
def test_student_closed(name):
    result, truth = run(name, logits(0, 0, 7), logits(1))
    cases.check(result, truth, loss=3e-6, gradient=1e-5)
    assert not np.any(result[1].values[:, [0, 7]])


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("reverse_kl", logits(0), logits(1, 4)),
        ("symmetric_kl", logits(0), logits(1, 4)),
        ("forward_kl", logits(0, 4), logits(1)),
        ("symmetric_kl", logits(0, 4), logits(1)),
    ],
)
def test_infinite_by_definition(name, student, teacher):
    ((loss, metrics), _), truth = run(name, student, teacher)
    assert truth.loss == INF
    assert loss == INF
    assert metrics["soft"] == INF


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_both_closed(name):
    """As if the tokens were not there, of which the truth knows that it is the same."""
    student, teacher = logits(0, 2, 10), logits(1, 2, 10)
    result, truth = run(name, student, teacher)
    cases.check(result, truth, loss=3e-6, gradient=1e-5)
    assert not np.any(result[1].values[:, [2, 10]])
    without = (np.delete(x, [2, 10], 1).astype(np.float64) for x in (student, teacher))
    np.testing.assert_allclose(truth.loss, cases.distillation(*without, divergence=name).loss, rtol=1e-12)


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_only_one_token_open(name):
    student = np.full((3, 11), -INF, np.float32)
    student[:, 3] = 1.0
    ((loss, _), gradient), _ = run(name, student, student)
    assert loss == 0
    assert not np.any(gradient.values)


def test_hard_loss_with_closed_tokens():
    labels = np.array([0, 1, 3])
    result, truth = run("forward_kl", logits(0, 2, 10), logits(1, 2, 10), labels, hard_weight=0.5)
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


def test_label_of_a_closed_token_is_infinite():
    ((loss, _), _), _ = run("forward_kl", logits(0, 2), logits(1, 2), np.array([0, 2, 3]), hard_weight=0.5)
    assert loss == INF


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_probabilities_that_underflow(name):
    """Log-probabilities of -300: their exponentials are 0 in float32, and the logarithm of a mixture must not be."""
    student, teacher = logits(0), logits(1)
    student[:, ::3] -= 300
    teacher[:, 1::3] -= 300
    result, truth = run(name, student, teacher)
    cases.check(result, truth, loss=1e-5, gradient=2e-5)


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_large_common_offset(name):
    """Exact offsets: the logits are multiples of 2^-3."""
    student, teacher = (np.round(8 * logits(seed)) / 8 for seed in (0, 1))
    (moved, moved_gradient), _ = run(name, student + 2**16, teacher - 2**16)
    (still, still_gradient), _ = run(name, student, teacher)
    np.testing.assert_allclose(moved[0], still[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moved_gradient.values, still_gradient.values, rtol=1e-4, atol=1e-6)


def names_and_widths(names, few):
    """Each name with a teacher that is wider and one that is narrower; all but a few are slow."""
    return [
        pytest.param(name, widths, marks=() if name in few else pytest.mark.slow)
        for widths in ((11, 29), (123, 11))
        for name in names
    ]


@pytest.mark.parametrize(
    ("name", "widths"), names_and_widths(cases.ONE_OF_EACH, ["forward_kl", "jensen_shannon", "total_variation"])
)
def test_truncated_vocabulary(name, widths):
    student, teacher = (logits(seed, vocabulary=width) for seed, width in enumerate(widths))
    labels = np.array([3, widths[0] - 1, -100])  # the hard loss knows all of the student's tokens
    result, truth = run(name, student, teacher, labels, hard_weight=0.5, temperature=1.5)
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


@pytest.mark.parametrize(
    ("name", "widths"), names_and_widths(FINITE_WHERE_CLOSED, ["jensen_shannon", "total_variation"])
)
def test_masked_vocabulary(name, widths):
    student, teacher = (logits(seed, vocabulary=width) for seed, width in enumerate(widths))
    labels = np.array([3, widths[0] - 1, -100])
    options = {"hard_weight": 0.5, "temperature": 1.5, "vocabulary": "mask"}
    result, truth = run(name, student, teacher, labels, **options)
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


@pytest.mark.parametrize(("name", "widths"), [("forward_kl", (13, 11)), ("reverse_kl", (11, 13))])
def test_masked_vocabulary_of_the_finite_side(name, widths):
    student, teacher = (logits(seed, vocabulary=width) for seed, width in enumerate(widths))
    result, truth = run(name, student, teacher, vocabulary="mask")
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


@pytest.mark.parametrize(("name", "widths"), [("forward_kl", (11, 13)), ("reverse_kl", (13, 11))])
def test_masked_vocabulary_of_the_infinite_side(name, widths):
    student, teacher = (logits(seed, vocabulary=width) for seed, width in enumerate(widths))
    ((loss, _), _), _ = run(name, student, teacher, vocabulary="mask")
    assert loss == INF


def test_fake_columns_take_no_probability():
    """Padding a model's vocabulary with columns the other has not: nothing changes, unlike with logits of 0."""
    student, teacher = logits(0), logits(1)
    padded = np.concatenate([teacher, np.zeros((3, 5), np.float32)], axis=1)
    (plain, gradient), _ = run("jensen_shannon", student, teacher)
    (truncated, truncated_gradient), _ = run("jensen_shannon", student, padded)
    np.testing.assert_allclose(truncated[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(truncated_gradient.values, gradient.values, rtol=1e-5, atol=1e-8)


TRANSFORMS = {
    "none": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 3.0},
    "scale_softcap": {"scale": 2.0, "softcap": 3.0},
    "all": {"bias": True, "scale": -1.5, "softcap": 20.0},
}


@pytest.mark.parametrize(
    ("student_transform", "teacher_transform"),
    [*((name, "none") for name in TRANSFORMS), ("none", "all"), ("scale_softcap", "bias")],
)
def test_transformed_logits(student_transform, teacher_transform):
    student = cases.head(0, 9, 8, 123, **TRANSFORMS[student_transform]).astype(jnp.float32)
    teacher = cases.head(1, 9, 5, 123, **TRANSFORMS[teacher_transform]).astype(jnp.float32)
    labels = cases.some_labels(2, 9, 123)
    options = {"temperature": 1.5, "hard_weight": 0.5}
    result = cases.traced_value_and_grad(student, teacher, labels, divergence=jaxkd.reverse_kl, chunk_size=4, **options)
    truth = cases.distillation(cases.twin(student), cases.twin(teacher), labels, divergence="reverse_kl", **options)
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


def test_closing_bias():
    """A bias of -inf closes a token for both, as padded vocabularies are closed."""
    student, teacher = (cases.head(seed, 9, 8, 128, bias=True) for seed in (0, 1))
    student.bias[123:] = teacher.bias[123:] = -INF
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    result = cases.traced_value_and_grad(student, teacher, divergence=jaxkd.jensen_shannon(0.5), chunk_size=4)
    truth = cases.distillation(cases.twin(student), cases.twin(teacher), divergence="jensen_shannon")
    cases.check(result, truth, loss=3e-6, gradient=1e-5)
    assert not np.any(result[1].bias[123:])


def test_python_numbers_as_scale_and_softcap():
    student, teacher = (cases.head(seed, 9, 8, 123).astype(jnp.float32) for seed in (0, 1))
    numbers = jaxkd.LinearLogits(student.hidden, student.weight, scale=2, softcap=30.0)
    arrays = jaxkd.LinearLogits(student.hidden, student.weight, scale=jnp.asarray(2.0), softcap=jnp.asarray(30.0))
    assert jaxkd.distillation_loss(numbers, teacher)[0] == jaxkd.distillation_loss(arrays, teacher)[0]
