"""Divergences of whole rows: worked numbers, laws, and float64 NumPy with every matrix formed."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from sweeps import only

import jaxkd

N, V, CHUNK, EMBEDDING = 13, 61, 4, 5
RNG = np.random.default_rng(0)
EMBEDDINGS = RNG.normal(size=(80, EMBEDDING)) / np.sqrt(EMBEDDING)
INF = np.inf


def softmax(z):
    return np.exp(cases.log_softmax(z))


def cosine_distance(teacher, student):
    is_open = np.isfinite(teacher) & np.isfinite(student)
    a, b = (np.where(is_open, z, 0) for z in (teacher, student))
    return 1 - (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def mse(teacher, student):
    with np.errstate(invalid="ignore"):
        squares = np.where(np.isfinite(teacher) & np.isfinite(student), np.square(teacher - student), np.nan)
    return np.nanmean(squares, axis=-1)


def earth_mover(teacher, student):
    p, q = (-np.sort(-softmax(z)) for z in (teacher, student))
    width = max(p.shape[1], q.shape[1])
    return sum(abs(cases._fit(p, width, 0.0) - cases._fit(q, width, 0.0)).T) / 2


def kernel_distance(kernel):
    def truth(teacher, student):
        gap = softmax(teacher) - softmax(student)
        return np.einsum("nv,vw,nw->n", gap, kernel(EMBEDDINGS[: gap.shape[1]]), gap)

    return truth


def sinkhorn(teacher, student, top=32, epsilon=0.1, iterations=20):
    unit = EMBEDDINGS / np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)

    def transport(p, q, x, y):
        kernel = np.exp((x @ y.T - 1) / epsilon)
        u, v = np.ones(len(p)), np.ones(len(q))
        for _ in range(iterations):
            u, v = np.sqrt(u / (kernel @ (q * v))), np.sqrt(v / (kernel.T @ (p * u)))
        u, v = 1 / (kernel @ (q * v)), 1 / (kernel.T @ (p * u))
        return epsilon * (p @ np.log(u) + q @ np.log(v))

    def row(z, w):
        (p, x), (q, y) = ((softmax(-np.sort(-a)[:top]), unit[np.argsort(-a)[:top]]) for a in (z, w))
        return transport(p, q, x, y) - transport(p, p, x, x) / 2 - transport(q, q, y, y) / 2

    return np.array([row(z, w) for z, w in zip(teacher, student, strict=True)])


DIVERGENCES = {
    "cosine_distance": (lambda: jaxkd.cosine_distance, cosine_distance),
    "mse": (lambda: jaxkd.mse, mse),
    "earth_mover": (lambda: jaxkd.earth_mover, earth_mover),
    "identity": (lambda: jaxkd.kernel_distance(), kernel_distance(lambda e: np.eye(len(e)))),
    "linear": (lambda: jaxkd.kernel_distance(EMBEDDINGS), kernel_distance(lambda e: e @ e.T)),
    "quadratic": (
        lambda: jaxkd.kernel_distance(EMBEDDINGS, degree=2, offset=0.5),
        kernel_distance(lambda e: (e @ e.T + 0.5) ** 2),
    ),
    "sinkhorn": (lambda: jaxkd.sinkhorn(EMBEDDINGS, top=12), lambda t, s: sinkhorn(t, s, top=12)),
}
OWN_VOCABULARY = ["earth_mover", "sinkhorn"]
LOGITS = ["cosine_distance", "mse"]


def logits(seed, width=V, rows=N, spread=2.0):
    return spread * np.random.default_rng(seed).normal(size=(rows, width))


def loss_and_gradient(name, student, teacher, dtype=jnp.float64, **options):
    return _loss_and_gradient(jnp.asarray(student, dtype), jnp.asarray(teacher, dtype), name, **options)


@partial(jax.jit, static_argnames=("name", "vocabulary"))
def _loss_and_gradient(student, teacher, name, vocabulary="truncate", temperature=1.0):
    """With the temperature traced, so that it is compiled once for many tests."""
    options = {"divergence": DIVERGENCES[name][0](), "vocabulary": vocabulary, "temperature": temperature}

    def loss(student):
        return jaxkd.distillation_loss(jaxkd.Logits(student), jaxkd.Logits(teacher), chunk_size=CHUNK, **options)[0]

    return jax.value_and_grad(loss)(student)


def mean(name, student, teacher, temperature=1.0, width=None):
    width = width or max(student.shape[1], teacher.shape[1])
    return DIVERGENCES[name][1](teacher[:, :width] / temperature, student[:, :width] / temperature).mean()


@pytest.mark.parametrize("teacher_width", only((V + 9,), (V - 7, V + 9)))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_float64(name, teacher_width, x64):
    """The value, and the gradient along a direction by central differences of the truth."""
    student, teacher = logits(1), logits(2, teacher_width)
    width = None if name in OWN_VOCABULARY else min(V, teacher_width)
    loss, gradient = loss_and_gradient(name, student, teacher, temperature=1.5)
    assert float(loss) == pytest.approx(mean(name, student, teacher, 1.5, width), rel=1e-12)
    direction, step = logits(3), 1e-6
    difference = [mean(name, student + sign * step * direction, teacher, 1.5, width) for sign in (1, -1)]
    assert float(np.vdot(gradient, direction)) == pytest.approx((difference[0] - difference[1]) / 2e-6, rel=2e-6)
    if width is not None:
        assert not np.any(gradient[:, width:])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_is_float64_rounded(name):
    student, teacher = (x.astype(np.float32) for x in (logits(1), logits(2)))
    loss, gradient = loss_and_gradient(name, student, teacher, jnp.float32)
    with jax.enable_x64(True):
        want, want_gradient = loss_and_gradient(name, student, teacher)
    assert float(loss) == pytest.approx(float(want), rel=3e-6)
    assert cases.relative_error(gradient, want_gradient) < 1e-5


def test_cosine_and_mse_keep_their_digits_near_the_teacher():
    """1 - cos is 5e-9 here: in float32 it is 0, and so is its gradient."""
    student = logits(1).astype(np.float32)
    teacher = (student * (1 + 1e-4 * logits(2, spread=1.0))).astype(np.float32)
    for name in LOGITS:
        loss, gradient = loss_and_gradient(name, student, teacher, jnp.float32)
        with jax.enable_x64(True):
            want, want_gradient = loss_and_gradient(name, student, teacher)
        assert float(loss) == pytest.approx(float(want), rel=1e-2)
        assert cases.relative_error(gradient, want_gradient) < 1e-2


WORKED = [
    (jaxkd.cosine_distance, [3.0, 4.0], [4.0, 3.0], 0.04),
    (jaxkd.cosine_distance, [1.0, 2.0, 2.0], [2.0, 1.0, -2.0], 1.0),
    (jaxkd.cosine_distance, [1.0, -INF, 1.0], [1.0, 7.0, -1.0], 1.0),
    (jaxkd.cosine_distance, [0.0, 0.0], [4.0, 3.0], 1.0),
    (jaxkd.mse, [1.0, 2.0, -INF], [2.0, 0.0, 5.0], 2.5),
    (jaxkd.earth_mover, np.log([0.5, 0.3, 0.2]), np.log([0.1, 0.9]), 0.4),
    (jaxkd.earth_mover, np.log([0.5, 0.3, 0.2]), np.log([0.2, 0.5, 0.3]), 0.0),
    (jaxkd.earth_mover, [0.0, -INF], np.log([0.25, 0.25, 0.5]), 0.5),
    (jaxkd.kernel_distance(), np.log([0.5, 0.5]), np.log([0.25, 0.75]), 0.125),
    (jaxkd.sinkhorn(np.eye(2), epsilon=0.01), [50.0, 0.0], [0.0, 50.0], 1.0),
    (jaxkd.sinkhorn(np.array([[1.0, 0], [2.0, 0]])), [50.0, 0.0], [0.0, 50.0], 0.0),  # two tokens of one direction
]


@pytest.mark.parametrize(("divergence", "teacher", "student", "value"), WORKED)
def test_worked_numbers(divergence, teacher, student, value):
    rows = (jnp.asarray([z], jnp.float32) for z in (teacher, student))
    np.testing.assert_allclose(jax.jit(divergence.__call__)(*rows), [value], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_at_equality_and_not_elsewhere(name):
    student = logits(1).astype(np.float32)
    loss, gradient = loss_and_gradient(name, student, student, jnp.float32)
    assert 0 <= loss <= 1e-6
    assert np.max(np.abs(gradient)) <= 1e-6
    assert loss_and_gradient(name, student, logits(2), jnp.float32)[0] > 1e-3


def test_earth_mover_knows_no_token():
    student, teacher = logits(1), logits(2)
    loss, gradient = loss_and_gradient("earth_mover", student, teacher, jnp.float32)
    order = RNG.permutation(V)
    other, moved = loss_and_gradient("earth_mover", student[:, order], teacher[:, RNG.permutation(V)], jnp.float32)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    np.testing.assert_allclose(moved, gradient[:, order], rtol=1e-4, atol=1e-8)


def test_sinkhorn_counts_a_near_synonym_less():
    """Token 1 points nearly where token 0 does, token 2 away from it."""
    table = np.array([[1.0, 0.0], [0.98, 0.2], [-1.0, 0.1]])
    teacher, near, far = (np.where(np.eye(3)[[i]] == 1, 20.0, 0.0) for i in range(3))
    to_near, to_far = jax.jit(jaxkd.sinkhorn(table, epsilon=0.05).__call__)(
        np.concatenate([teacher, teacher]), np.concatenate([near, far])
    )
    assert to_near < 0.05 * to_far


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_token_neither_side_can_emit_is_as_if_it_were_not_there(name):
    student, teacher = logits(1).astype(np.float32), logits(2).astype(np.float32)
    closed = [V - 3, V - 1]
    student[:, closed], teacher[:, closed] = -INF, -INF
    loss, gradient = loss_and_gradient(name, student, teacher, jnp.float32)
    assert np.isfinite(loss)
    assert not np.any(gradient[:, closed])
    assert np.all(np.isfinite(gradient))
    if name not in ("linear", "quadratic", "sinkhorn"):  # the others keep a token's embedding by its place
        without = (np.delete(z, closed, 1) for z in (student, teacher))
        np.testing.assert_allclose(loss, loss_and_gradient(name, *without, jnp.float32)[0], rtol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_token_one_side_cannot_emit(name):
    student, teacher = logits(1).astype(np.float32), logits(2, V + 4).astype(np.float32)
    student[:, 5], teacher[:, 7] = -INF, -INF
    loss, gradient = loss_and_gradient(name, student, teacher, jnp.float32, vocabulary="mask")
    assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[:, 5])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_masks_weights_hard_loss_and_poison(name):
    """As the mean of rows that are computed alone, with cross-entropy beside it."""
    student, teacher = (cases.head(seed, N, 8, V).astype(jnp.float32) for seed in (0, 1))
    labels = cases.some_labels(3, N, V, ignored=0.4)
    weights = RNG.uniform(0.5, 2, size=N).astype(np.float32)
    divergence = DIVERGENCES[name][0]()
    counted = labels != -100

    def loss(hidden, teacher_hidden):
        models = jaxkd.LinearLogits(hidden, student.weight), jaxkd.LinearLogits(teacher_hidden, teacher.weight)
        options = {"divergence": divergence, "hard_weight": 0.5, "weights": weights, "chunk_size": CHUNK}
        return jaxkd.distillation_loss(*models, labels, **options)

    poisoned = (jnp.where(counted[:, None], x.hidden, jnp.nan) for x in (student, teacher))
    (got, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(*poisoned)
    z, z_teacher = (cases.twin(x).logits[counted] for x in (student, teacher))
    w = weights[counted] / weights[counted].sum()
    hard = -cases.log_softmax(z)[np.arange(len(z)), labels[counted]]
    np.testing.assert_allclose(metrics["soft"], w @ DIVERGENCES[name][1](z_teacher, z), rtol=1e-5)
    np.testing.assert_allclose(metrics["hard"], w @ hard, rtol=1e-5)
    np.testing.assert_allclose(got, metrics["soft"] + 0.5 * metrics["hard"], rtol=1e-6)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[~counted])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_more_than_a_chunk_of_logits(name):
    """Nor a matrix of all pairs of tokens."""
    rows, width, hidden, chunk_size = 96, 1009, 40, 16
    models = [cases.head(seed, rows, hidden, width).astype(jnp.float32) for seed in (0, 1)]
    table = np.random.default_rng(0).normal(size=(width, 24)).astype(np.float32)
    make = {
        "linear": lambda: jaxkd.kernel_distance(table),
        "quadratic": lambda: jaxkd.kernel_distance(table, degree=2),
        "sinkhorn": lambda: jaxkd.sinkhorn(table),
    }
    divergence = make.get(name, DIVERGENCES[name][0])()

    def loss(student, teacher):
        return jaxkd.distillation_loss(student, teacher, divergence=divergence, chunk_size=chunk_size)[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(*models)
    small = {(width, hidden), (hidden, width), (width, 24), (24, width)}
    assert jaxprs.most_rows(jaxpr, width, small) == chunk_size


def test_parameters_may_be_traced():
    student, teacher = (jaxkd.Logits(jnp.asarray(logits(seed), jnp.float32)) for seed in (1, 2))
    traces = []

    @jax.jit
    def loss(epsilon, offset):
        traces.append(1)
        divergences = (
            jaxkd.sinkhorn(EMBEDDINGS, epsilon=epsilon),
            jaxkd.kernel_distance(EMBEDDINGS, degree=2, offset=offset),
        )
        return [jaxkd.distillation_loss(student, teacher, divergence=d, chunk_size=CHUNK)[0] for d in divergences]

    assert all(x != y for x, y in zip(loss(0.1, 1.0), loss(0.3, 2.0), strict=True))
    assert len(traces) == 1


def test_embeddings_are_not_differentiated():
    student, teacher = (jaxkd.Logits(jnp.asarray(logits(seed), jnp.float32)) for seed in (1, 2))

    def loss(table):
        return jaxkd.distillation_loss(student, teacher, divergence=jaxkd.kernel_distance(table))[0]

    with pytest.raises(TypeError, match=r"divergence.*stop_gradient"):
        jax.grad(loss)(jnp.asarray(EMBEDDINGS, jnp.float32))


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_kernels_say_why_they_cannot(implementation):
    models = [jaxkd.Logits(jnp.ones((2, 3)))] * 2
    with pytest.raises(ValueError, match=f'implementation="{implementation}".*whole rows.*"xla"'):
        jaxkd.distillation_loss(*models, divergence=jaxkd.mse, implementation=implementation)


BAD = [
    (lambda: jaxkd.kernel_distance(EMBEDDINGS, degree=0), ValueError, "`degree`.*0"),
    (lambda: jaxkd.kernel_distance(EMBEDDINGS, degree=1.5), TypeError, "`degree`.*1.5"),
    (lambda: jaxkd.kernel_distance(EMBEDDINGS, degree=2, offset=-1.0), ValueError, "`offset`.*-1"),
    (lambda: jaxkd.kernel_distance(EMBEDDINGS[0]), TypeError, r"`embeddings`.*\(5,\).*\(V, E\)"),
    (lambda: jaxkd.kernel_distance(np.ones((3, 2), int)), TypeError, "`embeddings`.*int64.*floating"),
    (lambda: jaxkd.kernel_distance("rbf"), TypeError, "`embeddings`.*str"),
    (lambda: jaxkd.sinkhorn(EMBEDDINGS, top=0), ValueError, "`top`.*0"),
    (lambda: jaxkd.sinkhorn(EMBEDDINGS, iterations=0), ValueError, "`iterations`.*0"),
    (lambda: jaxkd.sinkhorn(EMBEDDINGS, epsilon=0.0), ValueError, "`epsilon`.*0"),
    (lambda: jaxkd.sinkhorn(EMBEDDINGS, EMBEDDINGS[:, :3]), ValueError, "`student_embeddings`.*E=3.*E=5"),
    (
        lambda: jaxkd.distillation_loss(
            *[jaxkd.Logits(jnp.ones((2, 90)))] * 2, divergence=jaxkd.kernel_distance(EMBEDDINGS)
        ),
        ValueError,
        "`embeddings` has 80 rows.*90 tokens",
    ),
    (
        lambda: jaxkd.distillation_loss(*[jaxkd.Logits(jnp.ones((2, 3)))] * 2, divergence=jaxkd.sinkhorn),
        TypeError,
        "`divergence`",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
