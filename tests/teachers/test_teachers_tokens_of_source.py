"""The likeliest tokens of a source: NumPy's, at a temperature, chosen by another, in pieces and on many devices."""

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

N, V, K, CHUNK = 13, 101, 7, 4
TEACHER, STUDENT = cases.head(1, N, 6, V, bias=True, scale=0.7, softcap=5.0), cases.head(0, N, 8, V)
MASK = np.arange(N) % 3 > 0


def truth(chooser=TEACHER, temperature=1.0):
    ids = np.argsort(-chooser.logits, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(cases.log_softmax(TEACHER.logits / temperature), ids, 1), ids


@pytest.mark.parametrize("chosen_by", [None, STUDENT])
@pytest.mark.parametrize("chunk_size", [CHUNK, 1, None])
def test_float64(chosen_by, chunk_size, x64):
    top = jaxkd.TopKLogProbs.of(
        TEACHER.astype(jnp.float64),
        K,
        chosen_by=chosen_by and chosen_by.astype(jnp.float64),
        temperature=1.5,
        tail="renormalize",
        chunk_size=chunk_size,
    )
    log_probs, ids = truth(chosen_by or TEACHER, 1.5)
    np.testing.assert_array_equal(top.token_ids, ids)
    np.testing.assert_allclose(top.log_probs, log_probs, rtol=1e-12)
    assert (top.temperature, top.tail, top.token_ids.dtype) == (1.5, "renormalize", jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types(dtype):
    """As float64 has the rounded source: in float32, whose log-probabilities are not rounded again."""
    teacher = TEACHER.astype(dtype)
    top = jax.jit(lambda x: jaxkd.TopKLogProbs.of(x, K, chunk_size=CHUNK))(teacher)
    log_p = cases.log_softmax(cases.twin(teacher).logits)
    np.testing.assert_allclose(top.log_probs, -np.sort(-log_p, axis=1)[:, :K], rtol=1e-5)
    np.testing.assert_allclose(top.log_probs, np.take_along_axis(log_p, np.asarray(top.token_ids), 1), rtol=1e-5)
    assert top.log_probs.dtype == jnp.float32


def test_rows_of_a_mask_and_leading_axes():
    """A row that is left out has no entries, whatever it holds, and adds nothing to a loss."""
    hidden = np.where(MASK[:, None], TEACHER.hidden, np.nan)[1:].reshape(3, 4, -1)
    teacher = jaxkd.LinearLogits(hidden.astype(np.float32), TEACHER.weight.astype(np.float32))
    mask = MASK[1:].reshape(3, 4)
    top = jaxkd.TopKLogProbs.of(teacher, K, mask=mask, chunk_size=CHUNK)
    assert top.log_probs.shape == top.token_ids.shape == (3, 4, K)
    assert (top.token_ids[~mask] == -1).all()
    assert (top.token_ids[mask] >= 0).all()
    assert np.isfinite(top.log_probs[mask]).all()
    student = jaxkd.Logits(jnp.zeros((3, 4, V)))
    values = jaxkd.token_divergences(student, top)
    assert (values[~mask] == 0).all()
    assert (values[mask] > 0).all()


def test_equal_and_impossible_tokens():
    """Of equal ones the first; one that is impossible is padding."""
    z = jnp.array([[1.0, 2.0, 2.0, 1.0], [-jnp.inf, 0.0, -jnp.inf, -jnp.inf]])
    top = jaxkd.TopKLogProbs.of(jaxkd.Logits(z), 3)
    np.testing.assert_array_equal(top.token_ids[0], [1, 2, 0])
    np.testing.assert_array_equal(top.log_probs[1], [0, -np.inf, -np.inf])
    loss = jaxkd.token_divergences(jaxkd.Logits(jnp.zeros((2, 4))), top)
    assert float(loss[1]) == pytest.approx(np.log(4), rel=1e-5)


def test_all_tokens_are_the_source():
    teacher, student = TEACHER.astype(jnp.float32), STUDENT.astype(jnp.float32)
    loss = jax.jit(jaxkd.distillation_loss)
    top = jaxkd.TopKLogProbs.of(teacher, V, chunk_size=CHUNK)
    assert float(loss(student, top)[0]) == pytest.approx(float(loss(student, teacher)[0]), rel=1e-6)


def test_no_gradient_and_no_more_than_a_chunk_of_logits():
    rows, width, size, chunk_size = 96, 1009, 40, 16
    teacher, student = (cases.head(i, rows, size, width).astype(jnp.float32) for i in (0, 1))

    def loss(teacher, student):
        top = jaxkd.TopKLogProbs.of(teacher, K, chosen_by=student, chunk_size=chunk_size)
        return jnp.sum(top.log_probs)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(teacher, student)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))
    jaxpr = jax.make_jaxpr(loss)(teacher, student)
    assert jaxprs.most_rows(jaxpr, width, {(width, size), (size, width)}) == chunk_size
    assert len(jaxprs.products(jaxpr)) == 2


LAYOUTS = {
    "rows": ((8,), "x", ()),
    "vocabulary": ((8,), (), "x"),
    "fsdp": ((8,), "x", "x"),
    "both": ((2, 4), "x", "y"),
    "hybrid_fsdp": ((2, 4), P(("x", "y")), "y"),
}


@pytest.mark.parametrize("name", only(("both", "hybrid_fsdp"), LAYOUTS))
def test_many_devices(name):
    """With rows and a vocabulary that nothing divides, and fewer columns on a device than are asked for."""
    shape, rows, vocabulary = LAYOUTS[name]
    names = ("x", "y")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices("cpu")[:8])
    log_probs, ids = truth(STUDENT)
    top = jaxkd.TopKLogProbs.of(
        TEACHER.astype(jnp.float32),
        K,
        chosen_by=STUDENT.astype(jnp.float32),
        mask=MASK,
        chunk_size=2,
        sharding=jaxkd.Sharding(rows, vocabulary, mesh),
    )
    np.testing.assert_array_equal(top.token_ids, np.where(MASK[:, None], ids, -1))
    np.testing.assert_allclose(top.log_probs, np.where(MASK[:, None], log_probs, -np.inf), rtol=1e-5)

    few = jaxkd.Logits(jnp.asarray(TEACHER.logits[:8, :11], jnp.float32))
    if name != "fsdp" and name != "hybrid_fsdp":  # logits that exist are not split over both axes by one mesh axis
        got = jaxkd.TopKLogProbs.of(few, 9, sharding=jaxkd.Sharding(rows, vocabulary, mesh))
        np.testing.assert_array_equal(got.token_ids, jaxkd.TopKLogProbs.of(few, 9).token_ids)


def test_inside_a_shard_map():
    """Where the types of arrays say what is equal on all devices."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:8])
    hidden, weight = jnp.asarray(TEACHER.hidden[:12], jnp.float32), jnp.asarray(TEACHER.weight[:100], jnp.float32)

    def top(hidden, weight):
        return jaxkd.TopKLogProbs.of(jaxkd.LinearLogits(hidden, weight), K, sharding=jaxkd.Sharding("x", "y"))

    with jax.set_mesh(mesh):
        got = jax.jit(jax.shard_map(top, in_specs=(P("x"), P("y")), out_specs=P("x")))(hidden, weight)
    want = jaxkd.TopKLogProbs.of(jaxkd.LinearLogits(hidden, weight), K)
    np.testing.assert_array_equal(got.token_ids, want.token_ids)
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=1e-5)


ONE = jaxkd.Logits(jnp.ones((2, 5)))
BAD = [
    ({"k": 6}, ValueError, "`k` is 6 but `teacher` has V=5"),
    ({"k": 0}, ValueError, "`k` is 0"),
    ({"k": 2.0}, TypeError, "`k` is 2.0; give an integer"),
    ({"teacher": jnp.ones((2, 5))}, TypeError, "`teacher` is a.*LinearLogits"),
    ({"chosen_by": jnp.ones((2, 5))}, TypeError, "`chosen_by` is a.*LinearLogits"),
    ({"chosen_by": jaxkd.Logits(jnp.ones((2, 7)))}, ValueError, "`chosen_by` has V=7 but `teacher` has V=5"),
    (
        {"chosen_by": jaxkd.Logits(jnp.ones((3, 5)))},
        ValueError,
        r"`chosen_by.values`.*\(3,\).*`teacher.values`.*\(2,\)",
    ),
    ({"temperature": 0.0}, ValueError, "`temperature` is 0"),
    ({"temperature": jnp.ones(())}, TypeError, "`temperature`.*Python number"),
    ({"tail": "none"}, ValueError, "`tail` is 'none'"),
    ({"mask": jnp.ones(3, bool)}, ValueError, r"`mask`.*\(3,\).*\(2,\)"),
    ({"mask": jnp.ones(2)}, TypeError, "`mask` is float32"),
    ({"chunk_size": 0}, ValueError, "`chunk_size` is 0"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        jaxkd.TopKLogProbs.of(**{"teacher": ONE, "k": 2} | changes)
