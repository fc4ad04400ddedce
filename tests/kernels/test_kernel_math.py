"""The kernels' own `expm1` and `log1p`, and the terms that are traced with them."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd.kernels import kernel_math


def float64_of(function, x):
    with np.errstate(over="ignore", divide="ignore"):
        return function(np.float64(x))


@jax.jit
def term_and_slope(divergence, log_p, log_q):
    """Compiled once for a term: the parameters are traced."""
    return divergence.term_and_slope(log_p, log_q)


@jax.jit
def kernels_term_and_slope(divergence, log_p, log_q):
    return kernel_math.term_and_slope_of(divergence)(log_p, log_q, *divergence.parameters)


@jax.jit
def base_2_term_and_slope(divergence, log_p, log_q):
    form = kernel_math.base_2_term_and_slope_of(divergence)
    return form(log_p / kernel_math.LN2, log_q / kernel_math.LN2, *divergence.parameters)


@jax.jit
def log_softmax(*rows):
    return [jax.nn.log_softmax(x) for x in rows]


def close(log_p, log_q, both, one):
    """Neither side has the first tokens, and one side not some after them."""
    log_p, log_q = np.array(log_p), np.array(log_q)
    log_p[:both], log_q[one] = -np.inf, -np.inf
    return jnp.asarray(log_p), jnp.asarray(log_q)


NEAR_ZERO = np.concatenate([sign * np.geomspace(1e-30, 0.3, 4001) for sign in (-1, 1)]).astype(np.float32)


@pytest.mark.parametrize("x", [NEAR_ZERO, np.linspace(-80, 80, 9001, dtype=np.float32)])
def test_expm1(x):
    np.testing.assert_allclose(kernel_math.expm1(jnp.asarray(x)), float64_of(np.expm1, x), rtol=1e-6)


@pytest.mark.parametrize("x", [NEAR_ZERO, np.linspace(-0.999, 1e4, 9001, dtype=np.float32)])
def test_log1p(x):
    np.testing.assert_allclose(kernel_math.log1p(jnp.asarray(x)), float64_of(np.log1p, x), rtol=1e-6)


def test_at_the_ends():
    ends = jnp.array([0.0, -jnp.inf, jnp.inf])
    np.testing.assert_array_equal(kernel_math.expm1(ends), [0, -1, jnp.inf])
    np.testing.assert_array_equal(kernel_math.log1p(jnp.array([0.0, -1, jnp.inf])), [0, -jnp.inf, jnp.inf])


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_terms_and_slopes_are_the_same(name):
    divergence = cases.DIVERGENCES[name].make()
    rng = np.random.default_rng(0)
    log_p, log_q = (np.array(x) for x in log_softmax(*rng.normal(scale=5, size=(2, 1009)).astype(np.float32)))
    log_q = np.where(rng.random(1009) < 0.3, log_p + np.float32(1e-3), log_q)
    rows = close(log_p, log_q, 4, slice(2, 4))
    plain, replaced = term_and_slope(divergence, *rows), kernels_term_and_slope(divergence, *rows)
    for got, want in zip(replaced, plain, strict=True):
        scale = np.max(np.where(np.isfinite(want), np.abs(want), 0))
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-7 * scale)


# How often the kernel's form of a term has q - p, which sums to 0.
ADDED = {jaxkd.forward_kl: 1, jaxkd.reverse_kl: -1}


@pytest.mark.parametrize("divergence", ADDED)
def test_kernel_form_of_a_kl_near_convergence(divergence):
    """An error of a normaliser, here 1e-6, is not one of the loss, which is 5e-5 and of which it would be 2 %."""
    z = np.random.default_rng(0).normal(size=(2, 32000)) * [[3], [0.01]]
    log_p, log_q = (x - np.logaddexp.reduce(x) for x in (z[0], z[0] + z[1]))
    high, low = (log_p, log_q) if divergence is jaxkd.forward_kl else (log_q, log_p)
    want = np.sum(np.exp(high) * (high - low))
    term, _ = jax.jit(divergence.kernel_form)(*(np.float32(x / kernel_math.LN2) for x in (log_p, log_q + 1e-6)))
    assert cases.relative_error(np.float64(term).sum(), want) <= 1e-3


@pytest.mark.parametrize("name", cases.DIVERGENCES)
@pytest.mark.parametrize("gap", [3.0, 0.02])
def test_base_2_forms_are_the_same(name, gap):
    """To the rounding of float32 logits: 2e-6 of a probability times its logarithm."""
    divergence = cases.DIVERGENCES[name].make()
    rng = np.random.default_rng(0)
    z = rng.normal(scale=4, size=1009)
    log_p, log_q = log_softmax(*(np.float32(x) for x in (z, z + gap * rng.normal(size=1009))))
    log_p, log_q = close(log_p, log_q, 4, slice(2, 6))
    (term, slope), plain = base_2_term_and_slope(divergence, log_p, log_q), term_and_slope(divergence, log_p, log_q)
    if divergence in ADDED:
        term -= ADDED[divergence] * (np.exp(log_q) - np.exp(log_p))
    for x, want in zip((term, slope), plain, strict=True):
        weight = np.where(np.isfinite(want), np.exp(np.maximum(log_p, log_q)), 0)
        np.testing.assert_allclose(x, want, rtol=3e-6, atol=1e-37 + 4e-6 * np.max(weight))
        with np.errstate(invalid="ignore"):
            off = np.abs(np.where(np.isfinite(want), np.subtract(x, want), 0))
        np.testing.assert_array_less(off, 1e-12 + 4e-5 * weight)


jsd_kernel_form = jax.jit(jaxkd.jensen_shannon(0.5).kernel_form)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("gap", [0.002, 0.02, 0.2, 2.0])
def test_kernel_form_of_the_jsd_near_convergence(beta, gap):
    """The loss is right to 1e-4 of itself, however small it is."""
    rng = np.random.default_rng(0)
    z = rng.normal(scale=3, size=(16, 32000))
    log_p, log_q = log_softmax(*(np.float32(x) for x in (z, z + gap * rng.normal(size=z.shape))))
    term, _ = jsd_kernel_form(log_p / kernel_math.LN2, log_q / kernel_math.LN2, jnp.float32(beta))
    want, _ = cases.jensen_shannon(beta)(np.float64(log_p), np.float64(log_q))
    assert cases.relative_error(np.float64(term).sum(), want.sum()) <= 1e-4


def test_kernel_form_of_probabilities_that_underflow():
    """Nothing that is not a number comes out where both, or one, are below what float32 holds."""
    log2 = jnp.array([-jnp.inf, -1e30, -200.0, -127.0, -1.0])
    divergence = jaxkd.jensen_shannon(0.3)
    term, slope = divergence.kernel_form(log2[:, None], log2[None, :], 0.3)
    assert np.all(np.isfinite(term))
    assert np.all(np.isfinite(slope))
    assert np.all(np.asarray(term)[:3, :3] == 0)
    np.testing.assert_allclose(term[4, 0], -0.3 * 0.5 * np.log(0.3), rtol=1e-6)
    assert np.all(np.isnan(divergence.kernel_form(jnp.nan, log2, 0.3)[0]))


def test_slope_sums():
    """Where a divergence says what its slopes sum to, they do."""
    rng = np.random.default_rng(0)
    log_p, log_q = log_softmax(*rng.normal(scale=3, size=(2, 5, 1009)).astype(np.float32))
    known = {name: case.make() for name, case in cases.DIVERGENCES.items() if case.make().slope_sum is not None}
    assert "forward_kl" in known
    for divergence in known.values():
        _, slope = term_and_slope(divergence, log_p, log_q)
        np.testing.assert_allclose(slope.sum(-1), divergence.slope_sum, rtol=1e-6)


def test_replaces_them_at_any_depth():
    def function(x):
        return jax.jit(jnp.expm1)(x) * jnp.log1p(x)

    jaxpr = str(jax.make_jaxpr(kernel_math.with_kernel_math(lambda x: jax.jvp(function, (x,), (x,))))(1.0))
    assert "expm1" not in jaxpr
    assert "log1p" not in jaxpr
    assert "expm1" in str(jax.make_jaxpr(function)(1.0))


def test_computes_nothing_twice():
    def function(x, y):
        return jnp.exp(x - y) + jnp.exp(y - x), jnp.exp(x - y) * 2

    jaxpr = str(jax.make_jaxpr(kernel_math.with_kernel_math(function))(1.0, 2.0))
    assert jaxpr.count("= exp") == 2
    got, want = kernel_math.with_kernel_math(function)(jnp.float32(1), jnp.float32(2)), function(1.0, 2.0)
    np.testing.assert_allclose(got, want, rtol=1e-6)
