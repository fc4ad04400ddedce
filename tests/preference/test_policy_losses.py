"""Which numbers the policy losses give: worked by hand, and what their metrics and their gradients mean."""

from functools import partial
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_cases import CASES, TOKENS, B, evaluate_all
from preference_deviations import s
from quick_programs import QUICK, at_once

import jaxkd
from jaxkd import preference
from jaxkd.preference import bias_corrected, k1, k2, k3

# Two answers, of two tokens and of one: ratios 1.5 and 0.5, and 2; KL estimates k3 at x = -0.5, 0 and 0.
POLICY = jnp.array([[-2.0, -2.0], [-1.0, -9.0]])
RATIOS = np.array([[1.5, 0.5], [2.0, 7.0]])
OLD = POLICY - jnp.log(jnp.array(RATIOS))
REFERENCE = POLICY + jnp.array([[0.5, 0.0], [0.0, 9.0]])
MASK = jnp.array([[True, True], [True, False]])
KL = exp(0.5) - 1.5
BY_TOKEN = [[2.0, -1.0], [-1.0, 5.0]]
IMPORTANCE = [[0.5, 2.0], [3.0, 5.0]]
ENTROPIES = [[1.0, 2.0], [4.0, 8.0]]


def gate(r, temperature):
    return 4 / temperature * s(temperature * (r - 1))


def phi(w, power, decay):
    return w**power * exp(decay - decay * w)


LOSSES = {  # options, advantages, loss at beta = 0
    "dapo, by token": ({}, BY_TOKEN, (-2 * 1.28 + 0.8 + 2) / 3),
    "grpo, by token": ({}, BY_TOKEN, ((-2 * 1.2 + 0.8) / 2 + 2) / 2),
    "cispo, by token": ({"max_ratio": 1.2}, BY_TOKEN, (1.2 * 2 * 2 - 0.5 * 2 - 1.2) / 3),
    "dapo, delta": ({"delta": 1.6}, [-1.0, -1.0], (1.5 + 0.8 + 1.6) / 3),
    "dapo, delta of a gain": ({"delta": 1.6}, [1.0, 1.0], (-1.28 - 0.5 - 1.28) / 3),
    "dapo, delta within": ({"delta": 1.1}, [-1.0, 1.0], (1.28 + 0.8 - 1.1) / 3),
    "dapo, importance": ({"importance_weights": IMPORTANCE}, [1.0, -1.0], (-0.5 * 1.28 - 2 * 0.5 + 3 * 2) / 3),
    "dapo, importance of answers": ({"importance_weights": [0.5, 0.0]}, [1.0, -1.0], (-0.5 * 1.28 - 0.5 * 0.5) / 3),
    "dapo, entropy": ({"entropies": ENTROPIES, "entropy_weight": 0.1}, [0.0, 0.0], -0.1 * 7 / 3),
    "grpo, entropy": ({"entropies": ENTROPIES, "entropy_weight": 0.1}, [0.0, 0.0], -0.1 * (1.5 + 4) / 2),
    "sapo": ({"gain_temperature": 2.0, "loss_temperature": 0.5}, [1.0, -1.0], 0.0),  # below
    "luspo": ({"epsilon_low": 0.2, "epsilon_high": 0.05}, [1.0, 1.0], (-2 * 0.75**0.5 - 1.05) / 2),
    "gmpo": ({}, [1.0, -1.0], (-((exp(0.4) * 0.5) ** 0.5) + 2) / 2),
    "gmpo, low": ({}, [-1.0, 1.0], ((1.5 * exp(-0.4)) ** 0.5 - exp(0.4)) / 2),
    "rloo": ({}, [1.0, -1.0], (-0.75 + 2) / 2),
    "rloo, delta": ({"delta": 1.5}, [-1.0, -1.0], (0.8 + 1.5) / 2),
    "vespo": ({}, [1.0, -1.0], (4 * phi(0.75, 2, 3) - phi(2, 3, 2)) / 3),
}
LOSSES["sapo"] = (*LOSSES["sapo"][:2], (-(gate(1.5, 2) + gate(0.5, 2)) / 2 + gate(2, 0.5)) / 2)


def test_worked_numbers():
    def call(name, options, advantages):
        function = getattr(preference, name.partition(",")[0])
        options = {k: jnp.array(x) if isinstance(x, list) else x for k, x in options.items()}
        return lambda: function(POLICY, OLD, REFERENCE, jnp.array(advantages), MASK, beta=0.0, **options)

    results = at_once({name: call(name, *row[:2]) for name, row in LOSSES.items()})
    for name, (loss, metrics) in results.items():
        assert float(loss) == pytest.approx(LOSSES[name][2], rel=1e-5), name
        if "entropies" in LOSSES[name][0]:
            assert float(metrics["entropy"]) == pytest.approx(7 / 3)


PENALTIES = {  # of KL estimates: their sum over the three tokens, x = -0.5, 0, 0 and ratio 1.5
    "k1": (k1, -0.5),
    "k2": (k2, 0.125),
    "k3": (k3, KL),
    "corrected k3": (bias_corrected(k3), 1.5 * KL),
}


def test_worked_penalties():
    """With advantages 0 the loss is beta KL; `rloo` sums it over an answer, and `gspo` has one ratio for it."""
    zeros = jnp.zeros(2)
    calls = {}
    for name, (estimate, _) in PENALTIES.items():
        options = {"beta": 0.1, "kl_estimate": estimate}
        for function in (preference.dapo, preference.rloo, preference.gspo):
            arrays = POLICY, OLD, REFERENCE, zeros, MASK
            calls[name, function.__name__] = partial(function, *arrays, **options)
    for (name, function), (loss, metrics) in at_once(calls).items():
        total = PENALTIES[name][1]
        if name == "corrected k3" and function == "gspo":
            total = 0.75**0.5 * KL
        assert float(metrics["kl"]) == pytest.approx(total / 3, rel=1e-5), (name, function)
        divisor = {"dapo": 3, "rloo": 2, "gspo": 4}[function]
        assert float(loss) == pytest.approx(0.1 * total / divisor, rel=1e-5), (name, function)


def test_worked_sampled_kl():
    """Ratios 1.5, 0.5 and 2; only the first token's estimate is not 0, but for x = 1 of the third."""
    reference = REFERENCE - jnp.array([[0.0, 0.0], [1.0, 0.0]])
    third = exp(-1)
    expected = {
        "plain": ({}, (1.5 * KL + 2 * third) / 3, 0),
        "bound": ({"max_ratio": 1.6}, (1.5 * KL + 1.6 * third) / 3, 1 / 3),
        "k2": ({"kl_estimate": k2}, (1.5 * 0.125 + 2 * 0.5) / 3, 0),
        "importance": ({"importance_weights": jnp.array([2.0, 0.0])}, 2 * 1.5 * KL / 3, 0),
    }
    calls = {
        name: partial(preference.sampled_kl, POLICY, OLD, reference, MASK, **options)
        for name, (options, *_) in expected.items()
    }
    for name, (loss, metrics) in at_once(calls).items():
        assert float(loss) == pytest.approx(expected[name][1], rel=1e-5), name
        assert float(metrics["clip_fraction"]) == pytest.approx(expected[name][2]), name


def kl(p, q):
    return jnp.sum(jnp.where(p > 0, p * jnp.log(p / q), 0))


def test_what_each_estimate_descends(x64):
    """The expectation over all tokens of a vocabulary, by weights that are their probabilities."""
    rng = np.random.default_rng(0)
    logits, before, anchor = (jnp.asarray(rng.normal(size=11)) for _ in range(3))
    old, reference = jax.nn.softmax(before), jax.nn.softmax(anchor)

    def gradient(function):
        return jax.grad(lambda z: function(jax.nn.softmax(z)))(logits)

    reverse = gradient(lambda q: kl(q, reference))
    second_moment = gradient(lambda q: jnp.sum(q * jnp.log(q / reference) ** 2) / 2)
    forward = gradient(lambda q: kl(reference, q))

    def of_sampled(estimate, sampled_from, kind):
        """Each token an answer of its own."""

        def loss(z):
            q = jax.nn.softmax(z)
            sampler = jax.lax.stop_gradient(q) if sampled_from is None else sampled_from
            column = {"policy": q, "old": sampler, "reference": reference}
            column = {name: jnp.log(x)[:, None] for name, x in column.items()}
            if sampled_from is None:
                column["old"] = None
            mask, share = jnp.ones((11, 1), bool), {"weights": sampler, "normalizer": 1.0}
            if kind == "loss":
                return preference.sampled_kl(**column, mask=mask, kl_estimate=estimate, **share)[0]
            zeros = jnp.zeros(11)
            return preference.dapo(**column, advantages=zeros, mask=mask, beta=1.0, kl_estimate=estimate, **share)[0]

        return jax.grad(loss)(logits)

    rows = [  # estimate, what sampled, and the gradients of the penalty and of the loss
        (k1, None, 0 * reverse, 0 * reverse),
        (k2, None, reverse, reverse),
        (k3, None, forward, forward),
        *((bias_corrected(k), q, reverse, reverse) for k in (k1, k3) for q in (None, old)),
        *((bias_corrected(k2), q, second_moment, second_moment) for q in (None, old)),
        (k2, old, None, reverse),  # only `sampled_kl` weighs by the ratio what is not corrected
        (k3, old, None, forward),
    ]
    found = at_once(
        {
            f"{i} {kind}": partial(of_sampled, *row[:2], kind)
            for i, row in enumerate(rows)
            for kind in ("penalty", "loss")
        }
    )
    for i, (*_, penalty, loss) in enumerate(rows):
        for kind, want in (("penalty", penalty), ("loss", loss)):
            if want is not None:
                np.testing.assert_allclose(found[f"{i} {kind}"], want, atol=1e-12)


def test_the_reference_always_pulls_when_corrected():
    """However far policy, sampler and reference are apart, the slope of r k3 has the sign of policy - reference."""
    x, log_ratio = (a.ravel() for a in np.meshgrid([-1e4, -100.0, -21.0, -3.0, 2.0, 1e3], [-30.0, 0.0, 19.0, 60.0]))

    def slopes(function):
        def loss(policy, old, reference):
            arrays = [jnp.reshape(a, (1, 1)) for a in (policy, old, reference)]
            if function is preference.sampled_kl:
                return function(*arrays, jnp.ones((1, 1), bool))[0]
            options = {"beta": 1.0, "kl_estimate": bias_corrected(k3)}
            return function(*arrays, jnp.zeros(1), jnp.ones((1, 1), bool), **options)[0]

        return jax.vmap(jax.grad(loss))(jnp.zeros(x.size), -jnp.float32(log_ratio), -jnp.float32(x))

    results = at_once(
        {f.__name__: partial(slopes, f) for f in (preference.grpo, preference.gspo, preference.sampled_kl)}
    )
    for name, slope in results.items():
        assert np.isfinite(slope).all(), name
        np.testing.assert_array_equal(np.sign(slope), np.sign(x), err_msg=name)
        near = (abs(x) < 20) & (abs(log_ratio) < 20)
        np.testing.assert_allclose(slope[near], (np.exp(log_ratio) * x)[near], rtol=1e-4, err_msg=name)


def test_metrics_mean_the_same_whatever_the_weights_are():
    """Plain means over the tokens of answers that count: so those of batches, by ``num_tokens``, are those of all."""
    inputs = {name: CASES[name].inputs for name in TOKENS}
    ones, weights = np.ones(B), np.array([3.0, 0.1, 1.0, 2.0, 0.5, 7.0, 1.0, 1.0])
    half = 1.0 * (np.arange(B) < 3)
    plain, weighted, one, other = (evaluate_all(inputs, x) for x in (ones, weights, half, weights * (1 - half)))
    for name in TOKENS:
        assert weighted[name][0][0] != plain[name][0][0], name
        means, same, *parts = (x[name][0][1] for x in (plain, weighted, one, other))
        assert means.keys() == same.keys()
        for key, value in means.items():
            np.testing.assert_allclose(same[key], value, rtol=1e-6, err_msg=f"{name}, {key}")
            sums = [part[key] * (1 if key == "num_tokens" else part["num_tokens"]) for part in parts]
            total = value * (1 if key == "num_tokens" else means["num_tokens"])
            np.testing.assert_allclose(sum(sums), total, rtol=1e-5, atol=1e-5, err_msg=f"{name}, {key}")


def test_an_advantage_of_an_answer_is_that_of_its_tokens():
    """Also in `gspo`, where each token then has its own gradient: the answer's, for they are all the same."""
    names = [name for name in TOKENS if name in ("grpo", "dr_grpo", "dapo", "gspo", "luspo", "cispo", "sapo", "vespo")]
    inputs = {name: CASES[name].inputs for name in names}
    spread = {
        name: x | {"advantages": np.broadcast_to(x["advantages"][:, None], x["policy"].shape).copy()}
        for name, x in inputs.items()
    }
    want, got = (evaluate_all(x) for x in (inputs, spread))
    for name in names:
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, 1e-5, 1e-7, err_msg=name), got[name], want[name]
        )


def test_a_token_of_gspo_answers_for_its_own_advantage():
    advantages = jnp.array([[2.0, -1.0], [0.0, 0.0]])
    gspo = partial(preference.gspo, epsilon_low=0.9, epsilon_high=0.9)
    slope = jax.jit(jax.grad(lambda x: gspo(x, OLD, None, advantages, MASK)[0]), compiler_options=QUICK)(POLICY)
    np.testing.assert_allclose(slope, -(0.75**0.5) * np.array(advantages) / 4, rtol=1e-6)


def test_a_ratio_beyond_delta_has_no_gradient():
    slope = jax.grad(lambda x: preference.dapo(x, OLD, None, -jnp.ones(2), MASK, delta=1.6)[0])(POLICY)
    np.testing.assert_allclose(slope, [[1.5 / 3, 0], [0, 0]], rtol=1e-6)
    metrics = preference.dapo(POLICY, OLD, None, -jnp.ones(2), MASK, delta=1.6)[1]
    assert float(metrics["clip_fraction"]) == pytest.approx(2 / 3)


def test_rloo_without_old_is_reinforce():
    slope = jax.grad(lambda x: preference.rloo(x, None, None, jnp.array([2.0, -1.0]), MASK)[0])(POLICY)
    np.testing.assert_allclose(slope, [[-1, -1], [0.5, 0]], rtol=1e-6)


def test_entropy_bonus_from_hidden_states():
    """Its gradient reaches the head through `jaxkd.token_entropies`, and raises the entropy."""
    rng = np.random.default_rng(0)
    hidden, weight = jnp.float32(rng.normal(size=(2, 3, 4))), jnp.float32(rng.normal(size=(7, 4)))
    labels = jnp.array([[1, 2, -100], [3, 3, 0]])
    mask = labels != -100

    def loss(weight):
        student = jaxkd.LinearLogits(hidden, weight)
        entropies = jaxkd.token_entropies(student, mask=mask)
        log_probs = jaxkd.token_log_probs(student, labels)
        options = {"entropies": entropies, "entropy_weight": 1.0}
        return preference.dapo(log_probs, None, None, jnp.zeros(2), mask, **options)

    def dense(weight):
        log_q = jax.nn.log_softmax(hidden @ weight.T)
        return jnp.sum(jnp.exp(log_q) * log_q, axis=-1, where=jnp.ones_like(log_q, bool))[mask].mean()

    (value, metrics), slope = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(weight)
    want, wanted_slope = jax.value_and_grad(dense)(weight)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], -want, rtol=1e-5)
    np.testing.assert_allclose(slope, wanted_slope, rtol=1e-4, atol=1e-6)


def test_advantages_of_groups():
    rewards = jnp.array([1.0, 3.0, 2.0, 5.0, jnp.nan, 7.0, jnp.nan, jnp.nan, 4.0])
    mask = jnp.isfinite(rewards)
    of = partial(preference.group_advantages, rewards, group_size=3, mask=mask)
    deviation = 2**0.5
    np.testing.assert_allclose(
        of(epsilon=1e-9), [-1, 1, 0, -1 / deviation, 0, 1 / deviation, 0, 0, 0], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(of(is_scaled=False), [-1, 1, 0, -1, 0, 1, 0, 0, 0], rtol=1e-6)
    one_out = preference.leave_one_out_advantages(rewards, group_size=3, mask=mask)
    np.testing.assert_allclose(one_out, [-1.5, 1.5, 0, -2, 0, 2, 0, 0, 0], rtol=1e-6)
    equal = preference.group_advantages(jnp.ones(4), group_size=2)
    np.testing.assert_array_equal(equal, 0)
    assert preference.leave_one_out_advantages(jnp.ones(0), group_size=2).shape == (0,)


@pytest.mark.parametrize(
    ("arrays", "options", "error", "words"),
    [
        ((jnp.ones(5),), {"group_size": 2}, ValueError, r"`rewards` has shape \(5,\).*group_size=2"),
        ((jnp.ones((2, 2)),), {"group_size": 2}, ValueError, r"`rewards` has shape \(2, 2\)"),
        ((jnp.ones(4),), {"group_size": 2.0}, TypeError, "`group_size`"),
        ((jnp.ones(4),), {"group_size": 2, "mask": jnp.ones(4)}, TypeError, "`mask` is float32"),
        ((jnp.ones(4, int),), {"group_size": 2}, TypeError, "`rewards`"),
    ],
)
def test_errors_of_groups(arrays, options, error, words):
    for function in (preference.group_advantages, preference.leave_one_out_advantages):
        with pytest.raises(error, match=words):
            function(*arrays, **options)
    with pytest.raises(ValueError, match="`epsilon`"):
        preference.group_advantages(jnp.ones(4), group_size=2, epsilon=0.0)


def test_an_estimate_of_ones_own():
    """KL(policy‖reference) bounded by log 2 a token."""
    estimate = preference.KLEstimate(lambda x: jnp.log(2.0) - jnp.log1p(jnp.exp(-x)))
    loss = jax.jit(partial(preference.dapo, beta=1.0, kl_estimate=estimate), compiler_options=QUICK)
    value = loss(POLICY, None, REFERENCE, jnp.zeros(2), MASK)[0]
    assert float(value) == pytest.approx((log(2) - log(1 + exp(0.5))) / 3, rel=1e-5)
