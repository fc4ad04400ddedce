"""Where the preference losses differ on purpose from those of Liger Kernel and TRL, with both numbers."""

from math import exp, inf, log, log1p, nan

import jax.numpy as jnp
import numpy as np

import jaxkd
from jaxkd import preference

PAIRS = [jnp.array(x) for x in ([-1.0, -4.0], [-3.0, -1.0], [-2.0, -3.0], [-2.0, -3.0])]
ANSWERS = [jnp.array(x) for x in ([-1.0, -2.0, -3.0], [-3.0, -2.0, -2.0])]  # log-ratios of 2, 0 and -1, mean 1/3
IS_DESIRABLE = jnp.array([True, False, True])


def s(x):  # sigmoid
    return 1 / (1 + exp(-x))


def cost(x):  # -log sigmoid(x)
    return log1p(exp(-x))


# Where Liger Kernel 0.8.5 or TRL 1.16 differ, on purpose: the reason, their number, our number and how we get it.
ONE = jnp.zeros(1)
FAR = [jnp.array([-2000.0]), ONE, ONE, ONE]
DEVIATIONS = {
    "smoothed DPO": (
        "their sigmoid DPO takes label_smoothing and ignores it; `cdpo` is the smoothed loss",
        cost(1),
        0.9 * cost(1) + 0.1 * cost(-1),
        lambda: preference.cdpo(*(x[:1] for x in PAIRS), beta=0.5, label_smoothing=0.1),
    ),
    "likelihood": (
        "their NLL is a mean over the tokens of a batch: long answers weigh more, and parts do not add up. "
        "Answers of 1 and 3 tokens with -2 and -3: (2 + 3) / 4 against the mean of 2 / 1 and 3 / 3",
        1.25,
        1.5,
        lambda: (preference.cpo(*[jnp.array([-2.0, -3.0])] * 2, chosen_lengths=np.array([1, 3]))[1]["nll"],),
    ),
    "ORPO of certain answers": (
        "the odds of probability 1 are infinite, and theirs of two such answers inf - inf",
        nan,
        0.1 * log(2),
        lambda: preference.orpo(ONE, ONE),
    ),
    "DiscoPOP far below": (
        "their exponential overflows before its gate closes: inf * 0. At a margin of -1000 the logistic loss is left",
        nan,
        1000.0,
        lambda: preference.discopop(*FAR, beta=0.5),
    ),
    "IPO": (
        "Liger raises NotImplementedError; here, as in TRL, it takes averaged log-probabilities: (2 - 1)^2",
        nan,
        1.0,
        lambda: preference.ipo(*(x[:1] for x in PAIRS), beta=0.5),
    ),
    "KTO without a KL estimate": (
        "Liger then has no baseline: s(-1) and s(0). Here it is that of the batch, 1. (Liger has no weights of kinds.)",
        (s(-1) + s(0)) / 2,
        s(-0.5),
        lambda: preference.kto(*(x[:2] for x in ANSWERS), IS_DESIRABLE[:2], beta=0.5),
    ),
    "BCO's shift": (
        "TRL's, while it had BCO, is a running mean over all answers seen, 1/6 in a first batch of rewards 1, 0, -1/2; "
        "the paper's is halfway between the means of the two kinds, 1/8",
        (cost(5 / 6) + cost(1 / 6) + cost(-2 / 3)) / 3,
        (cost(7 / 8) + cost(1 / 8) + cost(-5 / 8)) / 3,
        lambda: preference.bco(*ANSWERS, IS_DESIRABLE, beta=0.5),
    ),
    "CISPO's bound": (
        "Liger's epsilon_high is the bound itself and 0.2 by default: the factor of every token is 0.2; ours is 5",
        0.2,
        1.0,
        lambda: preference.cispo(-jnp.ones((1, 1)), None, None, jnp.ones(1), jnp.ones((1, 1), bool)),
    ),
    "KL far from the reference": (
        "exp(100) is inf in float32; log-ratios are cut off at 20 before they are exponentiated",
        inf,
        exp(20) - 101,
        lambda: preference.grpo(
            *(jnp.array([[x]]) for x in (-100.0, -100.0, 0.0)), jnp.zeros(1), jnp.ones((1, 1), bool), beta=1.0
        ),
    ),
    "an answer without tokens": (
        "their average log-probability is 0 / 0; here 0, so that SimPO of two such answers is that of a margin of 0",
        nan,
        cost(-0.5),
        lambda: preference.simpo(
            *[jaxkd.sequence_log_probs(jaxkd.Logits(jnp.zeros((1, 2, 3))), -100 * jnp.ones((1, 2), int), average=True)]
            * 2
        ),
    ),
}
