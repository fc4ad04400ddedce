"""A draft model with a part of the target's vocabulary: the lines of `docs/draft_models.md`, held to dense float64."""

import re
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

N, V, WIDTH = 40, 61, 23
DOCUMENT = Path(__file__).parents[2] / "docs" / "draft_models.md"
RNG = np.random.default_rng(8)
TARGET, DRAFT = cases.head(1, N, 9, V), cases.head(0, N, 8, WIDTH)
TOKEN_IDS = RNG.permutation(V)[:WIDTH]
NEXT_TOKENS = np.where(RNG.uniform(size=N) < 0.2, -100, RNG.integers(0, V, N))
MASK = RNG.uniform(size=N) < 0.7


@pytest.fixture
def recipe(x64):
    """What the document's lines define, with the arrays from here in the place of its own."""
    data, *lines = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(data, names := {})
    own = {"token_ids": TOKEN_IDS, "next_tokens": NEXT_TOKENS, "mask": MASK}
    for name, head in (("target", TARGET), ("draft", DRAFT)):
        own |= {f"{name}_hidden": head.hidden, f"{name}_weight": head.weight}
    assert own.keys() < names.keys()
    names |= jax.tree.map(jnp.asarray, own)
    for block in lines:
        exec(block, names)
    return names


def renormalised():
    return TARGET.logits[:, TOKEN_IDS]


def whole_probabilities(temperature=1.0):
    """Of the target and of the draft, over all tokens of the target."""
    p, q = np.exp(cases.log_softmax(TARGET.logits / temperature)), np.zeros((N, V))
    q[:, TOKEN_IDS] = np.exp(cases.log_softmax(DRAFT.logits / temperature))
    return p, q


@pytest.mark.parametrize("mask", [None, MASK])
def test_loss(recipe, mask):
    """Forward KL from the renormalised target where the mask says, cross-entropy where the draft has the next token."""
    loss, metrics = jax.jit(recipe["draft_loss"])(
        *(jnp.asarray(x) for x in (DRAFT.hidden, DRAFT.weight, TARGET.hidden, TARGET.weight, NEXT_TOKENS)), mask
    )
    log_p, log_q = cases.log_softmax(renormalised()), cases.log_softmax(DRAFT.logits)
    number = {token: i for i, token in enumerate(TOKEN_IDS.tolist())}
    labelled = [row for row in range(N) if NEXT_TOKENS[row] in number]
    assert 0 < len(labelled) < (NEXT_TOKENS != -100).sum()
    soft = cases.forward_kl(log_p, log_q)[0][labelled if mask is None else mask].mean()
    hard = -np.mean([log_q[row, number[NEXT_TOKENS[row]]] for row in labelled])
    assert float(loss) == pytest.approx(soft + 0.1 * hard, rel=1e-11)
    assert float(metrics["num_rows"]) == (len(labelled) if mask is None else len({*labelled, *np.flatnonzero(mask)}))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_acceptance_rate(recipe, temperature):
    """sum min(p, q) over all of the target's tokens; less than against the renormalised target, and than its cover."""
    draft, target = DRAFT.astype(jnp.float64), TARGET.astype(jnp.float64)
    rates = recipe["acceptance_rates"](draft, target, temperature=temperature)
    p, q = whole_probabilities(temperature)
    np.testing.assert_allclose(rates, np.minimum(p, q).sum(axis=1), rtol=1e-10)
    assert np.all(rates <= p[:, TOKEN_IDS].sum(axis=1) + 1e-12)
    cut = jaxkd.LinearLogits(target.hidden, target.weight[TOKEN_IDS])
    apart = jaxkd.token_divergences(draft, cut, divergence=jaxkd.total_variation, temperature=temperature)
    assert np.all(1 - apart > rates)
    pairs = jaxkd.VocabularyMap(target, jnp.arange(WIDTH), jnp.asarray(TOKEN_IDS))
    nll = jaxkd.token_divergences(draft, pairs, divergence=jaxkd.overlap_nll, temperature=temperature)
    np.testing.assert_allclose(nll, -np.log(rates), rtol=1e-10)
    masked = recipe["acceptance_rates"](draft, target, MASK, temperature)
    np.testing.assert_allclose(masked, np.where(MASK, rates, 0), rtol=1e-12)


def test_acceptance_rate_of_sampled_tokens(recipe):
    """Speculative sampling itself: a token from q is kept with probability min(1, p / q)."""
    p, q = (x[0] for x in whole_probabilities())
    rate = float(recipe["acceptance_rates"](DRAFT.astype(jnp.float64), TARGET.astype(jnp.float64))[0])
    draws = 20_000
    tokens = np.random.default_rng(9).choice(V, size=draws, p=q)
    kept = np.random.default_rng(10).uniform(size=draws) < p[tokens] / q[tokens]
    assert kept.mean() == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / draws))


def test_mixture(recipe):
    """Value and gradient in closed form, the weight being a constant."""
    log_p, log_q = cases.log_softmax(renormalised()), cases.log_softmax(DRAFT.logits)
    (kl, kl_slope), (apart, apart_slope) = (f(log_p, log_q) for f in (cases.forward_kl, cases.total_variation))
    weight = np.exp(-3 * (1 - apart))
    slope = weight[:, None] * kl_slope + (1 - weight)[:, None] * apart_slope
    dz = MASK[:, None] * (slope - np.exp(log_q) * slope.sum(axis=1, keepdims=True)) / MASK.sum()
    cut = jaxkd.LinearLogits(jnp.asarray(TARGET.hidden), jnp.asarray(TARGET.weight[TOKEN_IDS]))
    loss, gradient = jax.value_and_grad(
        lambda weight: recipe["mixture_loss"](jaxkd.LinearLogits(jnp.asarray(DRAFT.hidden), weight), cut, MASK)
    )(jnp.asarray(DRAFT.weight))
    assert float(loss) == pytest.approx((weight * kl + (1 - weight) * apart)[MASK].mean(), rel=1e-11)
    np.testing.assert_allclose(gradient, dz.T @ DRAFT.hidden, rtol=1e-9, atol=1e-14)


def test_training_raises_the_rate(recipe):
    """By the loss of the recipe, and further by the rate itself."""
    target = TARGET.astype(jnp.float64)
    hidden, token_ids = jnp.asarray(TARGET.hidden), jnp.asarray(TOKEN_IDS)

    def rate(weight):
        return jnp.mean(recipe["acceptance_rates"](jaxkd.LinearLogits(hidden, weight), target))

    def recipe_loss(weight):
        return recipe["draft_loss"](hidden, weight, hidden, target.weight, jnp.asarray(NEXT_TOKENS), jnp.ones(N, bool))

    def rate_loss(weight):
        pairs = jaxkd.VocabularyMap(target, jnp.arange(WIDTH), token_ids)
        draft = jaxkd.LinearLogits(hidden, weight)
        return jaxkd.distillation_loss(draft, pairs, divergence=jaxkd.overlap_nll)

    weight, rates = jnp.zeros((WIDTH, hidden.shape[1])), []
    for loss, size in ((recipe_loss, 0.3), (rate_loss, 0.3)):
        rates.append(float(rate(weight)))
        step = jax.jit(lambda w, loss=loss, size=size: w - size * jax.grad(loss, has_aux=True)(w)[0])
        for _ in range(60):
            weight = step(weight)
    rates.append(float(rate(weight)))
    assert rates[0] + 0.05 < rates[1] < rates[2], rates
