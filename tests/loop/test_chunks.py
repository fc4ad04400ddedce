"""The chunk size is a matter of memory: it changes no number."""

import itertools
from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxprs
import lowering
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxkd
from jaxkd.loop import chunk_size
from jaxkd.loop.chunk_size import rows_of_chunk

DIVERGENCE = "jensen_shannon_0.1"
OPTIONS = {"temperature": 1.5, "hard_weight": 0.5}


def check(rows, vocabulary, chunk_size):
    student = cases.head(0, rows, 8, vocabulary, bias=True).astype(jnp.float32)
    teacher = cases.head(1, rows, 5, vocabulary).astype(jnp.float32)
    labels = cases.some_labels(2, rows, vocabulary, ignored=0.2)
    result = cases.traced_value_and_grad(
        student, teacher, labels, divergence=cases.DIVERGENCES[DIVERGENCE].make(), chunk_size=chunk_size, **OPTIONS
    )
    truth = cases.distillation(cases.twin(student), cases.twin(teacher), labels, divergence=DIVERGENCE, **OPTIONS)
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, *slow(31, 32, 61)])
def test_around_multiples_of_the_chunk(rows):
    check(rows, 123, 16)


@pytest.mark.parametrize("chunk_size", [1, 13, 37, 38, None, *slow(2, 36, 4096)])
def test_any_chunk_size(chunk_size):
    check(37, 123, chunk_size)


@pytest.mark.parametrize("rows", [11, *slow(5, 8)])
def test_ragged_vocabulary_of_a_real_model(rows):
    check(rows, 50257, 4)


@pytest.mark.parametrize("vocabulary", [2, 129, *slow(3, 127, 128)])
def test_vocabularies_around_a_block(vocabulary):
    check(9, vocabulary, 4)


@settings(max_examples=4)
@given(rows=st.integers(1, 40), vocabulary=st.integers(2, 300), chunk_size=st.integers(1, 50))
@example(rows=29, vocabulary=211, chunk_size=7)
def test_any_sizes(rows, vocabulary, chunk_size):
    check(rows, vocabulary, chunk_size)


def test_leading_axes_are_flattened():
    student, teacher = (cases.head(seed, (3, 7), 8, 123) for seed in (0, 1))
    labels, weights = cases.some_labels(2, (3, 7), 123), np.random.default_rng(0).uniform(size=(3, 7))
    flat_student, flat_teacher = (
        x.map(lambda name, value: value.reshape(21, 8) if name == "hidden" else value) for x in (student, teacher)
    )

    def run(student, teacher, labels, weights):
        return cases.traced_value_and_grad(
            student.astype(jnp.float32), teacher.astype(jnp.float32), labels, weights=weights, chunk_size=4
        )

    deep = run(student, teacher, labels, weights)
    flat = run(flat_student, flat_teacher, labels.reshape(-1), weights.reshape(-1))
    assert deep[1].hidden.shape == (3, 7, 8)
    for got, want in zip(jax.tree.leaves(deep), jax.tree.leaves(flat), strict=True):
        np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_one_row_without_leading_axes():
    student, teacher = (cases.head(seed, 1, 8, 123) for seed in (0, 1))
    student, teacher = (
        jaxkd.LinearLogits(x.hidden[0], x.weight) for x in (y.astype(jnp.float32) for y in (student, teacher))
    )
    (loss, metrics), gradient = cases.value_and_grad(student, teacher, jnp.asarray(5), hard_weight=0.5)
    truth = cases.distillation(
        cases.twin(student), cases.twin(teacher), np.asarray(5), divergence="forward_kl", hard_weight=0.5
    )
    cases.check(((loss, metrics), gradient), truth, loss=3e-6, gradient=1e-5)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_no_rows_at_all(shape):
    student, teacher = (cases.head(seed, shape, 8, 123).astype(jnp.float32) for seed in (0, 1))
    (loss, metrics), gradient = cases.value_and_grad(student, teacher)
    assert loss == 0
    assert metrics["num_rows"] == 0
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


SIZES = [5, 6, 7, 12, 16, 37, 4096, None]
QUICK = (
    [(size, jnp.float32, True) for size in (6, 7, 16, 37, None)]
    + [(size, jnp.float32, False) for size in (16, None)]
    + [(size, jnp.bfloat16, True) for size in (7, None)]
)
PIECES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(SIZES, (jnp.float32, jnp.bfloat16), (True, False))
]


class TestPieces:
    """A chunk whose logits are formed a piece at a time."""

    @pytest.fixture(autouse=True)
    def _small_pieces(self, monkeypatch):
        monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 6)

    @pytest.mark.parametrize(("chunk_size", "dtype", "labelled"), PIECES)
    def test_any_chunk_size(self, chunk_size, dtype, labelled):
        student = cases.head(0, 37, 8, 123).astype(dtype)
        teacher = cases.head(1, 37, 5, 123).astype(dtype)
        options = OPTIONS if labelled else {"temperature": 1.5}
        loss = partial(
            jaxkd.distillation_loss,
            divergence=cases.DIVERGENCES[DIVERGENCE].make(),
            chunk_size=chunk_size,
            **options,
        )
        value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
        for ignored in (0.6, 1.0) if labelled else (0.0,):
            labels = cases.some_labels(2, 37, 123, ignored=ignored) if labelled else None
            result = value_and_grad(student, teacher, labels)
            truth = cases.distillation(
                cases.twin(student), cases.twin(teacher), labels, divergence=DIVERGENCE, **options
            )
            cases.check(result, truth, loss=3e-6, gradient=1e-5 if dtype == jnp.float32 else 5e-3)

    @pytest.mark.parametrize("transform", [{"bias": True}, {"scale": 0.5}, {"softcap": 20.0}])
    def test_a_head_that_needs_its_logits_again(self, transform):
        student, teacher = (cases.head(seed, 37, 8, 123, **transform).astype(jnp.float32) for seed in (0, 1))
        result = cases.value_and_grad(student, teacher, divergence=jaxkd.forward_kl, chunk_size=16)
        truth = cases.distillation(cases.twin(student), cases.twin(teacher), divergence="forward_kl")
        cases.check(result, truth, loss=3e-6, gradient=1e-5)

    def test_only_a_piece_of_logits(self):
        student, teacher = (cases.head(seed, 64, 8, 123).astype(jnp.bfloat16) for seed in (0, 1))

        def loss(student):
            return jaxkd.distillation_loss(student, teacher, chunk_size=30)[0]

        jaxpr = jax.make_jaxpr(jax.grad(loss))(student)
        wide = {
            (v.aval.shape[0], v.aval.dtype)
            for x in jaxprs.equations(jaxpr)
            for v in x.outvars
            if v.aval.ndim == 2 and v.aval.shape[1] == 123
        }
        assert max(rows for rows, dtype in wide if dtype == jnp.float32) == 6
        assert max(rows for rows, dtype in wide if dtype == jnp.bfloat16) == 30  # the gradient of the chunk

    def test_a_chunk_is_never_exceeded(self):
        for size in range(1, 60):
            for rows in (1, 5, 31, 64):
                chunks = rows_of_chunk(size, *heads(rows, 123))
                assert chunks.size <= size
                assert chunks.piece <= 6
                assert chunks.size % chunks.piece == 0

    def test_rows_of_ones_own(self):
        student = cases.head(0, 37, 8, 123).astype(jnp.float32)
        labels = cases.some_labels(2, 37, 123, ignored=0.3)

        def of_rows(logits, labels, per_row, shared):
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]

        def loss(student, chunk_size):
            return jaxkd.chunked_loss(of_rows, student, labels, chunk_size=chunk_size)[0]

        value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        pieces, rows = (value_and_grad(student, size) for size in (20, 5))
        for a, b in zip(jax.tree.leaves(pieces), jax.tree.leaves(rows), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def heads(rows, width, hidden=64, dtype=jnp.bfloat16, **transform):
    """A student and a teacher as shapes."""
    shapes = (jax.ShapeDtypeStruct((n, hidden), dtype) for n in (rows, width))
    return (jaxkd.LinearLogits(*shapes, **transform),) * 2


@pytest.fixture
def on_a_gpu():
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=lowering.H100)):
        yield


@pytest.mark.parametrize(
    ("rows", "width", "hidden", "transform", "chunks"),
    [
        (8192, 128256, 4096, {}, (2048, 1024)),
        (65536, 151936, 1024, {}, (2048, 1024)),
        (8192, 262144, 1152, {}, (1024, 512)),
        (8192, 49152, 576, {}, (4096, 1024)),
        (8192, 32000, 1024, {}, (8192, 1024)),
        (1501, 128256, 2048, {}, (1536, 256)),
        (4096, 128256, 4096, {}, (4096, 512)),  # the sum over two chunks would take a quarter of the dense bytes alone
        (300, 128256, 4096, {}, (304, 152)),
        (200, 128256, 4096, {}, (200, 200)),
        (8192, 128256, 4096, {"softcap": 30.0}, (1024, 1024)),
        (65536, 128256, 4096, {"bias": 0.0}, (2048, 2048)),
    ],
)
def test_default_on_a_gpu(rows, width, hidden, transform, chunks, on_a_gpu):
    assert rows_of_chunk(None, *heads(rows, width, hidden, **transform)) == chunks


@pytest.mark.parametrize(
    ("rows", "width", "transform", "chunks"),
    [
        (8192, 49152, {}, (256, 64)),
        (1024, 16384, {}, (128, 128)),
        (512, 151936, {}, (64, 32)),
        (1025, 49152, {}, (114, 57)),
        (20, 262144, {}, (20, 20)),
        (8192, 151936, {"softcap": 30.0}, (32, 32)),
    ],
)
def test_default_on_a_cpu(rows, width, transform, chunks):
    assert rows_of_chunk(None, *heads(rows, width, **transform)) == chunks


@pytest.mark.parametrize(
    ("width", "hidden", "most"),
    [(128256, 4096, 3.0), (151936, 1024, 2.4), (128256, 2048, 2.1), (262144, 1152, 3.6), (49152, 576, 1.4)],
)
def test_bytes_by_default_on_a_gpu(width, hidden, most, on_a_gpu):
    """Of bfloat16: two heads' float32 logits of a piece, a gradient of a chunk, a float32 sum over several chunks.

    The dense formula has both heads' logits and as much for their gradients; ``most`` is in GiB. The largest array that
    fits the gradient of the head, which is returned, lies in its memory until then.
    """
    for rows in (512, 1024, 1500, 2048, 3000, 4096, 5632, 6144, 8192, 12345, 65536):
        size, piece = rows_of_chunk(None, *heads(rows, width, hidden))
        arrays = [4 * width * piece, 4 * width * piece, 2 * width * size, 4 * width * hidden if size < rows else 0]
        planned = sum(arrays)
        assert planned <= 16 * rows * width * (0.5 if rows < 1024 else 0.25)
        in_output = max((x for x in arrays if x <= 2 * width * hidden), default=0)
        assert planned - in_output <= most * 2**30


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [2048, 49152, 151936, 262144])
def test_rows_by_default_on_a_cpu(width, dtype):
    """An eighth at most, so that what XLA makes of a piece is little beside the dense formula's."""
    for rows in (512, 1000, 1024, 1500, 4096, 65536):
        size, piece = rows_of_chunk(None, *heads(rows, width, dtype=dtype))
        assert piece <= size <= rows / 8 + 1
        assert piece <= 32 or piece * width * 4 <= 20 * 2**20
