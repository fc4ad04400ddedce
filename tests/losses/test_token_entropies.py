"""Entropies of tokens: float64 NumPy, numbers worked by hand, SciPy, masks, special logits, rounding."""

import math
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import row_cases
import scipy.stats

import jaxkd

ln = math.log
B, T, D, V, CHUNK = 3, 9, 12, 123, 8
STUDENT = cases.head(0, (B, T), D, V, bias=True, scale=0.7, softcap=8.0)
MASK = np.random.default_rng(1).random((B, T)) < 0.7
MASK[1] = False
UPSTREAM = np.random.default_rng(3).normal(size=(B, T)).astype(np.float32)


@partial(jax.jit, static_argnames="chunk_size")
def values_and_pullback(student, mask, upstream, temperature=1.0, chunk_size=CHUNK):
    def entropies(student):
        return jaxkd.token_entropies(student, mask=mask, temperature=temperature, chunk_size=chunk_size)

    values, pullback = jax.vjp(entropies, student)
    return values, pullback(upstream.astype(values.dtype))[0]


def compare(student, mask=MASK, upstream=UPSTREAM, *, value=3e-6, gradient=1e-5, temperature=1.0, chunk_size=CHUNK):
    result = values_and_pullback(student, mask, upstream, temperature, chunk_size)
    counted = np.ones(upstream.shape, bool) if mask is None else mask
    truth = row_cases.entropies(row_cases.twin(student), counted, upstream, temperature)
    row_cases.check(result, truth, value=value, gradient=gradient)
    return result


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.3])
def test_against_the_truth(temperature):
    values, _ = compare(STUDENT.astype(jnp.float32), temperature=temperature)
    assert not np.any(values[~MASK])
    assert values.dtype == jnp.float32


def test_every_row():
    compare(cases.head(0, (B, T), D, V).astype(jnp.float32), mask=None)


def test_float64(x64):
    values, gradient = compare(STUDENT.astype(jnp.float64), value=1e-12, gradient=1e-12, temperature=1.7)
    assert values.dtype == gradient.weight.dtype == jnp.float64


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 5e-3), (jnp.float16, 2e-3)])
def test_types(dtype, bound):
    values, gradient = compare(cases.head(0, (B, T), D, V, bias=True).astype(dtype), gradient=bound)
    assert values.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}


def test_worked_by_hand():
    """z = (0, ln 2, ln 5): q = (1/8, 1/4, 5/8); at the temperature 1/2 it is (1, 4, 25) / 30."""
    z, one = jaxkd.Logits(np.log(np.array([[1.0, 2.0, 5.0]], np.float32))), np.ones(1, np.float32)
    for q, temperature in (([1 / 8, 1 / 4, 5 / 8], 1.0), ([1 / 30, 4 / 30, 25 / 30], 0.5)):
        entropy = -sum(x * ln(x) for x in q)
        values, gradient = values_and_pullback(z, None, one, temperature)
        np.testing.assert_allclose(values, [entropy], rtol=1e-6)
        want = [-x * (ln(x) + entropy) / temperature for x in q]
        np.testing.assert_allclose(gradient.values, [want], rtol=2e-5)


def test_outside_implementation():
    z = np.random.default_rng(0).normal(scale=3, size=(5, 7)).astype(np.float32)
    got = jaxkd.token_entropies(jaxkd.Logits(z), chunk_size=2)
    np.testing.assert_allclose(got, scipy.stats.entropy(np.exp(z.astype(np.float64)), axis=1), rtol=1e-5)


def test_it_is_the_entropy_of_the_statistics():
    """Which carry no gradient."""
    student, labels = STUDENT.astype(jnp.float32), np.where(MASK, 3, -100)
    want = jax.jit(partial(jaxkd.token_statistics, chunk_size=CHUNK))(student, labels)["entropy"]
    np.testing.assert_allclose(values_and_pullback(student, MASK, UPSTREAM)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, None])
def test_chunk_size_changes_no_number(chunk_size):
    compare(STUDENT.astype(jnp.float32), chunk_size=chunk_size)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_do_not_count_are_never_looked_at(value):
    """In either pass, their upstream gradient included."""
    spoilt = STUDENT.map(lambda name, x: np.where(MASK[..., None], x, value) if name == "hidden" else x)
    got = values_and_pullback(spoilt.astype(jnp.float32), MASK, np.where(MASK, UPSTREAM, value))
    want = values_and_pullback(STUDENT.astype(jnp.float32), MASK, UPSTREAM)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.any(got[1].hidden[~MASK])


def test_closed_tokens():
    """-inf logits are as if the tokens were not there; a distribution of one token has no entropy."""
    z = np.random.default_rng(0).normal(scale=2, size=(3, 11)).astype(np.float32)
    z[:, [2, 10]] = -np.inf
    z[1, [*range(4), *range(5, 11)]] = -np.inf
    ones = np.ones(3, np.float32)
    values, gradient = compare(jaxkd.Logits(z), None, ones)
    assert values[1] == 0
    assert not np.any(gradient.values[1])
    assert not np.any(gradient.values[:, [2, 10]])


@pytest.mark.parametrize("scale", [1e4, 1e-3])
def test_peaked_and_flat_rows(scale):
    """From no entropy to all of it, ln V, where the gradient of rounding alone would be larger than it is."""
    z = (scale * np.random.default_rng(0).normal(size=(3, 11))).astype(np.float32)
    values, gradient = values_and_pullback(jaxkd.Logits(z), None, np.ones(3, np.float32))
    truth = row_cases.entropies(z.astype(np.float64), np.ones(3, bool), np.ones(3))
    np.testing.assert_allclose(values, truth.values, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient.values, truth.gradient, atol=5e-8)


Z = jaxkd.Logits(jnp.ones((4, 5)))
BAD = {
    "student": (lambda: jaxkd.token_entropies(jnp.ones((4, 5))), TypeError, "`student`.*LinearLogits"),
    "mask": (lambda: jaxkd.token_entropies(Z, mask=jnp.ones(3, bool)), ValueError, r"`mask`.*\(3,\).*\(4,\)"),
    "labels as mask": (lambda: jaxkd.token_entropies(Z, mask=jnp.ones(4, int)), TypeError, "`mask`.*int32"),
    "list": (lambda: jaxkd.token_entropies(Z, mask=[True] * 4), TypeError, "`mask`.*list"),
    "temperature": (lambda: jaxkd.token_entropies(Z, temperature=0.0), ValueError, "`temperature`.*0"),
    "chunk_size": (lambda: jaxkd.token_entropies(Z, chunk_size=0), ValueError, "`chunk_size`.*0"),
    "implementation": (lambda: jaxkd.token_entropies(Z, implementation="cuda"), ValueError, "`implementation`.*cuda"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
