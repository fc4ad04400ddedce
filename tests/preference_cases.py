"""Every preference loss with inputs as a model has them, for the tests of what holds for all of them."""

import inspect
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from quick_programs import QUICK

import jaxkd
from jaxkd import preference

B, T = 8, 9


class Case(NamedTuple):
    function: Any
    inputs: dict[str, np.ndarray]  # float64; those that are differentiated begin with "policy"
    options: dict[str, Any]

    @property
    def policy(self) -> list[str]:
        return [name for name in self.inputs if name.startswith("policy")]

    @property
    def whole(self) -> dict[str, float]:
        """What the sums of parts of the batch are divided by, so that they add up to the whole."""
        parameters = inspect.signature(self.function).parameters
        if "nll_normalizer" in parameters and "chosen_lengths" in self.inputs:
            return {"normalizer": float(B), "nll_normalizer": float(self.inputs["chosen_lengths"].sum())}
        is_of_tokens = self.function in (preference.dapo, preference.cispo)
        return {"normalizer": float(self.inputs["mask"].sum() if is_of_tokens else B)}

    def evaluate(self, inputs: dict[str, Any], **options: Any) -> Any:
        """((loss, metrics), gradients of the policy's log-probabilities)"""
        policy = {name: inputs[name] for name in self.policy}

        def loss(policy: dict[str, Any]) -> Any:
            return self.function(**(inputs | policy), **(self.options | options))

        return jax.value_and_grad(loss, has_aux=True)(policy)

    def poisoned(self, dead: Any) -> dict[str, np.ndarray]:
        """The inputs with NaN for the policy and inf for all else in the rows that are ``dead``."""
        inputs = {k: x.copy() for k, x in self.inputs.items()}
        for k, x in inputs.items():
            if x.dtype == np.float64:
                x[dead] = np.nan if k.startswith("policy") else np.inf
        return inputs


def cast(inputs: dict[str, Any], dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return {k: jnp.asarray(x, dtype if x.dtype == np.float64 else x.dtype) for k, x in inputs.items()}


@cache
def _program(names: tuple[str, ...], with_metrics: bool) -> Any:
    """Many losses in one program."""

    def evaluate(inputs: Any, weights: Any, options: Any) -> Any:
        results = {k: CASES[k].evaluate(inputs[k], weights=weights, **options[k]) for k in names}
        return results if with_metrics else {k: ((loss, {}), g) for k, ((loss, _), g) in results.items()}

    return jax.jit(evaluate, compiler_options=QUICK)


def evaluate_all(
    inputs: dict[str, Any],
    weights: Any = None,
    options: Any = None,
    dtype: Any = jnp.float32,
    *,
    with_metrics: bool = True,
) -> Any:
    """``evaluate`` of the cases that ``inputs`` names, at their inputs and with options of their own, compiled once."""
    weights = np.ones(B) if weights is None else weights
    options = {k: (options or {}).get(k, {}) for k in inputs}
    arrays = {k: cast(x, dtype) for k, x in inputs.items()}
    return jax.device_get(_program(tuple(inputs), with_metrics)(arrays, jnp.asarray(weights, dtype), options))


def _inputs() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, size=2 * B)
    mask = np.arange(T) < lengths[:, None]
    tokens = -3 * rng.random((2 * B, T)) ** 2
    near = [tokens + 0.3 * rng.normal(size=tokens.shape) for _ in range(2)]
    policy, reference = ((x * mask).sum(1) for x in (tokens, near[0]))

    def halves(x: np.ndarray, model: str) -> dict[str, np.ndarray]:
        return {f"{model}_chosen": x[:B], f"{model}_rejected": x[B:]}

    sums = halves(policy, "policy"), halves(reference, "reference")
    means = halves(policy / lengths, "policy"), halves(reference / lengths, "reference")
    return {
        "sums": sums[0] | sums[1],
        "means": means[0] | means[1],
        "sums alone": sums[0] | {"chosen_lengths": lengths[:B].astype(float)},
        "means alone": means[0],
        "means with lengths": means[0] | {"chosen_lengths": lengths[:B].astype(float)},
        "unpaired": {"policy": policy[:B], "reference": reference[:B], "is_desirable": np.arange(B) % 3 != 1},
        "tokens": {"policy": tokens[:B], "old": near[0][:B], "reference": near[1][:B]}
        | {"advantages": rng.normal(size=B), "mask": mask[:B]},
    }


_INPUTS = _inputs()
_LENGTHS = {"chosen_lengths": _INPUTS["sums alone"]["chosen_lengths"]}
_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "sums": {"dpo": {}, "cdpo": {}, "robust": {}, "hinge": {}, "exo_pair": {}, "discopop": {}}
    | {"nca_pair": {}, "bco_pair": {}, "sppo_hard": {}, "apo_zero": {}, "apo_down": {}},
    "means": {"ipo": {}},
    "sums alone": {"cpo": {}},
    "means alone": {"simpo": {"beta": 2.0}, "cpo_simpo": {"beta": 2.0, "label_smoothing": 0.1}, "orpo": {}},
    "means with lengths": {"cpo_simpo, lengths": {"beta": 2.0}, "orpo, lengths": {}},
    "unpaired": {"kto": {"undesirable_weight": 1.5}, "bco": {}},
    "tokens": {"grpo": {}, "dr_grpo": {"max_length": 8}, "dapo": {}, "gspo": {}, "cispo": {"max_ratio": 1.3}},
}
CASES = {
    name: Case(getattr(preference, name.partition(",")[0]), _INPUTS[kind], options)
    for kind, losses in _KINDS.items()
    for name, options in losses.items()
}
CASES["irpo"] = Case(preference.irpo, _INPUTS["sums"] | _LENGTHS, {})
for _name in ("forward_kl", "reverse_kl", "symmetric_kl", "jensen_shannon", "alpha_divergence", "total_variation"):
    _divergence = getattr(jaxkd, _name)
    _divergence = _divergence if isinstance(_divergence, jaxkd.Divergence) else _divergence()
    CASES[f"f_po {_name}"] = Case(preference.f_po, _INPUTS["sums"], {"divergence": _divergence})

ONE_OF_EACH_KIND = ("dpo", "ipo", "cpo", "orpo", "orpo, lengths", "kto", "bco", "grpo", "dapo", "gspo", "cispo")
WITH_BASELINE = ("kto", "bco")  # of the whole batch
PAIRED = [name for name, case in CASES.items() if "policy_chosen" in case.inputs]
TOKENS = list(_KINDS["tokens"])
