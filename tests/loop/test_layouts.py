"""Every loss of rows over every layout of eight virtual CPU devices, held to one device."""

import functools
import math
import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkd
from jaxkd.loop import chunk_size

B, T, D, D_TEACHER, V, CHUNK, RANK = 8, 6, 16, 24, 40, 2, 3


def mesh_of(shape, names, kind):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=jax.devices("cpu")[: math.prod(shape)])


def arrays():
    """(B, T) rows of which some do not count, the first ones all do, so that devices have different numbers."""
    student = cases.head(0, (B, T), D, V, bias=True).astype(jnp.float32)
    teacher = cases.head(1, (B, T), D_TEACHER, V, bias=True).astype(jnp.float32)
    labels = cases.some_labels(2, (B, T), V, ignored=0.0)
    labels.reshape(-1)[labels.size // 3 :: 2] = -100
    rng = np.random.default_rng(3)
    weights = rng.uniform(0.5, 2.0, (B, T)).astype(np.float32)
    upstream = rng.uniform(0.5, 2.0, (B, T)).astype(np.float32)
    return {
        "hidden": student.hidden,
        "weight": student.weight,
        "bias": student.bias,
        "down": jnp.asarray(rng.normal(size=(D, RANK)) / 4, jnp.float32),
        "up": jnp.asarray(rng.normal(size=(RANK, V)) / 2, jnp.float32),
        "teacher_hidden": teacher.hidden,
        "teacher_weight": teacher.weight,
        "labels": jnp.asarray(labels),
        "weights": jnp.asarray(weights),
        "upstream": jnp.asarray(upstream),
    }


DIFFERENTIATED = ("hidden", "weight", "bias", "down", "up")


def models(x):
    student = jaxkd.LinearLogits(x["hidden"], x["weight"], x["bias"])
    return student, jaxkd.LinearLogits(x["teacher_hidden"], x["teacher_weight"])


def squares(logits, labels, per_row, shared):
    teacher, factor = per_row
    value = factor * jnp.mean((logits - teacher) ** 2, axis=1)
    return value, {"largest": jnp.max(logits, axis=1)}


# Each gives a scalar that is differentiated, and numbers that only have to be the same. `total` makes of a sum over the
# rows of a device the sum over all.


def distillation(divergence, x, total, **options):
    student, teacher = models(x)
    return jaxkd.distillation_loss(
        student, teacher, x["labels"], divergence=divergence, hard_weight=0.5, weights=x["weights"], **options
    )


def low_rank(x, total, **options):
    student = jaxkd.LinearLogits(x["hidden"], x["weight"], x["bias"], low_rank=(x["down"], x["up"]))
    return jaxkd.distillation_loss(student, models(x)[1], x["labels"], weights=x["weights"], **options)


def all_rows(x, total, **options):
    student, teacher = models(x)
    return jaxkd.distillation_loss(student, teacher, divergence=jaxkd.jensen_shannon(), **options)


def log_probs(x, total, **options):
    values = jaxkd.token_log_probs(models(x)[0], x["labels"], **options)
    return total(jnp.sum(values * x["upstream"])), {"rows": values}


def cross_entropy(x, total, **options):
    options |= {"label_smoothing": 0.1, "z_loss": 0.1, "weights": x["weights"]}
    return jaxkd.cross_entropy(models(x)[0], x["labels"], **options)


def divergences(x, total, **options):
    student, teacher = models(x)
    options |= {"divergence": jaxkd.jensen_shannon(0.3), "mask": x["weights"] > 0.7}
    values = jaxkd.token_divergences(student, teacher, x["labels"], **options)
    return total(jnp.sum(values * x["upstream"])), {"rows": values}


def entropies(x, total, **options):
    values = jaxkd.token_entropies(models(x)[0], mask=x["labels"] != -100, **options)
    return total(jnp.sum(values * x["upstream"])), {"rows": values}


def own_rows(x, total, **options):
    student, teacher = models(x)
    values = jaxkd.chunked_rows(gap, student, x["labels"], per_row=(teacher, x["weights"]), **options)
    return total(jnp.sum(values * x["upstream"])), {"rows": values}


def gap(*arguments):
    return squares(*arguments)[0]


def statistics(x, total, **options):
    student, teacher = models(x)
    return total(0.0 * jnp.sum(x["hidden"])), jaxkd.token_statistics(
        student, x["labels"], teacher, divergence=jaxkd.reverse_kl, **options
    )


def own(labelled, x, total, **options):
    student, teacher = models(x)
    chosen = (x["labels"],) if labelled else ()
    return jaxkd.chunked_loss(squares, student, *chosen, per_row=(teacher, x["weights"]), **options)


def hidden(loss, labelled, x, total, **options):
    labels = x["labels"] if labelled else None
    return loss(x["hidden"], x["teacher_hidden"][..., :D], labels, **options)


def projected(loss, x, total, **options):
    return loss(x["hidden"], x["teacher_hidden"], x["labels"], projection=x["weight"][:D_TEACHER], **options)


SUMS = {  # over tokens: the vocabulary may be split
    "jensen_shannon": partial(distillation, jaxkd.jensen_shannon(0.3)),
    "all_rows": all_rows,
    "low_rank": low_rank,
    "cross_entropy": cross_entropy,
    "token_divergences": divergences,
    "token_entropies": entropies,
    "token_log_probs": log_probs,
    "token_statistics": statistics,
}
WHOLE = {
    "cosine_distance": partial(distillation, jaxkd.cosine_distance),
    "chunked_loss": partial(own, True),
    "chunked_rows": own_rows,
    "chunked_loss_all_rows": partial(own, False),
    "hidden_cosine": partial(hidden, jaxkd.hidden_cosine, True),
    "hidden_mse_all_rows": partial(hidden, jaxkd.hidden_mse, False),
    "hidden_mse_projected": partial(projected, jaxkd.hidden_mse),
}

GIVE_ROWS = ("token_log_probs", "token_divergences", "token_entropies", "token_statistics", "chunked_rows")

# The mesh; the axes of B, of T and of the vocabulary.
LAYOUTS = {
    "rows": ((8,), ("data",), ("data",), (), ()),
    "rows of both axes": ((4, 2), ("data", "sequence"), ("data",), ("sequence",), ()),
    "vocabulary": ((8,), ("model",), (), (), ("model",)),
    "rows and vocabulary": ((2, 4), ("data", "model"), ("data",), (), ("model",)),
    "FSDP": ((4, 2), ("fsdp", "sequence"), ("fsdp",), ("sequence",), ("fsdp",)),
}
KINDS = ("Auto", "Explicit", "own shard_map")


def slow_unless(chosen, *values):
    return pytest.param(*values, marks=[] if chosen else [pytest.mark.slow])


def table():
    """All that there is; a sixth stays when slow tests are left out: each loss, each layout with each kind."""
    for i, (layout, (*_, vocabulary)) in enumerate(LAYOUTS.items()):
        for j, loss in enumerate(SUMS if vocabulary else SUMS | WHOLE):
            for k, kind in enumerate(KINDS):
                yield slow_unless((i + j + k) % 3 == 0 and (i + j // 3) % 2 == 0, loss, layout, kind)


REST_OF_WORK = [x for x in SUMS | WHOLE if x not in ("jensen_shannon", "token_log_probs", "chunked_loss")]


def specs_of(batch, sequence, vocabulary):
    rows = (batch or None, sequence or None)
    of_head = P(vocabulary or None)
    return {
        "hidden": P(*rows),
        "weight": of_head,
        "bias": of_head,
        "down": P(),
        "up": P(None, vocabulary or None),
        "teacher_hidden": P(*rows),
        "teacher_weight": of_head,
        "labels": P(*rows),
        "weights": P(*rows),
        "upstream": P(*rows),
    }


def value_and_gradients(loss, total=lambda x: x, **options):
    def of(x):
        def scalar(trained):
            return loss(x | trained, total, **{"chunk_size": CHUNK} | options)

        return jax.value_and_grad(scalar, has_aux=True)({name: x[name] for name in DIFFERENTIATED})

    return of


def assert_same(got, want):
    for path, x in jax.tree_util.tree_leaves_with_path(want):
        y = got
        for key in path:
            y = y[getattr(key, "key", getattr(key, "idx", None))]
        scale = float(jnp.max(jnp.abs(x))) or 1.0
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(y), np.asarray(x), rtol=0, atol=1e-5 * scale, err_msg=name)


def sharding_of(batch, sequence, vocabulary, mesh=None):
    return jaxkd.Sharding(P(batch or None, sequence or None), vocabulary, mesh)


@functools.cache
def on_one_device(name):
    return jax.jit(value_and_gradients((SUMS | WHOLE)[name]))(arrays())


@pytest.mark.parametrize(("name", "layout", "kind"), list(table()))
def test_layouts(name, layout, kind):
    shape, names, *axes = LAYOUTS[layout]
    loss, x = (SUMS | WHOLE)[name], arrays()
    mesh = mesh_of(shape, names, AxisType.Explicit if kind == "Explicit" else AxisType.Auto)
    specs = specs_of(*axes)
    placed = {key: jax.device_put(v, NamedSharding(mesh, specs[key])) for key, v in x.items()}
    if kind == "Auto":
        got = jax.jit(value_and_gradients(loss, sharding=sharding_of(*axes, mesh)))(placed)
    elif kind == "Explicit":  # nothing is said
        with jax.set_mesh(mesh):
            got = jax.jit(value_and_gradients(loss))(placed)
    else:
        batch, sequence, _ = axes
        row_axes = tuple(dict.fromkeys((*batch, *sequence)))
        total = partial(jax.lax.psum, axis_name=row_axes) if row_axes else lambda v: v
        of = value_and_gradients(loss, total, sharding=sharding_of(*axes))
        auxiliary = P(batch or None, sequence or None) if name in GIVE_ROWS else P()
        out_specs = ((P(), auxiliary), {key: specs[key] for key in DIFFERENTIATED})
        got = jax.jit(jax.shard_map(of, mesh=mesh, in_specs=(specs,), out_specs=out_specs))(placed)
    assert_same(got, on_one_device(name))


FEW = ("jensen_shannon", "token_log_probs", "cosine_distance", "chunked_loss", "hidden_cosine")


@pytest.mark.parametrize("name", [slow_unless(name in FEW, name) for name in SUMS | WHOLE])
def test_a_shard_map_that_says_nothing(name):
    """Without `sharding` in the caller's shard_map each device has the loss of its own rows, and gradients exist."""
    loss, x, mesh = (SUMS | WHOLE)[name], arrays(), mesh_of((2,), ("data",), AxisType.Auto)
    of_rows = {key: P("data") if v.shape[:2] == (B, T) else P() for key, v in x.items()}

    def total(x, sum_over_devices):
        def scalar(trained):
            return sum_over_devices(loss(x | trained, lambda v: v, chunk_size=CHUNK)[0])

        return jax.value_and_grad(scalar)({key: x[key] for key in DIFFERENTIATED})

    out_specs = P(), {key: of_rows[key] for key in DIFFERENTIATED}
    mapped = jax.shard_map(
        partial(total, sum_over_devices=lambda v: jax.lax.psum(v, "data")),
        mesh=mesh,
        in_specs=(of_rows,),
        out_specs=out_specs,
    )
    value, gradients = jax.jit(mapped)(x)
    alone = jax.jit(partial(total, sum_over_devices=lambda v: v))
    halves = [
        alone({k: v[i : i + B // 2] if of_rows[k] == P("data") else v for k, v in x.items()}) for i in (0, B // 2)
    ]
    np.testing.assert_allclose(value, halves[0][0] + halves[1][0], rtol=1e-5, atol=1e-6)
    for key, got in gradients.items():
        parts = [half[1][key] for half in halves]
        want = jnp.concatenate(parts) if of_rows[key] == P("data") else parts[0] + parts[1]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(want))) + 1e-9, err_msg=key)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("jensen_shannon", "rows"),
        ("jensen_shannon", "vocabulary"),
        ("token_log_probs", "rows"),
        ("chunked_loss", "rows"),
    ]
    + [pytest.param(name, "rows", marks=pytest.mark.slow) for name in REST_OF_WORK]
    + [pytest.param(name, "vocabulary", marks=pytest.mark.slow) for name in SUMS if name != "jensen_shannon"],
)
def test_work_is_shared(name, layout, monkeypatch):
    """A device has an eighth of the work and of the temporaries, and no array of all rows nor a whole head."""
    shape, names, *axes = LAYOUTS[layout]
    loss, rows, width = (SUMS | WHOLE)[name], (512, 8), 1024
    head = {"weight": (width, D), "bias": (width,), "teacher_weight": (width, D_TEACHER)}
    head |= {"down": (D, RANK), "up": (RANK, width)}
    states = {"hidden": (*rows, D), "teacher_hidden": (*rows, D_TEACHER), "weights": rows, "upstream": rows}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in (head | states).items()}
    shapes["labels"] = jax.ShapeDtypeStruct(rows, jnp.int32)
    mesh, specs = mesh_of(shape, names, AxisType.Auto), specs_of(*axes)
    placed = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, x in shapes.items()
    }

    def compiled(sharding, x):
        def of(x):
            if name == "token_statistics":  # has no gradient
                return loss(x, lambda v: v, chunk_size=4096, sharding=sharding)[1]
            return value_and_gradients(loss, chunk_size=4096, sharding=sharding)(x)

        return jax.jit(of).lower(x).compile()

    # All rows at once: of a loop the analysis counts one pass, which has as many rows on eight devices as on one.
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 4096)
    one, device = compiled(None, shapes), compiled(sharding_of(*axes, mesh), placed)
    flops = [x.cost_analysis()["flops"] for x in (one, device)]
    temporaries = [x.memory_analysis().temp_size_in_bytes for x in (one, device)]
    assert 0 < flops[1] < flops[0] / 6, flops
    assert temporaries[1] < temporaries[0] / 6, temporaries
    # What must not be on a device: (all rows, its columns), (its rows, all columns), what the layout splits.
    whole = (
        {(4096, width), (4096, D), (512, 8, D), (4096, D_TEACHER)}
        if layout == "rows"
        else {(width, D), (width, D_TEACHER)}
    )
    found = {tuple(map(int, x.split(","))) for x in re.findall(r"\[(\d+(?:,\d+)+)\]", device.as_text())}
    assert not found & whole


def test_a_bfloat16_head_is_summed_in_parts():
    """A reduce-scatter in float32 and an all-gather in bfloat16, no float32 array of the head; one rounding."""
    mesh, width = mesh_of((4, 2), ("data", "model"), AxisType.Auto), 64
    student = cases.head(0, (B, T), D, width).astype(jnp.bfloat16)
    teacher = cases.head(1, (B, T), D_TEACHER, width).astype(jnp.bfloat16)

    def gradient(weight, sharding=None):
        def loss(weight):
            head = jaxkd.LinearLogits(student.hidden, weight)
            log_probs = jaxkd.token_log_probs(head, jnp.ones((B, T), int), sharding=sharding)
            return 3.0 * jaxkd.distillation_loss(head, teacher, sharding=sharding)[0] + jnp.mean(log_probs)

        return jax.grad(loss)(weight)

    want = jax.jit(gradient)(student.weight)
    for vocabulary, columns in (((), width), (("model",), width // 2)):
        sharding = jaxkd.Sharding("data", vocabulary, mesh)
        weight = jax.device_put(student.weight, NamedSharding(mesh, P(vocabulary or None)))
        lowered = jax.jit(partial(gradient, sharding=sharding)).lower(weight)
        np.testing.assert_allclose(np.float32(lowered.compile()(weight)), np.float32(want), rtol=2**-7, atol=1e-5)
        text = lowered.as_text()  # XLA gathers no bfloat16 on a CPU
        part, whole = f"tensor<{columns // 4}x{D}x", f"tensor<{columns}x{D}x"
        moved = re.findall(r'"stablehlo\.(reduce_scatter|all_gather|all_reduce)".*?\) -> (\S+)', text, re.DOTALL)
        assert moved.count(("reduce_scatter", f"{part}f32>")) == moved.count(("all_gather", f"{whole}bf16>")) == 2
        assert ("all_reduce", f"{whole}f32>") not in moved


LIE = [
    (P("data"), P(None, "model")),
    (P("data", None, "model"), P(None, "model")),
    (P(), P()),
    (P(None, None, "data"), P()),
]
BY_TYPES = ("jensen_shannon", "token_log_probs", "chunked_loss")


@pytest.mark.parametrize(
    ("name", "of_hidden", "of_weight"),
    [slow_unless((i + j) % 3 == 0, name, *x) for i, x in enumerate(LIE) for j, name in enumerate(BY_TYPES)],
)
def test_types_say_how_arrays_lie(name, of_hidden, of_weight):
    """On Explicit axes: a head split over D, hidden states split over D, arrays that nothing splits."""
    mesh, x = mesh_of((4, 2), ("data", "model"), AxisType.Explicit), arrays()
    specs = {"hidden": of_hidden, "weight": of_weight, "teacher_hidden": P(*of_hidden[:1]), "labels": P(*of_hidden[:1])}
    placed = {name: jax.device_put(v, NamedSharding(mesh, specs.get(name, P()))) for name, v in x.items()}
    with jax.set_mesh(mesh):
        got = jax.jit(value_and_gradients((SUMS | WHOLE)[name]))(placed)
    assert_same(got, on_one_device(name))
    assert got[1]["weight"].sharding.spec == P(*(tuple(of_weight) + (None,) * (2 - len(of_weight))))
