"""The chunk size is a matter of memory: it changes no number."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxkd

DIVERGENCE = "jensen_shannon_0.1"
OPTIONS = {"temperature": 1.5, "hard_weight": 0.5}


def check(rows, vocabulary, chunk_size):
    student = cases.head(0, rows, 8, vocabulary, bias=True).astype(jnp.float32)
    teacher = cases.head(1, rows, 5, vocabulary).astype(jnp.float32)
    labels = cases.some_labels(2, rows, vocabulary, ignored=0.2)
    result = cases.value_and_grad(
        student, teacher, labels, divergence=cases.DIVERGENCES[DIVERGENCE].make(), chunk_size=chunk_size, **OPTIONS
    )
    truth = cases.distillation(cases.twin(student), cases.twin(teacher), labels, divergence=DIVERGENCE, **OPTIONS)
    cases.check(result, truth, loss=3e-6, gradient=1e-5)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 61])
def test_around_multiples_of_the_chunk(rows):
    check(rows, 123, 16)


@pytest.mark.parametrize("chunk_size", [1, 2, 13, 36, 37, 38, 4096, None])
def test_any_chunk_size(chunk_size):
    check(37, 123, chunk_size)


@pytest.mark.parametrize("rows", [5, 8, 11])
def test_ragged_vocabulary_of_a_real_model(rows):
    check(rows, 50257, 4)


@pytest.mark.parametrize("vocabulary", [2, 3, 127, 128, 129])
def test_vocabularies_around_a_block(vocabulary):
    check(9, vocabulary, 4)


@settings(max_examples=8)
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
        return cases.value_and_grad(
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
