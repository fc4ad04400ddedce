"""Embedding losses against dense NumPy in float64, in every type and chunk, with rows that do not count."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedding_cases import (
    CASES,
    ONE_OF_EACH,
    WEIGHTS,
    B,
    Case,
    check,
    difference_quotients,
    exact_gradients,
)
from quick_programs import QUICK
from sweeps import only


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_float64(name, x64):
    case = CASES[name]
    inputs = case.inputs()
    result = case.value_and_grad(inputs, WEIGHTS)
    check(result, case.truth(inputs, weights=WEIGHTS), exact_gradients(name, True), 1e-6, 1e-12)


@pytest.mark.parametrize("name", only(ONE_OF_EACH, CASES))
def test_float32(name):
    """With weights, `test_nothing_compared.py` has all."""
    case = CASES[name]
    inputs = case.inputs(np.float32)
    result = case.value_and_grad(inputs)
    exact = exact_gradients(name, False, np.float32)
    check(result, case.truth([x.astype(np.float64) for x in inputs]), exact, 5e-6, 1e-6)
    (loss, metrics), gradients = result
    assert all(x.dtype == jnp.float32 for x in (loss, *metrics.values(), *gradients))
    assert all(x.shape == () for x in metrics.values())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16(name):
    """Inputs are rounded, similarities are not: the loss is that of float32, a gradient is rounded once or twice."""
    case = CASES[name]
    inputs = tuple(jnp.asarray(x, jnp.bfloat16) for x in case.inputs())
    result = case.value_and_grad(inputs)
    loss = case.truth([np.asarray(x).astype(np.float64) for x in inputs])
    check(result, loss, exact_gradients(name, False, jnp.bfloat16), 4e-3, 2e-6)
    assert result[0][0].dtype == jnp.float32
    assert all(g.dtype == jnp.bfloat16 for g in result[1])


CHUNKED = ("info_nce, hard negatives", "info_nce, guide", "nt_xent")
CHUNKED += ("batch_hard_triplet", "batch_semi_hard_triplet", "batch_all_triplet")


@pytest.mark.parametrize("chunk_size", only((B - 1,), (1, B - 1, 1000)))
@pytest.mark.parametrize("name", CHUNKED)
def test_any_chunk_gives_the_same(name, chunk_size):
    case = CASES[name]
    case = Case(case.name, case.arrays, *case.labels, **case.options | {"chunk_size": chunk_size})
    inputs = case.inputs(np.float32)
    result = case.value_and_grad(inputs)
    exact = exact_gradients(name, False, np.float32)
    check(result, case.truth([x.astype(np.float64) for x in inputs]), exact, 5e-6, 1e-6)


PER_ROW = ("info_nce", "triplet", "margin_mse", "score_distillation")  # others have pairs, or rows without partners


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name not in ("cosent", "angle")])
def test_normalizer(name):
    case = CASES[name]
    inputs = case.inputs(np.float32)
    (loss, metrics), _ = case.value_and_grad(inputs, WEIGHTS.astype(np.float32))
    doubled = jax.jit(partial(case.loss, inputs, weights=WEIGHTS), compiler_options=QUICK)
    doubled_loss, doubled_metrics = doubled(normalizer=2 * metrics["num_rows"])
    ratio = WEIGHTS.sum() / (2 * (WEIGHTS != 0).sum())
    if name in PER_ROW:
        assert float(doubled_loss) == pytest.approx(ratio * float(loss), rel=1e-6)
        for mean in {"accuracy", "margin", "positive_distance"} & set(metrics):
            assert float(doubled_metrics[mean]) == pytest.approx(ratio * float(metrics[mean]), rel=1e-6)
    truth = case.truth(case.inputs(), weights=WEIGHTS, normalizer=2 * float(metrics["num_rows"]))
    assert float(doubled_loss) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_metrics_carry_no_gradient(name):
    case = CASES[name]
    inputs = case.inputs(np.float32)
    gradients = jax.jit(jax.grad(lambda x: sum(case.loss(x)[1].values())), compiler_options=QUICK)(inputs)
    assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize("name", ["info_nce", "info_nce, all directions", "cosent", "angle"])
def test_scale_can_be_learned(name, x64):
    case = CASES[name]
    inputs = case.inputs()
    slope = jax.jit(jax.grad(lambda scale: case.loss(inputs, scale=scale)[0]), compiler_options=QUICK)(9.0)
    quotient = (case.truth(inputs, scale=9 + 1e-5) - case.truth(inputs, scale=9 - 1e-5)) / 2e-5
    assert float(slope) == pytest.approx(quotient, rel=1e-6)


@pytest.mark.parametrize("name", ["info_nce", "angle", "nt_xent"])
def test_temperature_can_be_learned(name, x64):
    case = CASES[name]
    inputs = case.inputs()
    slope = jax.jit(jax.grad(lambda t: case.loss(inputs, temperature=t)[0]), compiler_options=QUICK)(0.3)
    word, of = ("temperature", lambda t: t) if name == "nt_xent" else ("scale", lambda t: 1 / t)
    above, below = (case.truth(inputs, **{word: of(0.3 + step)}) for step in (1e-6, -1e-6))
    assert float(slope) == pytest.approx((above - below) / 2e-6, rel=1e-6)


def test_weights_of_cosent_have_gradients(x64):
    case, weights = CASES["cosent"], WEIGHTS.copy()
    inputs = case.inputs()
    got = jax.jit(jax.grad(lambda weights: case.loss(inputs, weights=weights)[0]), compiler_options=QUICK)(weights)
    (quotients,) = difference_quotients(lambda x: case.truth(inputs, weights=x[0]), [weights])
    counts = WEIGHTS != 0
    assert cases.relative_error(got[counts], quotients[counts]) < 1e-6


def test_weights_of_info_nce_are_constants():
    case = CASES["info_nce"]
    with pytest.raises(TypeError, match="does not differentiate with respect to `weights`"):
        jax.eval_shape(jax.grad(lambda weights: case.loss(case.inputs(np.float32), weights=weights)[0]), jnp.ones(B))


@pytest.mark.parametrize("name", CASES)
def test_strict_promotion(name):
    case = CASES[name]
    with jax.numpy_dtype_promotion("strict"):
        loss, _ = jax.eval_shape(case.loss, case.inputs(np.float32), weights=WEIGHTS.astype(np.float32))
    assert loss.dtype == jnp.float32
