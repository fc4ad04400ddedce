"""Rows, tokens and kinds that do not count add exactly nothing to a preference loss, whatever they hold.

Every loss at every such input, eagerly and in one compiled program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_cases import CASES, TOKENS, B, cast, evaluate_all
from quick_programs import QUICK

WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.5, 1.0, 0.0])
INPUTS = {name: case.inputs for name, case in CASES.items()}
is_jitted = pytest.mark.parametrize("is_jitted", [False, True], ids=["eager", "jit"])
FEW = ("dpo", "cpo", "kto", "dapo", "sampled_kl")
EAGERLY = [
    pytest.param(False, FEW, id="eager"),
    pytest.param(False, CASES, id="all eager", marks=pytest.mark.slow),
]
of_names = pytest.mark.parametrize(("is_jitted", "names"), [*EAGERLY, pytest.param(True, CASES, id="jit")])


def evaluate(is_jitted, inputs, weights, options=None, names=tuple(CASES)):
    """Of ``names``; the program holds every loss, so that it is the same one for all tests."""
    if is_jitted:
        results = evaluate_all(INPUTS | inputs, weights, options)
        return {name: results[name] for name in names}
    return {
        name: CASES[name].evaluate(cast(inputs[name]), weights=weights, **(options or {}).get(name, {}))
        for name in names
    }


def is_zero(result):
    (loss, metrics), gradients = result
    return loss == 0 and all(x == 0 for x in metrics.values()) and not any(np.any(x) for x in gradients.values())


@of_names
def test_rows_of_weight_0(is_jitted, names):
    """The losses, metrics and gradients are those of clean inputs to the last bit."""
    poisoned = {name: case.poisoned(WEIGHTS == 0) for name, case in CASES.items()}
    results, clean = (evaluate(is_jitted, inputs, WEIGHTS, names=names) for inputs in (poisoned, INPUTS))
    for name, result in results.items():
        jax.tree.map(lambda x, y, name=name: np.testing.assert_array_equal(x, y, name), result, clean[name])
        assert np.isfinite(result[0][0]), name
        assert not any(np.any(x[WEIGHTS == 0]) for x in result[1].values()), name


@of_names
def test_no_row_counts(is_jitted, names):
    poisoned = {name: case.poisoned(slice(None)) for name, case in CASES.items()}
    for name, result in evaluate(is_jitted, poisoned, np.zeros(B), names=names).items():
        assert is_zero(result), name


@of_names
def test_no_rows(is_jitted, names):
    empty = {name: {k: x[:0] for k, x in inputs.items()} for name, inputs in INPUTS.items()}
    for name, result in evaluate(is_jitted, empty, np.zeros(0), names=names).items():
        assert is_zero(result), name


@of_names
def test_an_empty_micro_batch(is_jitted, names):
    """A normalizer of 0 gives a loss, metrics and gradients of 0, not an error that only a known number raises."""
    divisors = {name: dict.fromkeys(case.whole, 0.0) for name, case in CASES.items()}
    for name, result in evaluate(is_jitted, INPUTS, np.zeros(B), divisors, names).items():
        assert is_zero(result), name


def with_holes(rows, hole=None):
    """``rows`` without tokens, and ``hole`` in everything that then does not count."""
    inputs = {name: {k: x.copy() for k, x in INPUTS[name].items()} for name in TOKENS}
    for x in inputs.values():
        x["mask"][rows] = False
        if hole is not None:
            for k in [k for k in x if k != "mask"]:
                x[k][~x["mask"] if x[k].ndim == 2 else ~x["mask"].any(1)] = hole
    return inputs


@is_jitted
def test_answers_without_tokens(is_jitted):
    """One adds 0 to the loss, and what its tokens hold is never read; a batch of them is 0."""

    def results(inputs, weights=np.ones(B)):  # noqa: B008
        return evaluate(is_jitted, inputs, weights, names=TOKENS)

    is_empty = np.arange(B) == 2
    holed, clean, empty = (results(with_holes(*x)) for x in ((2, np.nan), (2,), (slice(None), np.nan)))
    left_out = results(with_holes(2, np.nan), 1.0 * ~is_empty)
    for name in TOKENS:
        jax.tree.map(lambda x, y, name=name: np.testing.assert_array_equal(x, y, name), holed[name], clean[name])
        (loss, metrics), gradients = holed[name]
        assert all(np.isfinite(x) for x in (loss, *metrics.values())), name
        assert not np.any(gradients["policy"][~INPUTS[name]["mask"] | is_empty[:, None]]), name
        assert is_zero(empty[name]), name
        counted = 1 if CASES[name].is_mean_of_tokens else (B - 1) / B
        np.testing.assert_allclose(loss, counted * left_out[name][0][0], rtol=1e-5, err_msg=name)


@is_jitted
def test_no_chosen_tokens(is_jitted):
    """The NLL of answers without tokens is 0, and all is finite."""
    names = [name for name, case in CASES.items() if "chosen_lengths" in case.inputs and name != "sft"]
    zeros = dict.fromkeys(("policy_chosen", "policy_rejected", "chosen_lengths"), np.zeros(B))
    inputs = {name: INPUTS[name] | zeros for name in names}
    for name, result in evaluate(is_jitted, inputs, np.ones(B), names=names).items():
        assert result[0][1]["nll"] == 0, name
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(result)), name


ONE_KIND = {  # loss, option, and the baseline that is left; log-ratios of -1 and 3 of answers of that kind
    "kto": ("kto", {}, 1.0),
    "kto, no KL rows": ("kto", {"kl_log_ratios": np.zeros(0)}, 0.0),
    "bco": ("bco", {}, 0.5),
}


@is_jitted
@pytest.mark.parametrize("row", ONE_KIND)
def test_answers_of_one_kind(row, is_jitted):
    """The other kind holds NaN and has weight 0; its metrics are 0."""
    name, options, baseline = ONE_KIND[row]
    policy = np.array([-1.0, 3.0, *[np.nan] * (B - 2)], np.float32)
    is_of_kind = np.arange(B) < 2

    def evaluate(is_desirable):
        arrays = {"policy": policy, "reference": jnp.zeros(B), "is_desirable": is_desirable}
        return CASES[name].evaluate(arrays, beta=0.5, weights=1.0 * is_of_kind, **options)

    if is_jitted:
        evaluate = jax.jit(evaluate, compiler_options=QUICK)
    for kind in (True, False):
        (loss, metrics), gradients = evaluate(is_of_kind == kind)
        assert np.isfinite(loss)
        assert metrics["kl" if name == "kto" else "delta"] == baseline
        assert metrics["chosen_rewards" if kind else "rejected_rewards"] == 0.5
        assert metrics["rejected_rewards" if kind else "chosen_rewards"] == 0
        assert metrics["num_desirable"] == (2 if kind else 0)
        assert np.isfinite(gradients["policy"]).all()
        assert np.array_equal(gradients["policy"] != 0, is_of_kind)
