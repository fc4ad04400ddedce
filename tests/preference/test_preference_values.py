"""Which numbers the preference losses of pairs give: worked by hand, identities between them, where others differ.

The two pairs: log-ratios to the reference of 1 and -1, and of -1 and 2. At beta = 1/2 the rewards are 1/2 and -1/2,
and -1/2 and 1; the margins 1 and -3/2.
"""

from functools import partial
from math import exp, inf, isnan, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_deviations import DEVIATIONS, PAIRS, cost, s
from quick_programs import at_once

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
    "cpo": ({"chosen_lengths": np.array([2.0, 4.0]), "alpha": 0.6}, cost(1) + 0.5, cost(-1.5) + 0.5),
    "simpo": ({"gamma": 0.5}, cost(0.5), cost(-2)),
    "cpo_simpo": ({"gamma": 0.5, "alpha": 0.1}, cost(0.5) + 0.1, cost(-2) + 0.4),
    "cpo_simpo, lengths": (
        {"chosen_lengths": np.array([3, 1]), "gamma": 0.5, "alpha": 0.1},
        cost(0.5) + 0.175,
        cost(-2) + 0.175,
    ),
    "orpo, lengths": (
        {"chosen_lengths": np.array([3, 1])},
        1.75 + cost(log(odds(-1) / odds(-3))) / 2,
        1.75 + cost(log(odds(-4) / odds(-1))) / 2,
    ),
    "orpo": ({}, 1 + cost(log(odds(-1) / odds(-3))) / 2, 4 + cost(log(odds(-4) / odds(-1))) / 2),
}


NLL = {"irpo": 0.75, "cpo": 5 / 6, "cpo_simpo": 2.5, "orpo": 2.5, "cpo_simpo, lengths": 1.75, "orpo, lengths": 1.75}


def test_worked_numbers():
    calls = {
        name: partial(
            getattr(preference, name.partition(",")[0]), *(PAIRS if name in WORKED else PAIRS[:2]), beta=0.5, **options
        )
        for name, (options, *_) in (WORKED | FREE).items()
    }
    for name, (loss, metrics) in at_once(calls).items():
        assert float(loss) == pytest.approx(sum((WORKED | FREE)[name][1:]) / 2, rel=2e-6), name
        assert float(metrics["margin"]) == pytest.approx(-0.25), name
        assert float(metrics["accuracy"]) == 0.5, name
        assert ("nll" in metrics) == (name in NLL), name
        if name in NLL:
            assert float(metrics["nll"]) == pytest.approx(NLL[name]), name
        if name.startswith("orpo"):
            log_odds_ratio = log(odds(-1) / odds(-3) * odds(-4) / odds(-1)) / 2
            assert float(metrics["log_odds_ratio"]) == pytest.approx(log_odds_ratio, rel=1e-5)


# Answers of 1, 3 and 5 tokens with NLLs of 2, 3 and 20, the last of weight 0; rejected ones as likely as the chosen.
SUMS, LENGTHS = jnp.array([-2.0, -3.0, -20.0]), np.array([1, 3, 5])
LIKELIHOODS = {  # loss, log-probabilities, options, and the NLL
    "cpo": ("cpo", SUMS, {}, 5 / 4),
    "cpo_simpo": ("cpo_simpo", SUMS / LENGTHS, {}, 5 / 4),
    "orpo": ("orpo", SUMS / LENGTHS, {}, 5 / 4),
    "irpo": ("irpo", SUMS, {}, (2 / 1 + 3 / 3) / 2),
    "one length": ("cpo", SUMS, {"chosen_lengths": 4}, 5 / 8),
    "one length, normalizer": ("cpo", SUMS, {"chosen_lengths": 4, "normalizer": 10.0}, 5 / 40),
    "one length of averages": ("orpo", SUMS / LENGTHS, {"chosen_lengths": 4, "normalizer": 10.0}, 3 / 10),
    "no lengths": ("orpo", SUMS / LENGTHS, {"chosen_lengths": None}, 3 / 2),
    "no lengths, normalizer": ("cpo_simpo", SUMS / LENGTHS, {"chosen_lengths": None, "normalizer": 10.0}, 3 / 10),
    "weights": ("cpo", SUMS, {"weights": np.array([1.0, 2.0, 0.0])}, (2 + 6) / (1 + 6)),
    "weights of averages": ("orpo", SUMS / LENGTHS, {"weights": np.array([1.0, 2.0, 0.0])}, (2 + 6) / (1 + 6)),
    "a part": ("cpo", SUMS, {"normalizer": 10.0, "nll_normalizer": 50.0}, 5 / 50),
    "a part of averages": ("cpo_simpo", SUMS / LENGTHS, {"normalizer": 10.0, "nll_normalizer": 50.0}, 5 / 50),
}


def test_likelihoods():
    """Over the tokens of all chosen answers, as in TRL and Liger Kernel, but in IRPO and where there are no lengths."""
    weights = np.array([1.0, 1.0, 0.0])

    def call(name, log_probs, options):
        arrays = [log_probs] * (4 if name == "irpo" else 2)
        return lambda: getattr(preference, name)(*arrays, **{"chosen_lengths": LENGTHS, "weights": weights} | options)

    results = at_once({row: call(*parts) for row, (*parts, _) in LIKELIHOODS.items()})
    for row, (_, metrics) in results.items():
        assert float(metrics["nll"]) == pytest.approx(LIKELIHOODS[row][-1], rel=1e-6), row


def test_odds_of_certain_answers_have_a_gradient():
    """Where log p is 0 the slope of the log-odds is that at log p = -eps, 1 / eps: it pushes a certain rejected answer.

    A certain chosen one's log-odds are 1 above log(1 / eps), and -log 2 has even odds: beta (eps / e) / eps is left.
    """
    eps = 2.0**-23
    certain, even = jnp.zeros(1), jnp.full(1, -log(2))
    slopes = jax.grad(lambda x, y: preference.orpo(x, y, beta=0.5)[0], (0, 1))
    assert float(slopes(even, certain)[1][0]) == pytest.approx(0.5 / eps, rel=1e-3)
    assert float(slopes(certain, even)[0][0]) == pytest.approx(-1 - 0.5 / exp(1), rel=1e-3)


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


def test_identities(x64):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(-20 * rng.random(50)) for _ in range(4)]
    calls = {
        name: lambda one=one, options=options, other=other, others=others: (
            one(*arrays, **options)[0] - other(*arrays, **others)[0]
        )
        for name, (one, options, other, others, _) in IDENTITIES.items()
    }
    for name, difference in at_once(calls).items():
        assert float(difference) == pytest.approx(IDENTITIES[name][-1], abs=1e-12), name


def test_f_po_at_zero_smoothing_is_finite_where_the_divergence_is():
    assert np.isfinite(f_po(*PAIRS, divergence=jaxkd.jensen_shannon(0.5), label_smoothing=0.0)[0])
    assert f_po(*PAIRS, divergence=jaxkd.reverse_kl, label_smoothing=0.0)[0] == inf


def test_deviations_from_others():
    results = at_once({name: evaluate for name, (_, _, _, evaluate, _) in DEVIATIONS.items()})
    for name, (reason, theirs, ours, _, who) in DEVIATIONS.items():
        assert reason
        assert set(who.split(", ")) <= {"Liger", "TRL", "sentence-transformers"}
        assert isnan(theirs) or abs(theirs - ours) > 1e-3 * abs(ours), name
        assert float(results[name][0]) == pytest.approx(ours, rel=1e-5), name
