"""Losses over eight virtual CPU devices, held to those of one."""

import functools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import all_but, only

import jaxkd
from jaxkd.loop import chunk_size

D, D_TEACHER = 16, 24
OPTIONS = {"divergence": jaxkd.jensen_shannon(0.3), "temperature": 2.0, "hard_weight": 0.5, "chunk_size": 3}


def mesh_of(shape, names, kind=AxisType.Auto):
    devices = jax.devices("cpu")[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=devices)


def data(rows, width, teacher_width=None, *, bias=True, scale=0.7, softcap=None):
    """Student, teacher, labels (the first rows all count, later ones rarely) and weights."""
    student = cases.head(0, rows, D, width, bias=bias, scale=scale, softcap=softcap).astype(jnp.float32)
    teacher = cases.head(1, rows, D_TEACHER, teacher_width or width, bias=bias).astype(jnp.float32)
    labels = cases.some_labels(2, rows, width, ignored=0.0)
    labels.reshape(-1)[labels.size // 3 :: 2] = -100
    weights = np.random.default_rng(3).uniform(0.5, 2.0, rows).astype(np.float32)
    return student, teacher, labels, weights


def loss(student, teacher, labels, weights, **options):
    return jaxkd.distillation_loss(student, teacher, labels, weights=weights, **{**OPTIONS, **options})


def value_and_grad(**options):
    return jax.jit(jax.value_and_grad(lambda *arrays: loss(*arrays, **options), has_aux=True))


def check(result, want, tolerance=1e-5):
    """Loss, metrics and each gradient, relative to its largest entry."""
    got, want = (jax.tree_util.tree_leaves_with_path(x) for x in (result, want))
    for (path, x), (_, y) in zip(got, want, strict=True):
        assert x.shape == y.shape
        error = np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0) / np.max(np.abs(np.asarray(y)), initial=1e-9)
        assert error <= tolerance, (jax.tree_util.keystr(path), error)


@pytest.fixture(scope="module")
def one_device():
    """What one device gives, by the arguments of `data`."""
    results = {}

    def result(*key, **options):
        name = key, tuple(options.items())
        if name not in results:
            results[name] = value_and_grad(**options)(*data(*key))
        return results[name]

    return result


# Mesh, axes of the rows, axes of the vocabulary.
LAYOUTS = {
    "rows_1": ((1,), "x", ()),
    "rows_2": ((2,), "x", ()),
    "rows_8": ((8,), "x", ()),
    "rows_8x1": ((8, 1), "x", "y"),
    "vocabulary_4": ((4,), (), "x"),
    "vocabulary_8": ((8,), (), "x"),
    "vocabulary_1x8": ((1, 8), "x", "y"),
    "fsdp_2": ((2,), "x", "x"),
    "fsdp_8": ((8,), "x", "x"),
    "both_2x4": ((2, 4), "x", "y"),
    "both_4x2": ((4, 2), "x", "y"),
    "hybrid_fsdp_2x4": ((2, 4), P(("x", "y")), "y"),
    "fsdp_and_vocabulary_2x4": ((2, 4), "x", ("x", "y")),
}


SLOW = ("rows_1", "rows_2", "vocabulary_4", "vocabulary_1x8", "fsdp_2", "both_4x2")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [slow(x) if x in SLOW else x for x in LAYOUTS])
def test_equals_one_device(name, one_device):
    """With rows and a vocabulary that nothing divides."""
    shape, rows, vocabulary = LAYOUTS[name]
    sharding = jaxkd.Sharding(rows, vocabulary, mesh_of(shape, ("x", "y")[: len(shape)]))
    check(value_and_grad(sharding=sharding)(*data(13, 101)), one_device(13, 101))


@pytest.mark.parametrize(
    "name", ["vocabulary_8", "fsdp_8", "both_2x4", slow("rows_2"), slow("fsdp_and_vocabulary_2x4")]
)
def test_pieces(name, monkeypatch):
    """Logits of a chunk formed a row at a time."""
    arrays = data(26, 101, None, bias=False, scale=None)
    want = value_and_grad(chunk_size=5)(*arrays)
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 1)
    shape, rows, vocabulary = LAYOUTS[name]
    sharding = jaxkd.Sharding(rows, vocabulary, mesh_of(shape, ("x", "y")[: len(shape)]))
    check(value_and_grad(sharding=sharding, chunk_size=4)(*arrays), want)


@pytest.mark.parametrize(("rows", "vocabulary"), [(P("x", "y"), ()), (P("x", "y"), "y"), (P(None, ("x", "y")), "x")])
def test_sequences(rows, vocabulary, one_device):
    """(B, T, D), with B and T split, ragged both."""
    sharding = jaxkd.Sharding(rows, vocabulary, mesh_of((2, 4), ("x", "y")))
    check(value_and_grad(sharding=sharding)(*data((3, 5), 64)), one_device((3, 5), 64))


@pytest.mark.parametrize(
    ("vocabulary", "widths"),
    [("truncate", (97, 120)), ("mask", (120, 97)), slow("truncate", (120, 97)), slow("mask", (97, 120))],
)
def test_vocabularies_of_different_width(vocabulary, widths, one_device):
    sharding = jaxkd.Sharding("x", "y", mesh_of((2, 4), ("x", "y")))
    options = {"vocabulary": vocabulary, "divergence": jaxkd.jensen_shannon(0.5)}
    check(value_and_grad(sharding=sharding, **options)(*data(13, *widths)), one_device(13, *widths, **options))


@pytest.mark.parametrize("divergence", ["reverse_kl", "alpha_divergence", slow("forward_kl"), slow("total_variation")])
def test_divergences(divergence):
    sharding = jaxkd.Sharding("x", "x", mesh_of((8,), ("x",)))
    student, teacher, *_ = data(13, 101, bias=False, scale=None)
    options = {"divergence": cases.DIVERGENCES[divergence].make(), "hard_weight": 0.0}
    arrays = student, teacher, None, None
    check(value_and_grad(sharding=sharding, **options)(*arrays), value_and_grad(**options)(*arrays))


def teachers(teacher):
    log_p = jax.nn.log_softmax(teacher.logits())
    tops = [jaxkd.TopKLogProbs(*jax.lax.top_k(log_p, k)) for k in (7, 4)]
    return {
        "top_k": tops[0],
        "mixture_of_top_k": jaxkd.Mixture(tops, jnp.linspace(0.1, 0.9, 26).reshape(13, 2)),
        "mixture": jaxkd.Mixture((teacher, jaxkd.Logits(log_p[:, ::-1])), jnp.array([0.3, 0.7])),
        "map": jaxkd.VocabularyMap(teacher, jnp.arange(50), jnp.arange(50)[::-1]),
    }


@pytest.mark.parametrize("name", all_but(["top_k", "mixture"], ["top_k", "mixture_of_top_k", "mixture", "map"]))
def test_rows_of_every_teacher(name):
    sharding = jaxkd.Sharding("x", mesh=mesh_of((8,), ("x",)))
    student, teacher, labels, weights = data(13, 101)
    arrays, options = (student, teachers(teacher)[name], labels, weights), {"temperature": 1.0}
    check(value_and_grad(sharding=sharding, **options)(*arrays), value_and_grad(**options)(*arrays))


@pytest.mark.parametrize("name", ["rows_8", "both_2x4"])
def test_logits_that_exist(name):
    shape, rows, vocabulary = LAYOUTS[name]
    sharding = jaxkd.Sharding(rows, vocabulary, mesh_of(shape, ("x", "y")[: len(shape)]))
    student, teacher, labels, weights = data(13, 101)
    arrays = jaxkd.Logits(student.logits()), jaxkd.Logits(teacher.logits()), labels, weights
    check(value_and_grad(sharding=sharding)(*arrays), value_and_grad()(*arrays))


def test_nothing_counts():
    sharding = jaxkd.Sharding("x", "x", mesh_of((8,), ("x",)))
    student, teacher, labels, weights = data(13, 101)
    labels = np.full_like(labels, -100)
    (total, metrics), gradient = value_and_grad(sharding=sharding)(student, teacher, labels, weights)
    assert total == metrics["num_rows"] == 0
    assert all((x == 0).all() for x in jax.tree.leaves(gradient))


def test_label_outside_the_vocabulary_is_nan():
    """101 is a column of the filling."""
    sharding = jaxkd.Sharding("x", "x", mesh_of((8,), ("x",)))
    student, teacher, labels, weights = data(13, 101)
    labels[0] = 101
    assert np.isnan(value_and_grad(sharding=sharding)(student, teacher, labels, weights)[0][0])


@functools.cache
def one_head_and_rows(sharding):
    """The cross-entropy, its metrics, and numbers of rows, as one program."""

    def of(student, teacher, labels, weights):
        options = {"chunk_size": 3, "sharding": sharding}
        loss, metrics = jaxkd.cross_entropy(
            student, labels, label_smoothing=0.2, z_loss=0.1, weights=weights, **options
        )
        rows = {
            "divergences": jaxkd.token_divergences(student, teacher, labels, divergence=jaxkd.reverse_kl, **options),
            "entropies": jaxkd.token_entropies(student, mask=weights > 0.8, temperature=2.0, **options),
            "log_probs": jaxkd.token_log_probs(student, labels, temperature=0.7, **options),
        }
        return loss + sum(jnp.vdot(x, weights) for x in rows.values()), (metrics, rows)

    return jax.jit(jax.value_and_grad(of, has_aux=True))


@pytest.mark.parametrize("name", only(["both_2x4"], ["vocabulary_8", "both_2x4", "rows_8", "fsdp_8"]))
def test_one_head_and_rows(name):
    """With rows and a vocabulary that nothing divides: columns of the filling are no tokens, in no mean of them."""
    shape, rows, vocabulary = LAYOUTS[name]
    sharding = jaxkd.Sharding(rows, vocabulary, mesh_of(shape, ("x", "y")[: len(shape)]))
    arrays = data(13, 101)
    check(one_head_and_rows(sharding)(*arrays), one_head_and_rows(None)(*arrays))
    arrays[2][0] = 101  # a column of the filling
    (_, (_, got)), _ = one_head_and_rows(sharding)(*arrays)
    for label_is_read in ("divergences", "log_probs"):
        np.testing.assert_array_equal(np.isnan(got[label_is_read]), np.arange(13) == 0)


# Shardings of the gradients


def placed(mesh, arrays, head, rows):
    student, teacher, labels, weights = arrays
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    sources = [
        jaxkd.LinearLogits(put(x.hidden, P(rows)), put(x.weight, head), put(x.bias, P()), scale=x.scale)
        for x in (student, teacher)
    ]
    return *sources, put(labels, P(rows)), put(weights, P(rows))


@pytest.mark.parametrize(
    ("kind", "head", "width"),
    [
        (AxisType.Auto, P("y", None), 104),
        (AxisType.Auto, P(None, "y"), 104),
        (AxisType.Auto, P(None, "y"), 101),
        (AxisType.Explicit, P(None, "y"), 101),
        slow(AxisType.Explicit, P("y", None), 104),
        slow(AxisType.Explicit, P(None, "y"), 104),
    ],
)
def test_gradients_are_sharded_as_their_primals(kind, head, width, one_device):
    """Over V, over D, and over D with a vocabulary that does not divide, each on both kinds of mesh axes."""
    mesh = mesh_of((2, 4), ("x", "y"), kind)
    arrays = placed(mesh, data(16, width), head, "x")
    result = value_and_grad(sharding=jaxkd.Sharding("x", "y", mesh))(*arrays)
    check(result, one_device(16, width))
    if kind == AxisType.Auto and width == 104:
        head = P("y", None)  # one that is split over D needs `out_shardings` to be turned back
    for name, spec in (("hidden", P("x", None)), ("weight", head)):
        gradient = getattr(result[1], name)
        assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2), (name, gradient.sharding)


# Inside the caller's shard_map


INSIDE = [(name, False) for name in ("fsdp_8", "both_2x4", "hybrid_fsdp_2x4")]
INSIDE += [(name, True) for name in ("both_2x4", "fsdp_8")]
INSIDE += [slow(name, False) for name in ("rows_8", "vocabulary_8")]  # as `test_layouts.py` has them


@pytest.mark.parametrize(("name", "outside"), INSIDE)
def test_inside_of_shard_map(name, outside, one_device):
    """Differentiated inside or outside of it, with replicated and with split arrays."""
    shape, rows, vocabulary = LAYOUTS[name]
    sharding = jaxkd.Sharding(rows, vocabulary)
    by_row, by_column = rows if isinstance(rows, P) else P(rows or None), P(vocabulary or None)
    student = jaxkd.LinearLogits(by_row, by_column, by_column, scale=P())
    in_specs = student, jaxkd.LinearLogits(by_row, by_column, by_column), by_row, by_row

    def local(*arrays):
        return loss(*arrays, sharding=sharding)

    differentiate = lambda f: jax.value_and_grad(f, has_aux=True)  # noqa: E731
    mapped = jax.shard_map(
        local if outside else differentiate(local),
        mesh=mesh_of(shape, ("x", "y")[: len(shape)]),
        in_specs=in_specs,
        out_specs=P() if outside else ((P(), P()), student),
    )
    check(jax.jit(differentiate(mapped) if outside else mapped)(*data(16, 104)), one_device(16, 104))


def test_one_device_s_loss_inside_of_shard_map():
    """Without `sharding` the loss is that of a shard, and its gradient sums over what is replicated."""
    student, teacher, labels, weights = data(16, 104)
    shards = jaxkd.LinearLogits(P("x"), P(), P(), scale=P())

    def mean(*arrays):
        return jax.lax.pmean(loss(*arrays, normalizer=2.0)[0], "x")

    in_specs = shards, jaxkd.LinearLogits(P("x"), P(), P()), P("x"), P("x")
    mapped = jax.shard_map(jax.grad(mean), mesh=mesh_of((8,), ("x",)), in_specs=in_specs, out_specs=shards)
    _, want = value_and_grad(normalizer=16.0)(student, teacher, labels, weights)
    check(jax.jit(mapped)(student, teacher, labels, weights), want)


def test_unchecked_shard_map_is_not_differentiated():
    mapped = jax.shard_map(
        jax.grad(lambda *arrays: loss(*arrays, sharding=jaxkd.Sharding("x"))[0]),
        mesh=mesh_of((8,), ("x",)),
        in_specs=(P("x"), P("x"), P("x"), P("x")),
        out_specs=P("x"),
        check_vma=False,
    )
    student, teacher, labels, weights = data(16, 104)
    with pytest.raises(ValueError, match="check_vma"):
        jax.eval_shape(mapped, jaxkd.Logits(student.logits()), jaxkd.Logits(teacher.logits()), labels, weights)


# What moves between devices, and what a device holds


ROWS, WIDTH, CHUNK = 1024, 2048, 16


def compiled(mesh, rows, vocabulary, head, rows_spec):
    """The program of one device, for arrays that are split so."""

    def array(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    student, teacher = (
        jaxkd.LinearLogits(array((ROWS, size), P(rows_spec)), array((WIDTH, size), head)) for size in (D, D_TEACHER)
    )
    labels, weights = array((ROWS,), P(rows_spec), jnp.int32), array((ROWS,), P(rows_spec))
    function = value_and_grad(sharding=jaxkd.Sharding(rows, vocabulary, mesh), chunk_size=CHUNK)
    return function.lower(student, teacher, labels, weights).compile()


def collectives(text):
    """(kind, the shapes of its results) of each collective of a compiled program."""
    pattern = r"= (\S.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    return [
        (kind, tuple(int(n) for n in shape.split(",") if n))
        for shapes, kind in re.findall(pattern, text)
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]


def shapes(text):
    return {tuple(int(n) for n in shape.split(",") if n) for shape in re.findall(r"[a-z]\d+\[([\d,]*)\]", text)}


def test_rows_move_the_head_s_gradient_once():
    text = compiled(mesh_of((8,), ("x",)), "x", (), P(), "x").as_text()
    moved = collectives(text)
    assert {kind for kind, _ in moved} == {"all-reduce"}
    assert {shape for _, shape in moved} == {(), (WIDTH, D)}
    assert max(np.prod(shape) for shape in shapes(text) if WIDTH in shape) == max(CHUNK, D_TEACHER) * WIDTH


@pytest.mark.parametrize("head", [P("x", None), P(None, "x")])
def test_vocabulary_moves_vectors_and_hidden_gradients(head):
    text = compiled(mesh_of((8,), ("x",)), (), "x", head, None).as_text()
    moved = collectives(text)
    reduced = {shape for kind, shape in moved if kind == "all-reduce"}
    assert reduced <= {(), (CHUNK,), (CHUNK, 1), (CHUNK, D)}
    assert (CHUNK, D) in reduced
    assert_no_whole_head(text, moved, split_over_v=head == P("x", None))


@pytest.mark.parametrize("head", [P("x", None), P(None, "x")])
def test_fsdp_gathers_a_chunk_s_rows(head):
    text = compiled(mesh_of((8,), ("x",)), "x", "x", head, "x").as_text()
    moved = collectives(text)
    gathered = {shape for kind, shape in moved if kind == "all-gather"}
    assert gathered == {(8 * CHUNK, D), (8 * CHUNK, D_TEACHER), (8 * CHUNK,)}
    assert {shape for kind, shape in moved if kind == "reduce-scatter"} == {(CHUNK, D)}
    assert {shape for kind, shape in moved if kind == "all-reduce"} <= {(), (8 * CHUNK,), (8 * CHUNK, 1)}
    assert_no_whole_head(text, moved, split_over_v=head == P("x", None))


def assert_no_whole_head(text, moved, split_over_v):
    """A head that is split over D is turned by an all-to-all of a device's part; no array has V columns."""
    turned = [shape for kind, shape in moved if kind in ("all-to-all", "collective-permute")]
    assert bool(turned) != split_over_v
    # A piece of an all-to-all is what one device sends another.
    assert all(np.prod(shape) <= WIDTH // 8 * D_TEACHER // 8 for shape in turned)
    if split_over_v:
        assert not [shape for shape in shapes(text) if WIDTH in shape]
    assert max(np.prod(shape) for shape in shapes(text) if len(shape) > 1) <= 8 * CHUNK * WIDTH // 8


def test_memory_of_a_device():
    """Logits and head of a device are an eighth."""

    def temporary(*arguments):
        return compiled(*arguments).memory_analysis().temp_size_in_bytes

    alone = temporary(mesh_of((1,), ("x",)), "x", (), P(), None)
    vocabulary = temporary(mesh_of((8,), ("x",)), (), "x", P("x", None), None)
    assert vocabulary < alone / 4


@pytest.mark.parametrize(("rows", "vocabulary"), [("x", "y"), (P(("x", "y")), "y")])
def test_a_mask_of_the_soft_loss(rows, vocabulary):
    """Two sets of rows, each divided by a sum over all devices; some devices have no row of one of them."""
    student, teacher, labels, weights = data(13, 101)
    mask = np.arange(13) % 3 > 0
    mask[:6] = False

    def of(sharding):
        options = {**OPTIONS, "sharding": sharding, "weights": weights, "mask": mask}
        return jax.jit(jax.value_and_grad(lambda *x: jaxkd.distillation_loss(*x, labels, **options), has_aux=True))

    sharding = jaxkd.Sharding(rows, vocabulary, mesh_of((2, 4), ("x", "y")))
    check(of(sharding)(student, teacher), of(None)(student, teacher))
