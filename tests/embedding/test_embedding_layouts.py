"""Embedding losses with rows over eight virtual CPU devices, held to one device; what is gathered, and what is not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import only

import jaxkd
from jaxkd import embedding

B, K, D = 24, 2, 12


def arrays(num_rows=B):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(num_rows, *shape)), jnp.float32)

    return {
        "anchors": normal(D),
        "positives": normal(D),
        "negatives": normal(K, D),
        "classes": jnp.asarray(rng.integers(0, 5, num_rows)),
        "documents": jnp.asarray(rng.integers(0, 30, (num_rows, 1 + K))),
        "mask": jnp.asarray(rng.random((num_rows, num_rows * (1 + K))) > 0.2),
        "scores": normal(1 + K),
        "degrees": jnp.asarray(rng.integers(0, 4, num_rows), jnp.float32),
        "weights": jnp.asarray(rng.uniform(0.5, 2, num_rows) * (rng.random(num_rows) > 0.3), jnp.float32),
    }


def contrast(x, weights, **options):
    return embedding.info_nce(
        x["anchors"], x["positives"], x["negatives"], symmetric=True, weights=weights, scale=x["scale"], **options
    )


def rank(x, weights, **options):
    return embedding.cosent(x["anchors"], x["positives"], x["degrees"], weights=weights, scale=x["scale"], **options)


def given(x, weights, **options):
    return embedding.triplet(x["anchors"], x["positives"], x["negatives"][:, 0], weights=weights, **options)


def search(x, weights, **options):
    return embedding.batch_hard_triplet(x["anchors"], x["classes"], weights=weights, margin=None, **options)


def nested(x, weights, **options):
    return embedding.matryoshka(embedding.info_nce, (D, 5))(x["anchors"], x["positives"], weights=weights, **options)


def guided(x, weights, **options):
    guide = embedding.Guide(x["positives"], x["anchors"], x["negatives"][..., ::-1], margin=0.1)
    return embedding.info_nce(
        x["anchors"],
        x["positives"],
        x["negatives"],
        directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
        negative_mask=x["negatives"][..., 0] < 1,
        candidate_mask=x["mask"],
        document_ids=x["documents"],
        guide=guide,
        weights=weights,
        scale=x["scale"],
        **options,
    )


def classes(x, weights, **options):
    return embedding.nt_xent(x["anchors"], x["classes"], weights=weights, temperature=1 / x["scale"], **options)


def semi_hard(x, weights, **options):
    return embedding.batch_semi_hard_triplet(x["anchors"], x["classes"], weights=weights, **options)


def of_all(x, weights, **options):
    return embedding.batch_all_triplet(
        x["anchors"], x["classes"], weights=weights, distance=embedding.cosine, **options
    )


def angles(x, weights, **options):
    return embedding.angle(x["anchors"], x["positives"], x["degrees"], weights=weights, scale=x["scale"], **options)


def margins(x, weights, **options):
    return embedding.margin_mse(x["anchors"], x["positives"], x["negatives"], x["scores"], weights=weights, **options)


def scores(x, weights, **options):
    return embedding.score_distillation(
        x["anchors"], x["positives"], x["negatives"], x["scores"], weights=weights, **options
    )


LOSSES = {
    "info_nce": contrast,
    "cosent": rank,
    "triplet": given,
    "batch_hard_triplet": search,
    "matryoshka": nested,
    "info_nce, guide": guided,
    "nt_xent": classes,
    "batch_semi_hard_triplet": semi_hard,
    "batch_all_triplet": of_all,
    "angle": angles,
    "margin_mse": margins,
    "score_distillation": scores,
}
DIFFERENTIATED = ("anchors", "positives", "scale")


def value_and_gradients(loss, weighted=True, **options):
    def of(x):
        def scalar(trained):
            return loss(x | trained, x["weights"] if weighted else None, **options)

        return jax.value_and_grad(scalar, has_aux=True)({name: x[name] for name in DIFFERENTIATED})

    return of


def mesh_of(kind):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,), devices=jax.devices("cpu")[:8])


def placed(x, mesh):
    return {name: jax.device_put(v, NamedSharding(mesh, P("data") if v.ndim else P())) for name, v in x.items()}


def table():
    """Every third is what stays when slow tests are left out: each loss, each kind of mesh."""
    for i, name in enumerate(LOSSES):
        for k, kind in enumerate(("Auto", "Explicit", "own shard_map")):
            yield pytest.param(name, kind, marks=[pytest.mark.slow] if (i + k) % 3 else [])


@pytest.mark.parametrize(("name", "kind"), list(table()))
def test_layouts(name, kind):
    x = arrays() | {"scale": jnp.asarray(3.0)}
    loss, mesh = LOSSES[name], mesh_of(AxisType.Explicit if kind == "Explicit" else AxisType.Auto)
    want = jax.jit(value_and_gradients(loss))(x)
    if kind == "Auto":
        got = jax.jit(value_and_gradients(loss, sharding=jaxkd.Sharding("data", mesh=mesh)))(placed(x, mesh))
    elif kind == "Explicit":  # nothing is said
        with jax.set_mesh(mesh):
            got = jax.jit(value_and_gradients(loss))(placed(x, mesh))
    else:
        specs = {name: P("data") if v.ndim else P() for name, v in x.items()}
        of = value_and_gradients(loss, sharding=jaxkd.Sharding("data"))
        out_specs = (P(), {name: specs[name] for name in DIFFERENTIATED})
        got = jax.jit(jax.shard_map(of, mesh=mesh, in_specs=(specs,), out_specs=out_specs))(placed(x, mesh))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(jnp.max(jnp.abs(b))), 1e-3))


WITHOUT_WEIGHTS = ("info_nce", "batch_hard_triplet", "info_nce, guide", "batch_all_triplet")


@pytest.mark.parametrize("name", only(("batch_hard_triplet", "info_nce, guide"), WITHOUT_WEIGHTS))
def test_rows_that_do_not_divide(name):
    """They are filled up, without weights too."""
    x = arrays(21) | {"scale": jnp.asarray(3.0)}
    want = jax.jit(value_and_gradients(LOSSES[name], weighted=False))(x)
    sharding = jaxkd.Sharding("data", mesh=mesh_of(AxisType.Auto))
    got = jax.jit(value_and_gradients(LOSSES[name], weighted=False, sharding=sharding))(x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("name", only(("info_nce",), ("info_nce", "batch_hard_triplet", "batch_semi_hard_triplet")))
def test_similarities_do_not_move(name):
    """A device has an eighth of the work; what crosses devices is as large as the embeddings, not their products."""
    num_rows, loss, mesh = 512, LOSSES[name], mesh_of(AxisType.Auto)
    x = arrays(num_rows) | {"scale": jnp.asarray(3.0)}

    def compiled(x, **options):
        return jax.jit(value_and_gradients(loss, chunk_size=num_rows, **options)).lower(x).compile()

    one, device = compiled(x), compiled(placed(x, mesh), sharding=jaxkd.Sharding("data", mesh=mesh))
    flops = [x.cost_analysis()["flops"] for x in (one, device)]
    assert flops[1] < flops[0] / 6
    moved = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-|reduce-scatter|collective-)", device.as_text())
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in moved]
    assert sizes
    assert max(sizes) <= num_rows * (1 + K) * D < num_rows * num_rows


def test_a_vocabulary_is_not_theirs():
    sharding = jaxkd.Sharding("data", "data", mesh_of(AxisType.Auto))
    with pytest.raises(ValueError, match=r"a loss of embeddings.*`vocabulary`"):
        embedding.info_nce(jnp.ones((8, 2)), jnp.ones((8, 2)), sharding=sharding)
