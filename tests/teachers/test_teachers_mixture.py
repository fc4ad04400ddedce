"""Several teachers: the dense float64 truth of the mixed distribution, its laws, and what is refused."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import jaxkd
from jaxkd.kernels import pallas_triton

N, D, V, CHUNK = 13, 8, 61, 4
STUDENT = cases.head(0, N, D, V)
TEACHERS = [cases.head(1, N, 6, V, bias=True), cases.head(2, N, 9, V), cases.head(3, N, D, V, softcap=5.0)]
LABELS = cases.some_labels(4, N, V, ignored=0.4)
SHARES = np.random.default_rng(5).uniform(size=(N, 3))
SHARES[::3, 1] = 0


def mixed(shares, temperature=1.0):
    """Logits of the mixture at the temperature."""
    shares = np.broadcast_to(shares, (N, 3))
    p = sum(
        w[:, None] * np.exp(cases.log_softmax(x.logits / temperature)) for w, x in zip(shares.T, TEACHERS, strict=True)
    )
    return temperature * np.log(p)


def run(teachers, shares=None, labels=LABELS, student=STUDENT, dtype=jnp.float32, **options):
    teachers = [x.astype(dtype) if isinstance(x, cases.Head) else x for x in teachers]
    teacher = jaxkd.Mixture(teachers, None if shares is None else jnp.asarray(shares, dtype))
    return loss_and_gradient(student.astype(dtype), teacher, labels, **options)


@partial(jax.jit, static_argnames=("implementation", "sharding", "vocabulary"))
def loss_and_gradient(student, teacher, labels, **options):
    """((loss, metrics), gradient to the student), with all numbers traced: one program for many tests."""
    return jax.value_and_grad(jaxkd.distillation_loss, has_aux=True)(
        student, teacher, labels, chunk_size=CHUNK, **options
    )


@pytest.mark.parametrize(
    ("name", "shares", "width"),
    [
        ("forward_kl", None, V),
        ("jensen_shannon_0.1", [0.5, 2.0, 0.0], V),
        ("reverse_kl", SHARES, V),
        ("hellinger", SHARES, V - 7),
    ],
)
def test_float64(name, shares, width, x64):
    """Loss, parts and gradients, the mixture cut to a narrower student's vocabulary; NaN where rows are ignored."""
    student = STUDENT.map(lambda field, x: x[:width] if field == "weight" else x)
    poisoned = [
        x.map(lambda f, x: np.where((LABELS == -100)[:, None], np.nan, x) if f == "hidden" else x) for x in TEACHERS
    ]
    labels = np.where(width > LABELS, LABELS, 0)
    options = {"temperature": 1.5, "hard_weight": 0.5, "vocabulary": "truncate"}
    divergence = cases.DIVERGENCES[name].make()
    got = run(poisoned, shares, labels, student, jnp.float64, divergence=divergence, **options)
    logits = mixed(np.ones(3) if shares is None else shares, 1.5)
    truth = cases.distillation(student, logits, labels, divergence=name, **options)
    cases.check(got, truth, loss=1e-11, gradient=1e-10)


def test_one_teacher_is_that_teacher():
    plain = loss_and_gradient(STUDENT.astype(jnp.float32), TEACHERS[0].astype(jnp.float32), LABELS, temperature=1.5)
    for teachers, shares in (
        (TEACHERS[:1], None),
        (TEACHERS[:1], [7.0]),
        ([TEACHERS[0]] * 3, [0.2, 0.5, 0.3]),
        ([TEACHERS[0], TEACHERS[1].map(lambda _, x: x * np.nan)], [1.0, 0.0]),
    ):
        (loss, _), gradient = run(teachers, shares, temperature=1.5)
        assert float(loss) == pytest.approx(float(plain[0][0]), rel=2e-6)
        assert cases.relative_error(gradient.weight, plain[1].weight) < 3e-6


def test_weights_are_normalised_and_may_be_traced():
    teachers = [x.astype(jnp.float32) for x in TEACHERS]
    student = STUDENT.astype(jnp.float32)
    traces = []

    @jax.jit
    def loss(shares):
        traces.append(1)
        return jaxkd.distillation_loss(student, jaxkd.Mixture(teachers, shares), chunk_size=CHUNK)[0]

    assert float(loss(jnp.array([2.0, 4.0, 2.0]))) == pytest.approx(float(loss(jnp.array([0.25, 0.5, 0.25]))), rel=1e-6)
    assert abs(loss(jnp.array([1.0, 0.0, 0.0])) - loss(jnp.array([0.0, 1.0, 0.0]))) > 1e-3
    assert np.isnan(loss(jnp.zeros(3)))
    assert np.isnan(loss(jnp.array([1.0, -0.5, 1.0])))
    assert len(traces) == 1


def test_a_mixture_is_broader_than_its_teachers():
    """Two sure teachers that disagree: half of the probability each, where the mean of their logits has one of many."""
    teachers = [jaxkd.Logits(20.0 * jax.nn.one_hot(jnp.array([i]), 4)) for i in (0, 1)]
    student = jaxkd.Logits(jnp.log(jnp.array([[0.5, 0.5, 1e-9, 1e-9]])))
    assert jaxkd.distillation_loss(student, jaxkd.Mixture(teachers))[0] < 1e-6


def test_kernels_take_it(monkeypatch):
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    options = {"divergence": jaxkd.jensen_shannon(0.3), "temperature": 1.5}
    kernel, xla = (run(TEACHERS, SHARES, implementation=name, **options) for name in ("triton", "xla"))
    np.testing.assert_allclose(kernel[0][0], xla[0][0], rtol=3e-6)
    assert cases.relative_error(kernel[1].weight, xla[1].weight) < 1e-5


def test_bfloat16():
    """As the mixture of the rounded teachers."""
    teachers = [x.astype(jnp.bfloat16) for x in TEACHERS[:2]]
    student = STUDENT.astype(jnp.bfloat16)
    (loss, _), gradient = loss_and_gradient(student, jaxkd.Mixture(teachers), None)
    p = np.mean([np.exp(cases.log_softmax(cases.twin(x).logits)) for x in teachers], axis=0)
    want = cases.distillation(cases.twin(student), np.log(p), divergence="forward_kl")
    assert float(loss) == pytest.approx(want.loss, rel=1e-4)
    assert gradient.weight.dtype == jnp.bfloat16
    assert cases.relative_error(gradient.weight, want.gradient.weight) < 5e-3


def test_leading_axes():
    by_sequence = [
        x.map(lambda f, x: x[:12].reshape(3, 4, -1) if f == "hidden" else x).astype(jnp.float32)
        for x in (STUDENT, *TEACHERS)
    ]
    shares = jnp.asarray(SHARES[:12].reshape(3, 4, 3), jnp.float32)
    distil = jax.jit(jaxkd.distillation_loss)
    loss = distil(by_sequence[0], jaxkd.Mixture(by_sequence[1:], shares))[0]
    rows = [x.map(lambda f, x: x[:12] if f == "hidden" else x).astype(jnp.float32) for x in (STUDENT, *TEACHERS)]
    flat = distil(rows[0], jaxkd.Mixture(rows[1:], shares.reshape(12, 3)))[0]
    assert float(loss) == pytest.approx(float(flat), rel=1e-6)


def test_no_gradient_to_teachers_and_an_error_for_weights():
    student, teachers = STUDENT.astype(jnp.float32), [x.astype(jnp.float32) for x in TEACHERS]
    gradient = jax.jit(jax.grad(lambda x: jaxkd.distillation_loss(student, jaxkd.Mixture(x))[0]))(teachers)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))
    with pytest.raises(TypeError, match=r"teacher\.weights.*stop_gradient"):
        jax.grad(lambda w: jaxkd.distillation_loss(student, jaxkd.Mixture(teachers, w))[0])(jnp.ones(3))


def test_no_more_than_a_chunk_of_logits():
    rows, width, chunk_size = 96, 1009, 16
    student, *teachers = (cases.head(i, rows, size, width).astype(jnp.float32) for i, size in enumerate((40, 24, 48)))

    def loss(student, teachers):
        return jaxkd.distillation_loss(student, jaxkd.Mixture(teachers), chunk_size=chunk_size)[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(student, teachers)
    heads = {shape for size in (40, 24, 48) for shape in ((width, size), (size, width))}
    assert jaxprs.most_rows(jaxpr, width, heads) == chunk_size
    assert len(jaxprs.products(jaxpr)) == 5


def test_rows_over_a_mesh():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
    want, got = (run(TEACHERS, SHARES, sharding=x) for x in (None, jaxkd.Sharding("data", mesh=mesh)))
    np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-6)
    assert cases.relative_error(got[1].weight, want[1].weight) < 1e-6


ONE, OTHER = jaxkd.Logits(jnp.ones((2, 5))), jaxkd.Logits(jnp.ones((2, 7)))
BAD = [
    (lambda: jaxkd.Mixture([]), ValueError, "`teacher.teachers` is empty"),
    (lambda: jaxkd.Mixture(ONE), TypeError, "`teacher.teachers` is a Logits.*list"),
    (lambda: jaxkd.Mixture([ONE, jnp.ones((2, 5))]), TypeError, r"`teacher.teachers\[1\]`.*LinearLogits"),
    (lambda: jaxkd.Mixture([ONE, OTHER]), ValueError, r"`teacher.teachers\[1\]` has V=7.*V=5.*tokenizer"),
    (lambda: jaxkd.Mixture([ONE, jaxkd.Logits(jnp.ones((3, 5)))]), ValueError, r"teachers\[1\].values.*\(3,\).*\(2,\)"),
    (lambda: jaxkd.Mixture([jaxkd.Logits(jnp.ones((3, 5)))]), ValueError, r"teachers\[0\].values.*\(3,\).*\(2,\)"),
    (lambda: jaxkd.Mixture([ONE], jnp.ones(2)), ValueError, r"`teacher.weights`.*\(2,\).*\(1,\).*\(2, 1\)"),
    (lambda: jaxkd.Mixture([ONE] * 2, np.array([1.0, -1.0])), ValueError, "`teacher.weights`.*negative.*-1"),
    (lambda: jaxkd.Mixture([ONE] * 2, np.zeros(2)), ValueError, "`teacher.weights`.*0"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        jaxkd.distillation_loss(ONE, make())
