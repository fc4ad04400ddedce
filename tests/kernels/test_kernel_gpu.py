"""The kernels on a real GPU: against the XLA rows, against float64, and against themselves."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd.loop import chunk_size

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

N, D, CHUNK = 48, 64, 32
KERNELS = ["triton", "mosaic"]
# Relative L2 errors of gradients against float64, of a teacher far away and of one with 2 % noise.
BOUNDS = {jnp.float32: (2e-5, 1e-4), jnp.bfloat16: (5e-3, 5e-3), jnp.float16: (2e-3, 2e-3)}


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 products in float32, not in TF32: the rows are what is compared."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "mosaic":
        needs_hopper()
    return request.param


def needs_hopper():
    device = jax.devices()[0].device_kind
    if jax.__version_info__ < (0, 11) or not any(name in device for name in ("H100", "H200")):
        pytest.skip(f"the Mosaic kernel is for jax 0.11 on an H100 or H200, this is {jax.__version__} on {device}")


def heads(width, dtype, *, near=False, teacher_width=None, **transform):
    student = cases.twin(cases.head(0, N, D, width, spread=2.0, **transform).astype(dtype))
    teacher = cases.near(student) if near else cases.head(1, N, D, teacher_width or width, spread=2.0)
    return student.astype(dtype), teacher.astype(dtype)


def run(student, teacher, name, implementation, labels=None, **options):
    divergence = cases.DIVERGENCES[name].make()
    return cases.traced_value_and_grad(
        student, teacher, labels, divergence=divergence, chunk_size=CHUNK, implementation=implementation, **options
    )


def compare(student, teacher, name, implementation, labels=None, *, gradient, **options):
    kernel = run(student, teacher, name, implementation, labels, **options)
    truth = cases.distillation(cases.twin(student), cases.twin(teacher), labels, divergence=name, **options)
    cases.check(kernel, truth, loss=3e-4, gradient=gradient)
    xla = run(student, teacher, name, "xla", labels, **options)
    if cases.DIVERGENCES[name].make().outer is not None:
        kernel, xla = kernel[1], xla[1]  # a logarithm of next to 1: the values were held to the truth above
    for a, b in zip(jax.tree.leaves(kernel), jax.tree.leaves(xla), strict=True):
        assert cases.relative_error(a, b) <= 2 * gradient


LABELS = cases.some_labels(3, N, 32000)
HARD = {"temperature": 2.0, "hard_weight": 0.5, "normalizer": 1.0}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_divergences(name, dtype, kernel):
    compare(*heads(32000, dtype), name, kernel, LABELS, gradient=BOUNDS[dtype][0], **HARD)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", [name for name in cases.ONE_OF_EACH if name not in cases.WITH_JUMPS])
def test_near_convergence(name, dtype, kernel):
    """The soft loss alone: beside it the hard loss would hide its error."""
    soft = HARD | {"hard_weight": 0.0}
    compare(*heads(32000, dtype, near=True), name, kernel, LABELS, gradient=BOUNDS[dtype][1], **soft)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("width", [128256, 151936])
def test_real_vocabularies(width, name, kernel):
    compare(*heads(width, jnp.bfloat16), name, kernel, gradient=5e-3)


@pytest.mark.parametrize("width", [2, 3, 123, 1003, 2048, 2049, 50257])
def test_ragged_vocabularies(width):
    labels = cases.some_labels(3, N, width)
    compare(
        *heads(width, jnp.float32), "jensen_shannon", "triton", labels, gradient=2e-5, temperature=2.0, hard_weight=0.5
    )


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_pieces(name, ignored, kernel, monkeypatch):
    """The gradient is written among the rows of a chunk, none of which is copied for it."""
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 8)
    labels = cases.some_labels(3, N, 32000, ignored=ignored) if ignored else None
    options = HARD if ignored else {"temperature": 2.0}
    compare(*heads(32000, jnp.bfloat16), name, kernel, labels, gradient=5e-3, **options)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_transforms(in_pieces, kernel, monkeypatch):
    """`jax.checkpoint` and `jax.vmap` change no more than the rounding of products that XLA may do otherwise."""
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 8 if in_pieces else 64)
    student, teacher = heads(32000, jnp.bfloat16)

    def loss(student):
        return jaxkd.distillation_loss(student, teacher, chunk_size=CHUNK, implementation=kernel)[0]

    grad = jax.value_and_grad(loss)
    double = jax.tree.map(lambda x: 2 * x, student)
    plain, other = jax.jit(grad)(student), jax.jit(grad)(double)
    again = jax.jit(jax.value_and_grad(jax.checkpoint(loss)))(student)
    mapped = jax.jit(jax.vmap(grad))(jax.tree.map(lambda x, y: jnp.stack([x, y]), student, double))
    for a, b, c, d in zip(*map(jax.tree.leaves, (plain, other, again, mapped)), strict=True):
        assert cases.relative_error(c, a) <= 5e-3
        assert cases.relative_error(d[0], a) <= 5e-3
        assert cases.relative_error(d[1], b) <= 5e-3


@pytest.mark.parametrize("width", [1024, 4096, 16416, 32032])
def test_aligned_vocabularies(width, kernel):
    labels = cases.some_labels(3, N, width)
    compare(
        *heads(width, jnp.float32), "jensen_shannon", kernel, labels, gradient=2e-5, temperature=2.0, hard_weight=0.5
    )


@pytest.mark.parametrize("widths", [(1003, 1251), (1251, 1003), (123, 50257), (50257, 123)])
@pytest.mark.parametrize("vocabulary", ["truncate", "mask"])
def test_vocabularies_of_different_width(widths, vocabulary):
    labels = cases.some_labels(3, N, widths[0])
    student, teacher = heads(widths[0], jnp.float32, teacher_width=widths[1])
    options = {"temperature": 2.0, "hard_weight": 0.5, "vocabulary": vocabulary}
    compare(student, teacher, "jensen_shannon", "triton", labels, gradient=2e-5, **options)


@pytest.mark.parametrize("name", ["jensen_shannon", "skew_kl", "total_variation", "hellinger", "alpha_divergence"])
def test_closed_tokens(name, kernel):
    values = np.random.default_rng(0).normal(scale=2, size=(2, N, 32000)).astype(np.float32)
    values[0][:, ::3] = -np.inf
    values[1][:, ::2] = -np.inf
    student, teacher = (jaxkd.Logits(jnp.asarray(x)) for x in values)
    result = run(student, teacher, name, kernel)
    truth = cases.distillation(*values.astype(np.float64), divergence=name)
    # The slope of the total variation is a sign, and of tokens whose probabilities agree to rounding it is either.
    cases.check(result, truth, loss=1e-5, gradient=5e-3 if name == "total_variation" else 2e-5)
    assert not np.any(result[1].values[:, ::3])


def test_poisoned_ignored_rows(kernel):
    labels = cases.some_labels(3, N, 32000)
    student, teacher = heads(32000, jnp.bfloat16)
    spoilt = jnp.where((labels == -100)[:, None], jnp.nan, student.hidden)
    results = [
        run(jaxkd.LinearLogits(hidden, student.weight), teacher, "jensen_shannon", kernel, labels, hard_weight=0.5)
        for hidden in (student.hidden, spoilt)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_identical_models(name, kernel):
    student, _ = heads(32000, jnp.bfloat16)
    (loss, _), gradient = run(student, student, name, kernel)
    assert 0 <= loss <= 1e-6
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient)) < 1e-6


@pytest.mark.parametrize("width", [32000, 128256, 262144])
def test_bitwise_repeatable(width, kernel):
    """Thirty times the same 2048 rows: a race between blocks shows as a row that differs."""
    rows = 2048
    keys = jax.random.split(jax.random.key(0), 2)
    student, teacher = (3 * jax.random.normal(key, (rows, width), jnp.float32) for key in keys)

    @jax.jit
    def value_and_grad(student, teacher):
        def loss(student):
            return jaxkd.distillation_loss(
                jaxkd.Logits(student),
                jaxkd.Logits(teacher),
                divergence=jaxkd.jensen_shannon(0.5),
                temperature=2.0,
                chunk_size=rows,
                implementation=kernel,
            )[0]

        return jax.value_and_grad(loss)(student)

    loss, gradient = value_and_grad(student, teacher)
    differs = jax.jit(lambda a, b: jnp.sum(jnp.any(a != b, axis=1)))
    for _ in range(30):
        again, again_gradient = value_and_grad(student, teacher)
        assert again == loss
        assert differs(again_gradient, gradient) == 0


def lowered(student, teacher, **options):
    def loss(student):
        return jaxkd.distillation_loss(student, teacher, **options)[0]

    return jax.jit(jax.grad(loss)).lower(student).as_text()


def test_mosaic_is_the_default_where_it_can_run():
    needs_hopper()
    assert "mosaic_gpu" in lowered(*heads(32000, jnp.bfloat16))


def test_triton_is_the_default_elsewhere():
    assert "triton" in lowered(*heads(64, jnp.bfloat16))
    assert "triton" in lowered(*heads(32000, jnp.bfloat16, teacher_width=31999), vocabulary="truncate")


def test_a_vocabulary_that_cannot_be_copied_is_filled_up():
    needs_hopper()
    student, teacher = heads(50257, jnp.bfloat16)
    assert "mosaic" in lowered(student, teacher)
    assert "triton" in lowered(student, jaxkd.Logits(teacher.logits()))


def test_the_default_follows_the_device():
    with jax.default_device(jax.devices("cpu")[0]):
        student, teacher = heads(32000, jnp.float32)
        assert np.isfinite(jaxkd.distillation_loss(student, teacher)[0])
        text = lowered(student, teacher)
    assert "mosaic" not in text
    assert "triton" not in text


@pytest.mark.parametrize(("widths", "reason"), [((32000, 32032), "32000.*32032"), ((64, 64), "64")])
def test_mosaic_says_why_it_cannot(widths, reason):
    needs_hopper()
    student, teacher = heads(widths[0], jnp.float32, teacher_width=widths[1])
    with pytest.raises(ValueError, match=f"mosaic.*{reason}"):
        jaxkd.distillation_loss(student, teacher, implementation="mosaic", vocabulary="truncate")


@pytest.mark.parametrize("pieces", [1, 4])
def test_memory_is_that_of_a_chunk(kernel, pieces, monkeypatch):
    rows, width, hidden, size = 4096, 32000, 256, 256
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: size // pieces)
    student, teacher = (
        jaxkd.LinearLogits(
            jax.ShapeDtypeStruct((rows, hidden), jnp.bfloat16), jax.ShapeDtypeStruct((width, hidden), jnp.bfloat16)
        )
        for _ in range(2)
    )

    def loss(student, teacher):
        return jaxkd.distillation_loss(student, teacher, chunk_size=size, implementation=kernel)[0]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(student, teacher).compile()
    chunk = size * width * ((4 + 4) // pieces + 2)  # two float32 logits, one bfloat16 gradient
    head = 4 * width * hidden
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.5 * chunk + 2 * head
