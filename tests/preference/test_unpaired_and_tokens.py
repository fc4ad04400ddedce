"""Which numbers the losses of unpaired answers and of tokens give: worked by hand, and far from the reference."""

from functools import partial
from math import exp

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_deviations import ANSWERS, IS_DESIRABLE, cost, s
from quick_programs import QUICK, at_once

from jaxkd import preference

UNPAIRED = {
    "kto": ({"desirable_weight": 2.0}, 2 * s(-5 / 6), s(-1 / 6), 2 * s(4 / 6)),
    "kto, other answers": ({"kl_log_ratios": jnp.array([3.0, -1.0])}, s(-0.5), s(-0.5), s(1)),
    "kto, negative": ({"kl_log_ratios": -2.0}, s(-1), s(0), s(0.5)),
    "kto, known": ({"kl_log_ratios": 2.0}, s(0), s(-1), s(1.5)),
    "bco": ({}, cost(0.875), cost(0.125), cost(-0.625)),  # shift: half of (1 - 1/2) / 2, and half of 0
    "bco, given": ({"delta": 0.25}, cost(0.75), cost(0.25), cost(-0.75)),
}


def test_worked_numbers_of_unpaired_answers():
    calls = {
        name: partial(getattr(preference, name[:3]), *ANSWERS, IS_DESIRABLE, beta=0.5, **options)
        for name, (options, *_) in UNPAIRED.items()
    }
    means = {"chosen_rewards": 0.25, "rejected_rewards": 0, "margin": 0.25}
    means |= {"chosen_log_probs": -2, "rejected_log_probs": -2, "num_sequences": 3, "num_desirable": 2}
    for name, (loss, metrics) in at_once(calls).items():
        assert float(loss) == pytest.approx(sum(UNPAIRED[name][1:]) / 3, rel=2e-6), name
        assert {key: float(metrics[key]) for key in means} == pytest.approx(means), name
        if name in ("kto", "bco"):
            assert float(metrics["accuracy"]) == pytest.approx(2 / 3)
            baseline = metrics.get("kl", metrics.get("delta"))
            assert float(baseline) == pytest.approx(1 / 3 if name == "kto" else 0.125)


def test_answers_of_one_kind_alone():
    """The shift is their mean, and metrics of the other kind are 0."""
    loss, metrics = preference.bco(*ANSWERS, jnp.array([False] * 3), beta=0.5)
    assert float(metrics["delta"]) == pytest.approx(1 / 6)
    assert float(loss) == pytest.approx((cost(-5 / 6) + cost(1 / 6) + cost(2 / 3)) / 3)
    assert float(metrics["chosen_rewards"]) == 0


def test_a_shift_over_many_batches():
    """The docstring's recipe gives the shift of all answers at once, batches of one kind among them."""
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 4, 8)).astype(np.float32)
    is_desirable = np.array([[1, 0] * 4, [1] * 8, [0] * 8, [1, 1, 0, 0] * 2], bool)
    weights = 1.0 * (rng.random((4, 8)) < 0.8)
    bco = jax.jit(partial(preference.bco, beta=0.5), compiler_options=QUICK)
    sums, counts = np.zeros(2), np.zeros(2)
    for batch in zip(policy, reference, is_desirable, weights, strict=True):
        metrics = bco(*batch[:3], weights=batch[3])[1]
        of_each = np.array([metrics["num_desirable"], metrics["num_sequences"] - metrics["num_desirable"]])
        sums += of_each * np.array([metrics["chosen_rewards"], metrics["rejected_rewards"]])
        counts += of_each
    everything = (x.reshape(-1) for x in (policy, reference, is_desirable))
    want = preference.bco(*everything, beta=0.5, weights=weights.reshape(-1))[1]["delta"]
    assert np.sum(sums / counts) / 2 == pytest.approx(float(want), rel=1e-5)


# Two answers, of two tokens and of one: ratios 1.5 and 0.5, and 1.1; KL estimates exp(d) - d - 1 at d = 0.5, 0 and 0.
POLICY = jnp.array([[-2.0, -2.0], [-1.0, -9.0]])
OLD = POLICY - jnp.log(jnp.array([[1.5, 0.5], [1.1, 7.0]]))
REFERENCE = POLICY + jnp.array([[0.5, 0.0], [0.0, 9.0]])
MASK = jnp.array([[True, True], [True, False]])
KL = exp(0.5) - 1.5
MEAN_RATIO = (1.5 * 0.5) ** 0.5
TOKENS = {  # options, advantages, loss, clipped tokens of the three
    "grpo": ({}, (2.0, -1.0), ((-2.4 - 1 + 0.1 * KL) / 2 + 1.1) / 2, 1),
    "grpo, low": ({}, (-1.0, 1.0), ((1.5 + 0.8 + 0.1 * KL) / 2 - 1.1) / 2, 1),
    "dr_grpo": ({"max_length": 4}, (2.0, -1.0), ((-2.4 - 1 + 0.1 * KL) / 4 + 1.1 / 4) / 2, 1),
    "dapo": ({}, (2.0, -1.0), (-2.56 - 1 + 0.1 * KL + 1.1) / 3, 1),
    "gspo": ({"epsilon_low": 0.2, "epsilon_high": 0.05}, (1.0, 1.0), (-MEAN_RATIO + 0.05 * KL - 1.05) / 2, 1),
    "cispo": ({"max_ratio": 1.2}, (2.0, -1.0), (1.2 * 4 + 0.5 * 4 + 0.1 * KL - 1.1) / 3, 1),
}


def test_worked_numbers_of_tokens():
    def call(name, options, advantages):
        function = getattr(preference, name.partition(",")[0])
        return lambda: function(POLICY, OLD, REFERENCE, jnp.array(advantages), MASK, beta=0.1, **options)

    results = at_once({name: call(name, *row[:2]) for name, row in TOKENS.items()})
    for name, (loss, metrics) in results.items():
        *_, expected, clipped = TOKENS[name]
        assert float(loss) == pytest.approx(expected, rel=1e-5), name
        assert float(metrics["kl"]) == pytest.approx(KL / 3, rel=1e-5), name
        assert float(metrics["clip_fraction"]) == pytest.approx(clipped / 3), name
        assert float(metrics["log_probs"]) == pytest.approx(-5 / 3), name
        assert float(metrics["num_tokens"]) == 3, name


def test_without_old_the_ratio_is_1_and_without_reference_there_is_no_kl():
    loss, metrics = preference.grpo(POLICY, None, None, jnp.array([2.0, -1.0]), MASK)
    assert float(loss) == pytest.approx(-0.5)
    assert float(metrics["kl"]) == 0


FAMILY = {"grpo": {}, "dr_grpo": {"max_length": 1}, "dapo": {}, "gspo": {}, "cispo": {}}


def of_one_token(name, advantage, *, old, reference):
    """Loss and slope, by the log-probability of an answer of one token."""

    def loss(policy):
        arrays = (None if x is None else jnp.reshape(x, (1, 1)) for x in (policy, old, reference))
        mask = jnp.ones((1, 1), bool)
        return getattr(preference, name)(*arrays, jnp.array([advantage]), mask, beta=0.5, **FAMILY[name])[0]

    return jax.vmap(jax.value_and_grad(loss))


def test_the_reference_always_pulls():
    """Half of exp(d) - d - 1 at d = reference - policy; beyond 20 its tangent, whose slope is that of 20."""
    d = np.array([-30.0, -1.0, 1e-4, 1.0, 19.5, 20.5, 100.0, 1e4])
    far = np.maximum(d - 20, 0)
    near = d - far
    losses = (np.expm1(near) - near + np.expm1(20) * far) / 2
    slopes = -np.expm1(near) / 2
    assert (slopes[d > 0] < 0).all()  # down to a higher log-probability
    call = {name: partial(of_one_token(name, 0.0, old=None, reference=0.0), -jnp.asarray(d)) for name in FAMILY}
    for name, (loss, slope) in at_once(call).items():
        np.testing.assert_allclose(loss, losses, rtol=1e-5, atol=2e-11, err_msg=name)
        np.testing.assert_allclose(slope, slopes, rtol=1e-5, atol=1e-8, err_msg=name)


def test_a_bad_answer_is_always_pushed_down():
    """By the ratio exp(x) at x = policy - old, beyond 20 by its tangent; CISPO by its bound of 5, and log p is x."""
    x = np.array([0.5, 1.0, 19.5, 20.5, 100.0, 1e4])
    far = np.maximum(x - 20, 0)
    slopes = np.exp(x - far)
    losses = slopes + np.exp(20) * far
    call = {name: partial(of_one_token(name, -1.0, old=0.0, reference=None), jnp.asarray(x)) for name in FAMILY}
    results = at_once(call)
    factor = np.minimum(np.exp(np.minimum(x, 20)), 5)
    for name, (loss, slope) in results.items():
        is_cispo = name == "cispo"
        np.testing.assert_allclose(loss, factor * x if is_cispo else losses, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(slope, factor if is_cispo else slopes, rtol=1e-5, err_msg=name)


def test_a_good_answer_is_clipped_however_far():
    x = jnp.array([0.5, 20.5, 1e4])
    names = [name for name in FAMILY if name != "cispo"]
    high = {"dapo": 0.28, "gspo": 4e-4}
    results = at_once({name: partial(of_one_token(name, 1.0, old=0.0, reference=None), x) for name in names})
    for name, (loss, slope) in results.items():
        np.testing.assert_allclose(loss, -1 - high.get(name, 0.2), rtol=1e-6, err_msg=name)
        assert not np.any(slope), name
