"""The kernels of one head and the sums that they keep on a real GPU: against XLA, float64, and themselves."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import row_cases

import jaxkd
from jaxkd.kernels.dispatch import CannotRun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

N, D, V, CHUNK = 48, 64, 32000, 32
BOUNDS = {jnp.float32: 2e-5, jnp.bfloat16: 5e-3, jnp.float16: 2e-3}
RAGGED = [2, 3, 123, 1003, 2048, 2049, 50257]
ALIGNED = [1024, 4096, 16416, 32032, 128256, 151936]
LABELS = cases.some_labels(3, N, 2)
COUNTED = LABELS != -100
UPSTREAM = np.random.default_rng(5).normal(size=N).astype(np.float32)
NUMBERS = {
    "label_smoothing": 0.15,
    "z_loss": 0.03,
    "weights": np.random.default_rng(4).uniform(0.2, 2, size=N).astype(np.float32),
}


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 products in float32, not in TF32: the rows are what is compared."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=["triton", "mosaic"])
def kernel(request):
    try:
        jaxkd.cross_entropy(head(4096), LABELS, implementation=request.param)
    except CannotRun as reason:
        pytest.skip(str(reason))
    return request.param


@pytest.fixture(params=["triton", "mosaic"])
def kernel_of_two(request):
    """Of two heads."""
    try:
        jaxkd.token_divergences(head(4096), head(4096), implementation=request.param)
    except CannotRun as reason:
        pytest.skip(str(reason))
    return request.param


def head(width=V, dtype=jnp.float32, seed=0):
    return cases.head(seed, N, D, width, spread=2.0).astype(dtype)


@partial(jax.jit, static_argnames=("chunk_size", "implementation"))
def cross_entropy(student, labels, implementation, chunk_size=CHUNK, **numbers):
    options = {"chunk_size": chunk_size, "implementation": implementation}
    return jax.value_and_grad(jaxkd.cross_entropy, has_aux=True)(student, labels, **options, **numbers)


def assert_close(a, b, bound):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert cases.relative_error(x, y) <= bound


def compare_cross_entropy(student, labels, implementation, *, gradient, **numbers):
    result = cross_entropy(student, labels, implementation, **numbers)
    truth = row_cases.cross_entropy(row_cases.twin(student), labels, **numbers)
    row_cases.check_cross_entropy(result, truth, loss=1e-5, gradient=gradient)
    assert_close(result, cross_entropy(student, labels, "xla", **numbers), 2 * gradient)
    return result


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("numbers", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, NUMBERS])
def test_cross_entropy(numbers, dtype, kernel):
    labels = cases.some_labels(3, N, V)
    compare_cross_entropy(head(dtype=dtype), labels, kernel, gradient=BOUNDS[dtype], **numbers)


@pytest.mark.parametrize("width", RAGGED)
def test_ragged_vocabularies(width):
    compare_cross_entropy(head(width), cases.some_labels(3, N, width), "triton", gradient=2e-5, **NUMBERS)


@pytest.mark.parametrize("width", ALIGNED)
def test_aligned_vocabularies(width, kernel):
    compare_cross_entropy(head(width), cases.some_labels(3, N, width), kernel, gradient=2e-5, **NUMBERS)


def test_closed_tokens(kernel):
    z = np.random.default_rng(0).normal(scale=2, size=(N, V)).astype(np.float32)
    z[:, ::3] = -np.inf
    student, labels = jaxkd.Logits(jnp.asarray(z)), np.where(COUNTED, 4, -100)
    _, gradient = compare_cross_entropy(student, labels, kernel, gradient=2e-5, z_loss=0.1)
    assert not np.any(gradient.values[:, ::3])
    (loss, metrics), _ = cross_entropy(student, labels, kernel, label_smoothing=0.1)
    assert loss == np.inf
    assert np.isfinite(metrics["hard"])


def test_poisoned_ignored_rows(kernel):
    labels, student = cases.some_labels(3, N, V), head(dtype=jnp.bfloat16)
    spoilt = jaxkd.LinearLogits(jnp.where((labels == -100)[:, None], jnp.nan, student.hidden), student.weight)
    results = [cross_entropy(x, labels, kernel, **NUMBERS) for x in (student, spoilt)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


# One number a row: the kernel has the values and the sums, XLA the gradient that is formed from them.

OF_ONE = {
    "log_probs": lambda student, temperature, **options: jaxkd.token_log_probs(
        student, LABELS, temperature=temperature, **options
    ),
    "entropies": lambda student, temperature, **options: jaxkd.token_entropies(
        student, mask=COUNTED, temperature=temperature, **options
    ),
}


@partial(jax.jit, static_argnames=("name", "implementation"))
def rows_of_one(name, student, temperature, implementation):
    options = {"chunk_size": CHUNK, "implementation": implementation}
    values, pullback = jax.vjp(lambda x: OF_ONE[name](x, temperature, **options), student)
    return values, pullback(jnp.asarray(UPSTREAM))[0]


@partial(jax.jit, static_argnames="implementation")
def rows_of_two(divergence, student, teacher, temperature, implementation):
    def values_of(student):
        options = {"divergence": divergence, "temperature": temperature, "chunk_size": CHUNK}
        return jaxkd.token_divergences(student, teacher, LABELS, implementation=implementation, **options)

    values, pullback = jax.vjp(values_of, student)
    return values, pullback(jnp.asarray(UPSTREAM))[0]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", OF_ONE)
def test_rows_of_one_head(name, dtype, kernel):
    student, temperature = head(dtype=dtype), 0.7
    got = rows_of_one(name, student, temperature, kernel)
    twin = cases.twin(student)
    if name == "log_probs":
        truth = row_cases.log_probs(twin, LABELS, UPSTREAM, temperature)
    else:
        truth = row_cases.entropies(twin, COUNTED, UPSTREAM, temperature)
    row_cases.check(got, truth, value=1e-5, gradient=BOUNDS[dtype])
    assert_close(got, rows_of_one(name, student, temperature, "xla"), 2 * BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_rows_of_two_heads(name, dtype, kernel_of_two):
    student, teacher, temperature = head(dtype=dtype), head(dtype=dtype, seed=1), 2.0
    divergence = cases.DIVERGENCES[name].make()
    got = rows_of_two(divergence, student, teacher, temperature, kernel_of_two)
    twins = cases.twin(student), cases.twin(teacher)
    truth = row_cases.divergences(*twins, COUNTED, UPSTREAM, name, temperature)
    # The slope of these is a sign: one token in a million has a p that equals q but for a rounding.
    bound = max(BOUNDS[dtype], 1e-3) if name in cases.WITH_JUMPS else BOUNDS[dtype]
    row_cases.check(got, truth, value=3e-5, gradient=bound)
    assert_close(got, rows_of_two(divergence, student, teacher, temperature, "xla"), 2 * bound)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_rows_of_two_heads_near_convergence(name, dtype, kernel_of_two):
    student = head(dtype=dtype)
    teacher = cases.near(cases.twin(student)).astype(dtype)
    got = rows_of_two(cases.DIVERGENCES[name].make(), student, teacher, 1.0, kernel_of_two)
    twins = cases.twin(student), cases.twin(teacher)
    truth = row_cases.divergences(*twins, COUNTED, UPSTREAM, name, 1.0)
    row_cases.check(got, truth, value=1e-3, gradient=max(BOUNDS[dtype], 1e-4))


# Repeated


def differing_rows(first, again):
    return jnp.sum(jnp.any(first != again, axis=1))


@pytest.mark.parametrize("width", [32000, 128256])
def test_cross_entropy_is_bitwise_repeatable(width, kernel):
    """Thirty times the same 2048 rows: a race between blocks shows as a row that differs."""
    rows = 2048
    student = 3 * jax.random.normal(jax.random.key(0), (rows, width), jnp.float32)
    labels = jax.random.randint(jax.random.key(1), (rows,), 0, width)
    numbers = {"label_smoothing": 0.1, "z_loss": 0.01}
    first = cross_entropy(jaxkd.Logits(student), labels, kernel, chunk_size=rows, **numbers)
    differs = jax.jit(differing_rows)
    for _ in range(30):
        again = cross_entropy(jaxkd.Logits(student), labels, kernel, chunk_size=rows, **numbers)
        assert again[0] == first[0]
        assert differs(again[1].values, first[1].values) == 0


@pytest.mark.parametrize("name", ["entropies", "jensen_shannon"])
def test_values_of_rows_are_bitwise_repeatable(name, kernel):
    """And so are the sums that are kept, which the gradient is made of."""
    if name == "entropies":
        calls = [rows_of_one(name, head(), 2.0, kernel) for _ in range(30)]
    else:
        divergence = jaxkd.jensen_shannon(0.5)
        calls = [rows_of_two(divergence, head(), head(seed=1), 2.0, kernel) for _ in range(30)]
    for again in calls[1:]:
        np.testing.assert_array_equal(again[0], calls[0][0])
        np.testing.assert_array_equal(again[1].hidden, calls[0][1].hidden)


# What runs where, and what it takes


def lowered(function):
    return jax.jit(jax.grad(lambda x: jnp.sum(function(x)))).lower(head(dtype=jnp.bfloat16)).as_text()


def test_a_kernel_is_the_default():
    calls = (
        lambda x: jaxkd.cross_entropy(x, LABELS)[0],
        lambda x: jaxkd.token_log_probs(x, LABELS),
        lambda x: jaxkd.token_entropies(x),
        lambda x: jaxkd.token_divergences(x, x),
    )
    for call in calls:
        text = lowered(call)
        assert "triton" in text or "mosaic_gpu" in text


def test_memory_is_that_of_a_chunk(kernel):
    rows, width, hidden, size = 4096, V, 256, 256
    student = jaxkd.LinearLogits(
        jax.ShapeDtypeStruct((rows, hidden), jnp.bfloat16), jax.ShapeDtypeStruct((width, hidden), jnp.bfloat16)
    )
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    compiled = cross_entropy.lower(student, labels, kernel, chunk_size=size, **{"z_loss": 0.1}).compile()
    chunk, gradient = size * width * (4 + 2), 4 * width * hidden  # float32 logits and a bfloat16 gradient; the head's
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.5 * chunk + 2 * gradient
