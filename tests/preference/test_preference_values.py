"""Which numbers the preference losses give: worked by hand, identities between them, and where others differ.

The two pairs: log-ratios to the reference of 1 and -1, and of -1 and 2. At beta = 1/2 the rewards are 1/2 and -1/2,
and -1/2 and 1; the margins 1 and -3/2.
"""

from math import exp, inf, isnan, log

import jax.numpy as jnp
import numpy as np
import pytest
from preference_deviations import ANSWERS, DEVIATIONS, IS_DESIRABLE, PAIRS, cost, s

import jaxkd
from jaxkd import preference
from jaxkd.preference import f_po


def kl(p, q):
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


def odds(x):
    return exp(x) / (1 - exp(x))


GATE = s(1 / 0.05), s(-1.5 / 0.05)
WORKED = {  # options, and the two losses
    "dpo": ({}, cost(1), cost(-1.5)),
    "cdpo": ({"label_smoothing": 0.2}, 0.8 * cost(1) + 0.2 * cost(-1), 0.8 * cost(-1.5) + 0.2 * cost(1.5)),
    "robust": (
        {"label_smoothing": 0.2},
        (0.8 * cost(1) - 0.2 * cost(-1)) / 0.6,
        (0.8 * cost(-1.5) - 0.2 * cost(1.5)) / 0.6,
    ),
    "hinge": ({}, 0, 2.5),
    "ipo": ({}, 1, 16),  # (2 - 1)^2 and (-3 - 1)^2
    "exo_pair": ({"label_smoothing": 0.2}, kl((s(1), s(-1)), (0.8, 0.2)), kl((s(-1.5), s(1.5)), (0.8, 0.2))),
    "discopop": (
        {},
        (1 - GATE[0]) * cost(1) + GATE[0] * exp(-1),
        (1 - GATE[1]) * cost(-1.5) + GATE[1] * exp(1.5),
    ),
    "irpo": ({"chosen_lengths": np.array([2.0, 4.0]), "alpha": 0.5}, cost(1) + 0.25, cost(-1.5) + 0.5),
    "f_po": (
        {"divergence": jaxkd.hellinger, "label_smoothing": 0.2},
        1 - (0.8 * s(1)) ** 0.5 - (0.2 * s(-1)) ** 0.5,
        1 - (0.8 * s(-1.5)) ** 0.5 - (0.2 * s(1.5)) ** 0.5,
    ),
    "nca_pair": ({}, cost(0.5) + cost(-0.5) / 2 + cost(0.5) / 2, cost(-0.5) + cost(0.5) / 2 + cost(-1) / 2),
    "bco_pair": ({}, 2 * cost(0.5), cost(-0.5) + cost(-1)),
    "sppo_hard": ({}, 0, 13),  # (1 - 1)^2 + (-1 + 1)^2 and (-1 - 1)^2 + (2 + 1)^2
    "apo_zero": ({}, 2 * s(-0.5), s(0.5) + s(1)),
    "apo_down": ({}, s(0.5) + s(-1), s(-0.5) + s(1.5)),
}
FREE = {  # of log-probabilities -1 and -4 chosen, -3 and -1 rejected: margins 1 and -3/2 without a reference too
    "cpo": ({"chosen_lengths": np.array([2.0, 4.0]), "alpha": 0.5}, cost(1) + 0.25, cost(-1.5) + 0.5),
    "simpo": ({"gamma": 0.5}, cost(0.5), cost(-2)),
    "cpo_simpo": ({"gamma": 0.5, "alpha": 0.1}, cost(0.5) + 0.1, cost(-2) + 0.4),
    "orpo": ({}, 1 + cost(log(odds(-1) / odds(-3))) / 2, 4 + cost(log(odds(-4) / odds(-1))) / 2),
}


@pytest.mark.parametrize("name", WORKED | FREE)
def test_worked_numbers(name):
    options, *losses = (WORKED | FREE)[name]
    arrays = PAIRS if name in WORKED else PAIRS[:2]
    loss, metrics = getattr(preference, name)(*arrays, beta=0.5, **options)
    assert float(loss) == pytest.approx(sum(losses) / 2, rel=2e-6)
    assert float(metrics["margin"]) == pytest.approx(-0.25)
    assert float(metrics["accuracy"]) == 0.5
    if name == "orpo":
        assert float(metrics["log_odds_ratio"]) == pytest.approx(
            log(odds(-1) / odds(-3) * odds(-4) / odds(-1)) / 2, rel=1e-5
        )
    if "nll" in metrics:
        assert float(metrics["nll"]) == pytest.approx(2.5 if name in ("orpo", "cpo_simpo") else 0.75)


UNPAIRED = {
    "kto": ({"desirable_weight": 2.0}, 2 * s(-5 / 6), s(-1 / 6), 2 * s(4 / 6)),
    "kto, other answers": ({"kl_log_ratios": jnp.array([3.0, -1.0])}, s(-0.5), s(-0.5), s(1)),
    "kto, negative": ({"kl_log_ratios": -2.0}, s(-1), s(0), s(0.5)),
    "kto, known": ({"kl_log_ratios": 2.0}, s(0), s(-1), s(1.5)),
    "bco": ({}, cost(0.875), cost(0.125), cost(-0.625)),  # shift: half of (1 - 1/2) / 2, and half of 0
    "bco, given": ({"delta": 0.25}, cost(0.75), cost(0.25), cost(-0.75)),
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_worked_numbers_of_unpaired_answers(name):
    options, *losses = UNPAIRED[name]
    loss, metrics = getattr(preference, name[:3])(*ANSWERS, IS_DESIRABLE, beta=0.5, **options)
    assert float(loss) == pytest.approx(sum(losses) / 3, rel=2e-6)
    assert float(metrics["chosen_rewards"]) == pytest.approx(0.25)
    assert float(metrics["rejected_rewards"]) == 0
    assert float(metrics["margin"]) == pytest.approx(0.25)
    assert float(metrics["chosen_log_probs"]) == -2
    assert float(metrics["rejected_log_probs"]) == -2
    assert float(metrics["num_sequences"]) == 3
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


@pytest.mark.parametrize("name", TOKENS)
def test_worked_numbers_of_tokens(name):
    options, advantages, expected, clipped = TOKENS[name]
    function = getattr(preference, name.split(",")[0])
    loss, metrics = function(POLICY, OLD, REFERENCE, jnp.array(advantages), MASK, beta=0.1, **options)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(KL / 3, rel=1e-5)
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped / 3)
    assert float(metrics["log_probs"]) == pytest.approx(-5 / 3)
    assert float(metrics["num_tokens"]) == 3


def test_without_old_the_ratio_is_1_and_without_reference_there_is_no_kl():
    loss, metrics = preference.grpo(POLICY, None, None, jnp.array([2.0, -1.0]), MASK)
    assert float(loss) == pytest.approx(-0.5)
    assert float(metrics["kl"]) == 0


IDENTITIES = {
    "f-PO's reverse KL is DPO": (f_po, {"divergence": jaxkd.forward_kl, "label_smoothing": 0.0}, preference.dpo, {}, 0),
    "and cDPO less the entropy": (
        f_po,
        {"divergence": jaxkd.forward_kl, "label_smoothing": 0.2},
        preference.cdpo,
        {"label_smoothing": 0.2},
        0.8 * log(0.8) + 0.2 * log(0.2),
    ),
    "f-PO's forward KL is EXO": (
        f_po,
        {"divergence": jaxkd.reverse_kl, "label_smoothing": 0.01},
        preference.exo_pair,
        {"label_smoothing": 0.01},
        0,
    ),
    "robust without smoothing": (preference.robust, {"label_smoothing": 0.0}, preference.dpo, {}, 0),
    "conservative without smoothing": (preference.cdpo, {"label_smoothing": 0.0}, preference.dpo, {}, 0),
    "IRPO without likelihood": (preference.irpo, {"alpha": 0.0, "chosen_lengths": 1}, preference.dpo, {}, 0),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name, x64):
    one, options, other, other_options, difference = IDENTITIES[name]
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(-20 * rng.random(50)) for _ in range(4)]
    got, want = one(*arrays, **options)[0], other(*arrays, **other_options)[0]
    assert float(got - want) == pytest.approx(difference, abs=1e-12)


def test_f_po_at_zero_smoothing_is_finite_where_the_divergence_is():
    assert np.isfinite(f_po(*PAIRS, divergence=jaxkd.jensen_shannon(0.5), label_smoothing=0.0)[0])
    assert f_po(*PAIRS, divergence=jaxkd.reverse_kl, label_smoothing=0.0)[0] == inf


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviations_from_others(name):
    reason, theirs, ours, evaluate = DEVIATIONS[name]
    assert reason
    assert isnan(theirs) or abs(theirs - ours) > 1e-3 * abs(ours)
    assert float(evaluate()[0]) == pytest.approx(ours, rel=1e-5)
