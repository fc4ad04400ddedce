"""Where the preference and embedding losses differ on purpose from Liger Kernel, TRL and sentence-transformers."""

from math import exp, inf, log, log1p, nan

import jax.numpy as jnp
import numpy as np

import jaxkd
from jaxkd import embedding, preference

PAIRS = [jnp.array(x) for x in ([-1.0, -4.0], [-3.0, -1.0], [-2.0, -3.0], [-2.0, -3.0])]
ANSWERS = [jnp.array(x) for x in ([-1.0, -2.0, -3.0], [-3.0, -2.0, -2.0])]  # log-ratios of 2, 0 and -1, mean 1/3
IS_DESIRABLE = jnp.array([True, False, True])


def s(x):  # sigmoid
    return 1 / (1 + exp(-x))


def cost(x):  # -log sigmoid(x)
    return log1p(exp(-x))


ONE = jnp.zeros(1)
FAR = [jnp.array([-2000.0]), ONE, ONE, ONE]
TOKEN = jnp.ones((1, 1), bool)
AT_0, AT_1 = jnp.zeros((1, 1)), jnp.ones((1, 1))
TWO, SHORT, ENTROPIES = jnp.zeros((2, 2)), jnp.array([[1, 1], [1, 0]]), jnp.array([[1.0, 1.0], [4.0, 9.0]])
LENGTHS = np.array([1, 3])
LINE = jnp.array([[0.0], [4.0], [1.0], [9.0], [5.0]])  # distances of a class to itself 4 and 8; the last is alone

# What Liger Kernel 0.8.5, TRL 1.16 or sentence-transformers 6 give: why, their number, ours and how we get it, who.
DEVIATIONS = {
    "smoothed DPO": (
        "their sigmoid DPO takes label_smoothing and ignores it; `cdpo` is the smoothed loss",
        cost(1),
        0.9 * cost(1) + 0.1 * cost(-1),
        lambda: preference.cdpo(*(x[:1] for x in PAIRS), beta=0.5, label_smoothing=0.1),
        "Liger, TRL",
    ),
    "IRPO's likelihood": (
        "their NLL beside DPO is a mean over the batch's tokens, (2 + 3) / 4 of answers of 1 and 3 tokens with -2 and "
        "-3; the paper's, and `irpo`'s, is the mean of each answer's own mean, (2 / 1 + 3 / 3) / 2",
        1.25,
        1.5,
        lambda: (preference.irpo(*[jnp.array([-2.0, -3.0])] * 4, chosen_lengths=LENGTHS)[1]["nll"],),
        "Liger, TRL",
    ),
    "likelihood without lengths": (
        "`orpo` and `cpo_simpo` without chosen_lengths know no tokens: the mean of averages -2 and -1. With lengths 1 "
        "and 3 theirs, (2 + 3) / 4",
        1.25,
        1.5,
        lambda: (preference.orpo(*[jnp.array([-2.0, -1.0])] * 2)[1]["nll"],),
        "Liger, TRL",
    ),
    "SimPO's likelihood": (
        "its SimPO adds the NLL unless cpo_alpha is 0; `simpo` is the paper's, `cpo_simpo` the sum",
        cost(1.5) + 1,
        cost(1.5),
        lambda: preference.simpo(jnp.array([-1.0]), jnp.array([-5.0]), beta=0.5, gamma=0.5),
        "TRL",
    ),
    "ORPO of certain answers": (
        "the odds of probability 1 are infinite, and theirs of two such answers inf - inf",
        nan,
        0.1 * log(2),
        lambda: preference.orpo(ONE, ONE),
        "Liger, TRL",
    ),
    "ORPO's likelihood": (
        "its NLL is of the prompt's tokens too, (4 + 2) / 2 of one of each; ours of the log-probabilities given",
        3.0,
        2.0,
        lambda: (preference.orpo(jnp.array([-2.0]), jnp.array([-3.0]), chosen_lengths=1)[1]["nll"],),
        "TRL",
    ),
    "ORPO's log_odds_ratio": (
        "their metric of this name is its log sigmoid; the log-odds are log_odds_chosen there",
        -cost(log(exp(2) * (1 - exp(-3)) / (1 - exp(-1)))),
        log(exp(2) * (1 - exp(-3)) / (1 - exp(-1))),
        lambda: (preference.orpo(jnp.array([-1.0]), jnp.array([-3.0]))[1]["log_odds_ratio"],),
        "Liger, TRL",
    ),
    "DiscoPOP far below": (
        "their exponential overflows before its gate closes: inf * 0. At a margin of -1000 the logistic loss is left",
        nan,
        1000.0,
        lambda: preference.discopop(*FAR, beta=0.5),
        "Liger, TRL",
    ),
    "IPO": (
        "it raises NotImplementedError; here, as in TRL, it takes averaged log-probabilities: (2 - 1)^2",
        nan,
        1.0,
        lambda: preference.ipo(*(x[:1] for x in PAIRS), beta=0.5),
        "Liger",
    ),
    "KTO without a KL estimate": (
        "it then has no baseline: s(-1) and s(0). Here it is that of the batch, 1. It has no weights of kinds either",
        (s(-1) + s(0)) / 2,
        s(-0.5),
        lambda: preference.kto(*(x[:2] for x in ANSWERS), IS_DESIRABLE[:2], beta=0.5),
        "Liger",
    ),
    "BCO's shift": (
        "while it had BCO, it was a running mean over all answers seen, 1/6 in a first batch of rewards 1, 0, -1/2; "
        "the paper's is halfway between the means of the two kinds, 1/8",
        (cost(5 / 6) + cost(1 / 6) + cost(-2 / 3)) / 3,
        (cost(7 / 8) + cost(1 / 8) + cost(-5 / 8)) / 3,
        lambda: preference.bco(*ANSWERS, IS_DESIRABLE, beta=0.5),
        "TRL",
    ),
    "CISPO's bound": (
        "their epsilon_high is the bound itself and 0.2 by default: the factor of every token is 0.2; ours is 5",
        0.2,
        1.0,
        lambda: preference.cispo(-AT_1, None, None, jnp.ones(1), TOKEN),
        "Liger, TRL",
    ),
    "CISPO's clip_fraction": (
        "theirs leaves out tokens of negative advantage, whose factor is cut off as well",
        0.0,
        1.0,
        lambda: (preference.cispo(AT_0, -3 * AT_1, None, -jnp.ones(1), TOKEN)[1]["clip_fraction"],),
        "Liger, TRL",
    ),
    "KL far from the reference": (
        "exp(100) is inf in float32; beyond a log-ratio of 20 its tangent goes on",
        inf,
        exp(20) * 81 - 101,
        lambda: preference.grpo(*(jnp.array([[x]]) for x in (-100.0, -100.0, 0.0)), jnp.zeros(1), TOKEN, beta=1.0),
        "Liger, TRL",
    ),
    "a ratio far from the old policy": (
        "exp(100) is inf in float32; beyond a log-ratio of 20 its tangent goes on, and pushes a bad token down",
        inf,
        exp(20) * 81,
        lambda: preference.grpo(AT_0, -100 * AT_1, None, -jnp.ones(1), TOKEN),
        "Liger, TRL",
    ),
    "GRPO's KL by default": (
        "its beta is 0; ours is Liger's and the paper's, 0.04, where there is a reference",
        -1.0,
        -1 + 0.04 * (exp(1) - 2),
        lambda: preference.grpo(-AT_1, None, AT_0, jnp.ones(1), TOKEN),
        "TRL",
    ),
    "KL of another policy's tokens": (
        "it is multiplied by the ratio, here e; ours is not unless `kl_estimate` says so, as in Liger and the paper",
        exp(1) * (exp(1) - 2),
        exp(1) - 2,
        lambda: preference.grpo(-AT_1, -2 * AT_1, AT_0, jnp.zeros(1), TOKEN, beta=1.0),
        "TRL",
    ),
    "GRPO's entropy bonus": (
        "its bonus is a mean over the batch's tokens, of entropies 1, 1 and 4 here; ours is averaged as the loss is",
        -2.0,
        -2.5,
        lambda: preference.grpo(TWO, None, None, jnp.zeros(2), SHORT, entropies=ENTROPIES, entropy_weight=1.0),
        "TRL",
    ),
    "clip_fraction with delta": (
        "their fraction leaves out tokens that delta stops; ours is of all whose gradient stopped",
        0.0,
        1.0,
        lambda: (preference.dapo(AT_1, -AT_1, None, -jnp.ones(1), TOKEN, delta=2.0)[1]["clip_fraction"],),
        "Liger, TRL",
    ),
    "f-DPO's rewards": (
        "its metrics are beta times log-ratios; beta times scores are the rewards that the loss compares",
        0.5,
        0.5 * (1 - exp(-1)),
        lambda: (
            preference.f_dpo(*(x[:1] for x in PAIRS), score=preference.forward_kl_score, beta=0.5)[1]["chosen_rewards"],
        ),
        "TRL",
    ),
    "DAPO's upper clip by default": (
        "their epsilon_high is 0.2; ours is the paper's, 0.28",
        -1.2,
        -1.28,
        lambda: preference.dapo(AT_1, AT_0, None, jnp.ones(1), TOKEN),
        "Liger, TRL",
    ),
    "DAPO of a micro-batch": (
        "theirs divides by the tokens of all micro-batches, here 4; ours by its own unless given them as normalizer",
        -0.25,
        -1.0,
        lambda: preference.dapo(AT_0, None, None, jnp.ones(1), TOKEN),
        "Liger, TRL",
    ),
    "GSPO's clip by default": (
        "it is grpo with a ratio of sequences there, clipped at 0.2 as grpo is; ours are the paper's, 3e-4 and 4e-4",
        -1.2,
        -1.0004,
        lambda: preference.gspo(AT_1, AT_0, None, jnp.ones(1), TOKEN),
        "Liger, TRL",
    ),
    "robust DPO's smoothing by default": (
        "their label_smoothing is 0, with which it is DPO; ours is the paper's 0.1",
        cost(1),
        (0.9 * cost(1) - 0.1 * cost(-1)) / 0.8,
        lambda: preference.robust(*(x[:1] for x in PAIRS), beta=0.5),
        "Liger, TRL",
    ),
    "EXO's smoothing by default": (
        "their label_smoothing is 0, which they then refuse; ours is the 1e-3 that they recommend",
        nan,
        s(1) * log(s(1) / 0.999) + s(-1) * log(s(-1) / 0.001),
        lambda: preference.exo_pair(*(x[:1] for x in PAIRS), beta=0.5),
        "Liger, TRL",
    ),
    "an answer without tokens": (
        "their average log-probability is 0 / 0; here 0, so that SimPO of two such answers is that of a margin of 0",
        nan,
        cost(-0.5),
        lambda: preference.simpo(
            *[jaxkd.sequence_log_probs(jaxkd.Logits(jnp.zeros((1, 2, 3))), -100 * jnp.ones((1, 2), int), average=True)]
            * 2
        ),
        "Liger, TRL",
    ),
    "batch-hard rows without a partner": (
        "it takes the missing positive's distance as 0, and the row is in the mean: 21 / 5. Here it does not count",
        4.2,
        5.25,
        lambda: embedding.batch_hard_triplet(LINE, jnp.array([0, 0, 1, 1, 2]), margin=1.0),
        "sentence-transformers",
    ),
}
