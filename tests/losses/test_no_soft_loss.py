"""`distillation_loss` with the number 0 as `soft_weight`: the hard loss alone, and no teacher in the program."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

N, D, V, CHUNK = 13, 8, 41, 4
STUDENT = cases.head(0, N, D, V).astype(jnp.float32)
TEACHER = cases.head(1, N, 5, V).astype(jnp.float32)
LABELS = cases.some_labels(2, N, V)
MASK = np.arange(N) % 4 > 0
WEIGHTS = np.random.default_rng(3).uniform(0.5, 2, size=N).astype(np.float32)
IDS = jnp.arange(9)
TEACHERS = {
    "LinearLogits": TEACHER,
    "Logits": jaxkd.Logits(TEACHER.logits()),
    "TopKLogProbs": jaxkd.TopKLogProbs(*jax.lax.top_k(jax.nn.log_softmax(TEACHER.logits()), 5)),
    "Mixture": jaxkd.Mixture([TEACHER, TEACHER], jnp.array([0.3, 0.7])),
    "VocabularyMap": jaxkd.VocabularyMap(TEACHER, IDS, IDS),
}


def value_and_grad(teacher, soft_weight=0, **options):
    def loss(student, weights):
        return jaxkd.distillation_loss(
            student,
            teacher,
            LABELS,
            soft_weight=soft_weight,
            hard_weight=0.7,
            weights=weights,
            chunk_size=CHUNK,
            **options,
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(STUDENT, WEIGHTS)


@pytest.mark.parametrize("name", TEACHERS)
def test_it_is_the_hard_loss(name):
    """And not a number of the teacher is read."""
    unreadable = jax.tree.map(lambda x: jnp.nan * x if jnp.issubdtype(x.dtype, jnp.floating) else x, TEACHERS[name])
    result = value_and_grad(unreadable)
    want = cases.distillation(
        cases.twin(STUDENT),
        cases.twin(TEACHER),
        LABELS,
        divergence="forward_kl",
        soft_weight=0.0,
        hard_weight=0.7,
        weights=WEIGHTS,
    )
    cases.check(result, want._replace(soft=0.0), loss=3e-6, gradient=1e-5)


@pytest.mark.parametrize("options", [{"mask": MASK}, {"mask": MASK, "normalizer": 7.0}, {"temperature": 2.0}])
def test_a_weight_that_is_known_is_one_that_is_traced(options):
    """But for the metric of what is not computed: which rows count, and what divides, is the same."""
    (loss, metrics), gradient = value_and_grad(TEACHER, 0.0, **options)
    (traced_loss, traced), traced_gradient = value_and_grad(TEACHER, jnp.zeros(()), **options)
    np.testing.assert_allclose(loss, traced_loss, rtol=1e-6)
    assert metrics["soft"] == 0 < traced["soft"]
    for name in ("hard", "num_rows"):
        np.testing.assert_allclose(metrics[name], traced[name], rtol=1e-6, err_msg=name)
    for x, y in zip(*map(jax.tree.leaves, (gradient, traced_gradient)), strict=True):
        assert cases.relative_error(x, y) <= 1e-6


def test_it_is_the_cross_entropy():
    (loss, metrics), gradient = value_and_grad(TEACHER)
    (want, parts), want_gradient = jax.jit(
        jax.value_and_grad(lambda x: jaxkd.cross_entropy(x, LABELS, weights=WEIGHTS, chunk_size=CHUNK), has_aux=True)
    )(STUDENT)
    np.testing.assert_allclose(loss, 0.7 * want, rtol=1e-6)
    np.testing.assert_allclose(metrics["hard"], parts["hard"], rtol=1e-6)
    assert cases.relative_error(gradient.weight, 0.7 * want_gradient.weight) <= 1e-6


def test_neither_loss():
    loss, metrics = jaxkd.distillation_loss(STUDENT, TEACHER, soft_weight=0)
    assert loss == metrics["soft"] == metrics["hard"] == 0
    assert metrics["num_rows"] == N
