"""A teacher for each row: float64 truth, a one-hot mixture, how many rows go through a head, and what is refused."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sweeps import only

import jaxkd
from jaxkd.kernels import pallas_triton
from jaxkd.teachers.routed import rows_together

N, D, V, CHUNK = 29, 8, 61, 9
STUDENT = cases.head(0, N, D, V)
TEACHERS = [cases.head(1, N, 6, V, bias=True), cases.head(2, N, 9, V), cases.head(3, N, D, V, softcap=5.0)]
LABELS = cases.some_labels(4, N, V, ignored=0.4)
INDEX = np.random.default_rng(5).integers(0, 3, N)
INDEX[:5] = 1
WEIGHTS = np.random.default_rng(6).uniform(0.5, 2.0, N)


def of_rows(index, head, number):
    """NaN in the rows that are another teacher's."""
    return head.map(lambda f, x: np.where((index == number)[:, None], x, np.nan) if f == "hidden" else x)


def run(index, dtype=jnp.float32, labels=LABELS, **options):
    teachers = [of_rows(index, x, i).astype(dtype) for i, x in enumerate(TEACHERS)]
    return loss_and_gradient(STUDENT.astype(dtype), jaxkd.Routed(teachers, index), labels, **options)


@partial(jax.jit, static_argnames=("implementation", "sharding", "vocabulary", "chunk_size"))
def loss_and_gradient(student, teacher, labels, chunk_size=CHUNK, **options):
    """((loss, metrics), gradient to the student), with all numbers traced: one program for many tests."""
    return jax.value_and_grad(jaxkd.distillation_loss, has_aux=True)(
        student, teacher, labels, chunk_size=chunk_size, **options
    )


INDICES = {
    "mixed": INDEX,
    "in order": np.sort(INDEX),
    "one alone": np.full(N, 2),
    "negative": np.where(LABELS == -100, -1, INDEX),
}


@pytest.mark.parametrize("name", ["jensen_shannon_0.1", "reverse_kl"])
@pytest.mark.parametrize("order", INDICES)
def test_float64(name, order, x64):
    """Loss, parts and gradients, with a hard loss, weights, and rows that do not count."""
    index = INDICES[order]
    options = {"temperature": 1.5, "hard_weight": 0.5, "weights": WEIGHTS}
    got = run(index, jnp.float64, divergence=cases.DIVERGENCES[name].make(), **options)
    logits = np.stack([x.logits for x in TEACHERS])[np.maximum(index, 0), np.arange(N)]
    cases.check(
        got, cases.distillation(STUDENT, logits, LABELS, divergence=name, **options), loss=1e-11, gradient=1e-10
    )


@pytest.mark.parametrize("chunk_size", only((4,), (1, 4, N, 1000)))
def test_a_one_hot_mixture(chunk_size):
    student, teachers = STUDENT.astype(jnp.float32), [x.astype(jnp.float32) for x in TEACHERS]
    (want, _), want_gradient = loss_and_gradient(student, jaxkd.Mixture(teachers, jax.nn.one_hot(INDEX, 3)), LABELS)
    (got, _), gradient = run(INDEX, chunk_size=chunk_size)
    assert float(got) == pytest.approx(float(want), rel=2e-6)
    assert cases.relative_error(gradient.weight, want_gradient.weight) < 3e-6


def test_each_row_s_divergence_and_whole_rows_of_logits():
    """`token_divergences` forms the logits twice; a divergence of logits themselves sees those of the teacher."""
    student, teachers = STUDENT.astype(jnp.float32), [x.astype(jnp.float32) for x in TEACHERS]

    @jax.jit
    def values(student, teacher):
        values = jaxkd.token_divergences(student, teacher, chunk_size=CHUNK)
        return jnp.vdot(values, WEIGHTS), values

    (_, got), gradient = jax.value_and_grad(values, has_aux=True)(student, jaxkd.Routed(teachers, INDEX))
    dense = np.stack([x.logits for x in TEACHERS])[INDEX, np.arange(N)]
    (_, want), want_gradient = jax.value_and_grad(values, has_aux=True)(student, jaxkd.Logits(jnp.float32(dense)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert cases.relative_error(gradient.weight, want_gradient.weight) < 1e-5
    loss = jaxkd.distillation_loss(student, jaxkd.Routed(teachers, INDEX), divergence=jaxkd.mse, chunk_size=CHUNK)[0]
    assert float(loss) == pytest.approx(np.square(dense - STUDENT.logits).mean(), rel=1e-5)


def test_an_index_that_is_traced_and_names_no_teacher():
    """NaN where the row counts, and one program for all."""
    teachers, student = [x.astype(jnp.float32) for x in TEACHERS], STUDENT.astype(jnp.float32)
    traces = []

    @jax.jit
    def loss(index):
        traces.append(1)
        return jaxkd.distillation_loss(student, jaxkd.Routed(teachers, index), LABELS, chunk_size=CHUNK)[0]

    counted, ignored = np.flatnonzero(LABELS != -100)[0], np.flatnonzero(LABELS == -100)[0]
    assert np.isfinite(loss(INDEX))
    for wrong in (-1, 3, 1000):
        for row, is_nan in ((counted, True), (ignored, False)):
            index = INDEX.copy()
            index[row] = wrong
            assert np.isnan(loss(index)) == is_nan
    assert len(traces) == 1


class Counting(jaxkd.LinearLogits):
    """A head that keeps count of the rows that go through it when the program runs."""

    rows: list[int] = []  # noqa: RUF012

    def logits(self):
        jax.debug.callback(self.rows.append, self.hidden.shape[0])
        return super().logits()


jax.tree_util.register_dataclass(
    Counting, ["hidden", "weight", "bias", "low_rank", "scale", "softcap"], [], drop_fields=["_"]
)


def rows_through_heads(teacher, rows, chunk_size):
    Counting.rows.clear()
    student = cases.head(0, rows, D, V).astype(jnp.float32)
    jax.block_until_ready(jaxkd.distillation_loss(student, teacher, chunk_size=chunk_size))
    jax.effects_barrier()
    return sum(map(int, Counting.rows))


@pytest.mark.parametrize("order", [np.asarray, np.sort])
def test_rows_go_through_one_head(order):
    """Not one product more than blocks waste: a mixture takes as many as there are teachers."""
    count, rows, chunk_size = 4, 256, 64
    heads = [vars(cases.head(i, rows, D, V).astype(jnp.float32)) for i in range(count)]
    teachers = [Counting(**fields) for fields in heads]
    index = order(np.random.default_rng(7).integers(0, count, rows))
    routed = rows_through_heads(jaxkd.Routed(teachers, index), rows, chunk_size)
    assert rows <= routed < 1.5 * rows
    assert rows_through_heads(jaxkd.Mixture(teachers, jax.nn.one_hot(index, count)), rows, chunk_size) == count * rows


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100, 1024, 5000])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
def test_blocks_waste_less_than_half(size, count):
    together = rows_together(size, count)
    assert 1 <= together <= 256
    assert count * (together - 1) < max(size, 1) / 2


def test_kernels_take_it(monkeypatch):
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    options = {"divergence": jaxkd.jensen_shannon(0.3), "temperature": 1.5}
    kernel, xla = (run(INDEX, implementation=name, **options) for name in ("triton", "xla"))
    np.testing.assert_allclose(kernel[0][0], xla[0][0], rtol=3e-6)
    assert cases.relative_error(kernel[1].weight, xla[1].weight) < 1e-5


def test_bfloat16_logits_that_exist_and_a_shared_array_of_hidden_states():
    hidden = TEACHERS[2].hidden
    heads = [x.map(lambda f, x: hidden if f == "hidden" else x) for x in (STUDENT, TEACHERS[2])]
    rounded = [x.astype(jnp.bfloat16) for x in heads]
    teachers = [*rounded, jaxkd.Logits(jnp.asarray(TEACHERS[0].logits, jnp.bfloat16))]
    student = STUDENT.astype(jnp.bfloat16)
    (loss, _), gradient = loss_and_gradient(student, jaxkd.Routed(teachers, INDEX), None)
    dense = [cases.twin(x).logits for x in rounded] + [np.float64(teachers[2].values)]
    logits = np.stack(dense)[INDEX, np.arange(N)]
    want = cases.distillation(cases.twin(student), logits, divergence="forward_kl")
    assert float(loss) == pytest.approx(want.loss, rel=1e-4)
    assert cases.relative_error(gradient.weight, want.gradient.weight) < 5e-3


def test_no_more_than_a_chunk_of_logits():
    rows, width, chunk_size = 96, 1009, 16
    student, *teachers = (cases.head(i, rows, size, width).astype(jnp.float32) for i, size in enumerate((40, 24, 48)))

    def loss(student, teachers, index):
        return jaxkd.distillation_loss(student, jaxkd.Routed(teachers, index), chunk_size=chunk_size)[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(student, teachers, jnp.zeros(rows, int))
    heads = {shape for size in (40, 24, 48) for shape in ((width, size), (size, width))}
    assert jaxprs.most_rows(jaxpr, width, heads) == chunk_size
    assert len(jaxprs.products(jaxpr)) == 5


LAYOUTS = {
    "rows": ((8,), "x", ()),
    "vocabulary": ((8,), (), "x"),
    "fsdp": ((8,), "x", "x"),
    "both": ((2, 4), "x", "y"),
}


@pytest.mark.parametrize("name", only(("fsdp", "both"), LAYOUTS))
def test_many_devices(name):
    """Devices whose rows have other teachers are not in step, and need not be."""
    shape, rows, vocabulary = LAYOUTS[name]
    names = ("x", "y")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices("cpu")[:8])
    index = np.sort(INDEX)
    want = run(index, temperature=1.5)
    got = run(index, temperature=1.5, chunk_size=3, sharding=jaxkd.Sharding(rows, vocabulary, mesh))
    np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-5)
    assert cases.relative_error(got[1].weight, want[1].weight) < 1e-5
    assert cases.relative_error(got[1].hidden, want[1].hidden) < 1e-5


def test_inside_a_shard_map():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    heads = [x.astype(jnp.float32) for x in TEACHERS]
    arrays = jnp.asarray(STUDENT.hidden[:28], jnp.float32), [x.hidden[:28] for x in heads], jnp.asarray(INDEX[:28])

    def loss(hidden, hiddens, index, **options):
        teachers = [jaxkd.LinearLogits(h, x.weight) for h, x in zip(hiddens, heads, strict=True)]
        student = jaxkd.LinearLogits(hidden, jnp.asarray(STUDENT.weight, jnp.float32))
        return jaxkd.distillation_loss(student, jaxkd.Routed(teachers, index), chunk_size=5, **options)[0]

    mapped = jax.shard_map(partial(loss, sharding=jaxkd.Sharding("x")), in_specs=(P("x"),) * 3, out_specs=P())
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(mapped))(*arrays)
    want = jax.jit(jax.value_and_grad(loss))(*arrays)
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)
    assert cases.relative_error(got[1], want[1]) < 1e-5


def test_vmap_checkpoint_and_forward_over_reverse():
    """The number of blocks is known at run time alone, which only the reverse mode could not go through."""
    heads, hidden = [x.astype(jnp.float32) for x in TEACHERS], jnp.asarray(STUDENT.hidden, jnp.float32)

    def loss(hidden, index, kind):
        teacher = kind(heads, index if kind is jaxkd.Routed else jax.nn.one_hot(index, 3))
        student = jaxkd.LinearLogits(hidden, jnp.asarray(STUDENT.weight, jnp.float32))
        return jaxkd.distillation_loss(student, teacher, LABELS, chunk_size=CHUNK)[0]

    def results(kind):
        of = partial(loss, kind=kind)
        both = jnp.stack([INDEX, INDEX[::-1]])
        return (
            jax.vmap(jax.grad(of), in_axes=(None, 0))(hidden, both),
            jax.grad(jax.checkpoint(of))(hidden, both[0]),
            jax.jvp(lambda x: jax.grad(of)(x, both[0]), (hidden,), (hidden,))[1],
        )

    routed, mixed = (jax.jit(partial(results, kind))() for kind in (jaxkd.Routed, jaxkd.Mixture))
    for x, y in zip(routed, mixed, strict=True):
        assert cases.relative_error(x, y) < 1e-5


def test_no_gradient_to_the_teachers():
    student, teachers = STUDENT.astype(jnp.float32), [x.astype(jnp.float32) for x in TEACHERS]
    loss = jax.jit(jax.grad(lambda x: jaxkd.distillation_loss(student, jaxkd.Routed(x, INDEX), chunk_size=CHUNK)[0]))
    assert not any(np.any(x) for x in jax.tree.leaves(loss(teachers)))


ONE, OTHER = jaxkd.Logits(jnp.ones((2, 5))), jaxkd.Logits(jnp.ones((2, 7)))
FIRST = np.zeros(2, int)
BAD = [
    (lambda: jaxkd.Routed([], FIRST), ValueError, "`teacher.teachers` is empty"),
    (lambda: jaxkd.Routed(ONE, FIRST), TypeError, "`teacher.teachers` is a Logits.*list"),
    (lambda: jaxkd.Routed([ONE, jnp.ones((2, 5))], FIRST), TypeError, r"`teacher.teachers\[1\]`.*LinearLogits"),
    (lambda: jaxkd.Routed([ONE, OTHER], FIRST), ValueError, r"`teacher.teachers\[1\]` has V=7.*V=5.*tokenizer"),
    (lambda: jaxkd.Routed([ONE], FIRST[:1]), ValueError, r"`teacher.index`.*\(1,\).*teachers\[0\].values.*\(2,\)"),
    (lambda: jaxkd.Routed([ONE], np.zeros(2, np.float32)), TypeError, "`teacher.index` is float32; give integers"),
    (lambda: jaxkd.Routed([ONE], [0, 0]), TypeError, "`teacher.index` is a list; give an array"),
    (
        lambda: jaxkd.Routed([ONE] * 2, FIRST + 2),
        ValueError,
        "`teacher.index` has 2 but there are 2 teachers; give 0 to 1",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        jaxkd.distillation_loss(ONE, make())
