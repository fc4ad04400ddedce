"""The example of a loss of one's own, a few steps of it, and its loss against the KL divergence that it takes apart."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

pytest.importorskip("flax")
pytest.importorskip("matplotlib")

from examples import your_own_loss


def test_example(tmp_path, capsys):
    your_own_loss.main(["--steps", "6", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    for name in ("forward KL", "decoupled KL"):
        before, after = (
            [float(x) for x in re.search(rf"{name}, held out, {when}: JSD (\S+), .* loss (\S+)", output).groups()]
            for when in ("before", "after")
        )
        assert after[0] < before[0]
        assert after[1] < before[1]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_decoupled_kl_is_kl_with_the_teachers_own_weight():
    """KL = KL(target) + (1 - p_label) KL(others): the paper's equation 7."""
    student, teacher = (jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(2, 5, 11)).astype(np.float32))
    labels = jnp.arange(5)
    _, parts = your_own_loss.decoupled_kl(student, labels, teacher, {"target": 1.0, "others": 1.0})
    log_p = jax.nn.log_softmax(teacher)
    rest = 1 - jnp.exp(log_p[jnp.arange(5), labels])
    whole = jaxkd.forward_kl(log_p, jax.nn.log_softmax(student))
    np.testing.assert_allclose(parts["target"] + rest * parts["others"], whole, rtol=1e-5)
