"""The kernels' own `expm1` and `log1p`, and the terms that are traced with them."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import kernel_math


def float64_of(function, x):
    with np.errstate(over="ignore", divide="ignore"):
        return function(np.float64(x))


NEAR_ZERO = np.concatenate([sign * np.geomspace(1e-30, 0.3, 4001) for sign in (-1, 1)]).astype(np.float32)


@pytest.mark.parametrize("x", [NEAR_ZERO, np.linspace(-80, 80, 9001, dtype=np.float32)])
def test_expm1(x):
    np.testing.assert_allclose(kernel_math.expm1(x), float64_of(np.expm1, x), rtol=1e-6)


@pytest.mark.parametrize("x", [NEAR_ZERO, np.linspace(-0.999, 1e4, 9001, dtype=np.float32)])
def test_log1p(x):
    np.testing.assert_allclose(kernel_math.log1p(x), float64_of(np.log1p, x), rtol=1e-6)


def test_at_the_ends():
    ends = jnp.array([0.0, -jnp.inf, jnp.inf])
    np.testing.assert_array_equal(kernel_math.expm1(ends), [0, -1, jnp.inf])
    np.testing.assert_array_equal(kernel_math.log1p(jnp.array([0.0, -1, jnp.inf])), [0, -jnp.inf, jnp.inf])


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_terms_and_slopes_are_the_same(name):
    divergence = cases.DIVERGENCES[name].make()
    rng = np.random.default_rng(0)
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(rng.normal(scale=5, size=1009), jnp.float32)) for _ in range(2))
    log_q = jnp.where(rng.random(1009) < 0.3, log_p + 1e-3, log_q)
    log_p, log_q = log_p.at[:4].set(-jnp.inf), log_q.at[2:4].set(-jnp.inf)
    plain = jax.jit(divergence.term_and_slope)(log_p, log_q)
    replaced = jax.jit(kernel_math.with_kernel_math(divergence.term_and_slope))(log_p, log_q)
    for got, want in zip(replaced, plain, strict=True):
        scale = np.max(np.where(np.isfinite(want), np.abs(want), 0))
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-7 * scale)


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
