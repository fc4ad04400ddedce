"""The kernel's arithmetic, run as JAX operations on the CPU, against the float64 truth."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import only

import jaxkd
from jaxkd.kernels import pallas_triton
from jaxkd.loop import chunk_size

N, D, CHUNK = 7, 8, 4


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)


def run(student, teacher, name, labels=None, implementation="triton", vocabulary="truncate", **numbers):
    """With every number traced: one program for the calls of a divergence's term and of shapes."""
    return cases.traced_value_and_grad(
        student,
        teacher,
        None if labels is None else jnp.asarray(labels),
        divergence=cases.DIVERGENCES[name].make(),
        chunk_size=CHUNK,
        implementation=implementation,
        vocabulary=vocabulary,
        **numbers,
    )


def compare(student, teacher, name, labels=None, *, loss=3e-6, gradient=1e-5, **options):
    """With the float64 truth, to which `test_loss.py` holds the XLA rows."""
    kernel = run(student, teacher, name, labels, **options)
    if isinstance(student, jaxkd.Logits):
        twins = (np.asarray(x.values, np.float64) for x in (student, teacher))
    else:
        twins = (cases.twin(x) for x in (student, teacher))
    truth = cases.distillation(*twins, labels, divergence=name, **options)
    cases.check(kernel, truth, loss=loss, gradient=gradient)
    (got, metrics), got_gradient = kernel
    assert {x.dtype for x in (got, *metrics.values())} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(student), strict=True):
        assert a.dtype == b.dtype


def heads(width, teacher_width=None, dtype=jnp.float32, **transform):
    student = cases.head(0, N, D, width, **transform).astype(dtype)
    teacher = cases.head(1, N, D + 3, teacher_width or width, **transform).astype(dtype)
    return student, teacher


SETTINGS = {
    "plain": {},
    "hard": {"labels": cases.some_labels(3, N, 123), "temperature": 0.7, "soft_weight": 0.3, "hard_weight": 0.7},
}


def logits(student_columns=(), teacher_columns=()):
    """Where these columns are closed."""
    values = np.random.default_rng(0).normal(scale=2, size=(2, N, 123)).astype(np.float32)
    values[0][:, list(student_columns)] = -np.inf
    values[1][:, list(teacher_columns)] = -np.inf
    return jaxkd.Logits(jnp.asarray(values[0])), jaxkd.Logits(jnp.asarray(values[1]))


FINITE_WHERE_ONE_SIDE_IS_CLOSED = ["jensen_shannon", "skew_kl", "total_variation", "hellinger", "alpha_divergence"]


FEW = ("jensen_shannon", "total_variation", "renyi")  # `test_kernel_math.py` has the arithmetic of each


@pytest.mark.parametrize("name", only(FEW, cases.ONE_OF_EACH))
def test_divergences(name):
    """One program a divergence: all tokens open, some closed on both sides, some on one."""
    compare(*logits(), name, **SETTINGS["hard"])
    closed = {"labels": cases.some_labels(3, N, 2), "temperature": 1.0, "soft_weight": 1.0, "hard_weight": 0.5}
    compare(*logits((2, 10, 122), (2, 10, 122)), name, **closed)
    if name in FINITE_WHERE_ONE_SIDE_IS_CLOSED:
        labels = cases.some_labels(3, N, 2) + 1  # open, or ignored
        compare(*logits((0, 7), (3, 122)), name, **closed | {"labels": np.where(labels < 0, -100, labels)})


def test_without_labels():
    """Of divergences with the one sum of slopes known, and not."""
    for name in ("forward_kl", "hellinger"):
        compare(*heads(123), name)


# A power of two is one block or many; of others the last block overlaps the one before.
@pytest.mark.parametrize("width", [2, 3, 2049, *(slow(width) for width in (127, 128, 2047, 2048, 4099))])
def test_ragged_vocabularies(width):
    labels = cases.some_labels(3, N, width)
    compare(*heads(width), "jensen_shannon", labels, temperature=2.0, hard_weight=0.5)


@pytest.mark.parametrize(
    ("widths", "setting"),
    [((131, 123), "hard"), ((2049, 2049), "plain"), slow((123, 123), "hard"), slow((131, 123), "plain")],
)
def test_pieces(widths, setting, monkeypatch):
    """The gradient is written among the rows of a chunk."""
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 1)
    cases.traced_value_and_grad.clear_cache()  # which does not know of it
    compare(*heads(*widths), "jensen_shannon", vocabulary="truncate", **SETTINGS[setting])
    cases.traced_value_and_grad.clear_cache()


def test_one_token():
    assert jaxkd.distillation_loss(*heads(1), implementation="triton")[0] == 0


@pytest.mark.parametrize(
    ("vocabulary", "widths"),
    [
        ("truncate", (123, 2500)),
        ("mask", (2500, 123)),
        slow("truncate", (131, 123)),
        slow("mask", (123, 131)),
        slow("truncate", (123, 131)),
        slow("truncate", (2500, 123)),
        slow("mask", (131, 123)),
        slow("mask", (123, 2500)),
    ],
)
def test_vocabularies_of_different_width(vocabulary, widths):
    labels = cases.some_labels(3, N, widths[0])
    compare(*heads(*widths), "jensen_shannon", labels, temperature=1.5, hard_weight=0.5, vocabulary=vocabulary)


@pytest.mark.parametrize("widths", [(123, 131), (131, 123)])
def test_truncated_vocabulary_without_labels(widths):
    compare(*heads(*widths), "reverse_kl", vocabulary="truncate")


def test_a_whole_block_closed():
    """The first blocks of a row hold no token at all, on either side."""
    values = np.full((2, N, 4099), -np.inf, np.float32)
    values[:, :, 4001:] = np.random.default_rng(0).normal(size=(2, N, 98))
    compare(*(jaxkd.Logits(jnp.asarray(x)) for x in values), "forward_kl")


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
    (loss, _), gradient = run(student, student, "jensen_shannon")
    assert 0 <= loss <= 1e-6
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient)) < 1e-6


def test_poisoned_ignored_rows():
    labels = np.array([1, -100, 5, -100, 7, 2, -100])
    student, teacher = heads(123)
    poison = jnp.where(labels[:, None] == -100, jnp.nan, 0)

    def poisoned(poison):
        rows = jaxkd.LinearLogits(student.hidden + poison, student.weight)
        return jax.tree.leaves(run(rows, teacher, "jensen_shannon", labels, hard_weight=0.5))

    for a, b in zip(poisoned(poison), poisoned(jnp.zeros_like(poison)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_loss_alone():
    student, teacher = heads(123)
    loss = jax.jit(jaxkd.distillation_loss, static_argnames=("chunk_size", "implementation"))
    kernel, xla = (loss(student, teacher, chunk_size=CHUNK, implementation=name)[0] for name in ("triton", "xla"))
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
