"""The kernel of one head, and the sums that it keeps for a later gradient, on the CPU: against XLA and float64."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import row_cases
from sweeps import all_but

import jaxkd
from jaxkd.kernels import pallas_triton
from jaxkd.loop import chunk_size

N, D, V, CHUNK = 7, 8, 123, 4
LABELS = cases.some_labels(3, N, V)
COUNTED = LABELS != -100
WEIGHTS = np.random.default_rng(4).uniform(0.2, 2, size=N).astype(np.float32)
UPSTREAM = np.random.default_rng(5).normal(size=N).astype(np.float32)
NUMBERS = {"label_smoothing": 0.15, "z_loss": 0.03, "weights": WEIGHTS}


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)


def head(width=V, dtype=jnp.float32, **transform):
    return cases.head(0, N, D, width, **transform).astype(dtype)


def logits(*closed, seed=0, width=V):
    z = np.random.default_rng(seed).normal(scale=2, size=(N, width)).astype(np.float32)
    z[:, list(closed)] = -np.inf
    return jaxkd.Logits(jnp.asarray(z))


@partial(jax.jit, static_argnames=("chunk_size", "implementation"))
def cross_entropy(student, labels, implementation="triton", chunk_size=CHUNK, **numbers):
    """With every number traced: one program for the calls of a type and of shapes."""
    options = {"chunk_size": chunk_size, "implementation": implementation}
    return jax.value_and_grad(jaxkd.cross_entropy, has_aux=True)(student, labels, **options, **numbers)


def compare_cross_entropy(student, labels=LABELS, *, loss=3e-6, gradient=1e-5, **numbers):
    result = cross_entropy(student, labels, **numbers)
    truth = row_cases.cross_entropy(row_cases.twin(student), labels, **numbers)
    row_cases.check_cross_entropy(result, truth, loss=loss, gradient=gradient)
    return result


@pytest.mark.parametrize("numbers", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, NUMBERS])
def test_cross_entropy(numbers):
    """What is not asked for is not in the program."""
    compare_cross_entropy(head(), **numbers)


def test_cross_entropy_is_that_of_xla():
    for student in (head(bias=True), logits(2, 122)):
        numbers = NUMBERS if isinstance(student, jaxkd.LinearLogits) else {"z_loss": 0.1}
        labels = LABELS if isinstance(student, jaxkd.LinearLogits) else np.where(LABELS % 120 == 2, 3, LABELS)
        kernel, xla = (cross_entropy(student, labels, name, **numbers) for name in ("triton", "xla"))
        for a, b in zip(jax.tree.leaves(kernel), jax.tree.leaves(xla), strict=True):
            assert a.dtype == b.dtype
            assert cases.relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("width", [2, 2049, 4099])
def test_ragged_vocabularies(width):
    """A power of two is one block or many; of others the last block overlaps the one before."""
    compare_cross_entropy(head(width), cases.some_labels(3, N, width), **NUMBERS)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 5e-3), (jnp.float16, 2e-3)])
def test_half_precision(dtype, bound):
    compare_cross_entropy(head(dtype=dtype), gradient=bound, **NUMBERS)


def test_infinite_by_definition():
    """The label of a closed token, and a uniform share of one: never NaN."""
    student = logits(2, 122)
    for label, label_smoothing in ((2, 0.0), (2, 0.1), (3, 0.1)):
        (loss, metrics), _ = cross_entropy(student, np.full(N, label), label_smoothing=label_smoothing)
        assert loss == np.inf
        assert np.isinf(metrics["hard"]) == (label == 2)
    compare_cross_entropy(student, np.full(N, 3), label_smoothing=0.0)


def test_large_logits():
    """The mean over the vocabulary is one of differences, which keep their digits."""
    student = jaxkd.Logits(logits().values + 1e4)
    (loss, _), gradient = cross_entropy(student, LABELS, **NUMBERS | {"z_loss": 0.0})
    truth = row_cases.cross_entropy(row_cases.twin(student), LABELS, **NUMBERS | {"z_loss": 0.0})
    np.testing.assert_allclose(loss, truth.loss, rtol=1e-5)
    assert cases.relative_error(gradient.values, truth.gradient) <= 1e-5


def test_pieces(monkeypatch):
    """The gradient is written among the rows of a chunk."""
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 1)
    cross_entropy.clear_cache()  # which does not know of it
    compare_cross_entropy(head(), **NUMBERS)
    cross_entropy.clear_cache()


def test_poisoned_ignored_rows_and_labels_outside():
    student, poison = head(), np.where(COUNTED, 0, np.nan)[:, None]
    spoilt = jaxkd.LinearLogits(student.hidden + poison, student.weight)
    results = [cross_entropy(x, LABELS, **NUMBERS) for x in (student, spoilt)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)
    labels = np.where(np.arange(N) == np.argmax(COUNTED), V, LABELS)
    assert np.isnan(cross_entropy(student, labels, **NUMBERS)[0][0])


def test_loss_alone():
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "chunk_size": CHUNK}
    kernel, xla = (
        jax.jit(lambda x, name=name: jaxkd.cross_entropy(x, LABELS, implementation=name, **options))(head())
        for name in ("triton", "xla")
    )
    for a, b in zip(jax.tree.leaves(kernel), jax.tree.leaves(xla), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)


# One number a row


def log_probs(student, teacher, temperature, **options):
    return jaxkd.token_log_probs(student, LABELS, temperature=temperature, **options)


def entropies(student, teacher, temperature, **options):
    return jaxkd.token_entropies(student, mask=COUNTED, temperature=temperature, **options)


def divergences(divergence, student, teacher, temperature, **options):
    options |= {"divergence": divergence, "temperature": temperature}
    return jaxkd.token_divergences(student, teacher, LABELS, **options)


ROWS = {"log_probs": log_probs, "entropies": entropies} | {
    name: partial(divergences, cases.DIVERGENCES[name].make())
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "hellinger", "renyi")
}


@partial(jax.jit, static_argnames=("name", "implementation", "vocabulary"))
def values_and_pullback(name, student, teacher, temperature, implementation="triton", vocabulary=None):
    options = {"chunk_size": CHUNK, "implementation": implementation}
    options |= {} if vocabulary is None else {"vocabulary": vocabulary}
    values, pullback = jax.vjp(lambda x: ROWS[name](x, teacher, temperature, **options), student)
    return values, pullback(jnp.asarray(UPSTREAM, values.dtype))[0]


def truth(name, student, teacher, temperature):
    if name == "log_probs":
        return row_cases.log_probs(student, LABELS, UPSTREAM, temperature)
    if name == "entropies":
        return row_cases.entropies(student, COUNTED, UPSTREAM, temperature)
    return row_cases.divergences(student, teacher, COUNTED, UPSTREAM, name, temperature)


@pytest.mark.parametrize("name", all_but(("forward_kl", "hellinger", "reverse_kl"), ROWS))
def test_numbers_of_rows(name):
    student, teacher = head(), cases.head(1, N, D + 3, V).astype(jnp.float32)
    for temperature in (1.0, 0.7):
        result = values_and_pullback(name, student, teacher, temperature)
        twins = cases.twin(student), cases.twin(teacher)
        row_cases.check(result, truth(name, *twins, temperature), value=3e-6, gradient=1e-5)


@pytest.mark.parametrize("name", ["log_probs", "entropies", "jensen_shannon"])
def test_numbers_of_rows_with_closed_tokens(name):
    """-inf in the columns 2 and 122 of both models, where no label is."""
    student, teacher = logits(2, 122), logits(2, 122, seed=1)
    result = values_and_pullback(name, student, teacher, 2.0)
    twins = (row_cases.twin(x) for x in (student, teacher))
    row_cases.check(result, truth(name, *twins, 2.0), value=3e-6, gradient=1e-5)
    assert not np.any(result[1].values[:, [2, 122]])


@pytest.mark.parametrize(
    ("vocabulary", "teacher_width"), all_but([("truncate", 131)], [("truncate", 131), ("truncate", 100), ("mask", 131)])
)
def test_divergences_of_different_vocabularies(vocabulary, teacher_width):
    """The sums that are kept are those over the tokens that are compared."""
    student, teacher = head(), cases.head(1, N, D + 3, teacher_width).astype(jnp.float32)
    name = "jensen_shannon"
    kernel, xla = (
        values_and_pullback(name, student, teacher, 1.5, implementation, vocabulary)
        for implementation in ("triton", "xla")
    )
    for a, b in zip(jax.tree.leaves(kernel), jax.tree.leaves(xla), strict=True):
        assert cases.relative_error(a, b) <= 1e-5
    if vocabulary == "truncate":
        want = truth(name, cases.twin(student), cases.twin(teacher), 1.5)
        row_cases.check(kernel, want, value=3e-6, gradient=1e-5)


def test_numbers_of_rows_near_the_teacher():
    """In bfloat16, where rounded logits would be no gradient at all."""
    student = cases.twin(head(1003, jnp.bfloat16))
    teacher = cases.near(student)
    result = values_and_pullback("jensen_shannon", student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16), 1.0)
    teacher = cases.twin(teacher.astype(jnp.bfloat16))
    row_cases.check(result, truth("jensen_shannon", student, teacher, 1.0), value=1e-3, gradient=5e-3)


def test_float64_is_refused(x64):
    student = head(dtype=jnp.float64)
    for call in (jaxkd.cross_entropy, jaxkd.token_log_probs):
        with pytest.raises(ValueError, match="float64"):
            call(student, LABELS, implementation="triton")
