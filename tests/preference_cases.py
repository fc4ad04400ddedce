"""Every preference loss with inputs as a model has them, for the tests of what holds for all of them."""

import inspect
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import on_device
from quick_programs import QUICK

import jaxkd
from jaxkd import preference

B, T = 8, 9


class Case(NamedTuple):
    function: Any
    inputs: dict[str, np.ndarray]  # float64
    options: dict[str, Any]

    @property
    def policy(self) -> list[str]:
        """What is differentiated."""
        return [name for name in self.inputs if name.startswith(("policy", "entropies"))]

    @property
    def whole(self) -> dict[str, float]:
        """What the sums of parts of the batch are divided by, so that they add up to the whole."""
        parameters = inspect.signature(self.function).parameters
        if "nll_normalizer" in parameters and "chosen_lengths" in self.inputs:
            return {"normalizer": float(B), "nll_normalizer": float(self.inputs["chosen_lengths"].sum())}
        if self.function is preference.sft:
            return {"normalizer": float(self.inputs["chosen_lengths"].sum())}
        return {"normalizer": float(self.inputs["mask"].sum() if self.is_mean_of_tokens else B)}

    @property
    def is_mean_of_tokens(self) -> bool:
        return self.function in (preference.dapo, preference.cispo, preference.vespo, preference.sampled_kl)

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
    return {k: on_device(x, dtype if x.dtype == np.float64 else x.dtype) for k, x in inputs.items()}


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
    of_tokens = {"policy": tokens[:B], "old": near[0][:B], "reference": near[1][:B]}
    of_tokens |= {"advantages": rng.normal(size=B), "mask": mask[:B]}
    added = {"entropies": 3 * rng.random((B, T)), "importance_weights": 2 * rng.random((B, T))}
    by_token = {"advantages": rng.normal(size=(B, T))} | added
    by_answer = added | {"importance_weights": 2 * rng.random(B)}
    return {
        "sums": sums[0] | sums[1],
        "means": means[0] | means[1],
        "sums alone": sums[0] | {"chosen_lengths": lengths[:B].astype(float)},
        "means alone": means[0],
        "means with lengths": means[0] | {"chosen_lengths": lengths[:B].astype(float)},
        "unpaired": {"policy": policy[:B], "reference": reference[:B], "is_desirable": np.arange(B) % 3 != 1},
        "chosen": {"policy_chosen": policy[:B], "chosen_lengths": lengths[:B].astype(float)},
        "tokens": of_tokens,
        "by token": of_tokens | by_token,
        "by answer": of_tokens | by_answer,
        "vespo, by token": {k: x for k, x in (of_tokens | by_token).items() if k != "importance_weights"},
        "no advantages": {k: x for k, x in of_tokens.items() if k != "advantages"},
    }


_INPUTS = _inputs()
_LENGTHS = {"chosen_lengths": _INPUTS["sums alone"]["chosen_lengths"]}
_ADDED = {"entropy_weight": 0.1, "kl_estimate": preference.bias_corrected(preference.k3)}
_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "sums": {"dpo": {}, "cdpo": {}, "robust": {}, "hinge": {}, "exo_pair": {}, "discopop": {}}
    | {"nca_pair": {}, "bco_pair": {}, "sppo_hard": {}, "apo_zero": {}, "apo_down": {}}
    | {"aot": {"label_smoothing": 0.1}, "aot_unpaired": {}},
    "means": {"ipo": {}},
    "sums alone": {"cpo": {}},
    "means alone": {"simpo": {"beta": 2.0}, "cpo_simpo": {"beta": 2.0, "label_smoothing": 0.1}, "orpo": {}},
    "means with lengths": {"cpo_simpo, lengths": {"beta": 2.0}, "orpo, lengths": {}},
    "unpaired": {"kto": {"undesirable_weight": 1.5}, "bco": {}},
    "chosen": {"sft": {}},
    "tokens": {"grpo": {}, "dr_grpo": {"max_length": 8}, "dapo": {}, "gspo": {}, "cispo": {"max_ratio": 1.3}}
    | {"sapo": {}, "luspo": {}, "gmpo": {}, "rloo": {}, "vespo": {}},
    "by token": {"grpo, by token": _ADDED | {"delta": 1.4}, "dr_grpo, by token": _ADDED | {"max_length": 8}}
    | dict.fromkeys(("dapo, by token", "gspo, by token", "luspo, by token", "sapo, by token"), _ADDED)
    | {"cispo, by token": _ADDED | {"max_ratio": 1.3}},
    "by answer": dict.fromkeys(("gmpo, by answer", "rloo, by answer"), _ADDED),
    "vespo, by token": {"vespo, by token": _ADDED},
    "no advantages": {"sampled_kl": {}, "sampled_kl, bound": {"max_ratio": 1.1, "kl_estimate": preference.k2}},
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
for _name, _score in (
    ("forward_kl", preference.forward_kl_score),
    ("jensen_shannon", preference.jensen_shannon_score),
    ("alpha", preference.alpha_score(0.3)),
):
    CASES[f"f_dpo {_name}"] = Case(preference.f_dpo, _INPUTS["sums"], {"score": _score})

NOT_LOSSES = {
    "KLEstimate",
    "k1",
    "k2",
    "k3",
    "bias_corrected",
    "alpha_score",
    "forward_kl_score",
    "jensen_shannon_score",
}
NOT_LOSSES |= {"group_advantages", "leave_one_out_advantages", "length_desensitized_log_probs"}
LOSSES = [name for name in preference.__all__ if name not in NOT_LOSSES]
ONE_OF_EACH_KIND = ("dpo", "ipo", "cpo", "orpo", "orpo, lengths", "kto", "bco", "grpo", "dapo", "gspo", "cispo")
ONE_OF_EACH_KIND += ("aot", "f_dpo forward_kl", "sft", "rloo, by answer", "gspo, by token", "sampled_kl")
OF_WHOLE_BATCH = ("kto", "bco", "aot", "aot_unpaired")  # a baseline, or ranks
PAIRED = [name for name, case in CASES.items() if "policy_rejected" in case.inputs]
TOKENS = [name for name, case in CASES.items() if "mask" in case.inputs]
