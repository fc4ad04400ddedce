"""The loss of the example of a loss of one's own, against the KL divergence that it takes apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

pytest.importorskip("flax")
pytest.importorskip("matplotlib")

from examples import your_own_loss


def test_decoupled_kl_is_kl_with_the_teachers_own_weight():
    """KL = KL(target) + (1 - p_label) KL(others): the paper's equation 7."""
    student, teacher = (jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(2, 5, 11)).astype(np.float32))
    labels = jnp.arange(5)
    _, parts = jax.jit(your_own_loss.decoupled_kl)(student, labels, teacher, {"target": 1.0, "others": 1.0})
    log_p = jax.nn.log_softmax(teacher)
    rest = 1 - jnp.exp(log_p[jnp.arange(5), labels])
    whole = jaxkd.forward_kl(log_p, jax.nn.log_softmax(student))
    np.testing.assert_allclose(parts["target"] + rest * parts["others"], whole, rtol=1e-5)
