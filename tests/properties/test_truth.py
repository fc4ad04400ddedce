"""The truth of the other tests, held to central differences: a wrong formula in it must not pass for the library's."""

import dataclasses

import cases
import numpy as np
import pytest
import row_cases

LABELS = cases.some_labels(3, (2, 3), 7)
WEIGHTS = np.random.default_rng(4).uniform(0.2, 2, size=(2, 3))


def central_difference(function, x, step=1e-5):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        gradient[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


@pytest.mark.parametrize("divergence", cases.DIVERGENCES)
@pytest.mark.parametrize("teacher_width", [7, 5, 9])
def test_gradient_is_that_of_the_loss(divergence, teacher_width):
    student = cases.head(0, (2, 3), 4, 7, bias=True, scale=0.8, softcap=4.0)
    teacher = cases.head(1, (2, 3), 3, teacher_width, softcap=9.0)
    options = {
        "divergence": divergence,
        "temperature": 1.7,
        "soft_weight": 0.6,
        "hard_weight": 0.4,
        "weights": WEIGHTS,
    }
    gradient = cases.distillation(student, teacher, LABELS, **options).gradient
    for field in dataclasses.fields(student):

        def loss(x, name=field.name):
            return cases.distillation(dataclasses.replace(student, **{name: x}), teacher, LABELS, **options).loss

        want = central_difference(loss, np.asarray(getattr(student, field.name)))
        assert cases.relative_error(getattr(gradient, field.name), want) < 1e-7, field.name


def test_truth_of_a_masked_vocabulary_is_that_of_the_wider_one_without_probability():
    teacher = np.random.default_rng(0).normal(size=(5, 9))
    student = np.random.default_rng(1).normal(size=(5, 7))
    closed = np.pad(student, ((0, 0), (0, 2)), constant_values=-np.inf)
    masked = cases.distillation(student, teacher, divergence="jensen_shannon", vocabulary="mask")
    wide = cases.distillation(closed, teacher, divergence="jensen_shannon")
    assert masked.loss == pytest.approx(wide.loss)
    np.testing.assert_allclose(masked.gradient, wide.gradient[:, :7])


UPSTREAM = np.random.default_rng(5).normal(size=(2, 3))
MASK = LABELS != -100
OF_ROWS = {
    "cross_entropy": lambda x: row_cases.cross_entropy(
        x, LABELS, label_smoothing=0.3, z_loss=0.2, weights=WEIGHTS, normalizer=2.5
    ),
    "log_probs": lambda x: row_cases.log_probs(x, LABELS, UPSTREAM, 1.7),
    "entropies": lambda x: row_cases.entropies(x, MASK, UPSTREAM, 1.7),
    "divergences": lambda x: row_cases.divergences(x, TEACHER, MASK, UPSTREAM, "jensen_shannon", 1.7),
}
TEACHER = cases.head(1, (2, 3), 3, 5, softcap=9.0)


@pytest.mark.parametrize("name", OF_ROWS)
def test_gradient_is_that_of_the_rows(name):
    student = cases.head(0, (2, 3), 4, 7, bias=True, scale=0.8, softcap=4.0)

    def total(student):
        truth = OF_ROWS[name](student)
        return truth.loss if name == "cross_entropy" else float((truth.values * UPSTREAM).sum())

    gradient = OF_ROWS[name](student).gradient
    for field in dataclasses.fields(student):

        def moved(x, name=field.name):
            return total(dataclasses.replace(student, **{name: x}))

        want = central_difference(moved, np.asarray(getattr(student, field.name)))
        assert cases.relative_error(getattr(gradient, field.name), want) < 1e-7, field.name
