"""What holds for every preference loss: masks, means, types, references, traced numbers, extremes, metrics."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import preference
from tests.preference_cases import CASES, ONE_OF_EACH_KIND, PAIRED, TOKENS, WITH_BASELINE, B

WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.5, 1.0, 0.0])
every_loss = pytest.mark.parametrize("name", CASES)
one_of_each_kind = pytest.mark.parametrize("name", ONE_OF_EACH_KIND)


def cast(inputs, dtype=jnp.float32):
    return {k: jnp.asarray(x, dtype if x.dtype == np.float64 else x.dtype) for k, x in inputs.items()}


def evaluate(case, inputs, **options):
    """((loss, metrics), gradients of the policy's log-probabilities)"""
    policy = {name: inputs[name] for name in case.policy}
    loss = lambda policy: case.function(**(inputs | policy), **(case.options | options))  # noqa: E731
    return jax.value_and_grad(loss, has_aux=True)(policy)


def test_every_loss_is_covered_and_has_the_arguments_of_its_kind():
    assert {case.function for case in CASES.values()} == {getattr(preference, name) for name in preference.__all__}
    orders = {
        ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"),
        ("policy_chosen", "policy_rejected"),
        ("policy", "reference", "is_desirable"),
        ("policy", "old", "reference", "advantages", "mask"),
    }
    for name in preference.__all__:
        parameters = inspect.signature(getattr(preference, name)).parameters.values()
        assert tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD) in orders
        assert [p.name for p in parameters if p.kind == p.KEYWORD_ONLY][-2:] == ["weights", "normalizer"]


@pytest.mark.parametrize(
    "name", [name for name in CASES if name in ONE_OF_EACH_KIND or name.startswith(("discopop", "exo", "f_po"))]
)
def test_gradient_is_the_derivative(name, x64):
    """Against central differences in float64, in a random direction."""
    case = CASES[name]
    inputs = cast(case.inputs, jnp.float64)
    options = {"weights": WEIGHTS} | {"kto": {"kl_log_ratios": 0.3}, "bco": {"delta": 0.1}}.get(name, {})
    if name == "cispo":  # its factor is a constant: the same one at both ends, where every ratio is cut off
        inputs, options = inputs | {"old": inputs["policy"] - 2}, options | {"max_ratio": 1.0}
    _, gradients = evaluate(case, inputs, **options)
    rng = np.random.default_rng(1)
    directions = {key: rng.normal(size=gradient.shape) for key, gradient in gradients.items()}
    ends = [
        case.function(**inputs | {k: inputs[k] + step * x for k, x in directions.items()}, **case.options | options)[0]
        for step in (1e-5, -1e-5)
    ]
    slope = sum(float(np.sum(gradients[k] * x)) for k, x in directions.items())
    assert float(ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=2e-6, abs=1e-9)


@every_loss
def test_a_row_of_weight_0_adds_exactly_nothing_whatever_it_holds(name):
    case = CASES[name]
    poisoned = {k: x.copy() for k, x in case.inputs.items()}
    for k, x in poisoned.items():
        if x.dtype == np.float64 and k != "chosen_lengths":
            x[WEIGHTS == 0] = np.nan if k.startswith("policy") else np.inf
    results = [evaluate(case, cast(inputs), weights=WEIGHTS) for inputs in (poisoned, case.inputs)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    (loss, _), gradients = results[0]
    assert np.isfinite(loss)
    assert not any(np.any(x[WEIGHTS == 0]) for x in gradients.values())


@every_loss
def test_a_batch_with_nothing_counted_is_0(name):
    case = CASES[name]
    (loss, metrics), gradients = evaluate(case, cast(case.inputs), weights=np.zeros(B))
    assert loss == 0
    assert all(np.isfinite(x) for x in metrics.values())
    assert not any(np.any(x) for x in gradients.values())


@one_of_each_kind
def test_a_batch_without_rows_is_0(name):
    case = CASES[name]
    loss, metrics = case.function(**cast({k: x[:0] for k, x in case.inputs.items()}), **case.options)
    assert loss == 0
    assert all(x == 0 for x in metrics.values())


@one_of_each_kind
def test_weights_are_repetitions(name):
    """A row of weight 2 counts as two rows."""
    case = CASES[name]
    twice = np.array([0, 1, 2, 2, 3, 4, 5, 5])
    (want, _), _ = evaluate(case, cast({k: x[twice] for k, x in case.inputs.items()}))
    (got, _), _ = evaluate(case, cast(case.inputs), weights=np.array([1.0, 1, 2, 1, 1, 2, 0, 0]))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH_KIND if name not in WITH_BASELINE])
def test_parts_add_up_to_the_whole(name):
    case = CASES[name]
    total = float(case.inputs["mask"].sum()) if name in ("dapo", "cispo") else B
    (whole, metrics), gradients = evaluate(case, cast(case.inputs))
    parts = [
        evaluate(case, cast({k: x[part] for k, x in case.inputs.items()}), normalizer=total)
        for part in (slice(0, 4), slice(4, B))
    ]
    np.testing.assert_allclose(sum(part[0][0] for part in parts), whole, rtol=1e-5)
    for key, gradient in gradients.items():
        joined = np.concatenate([part[1][key] for part in parts])
        np.testing.assert_allclose(joined, gradient, rtol=1e-5, atol=1e-8)
    if name in PAIRED:
        for key, value in metrics.items():
            np.testing.assert_allclose(sum(part[0][1][key] for part in parts), value, rtol=1e-5, atol=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_types(name, dtype):
    case = CASES[name]
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        inputs = cast(case.inputs, jnp.dtype(dtype))
        (loss, metrics), gradients = jax.eval_shape(lambda: evaluate(case, inputs, weights=WEIGHTS))
        assert loss.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
        assert all(x.dtype == dtype for x in gradients.values())


@one_of_each_kind
def test_of_bfloat16_only_the_inputs_are_rounded(name):
    case = CASES[name]
    rounded = cast(case.inputs, jnp.bfloat16)
    exact = {k: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for k, x in rounded.items()}
    assert float(evaluate(case, rounded)[0][0]) == float(evaluate(case, exact)[0][0])


@one_of_each_kind
def test_only_the_policy_has_a_gradient_and_the_metrics_have_none(name):
    case = CASES[name]
    arrays = cast(case.inputs)
    arrays = {k: x for k, x in arrays.items() if k.startswith(("policy", "reference", "old", "advantages"))}
    (loss, metrics), pullback = jax.vjp(lambda x: case.function(**(cast(case.inputs) | x), **case.options), arrays)
    gradients = pullback((jnp.ones_like(loss), jax.tree.map(jnp.zeros_like, metrics)))[0]
    assert {k for k, x in gradients.items() if np.any(x)} == set(case.policy)
    gradients = pullback((jnp.zeros_like(loss), jax.tree.map(jnp.ones_like, metrics)))[0]
    assert not any(np.any(x) for x in gradients.values())


@every_loss
def test_numbers_may_be_traced(name):
    case = CASES[name]
    defaults = {k: p.default for k, p in inspect.signature(case.function).parameters.items()}
    numbers = {k: x for k, x in (defaults | case.options).items() if isinstance(x, (int, float))} | {"normalizer": 3.0}
    constants = {k: x for k, x in case.options.items() if k not in numbers} | cast(case.inputs)
    loss = jax.eval_shape(lambda numbers: case.function(**constants, **numbers)[0], numbers)
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto", "gspo"])
def test_traced_numbers_give_the_same(name):
    case = CASES[name]
    traced = jax.jit(lambda inputs, beta: case.function(**inputs, **(case.options | {"beta": beta}))[0])
    for beta in (0.1, 0.7):
        got = case.function(**cast(case.inputs), **(case.options | {"beta": beta}))[0]
        np.testing.assert_allclose(traced(cast(case.inputs), beta), got, rtol=1e-6)
    assert traced._cache_size() == 1


@every_loss
def test_extremes_are_finite(name):
    """Log-probabilities of 0 and of -1e4 in every combination, a row for each."""
    case = CASES[name]
    names = [k for k in case.inputs if k.startswith(("policy", "old", "reference", "is_desirable"))]
    inputs = cast(case.inputs)
    for i, k in enumerate(names):
        is_far = (np.arange(B) >> i) % 2 == 1  # never so for the fourth, the reference of the rejected answer
        values = is_far if k == "is_desirable" else np.where(is_far, -1e4, 0.0)
        inputs[k] = jnp.broadcast_to(values.reshape(-1, *(1,) * (inputs[k].ndim - 1)), inputs[k].shape)
    (loss, metrics), gradients = evaluate(case, inputs)
    assert np.isfinite(loss)
    assert all(np.isfinite(x) for x in metrics.values())
    assert all(np.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize("name", TOKENS)
def test_an_answer_without_tokens(name):
    """It adds 0 to the loss, and what its tokens hold is never read."""
    case = CASES[name]
    masked = {k: x.copy() for k, x in case.inputs.items()}
    masked["mask"][2] = False
    for k in ("policy", "old", "reference"):
        masked[k][~masked["mask"]] = np.nan
    (loss, metrics), gradients = evaluate(case, cast(masked))
    clean = {k: case.inputs[k] for k in ("policy", "old", "reference")}
    (want, _), _ = evaluate(case, cast(masked | clean))
    assert np.isfinite(loss)
    assert float(loss) == float(want)
    assert all(np.isfinite(x) for x in metrics.values())
    assert not np.any(gradients["policy"][~masked["mask"]])
    (rest, _), _ = evaluate(case, cast(masked), weights=np.where(np.arange(B) == 2, 0.0, 1.0))
    counted = 1 if name in ("dapo", "cispo") else (B - 1) / B
    np.testing.assert_allclose(loss, counted * rest, rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo", "apo_zero", "cpo", "orpo"])
def test_metrics_of_pairs(name):
    """Rewards are beta times log-ratios, or log-probabilities where there is no reference."""
    case = CASES[name]
    options = case.options | {"beta": 0.5, "weights": WEIGHTS}
    metrics = case.function(**cast(case.inputs), **options)[1]
    x = case.inputs
    share = WEIGHTS / WEIGHTS.sum()
    chosen, rejected = (0.5 * (x[f"policy_{side}"] - x.get(f"reference_{side}", 0)) for side in ("chosen", "rejected"))
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
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


BAD = {
    "rank": ("dpo", {"policy_chosen": jnp.zeros((B, 2))}, ValueError, ["`policy_chosen`", r"\(8, 2\)", r"\(B\)"]),
    "size": ("dpo", {"reference_rejected": jnp.zeros(5)}, ValueError, ["`reference_rejected`", r"\(5,\)", r"\(8,\)"]),
    "integers": ("dpo", {"policy_rejected": jnp.zeros(B, int)}, TypeError, ["`policy_rejected`", "int32"]),
    "no reference": ("ipo", {"reference_chosen": None}, TypeError, ["`reference_chosen`", "NoneType"]),
    "beta": ("hinge", {"beta": 0.0}, ValueError, ["`beta`", "above 0"]),
    "beta array": ("hinge", {"beta": jnp.ones(B)}, TypeError, ["`beta`", "a number"]),
    "weights": ("apo_zero", {"weights": -np.ones(B)}, ValueError, ["`weights`", "negative", "-1"]),
    "weights shape": ("grpo", {"weights": np.ones((B, 2))}, ValueError, ["`weights`", r"\(8, 2\)", r"\(8,\)"]),
    "normalizer": ("bco_pair", {"normalizer": 0}, ValueError, ["`normalizer`", "above 0"]),
    "smoothing": ("cdpo", {"label_smoothing": 0.5}, ValueError, ["`label_smoothing`", "below 0.5"]),
    "no smoothing": ("exo_pair", {"label_smoothing": 0.0}, ValueError, ["`label_smoothing`", "above 0"]),
    "tau": ("discopop", {"tau": -1.0}, ValueError, ["`tau`", "above 0"]),
    "lengths": ("cpo", {"chosen_lengths": np.ones(3)}, ValueError, ["`chosen_lengths`", r"\(3,\)", r"\(8,\)"]),
    "alpha": ("irpo", {"alpha": -1}, ValueError, ["`alpha`", "at least 0"]),
    "divergence": ("f_po forward_kl", {"divergence": "js"}, TypeError, ["`divergence`", "'js'", "jensen_shannon"]),
    "desirable": ("kto", {"is_desirable": jnp.ones(B)}, TypeError, ["`is_desirable`", "float32", "booleans"]),
    "desirable shape": ("bco", {"is_desirable": jnp.ones(2, bool)}, ValueError, ["`is_desirable`", r"\(2,\)"]),
    "undesirable": ("kto", {"undesirable_weight": -1.0}, ValueError, ["`undesirable_weight`", "at least 0"]),
    "token rank": ("grpo", {"policy": jnp.zeros(B)}, ValueError, ["`policy`", r"\(8,\)", r"\(B, T\)"]),
    "mask": ("dapo", {"mask": jnp.ones((B, 2))}, ValueError, ["`mask`", r"\(8, 2\)", r"\(8, 9\)"]),
    "advantages": ("gspo", {"advantages": jnp.ones((B, 9))}, ValueError, ["`advantages`", r"\(8, 9\)", r"\(8,\)"]),
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
