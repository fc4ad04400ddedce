"""What holds for every preference loss: masks, means, types, references, traced numbers, extremes, metrics."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_cases import CASES, LOSSES, NOT_LOSSES, OF_WHOLE_BATCH, ONE_OF_EACH_KIND, PAIRED, B, cast, evaluate_all
from quick_programs import QUICK, Traced

from jaxkd import preference

WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.5, 1.0, 0.0])
INPUTS = {name: case.inputs for name, case in CASES.items()}
every_loss = pytest.mark.parametrize("name", CASES)


def test_every_loss_is_covered_and_has_the_arguments_of_its_kind():
    assert {case.function for case in CASES.values()} == {getattr(preference, name) for name in LOSSES}
    assert set(preference.__all__) >= NOT_LOSSES
    orders = {
        ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"),
        ("policy_chosen", "policy_rejected"),
        ("policy", "reference", "is_desirable"),
        ("policy", "old", "reference", "advantages", "mask"),
        ("policy", "old", "reference", "mask"),
        ("policy_chosen",),
    }
    for name in LOSSES:
        parameters = inspect.signature(getattr(preference, name)).parameters.values()
        assert tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD) in orders
        assert [p.name for p in parameters if p.kind == p.KEYWORD_ONLY][-2:] == ["weights", "normalizer"]


def test_gradient_is_the_derivative(x64):
    """Against central differences in float64, in a random direction."""
    more = ("discopop", "exo", "f_po", "f_dpo", "luspo", "sapo", "gmpo", "rloo", "grpo", "dapo")
    names = [n for n in CASES if n in ONE_OF_EACH_KIND or n.startswith(more)]
    names = [n for n in names if not n.startswith(("gspo, ", "luspo, ", "sampled_kl"))]  # slopes of their own
    inputs = {name: dict(CASES[name].inputs) for name in names}
    options = {"kto": {"kl_log_ratios": 0.3}, "bco": {"delta": 0.1}, "cispo": {"max_ratio": 1.0}}
    inputs["cispo"]["old"] = inputs["cispo"]["policy"] - 2  # its factor is a constant: the same one at both ends
    rng = np.random.default_rng(1)
    directions = {n: {k: rng.normal(size=inputs[n][k].shape) for k in CASES[n].policy} for n in inputs}

    def moved(step):
        return {n: x | {k: x[k] + step * d for k, d in directions[n].items()} for n, x in inputs.items()}

    here, above, below = (
        evaluate_all(moved(step), WEIGHTS, options, jnp.float64, with_metrics=False) for step in (0, 1e-5, -1e-5)
    )
    for name in names:
        slope = sum(float(np.sum(here[name][1][k] * x)) for k, x in directions[name].items())
        quotient = float(above[name][0][0] - below[name][0][0]) / 2e-5
        assert quotient == pytest.approx(slope, rel=2e-6, abs=1e-9), name


def test_weights_are_repetitions():
    """A row of weight 2 counts as two rows."""
    twice = np.array([0, 1, 2, 2, 3, 4, 5, 5])
    rows = {name: {k: x[twice] for k, x in inputs.items()} for name, inputs in INPUTS.items()}
    want, got = evaluate_all(rows), evaluate_all(INPUTS, np.array([1.0, 1, 2, 1, 1, 2, 0, 0]))
    for name in CASES:
        np.testing.assert_allclose(got[name][0][0], want[name][0][0], rtol=1e-5, err_msg=name)


def test_parts_add_up_to_the_whole():
    """Halves of the batch, each filled up with rows of weight 0."""
    options = {name: case.whole for name, case in CASES.items()}
    is_first = np.arange(B) < B // 2
    whole = evaluate_all(INPUTS)
    parts = [evaluate_all(INPUTS, 1.0 * half, options) for half in (is_first, ~is_first)]
    for name in [name for name in CASES if name not in OF_WHOLE_BATCH]:
        (loss, metrics), gradients = whole[name]
        one, other = (part[name] for part in parts)
        np.testing.assert_allclose(one[0][0] + other[0][0], loss, rtol=1e-5, err_msg=name)
        for key, gradient in gradients.items():
            np.testing.assert_allclose(one[1][key] + other[1][key], gradient, rtol=1e-5, atol=1e-8, err_msg=name)
        for key in metrics if name in PAIRED else ():
            total = one[0][1][key] + other[0][1][key]
            np.testing.assert_allclose(total, metrics[key], rtol=1e-5, atol=1e-6, err_msg=f"{name}, {key}")


@every_loss
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_types(name, dtype):
    case = CASES[name]
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        inputs = cast(case.inputs, jnp.dtype(dtype))
        (loss, metrics), gradients = jax.eval_shape(lambda: case.evaluate(inputs, weights=WEIGHTS))
        assert loss.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
        assert all(x.dtype == dtype for x in gradients.values())


def test_of_bfloat16_only_the_inputs_are_rounded():
    """The same loss from float32 inputs that hold the same numbers."""
    rounded = {name: cast(CASES[name].inputs, jnp.bfloat16) for name in ONE_OF_EACH_KIND}
    exact = {
        name: {k: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for k, x in inputs.items()}
        for name, inputs in rounded.items()
    }
    losses = jax.jit(
        lambda inputs: {name: CASES[name].function(**x, **CASES[name].options)[0] for name, x in inputs.items()},
        compiler_options=QUICK,
    )
    assert jax.device_get(losses(rounded)) == jax.device_get(losses(exact))


CONSTANTS = ["reference", "reference_chosen", "reference_rejected", "old", "advantages", "importance_weights"]


def test_only_the_policy_has_a_gradient_and_the_metrics_have_none():
    """Pulled back to every array that could have one."""

    def pullbacks(name):
        case, arrays = CASES[name], cast(CASES[name].inputs)
        arrays = {k: x for k, x in arrays.items() if k in CONSTANTS + case.policy}
        (loss, metrics), pullback = jax.vjp(lambda x: case.function(**(cast(case.inputs) | x), **case.options), arrays)
        ones, zeros = jnp.ones_like(loss), jnp.zeros_like(loss)
        return [
            pullback((ones, jax.tree.map(jnp.zeros_like, metrics)))[0],
            pullback((zeros, jax.tree.map(jnp.ones_like, metrics)))[0],
        ]

    pulled_back = jax.jit(lambda: {name: pullbacks(name) for name in ONE_OF_EACH_KIND}, compiler_options=QUICK)()
    for name, (of_loss, of_metrics) in pulled_back.items():
        assert {k for k, x in of_loss.items() if np.any(x)} == set(CASES[name].policy), name
        assert not any(np.any(x) for x in of_metrics.values()), name


@every_loss
def test_numbers_may_be_traced(name):
    case = CASES[name]
    defaults = {k: p.default for k, p in inspect.signature(case.function).parameters.items()}
    numbers = {k: x for k, x in (defaults | case.options).items() if isinstance(x, (int, float))} | case.whole
    constants = {k: x for k, x in case.options.items() if k not in numbers} | cast(case.inputs)
    loss = jax.eval_shape(lambda numbers: case.function(**constants, **numbers)[0], numbers)
    assert loss.dtype == jnp.float32


def test_traced_numbers_give_the_same():
    names = ("dpo", "orpo", "kto", "gspo")

    def losses(inputs, beta):
        return {n: CASES[n].function(**inputs[n], **(CASES[n].options | {"beta": beta}))[0] for n in names}

    counted, inputs = Traced(losses), {name: cast(CASES[name].inputs) for name in names}
    traced = jax.jit(counted, compiler_options=QUICK)
    for beta in (0.1, 0.7):
        known = jax.jit(partial(losses, beta=beta), compiler_options=QUICK)
        for name, want in known(inputs).items():
            np.testing.assert_allclose(traced(inputs, beta)[name], want, rtol=1e-6, err_msg=name)
    assert counted.count == 1


def test_extremes_are_finite():
    """Log-probabilities of 0 and of -1e4 in every combination, a row for each."""
    extremes = {}
    for name, case in CASES.items():
        names = [k for k in case.inputs if k.startswith(("policy", "old", "reference", "is_desirable"))]
        extremes[name] = dict(case.inputs)
        for i, k in enumerate(names):
            is_far = (np.arange(B) >> i) % 2 == 1  # never so for the fourth, the reference of the rejected answer
            values = is_far if k == "is_desirable" else np.where(is_far, -1e4, 0.0)
            shape = case.inputs[k].shape
            extremes[name][k] = np.broadcast_to(values.reshape(-1, *(1,) * (len(shape) - 1)), shape)
    for name, result in evaluate_all(extremes).items():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(result)), name


def test_metrics_of_pairs():
    """Rewards are beta times log-ratios, or their scores, or log-probabilities where there is no reference."""
    share, results = WEIGHTS / WEIGHTS.sum(), evaluate_all(INPUTS, WEIGHTS)
    for name in PAIRED:
        x, beta, metrics = INPUTS[name], CASES[name].options.get("beta", 0.1), results[name][0][1]
        score = CASES[name].options.get("score", np.asarray)
        chosen, rejected = (
            beta * np.asarray(score(np.float32(x[f"policy_{side}"] - x.get(f"reference_{side}", 0))))
            for side in ("chosen", "rejected")
        )
        expected = {
            "chosen_rewards": share @ chosen,
            "rejected_rewards": share @ rejected,
            "margin": share @ (chosen - rejected),
            "accuracy": share @ (chosen > rejected),
            "chosen_log_probs": share @ x["policy_chosen"],
            "rejected_log_probs": share @ x["policy_rejected"],
            "num_pairs": 5,
        }
        for key, value in expected.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=f"{name}, {key}")


LENGTHS = {"chosen_lengths": np.ones(B)}
BAD = {
    "rank": ("dpo", {"policy_chosen": jnp.zeros((B, 2))}, ValueError, ["`policy_chosen`", r"\(8, 2\)", r"\(B\)"]),
    "size": ("dpo", {"reference_rejected": jnp.zeros(5)}, ValueError, ["`reference_rejected`", r"\(5,\)", r"\(8,\)"]),
    "integers": ("dpo", {"policy_rejected": jnp.zeros(B, int)}, TypeError, ["`policy_rejected`", "int32"]),
    "no reference": ("ipo", {"reference_chosen": None}, TypeError, ["`reference_chosen`", "NoneType"]),
    "beta": ("hinge", {"beta": 0.0}, ValueError, ["`beta`", "above 0"]),
    "beta array": ("hinge", {"beta": jnp.ones(B)}, TypeError, ["`beta`", "a number"]),
    "weights": ("apo_zero", {"weights": -np.ones(B)}, ValueError, ["`weights`", "negative", "-1"]),
    "weights shape": ("grpo", {"weights": np.ones((B, 2))}, ValueError, ["`weights`", r"\(8, 2\)", r"\(8,\)"]),
    "normalizer": ("bco_pair", {"normalizer": -1}, ValueError, ["`normalizer`", "at least 0"]),
    "smoothing": ("cdpo", {"label_smoothing": 0.5}, ValueError, ["`label_smoothing`", "below 0.5"]),
    "no smoothing": ("exo_pair", {"label_smoothing": 0.0}, ValueError, ["`label_smoothing`", "above 0"]),
    "tau": ("discopop", {"tau": -1.0}, ValueError, ["`tau`", "above 0"]),
    "lengths": ("cpo", {"chosen_lengths": np.ones(3)}, ValueError, ["`chosen_lengths`", r"\(3,\)", r"\(8,\)"]),
    "tokens": ("cpo", {"normalizer": 9.0}, ValueError, ["`normalizer`", "`nll_normalizer`", "whole batch"]),
    "no lengths": ("orpo", {"nll_normalizer": 9.0}, ValueError, ["`nll_normalizer`", "`chosen_lengths` is None"]),
    "no tokens": ("orpo", {"nll_normalizer": -9.0} | LENGTHS, ValueError, ["`nll_normalizer`", "at least 0"]),
    "alpha": ("irpo", {"alpha": -1}, ValueError, ["`alpha`", "at least 0"]),
    "divergence": ("f_po forward_kl", {"divergence": "js"}, TypeError, ["`divergence`", "'js'", "jensen_shannon"]),
    "desirable": ("kto", {"is_desirable": jnp.ones(B)}, TypeError, ["`is_desirable`", "float32", "booleans"]),
    "desirable shape": ("bco", {"is_desirable": jnp.ones(2, bool)}, ValueError, ["`is_desirable`", r"\(2,\)"]),
    "undesirable": ("kto", {"undesirable_weight": -1.0}, ValueError, ["`undesirable_weight`", "at least 0"]),
    "kl": ("kto", {"kl_log_ratios": jnp.zeros((B, 2))}, ValueError, ["`kl_log_ratios`", r"\(8, 2\)", r"\(M,\)"]),
    "token rank": ("grpo", {"policy": jnp.zeros(B)}, ValueError, ["`policy`", r"\(8,\)", r"\(B, T\)"]),
    "mask": ("dapo", {"mask": jnp.ones((B, 2))}, ValueError, ["`mask`", r"\(8, 2\)", r"\(8, 9\)"]),
    "advantages": (
        "gspo",
        {"advantages": jnp.ones((B, 2))},
        ValueError,
        ["`advantages`", r"\(8, 2\)", r"\(8,\)", r"\(8, 9\)"],
    ),
    "of answers": (
        "rloo",
        {"advantages": jnp.ones((B, 9))},
        ValueError,
        ["`advantages`", r"\(8, 9\)", "rloo", r"\(8,\)"],
    ),
    "importance": ("dapo", {"importance_weights": jnp.ones(9)}, ValueError, ["`importance_weights`", r"\(9,\)"]),
    "entropies": ("dapo", {"entropies": jnp.ones(B)}, ValueError, ["`entropies`", r"\(8,\)", r"\(B, T\)"]),
    "no entropies": ("dapo", {"entropy_weight": 0.1}, ValueError, ["`entropy_weight`", "`entropies` is None"]),
    "estimate": ("dapo", {"kl_estimate": "k3"}, TypeError, ["`kl_estimate`", "'k3'", "KLEstimate"]),
    "delta": ("dapo", {"delta": 0.0}, ValueError, ["`delta`", "above 0"]),
    "power": ("vespo", {"loss_power": -1}, ValueError, ["`loss_power`", "at least 0"]),
    "temperature": ("sapo", {"gain_temperature": 0}, ValueError, ["`gain_temperature`", "above 0"]),
    "no teacher": ("sampled_kl", {"reference": None}, TypeError, ["`reference`", r"\(B, T\)"]),
    "score": ("f_dpo alpha", {"score": "js"}, TypeError, ["`score`", "'js'", "jensen_shannon_score"]),
    "chosen lengths": ("sft", {"chosen_lengths": np.ones(3)}, ValueError, ["`chosen_lengths`", r"\(3,\)", r"\(8,\)"]),
    "epsilon": ("gspo", {"epsilon_low": -0.1}, ValueError, ["`epsilon_low`", "at least 0"]),
    "max_length": ("dr_grpo", {"max_length": 0}, ValueError, ["`max_length`", "above 0"]),
    "max_ratio": ("cispo", {"max_ratio": 0.0}, ValueError, ["`max_ratio`", "above 0"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_errors(bad):
    name, changes, error, words = BAD[bad]
    case = CASES[name]
    with pytest.raises(error) as raised:
        case.function(**(cast(case.inputs) | case.options | changes))
    for word in words:
        assert raised.match(word)
