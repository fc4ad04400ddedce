"""The kernel's arithmetic, run as JAX operations on the CPU, against the XLA rows and the float64 truth."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd.kernels import pallas_triton
from jaxkd.loop import chunk_size

N, D, CHUNK = 7, 8, 4


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)


def compare(student, teacher, name, labels=None, *, loss=3e-6, gradient=1e-5, **options):
    def run(implementation):
        return cases.value_and_grad(
            student,
            teacher,
            labels,
            divergence=cases.DIVERGENCES[name].make(),
            chunk_size=CHUNK,
            implementation=implementation,
            **options,
        )

    kernel, xla = run("triton"), run("xla")
    if isinstance(student, jaxkd.Logits):
        twins = (np.asarray(x.values, np.float64) for x in (student, teacher))
    else:
        twins = (cases.twin(x) for x in (student, teacher))
    truth = cases.distillation(*twins, labels, divergence=name, **options)
    cases.check(kernel, truth, loss=loss, gradient=gradient)
    for a, b in zip(jax.tree.leaves(kernel), jax.tree.leaves(xla), strict=True):
        assert a.dtype == b.dtype
        assert cases.relative_error(a, np.asarray(b, np.float64)) <= gradient


def heads(width, teacher_width=None, dtype=jnp.float32, **transform):
    student = cases.head(0, N, D, width, **transform).astype(dtype)
    teacher = cases.head(1, N, D + 3, teacher_width or width, **transform).astype(dtype)
    return student, teacher


SETTINGS = {
    "plain": {},
    "hard": {"labels": cases.some_labels(3, N, 123), "temperature": 0.7, "soft_weight": 0.3, "hard_weight": 0.7},
}


@pytest.mark.parametrize(
    ("name", "setting"),
    [*((name, "hard") for name in cases.ONE_OF_EACH), ("forward_kl", "plain"), ("hellinger", "plain")],
)
def test_divergences(name, setting):
    compare(*heads(123), name, **SETTINGS[setting])


@pytest.mark.parametrize("width", [2, 3, 127, 128, 2047, 2048, 2049, 4099])
def test_ragged_vocabularies(width):
    labels = cases.some_labels(3, N, width)
    compare(*heads(width), "jensen_shannon", labels, temperature=2.0, hard_weight=0.5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("widths", [(123, 123), (131, 123), (2049, 2049)])
def test_pieces(widths, setting, monkeypatch):
    """The gradient is written among the rows of a chunk."""
    monkeypatch.setattr(chunk_size, "PIECE_BYTES", sum(widths) * 4)
    compare(*heads(*widths), "jensen_shannon", vocabulary="truncate", **SETTINGS[setting])


def test_one_token():
    assert jaxkd.distillation_loss(*heads(1), implementation="triton")[0] == 0


WIDTHS = [(123, 131), (131, 123), (123, 2500), (2500, 123)]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("vocabulary", ["truncate", "mask"])
@pytest.mark.parametrize("name", ["jensen_shannon"])
def test_vocabularies_of_different_width(name, vocabulary, widths):
    labels = cases.some_labels(3, N, widths[0])
    compare(*heads(*widths), name, labels, temperature=1.5, hard_weight=0.5, vocabulary=vocabulary)


@pytest.mark.parametrize("widths", [(123, 131), (131, 123)])
def test_truncated_vocabulary_without_labels(widths):
    compare(*heads(*widths), "reverse_kl", vocabulary="truncate")


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "hellinger", "alpha_divergence"])
def test_both_closed(name):
    student, teacher = closed((2, 10, 122), (2, 10, 122))
    compare(student, teacher, name, cases.some_labels(3, N, 2), hard_weight=0.5)


@pytest.mark.parametrize("name", ["jensen_shannon", "skew_kl", "total_variation", "hellinger", "alpha_divergence"])
def test_one_side_closed(name):
    compare(*closed((0, 7), (3, 122)), name)


def test_a_whole_block_closed():
    """The first blocks of a row hold no token at all, on either side."""
    values = np.full((2, N, 4099), -np.inf, np.float32)
    values[:, :, 4001:] = np.random.default_rng(0).normal(size=(2, N, 98))
    compare(*(jaxkd.Logits(jnp.asarray(x)) for x in values), "forward_kl")


def closed(student_columns, teacher_columns):
    values = np.random.default_rng(0).normal(scale=2, size=(2, N, 123)).astype(np.float32)
    values[0][:, student_columns] = -np.inf
    values[1][:, teacher_columns] = -np.inf
    return jaxkd.Logits(jnp.asarray(values[0])), jaxkd.Logits(jnp.asarray(values[1]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    student = cases.twin(heads(1003, dtype=dtype)[0])
    teacher = cases.near(student)
    compare(student.astype(dtype), teacher.astype(dtype), "jensen_shannon", loss=1e-4, gradient=5e-3)


def test_transformed_logits():
    labels = cases.some_labels(3, N, 123)
    # The gradient of the softcap is a small sum of terms of both signs.
    compare(*heads(123, bias=True, scale=0.7, softcap=20.0), "reverse_kl", labels, hard_weight=0.5, gradient=1e-4)


def test_identical_models():
    student, _ = heads(1003)
    (loss, _), gradient = cases.value_and_grad(student, student, chunk_size=CHUNK, implementation="triton")
    assert 0 <= loss <= 1e-6
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient)) < 1e-6


def test_poisoned_ignored_rows():
    labels = np.array([1, -100, 5, -100, 7, 2, -100])
    student, teacher = heads(123)
    poison = jnp.where(labels[:, None] == -100, jnp.nan, 0)

    def run(poison):
        rows = jaxkd.LinearLogits(student.hidden + poison, student.weight)
        return cases.value_and_grad(rows, teacher, labels, chunk_size=CHUNK, hard_weight=0.5, implementation="triton")

    for a, b in zip(jax.tree.leaves(run(poison)), jax.tree.leaves(run(0 * labels[:, None])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_loss_alone():
    student, teacher = heads(123)
    kernel, xla = (
        jaxkd.distillation_loss(student, teacher, chunk_size=CHUNK, implementation=name)[0]
        for name in ("triton", "xla")
    )
    np.testing.assert_allclose(kernel, xla, rtol=1e-6)


def test_float64_is_refused(x64):
    student, teacher = heads(123, dtype=jnp.float64)
    with pytest.raises(ValueError, match="float64"):
        jaxkd.distillation_loss(student, teacher, implementation="triton")


def pearson(log_p, log_q):
    return jnp.exp(log_q) * jnp.expm1(log_p - log_q) ** 2


def test_divergence_of_ones_own():
    student, teacher = heads(123)
    kernel, xla = (
        cases.value_and_grad(
            student, teacher, divergence=jaxkd.Divergence(pearson), chunk_size=CHUNK, implementation=name
        )
        for name in ("triton", "xla")
    )
    for a, b in zip(jax.tree.leaves(kernel), jax.tree.leaves(xla), strict=True):
        assert cases.relative_error(a, b) <= 1e-5
