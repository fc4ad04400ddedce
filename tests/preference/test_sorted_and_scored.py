"""AOT, f-DPO, LD-DPO's log-probabilities and the SFT term: worked by hand, and by what they have to agree with."""

from functools import partial
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_deviations import PAIRS, cost
from quick_programs import QUICK, at_once

import jaxkd
from jaxkd import preference

SCORES = {  # as functions of t = policy / reference
    "forward KL": (preference.forward_kl_score, lambda t: 1 - 1 / t),
    "Jensen-Shannon": (preference.jensen_shannon_score, lambda t: log(2 * t / (1 + t))),
    "alpha": (preference.alpha_score(0.3), lambda t: (t**-0.7 - 1) / -0.7),
    "alpha above 1": (preference.alpha_score(1.5), lambda t: (t**0.5 - 1) / 0.5),
    "alpha at 1": (preference.alpha_score(1.0), log),
    "alpha at 0": (preference.alpha_score(0), lambda t: 1 - 1 / t),
}


def test_scores():
    """Log-ratios of (1, -1) and (-1, 2), at beta = 1/2."""
    calls = {name: partial(preference.f_dpo, *PAIRS, score=score, beta=0.5) for name, (score, _) in SCORES.items()}
    for name, (loss, metrics) in at_once(calls).items():
        score = SCORES[name][1]
        margins = [(score(exp(a)) - score(exp(b))) / 2 for a, b in ((1, -1), (-1, 2))]
        assert float(loss) == pytest.approx(sum(cost(m) for m in margins) / 2, rel=1e-5), name
        assert float(metrics["margin"]) == pytest.approx(sum(margins) / 2, rel=1e-5), name


def test_the_score_of_reverse_kl_is_dpo():
    x = preference.f_dpo(*PAIRS, score=lambda log_ratio: log_ratio, beta=0.5)
    jax.tree.map(np.testing.assert_array_equal, x, preference.dpo(*PAIRS, beta=0.5))


DIVERGENCES = {
    "forward KL": jaxkd.forward_kl,
    "Jensen-Shannon": jaxkd.jensen_shannon(0.5),
    "alpha": jaxkd.alpha_divergence(0.7),
    "reverse KL": jaxkd.reverse_kl,
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_scores_are_slopes_of_the_divergences_of_that_name(name, x64):
    """d term / d q at p = 1 is f'(q), but for a constant; the Jensen-Shannon score is that of twice the divergence."""
    score = {**SCORES, "reverse KL": (lambda log_ratio: log_ratio, None)}[name][0]
    factor = 2 if name == "Jensen-Shannon" else 1
    log_t = jnp.linspace(-3, 3, 7)
    of_t = jax.vmap(jax.grad(lambda t: DIVERGENCES[name].terms(jnp.zeros(1), jnp.log(t)[None])[0]))
    slopes = factor * jax.jit(of_t)(jnp.exp(log_t))
    np.testing.assert_allclose(slopes - slopes[3], score(log_t) - score(log_t[3]), rtol=1e-9, atol=1e-12)


def test_a_score_far_from_the_reference_has_a_slope():
    """exp(1000) of the forward KL is inf; beyond 20 its tangent goes on."""
    far = [jnp.array([x]) for x in (-1000.0, 0.0, 0.0, 0.0)]
    of_far = partial(preference.f_dpo, score=preference.forward_kl_score)
    loss, slope = jax.value_and_grad(lambda x: of_far(x, *far[1:])[0])(far[0])
    assert float(loss) == pytest.approx(0.1 * (exp(20) * 981 - 1), rel=1e-5)
    assert float(slope[0]) == pytest.approx(-0.1 * exp(20), rel=1e-5)


# Three pairs: chosen - rejected is 2, -1 and 5 under the policy, 0, 3 and 1 under the reference; policy - reference is
# 4, 1 and 0 of the chosen, 2, 5 and -4 of the rejected answers.
TRIPLE = [jnp.array(x) for x in ([4.0, 1.0, 1.0], [2.0, 2.0, -4.0], [0.0, 0.0, 1.0], [0.0, -3.0, 0.0])]
RANKED = {  # at beta = 1: the differences of what is sorted
    "aot": (-1 - 0, 2 - 1, 5 - 3),
    "aot_unpaired": (0 + 4, 1 - 2, 4 - 5),
}


@pytest.mark.parametrize("name", RANKED)
def test_ranks(name):
    function = getattr(preference, name)
    loss, metrics = function(*TRIPLE, beta=1.0)
    assert float(loss) == pytest.approx(sum(cost(d) for d in RANKED[name]) / 3, rel=1e-6)
    assert float(metrics["margin"]) == pytest.approx((2 - 4 + 4) / 3, rel=1e-6)
    smooth = function(*TRIPLE, beta=1.0, label_smoothing=0.25)[0]
    expected = sum(0.75 * cost(d) + 0.25 * cost(-d) for d in RANKED[name]) / 3
    assert float(smooth) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", RANKED)
def test_the_order_of_a_batch_has_no_meaning(name):
    """Nor, in `aot_unpaired`, which chosen answer stands beside which rejected one; weights are shares."""
    function = jax.jit(partial(getattr(preference, name), beta=0.7), compiler_options=QUICK)
    rng = np.random.default_rng(0)
    arrays = [jnp.float32(rng.normal(size=9)) for _ in range(4)]
    weights = jnp.float32(rng.random(9))
    moved = rng.permutation(9)
    want = function(*arrays, weights=weights)[0]
    assert float(function(*(x[moved] for x in arrays), weights=weights[moved])[0]) == pytest.approx(
        float(want), rel=1e-5
    )
    assert float(function(*arrays, weights=7 * weights)[0]) == pytest.approx(float(want), rel=1e-5)
    if name == "aot_unpaired":
        even = jnp.ones(9)
        halves = [x[moved] if i % 2 else x for i, x in enumerate(arrays)]
        want = function(*arrays, weights=even)[0]
        assert float(function(*halves, weights=even)[0]) == pytest.approx(float(want), rel=1e-5)


def test_halves_of_a_weight():
    """A pair of weight 1 is two of weight 1/2; of uneven weights a pair's rank is compared with more than one."""
    one, other = ([jnp.array(x) for x in columns] for columns in ([[3.0, 0.0]] * 2, [[3.0, 3.0, 0.0]] * 2))
    zeros = [jnp.zeros(2), jnp.zeros(2)]
    whole = preference.aot_unpaired(one[0], -one[1], *zeros, weights=jnp.array([1.0, 1.0]))[0]
    split = preference.aot_unpaired(
        other[0], -other[1], jnp.zeros(3), jnp.zeros(3), weights=jnp.array([0.5, 0.5, 1.0])
    )[0]
    assert float(whole) == pytest.approx(float(split), rel=1e-6)
    # Policy 0 and 4 of weights 1 and 3, the reference's 1 and 0 of the same pairs: between the marks 1, 3 and 4 the
    # differences are 0 - 0, 4 - 0 and 4 - 1.
    uneven = [jnp.array(x) for x in ([0.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0])]
    loss = preference.aot(*uneven, beta=1.0, weights=jnp.array([1.0, 3.0]))[0]
    assert float(loss) == pytest.approx((cost(0) + 2 * cost(4) + cost(3)) / 4, rel=1e-6)


CHOSEN = np.array([[-1.0, -2.0, -4.0, -8.0], [-1.0, -1.0, np.nan, np.inf]])
REJECTED = np.array([[-3.0, -5.0, np.nan], [-7.0, -6.0, -2.0]])
MASKS = np.array([[1, 1, 1, 1], [1, 1, 0, 0]]), np.array([[1, 1, 0], [1, 1, 1]])


def test_length_desensitized_log_probs():
    """Lengths 4 and 2, 2 and 3."""
    of = jax.jit(preference.length_desensitized_log_probs)
    for alpha in (0.0, 0.5, 1.0):
        chosen, rejected = of(jnp.float32(CHOSEN), jnp.float32(REJECTED), *MASKS, alpha=alpha)
        np.testing.assert_allclose(chosen, [-3 - 12 * alpha, -2], rtol=1e-6)
        np.testing.assert_allclose(rejected, [-8, -13 - 2 * alpha], rtol=1e-6)
    slope = jax.grad(lambda x: of(x, jnp.float32(REJECTED), *MASKS, alpha=0.5)[0].sum())(jnp.float32(CHOSEN))
    np.testing.assert_allclose(slope, [[1, 1, 0.5, 0.5], [1, 1, 0, 0]])


def test_answers_that_begin_late():
    """Tokens are counted from an answer's own first one, as where prompts stand before."""
    masks = jnp.array([[0, 0, 1, 1]]), jnp.array([[0, 1, 0, 0]])
    chosen, rejected = preference.length_desensitized_log_probs(
        *[jnp.array([[-1.0, -2, -4, -8]])] * 2, *masks, alpha=0.5
    )
    assert (float(chosen[0]), float(rejected[0])) == (-8, -2)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"alpha": 1.5}, ValueError, "`alpha` is 1.5"),
        ({"chosen": jnp.zeros(2)}, ValueError, r"`chosen` has shape \(2,\).*\(B, T\)"),
        ({"rejected": jnp.zeros((2, 3), int)}, TypeError, "`rejected`"),
        ({"chosen_mask": jnp.ones((2, 3))}, ValueError, r"`chosen_mask` has shape \(2, 3\).*\(2, 4\)"),
        ({"rejected": jnp.zeros((3, 3)), "rejected_mask": jnp.ones((3, 3))}, ValueError, "`rejected` has B=3"),
    ],
)
def test_errors_of_length_desensitized_log_probs(changes, error, words):
    arrays = {"chosen": jnp.zeros((2, 4)), "rejected": jnp.zeros((2, 3))}
    arrays |= {"chosen_mask": jnp.ones((2, 4)), "rejected_mask": jnp.ones((2, 3)), "alpha": 0.5}
    with pytest.raises(error, match=words):
        preference.length_desensitized_log_probs(**(arrays | changes))


def test_the_sft_term_is_the_cross_entropy_of_chosen_answers():
    """And what `cpo` adds."""
    rng = np.random.default_rng(0)
    student = jaxkd.LinearLogits(jnp.float32(rng.normal(size=(3, 5, 4))), jnp.float32(rng.normal(size=(7, 4))))
    labels = jnp.where(np.arange(5) < np.array([[5], [2], [0]]), rng.integers(7, size=(3, 5)), -100)
    log_probs, lengths = jaxkd.sequence_log_probs(student, labels), jnp.array([5, 2, 0])
    loss = float(preference.sft(log_probs, chosen_lengths=lengths)[0])
    assert loss == pytest.approx(float(jaxkd.cross_entropy(student, labels)[0]), rel=1e-6)
    assert loss == pytest.approx(
        float(preference.cpo(log_probs, log_probs, chosen_lengths=lengths)[1]["nll"]), rel=1e-6
    )
    part = preference.sft(log_probs, chosen_lengths=lengths, weights=jnp.array([2.0, 0.0, 1.0]), normalizer=20.0)
    assert float(part[0]) == pytest.approx(float(-2 * log_probs[0] / 20), rel=1e-6)
    assert float(part[1]["num_sequences"]) == 2
