"""Every preference loss with inputs as a model has them, for the tests of what holds for all of them."""

from typing import Any, NamedTuple

import numpy as np

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
    "unpaired": {"kto": {"undesirable_weight": 1.5}, "bco": {}},
    "tokens": {"grpo": {}, "dr_grpo": {"max_length": 8}, "dapo": {}, "gspo": {}, "cispo": {"max_ratio": 1.3}},
}
CASES = {
    name: Case(getattr(preference, name), _INPUTS[kind], options)
    for kind, losses in _KINDS.items()
    for name, options in losses.items()
}
CASES["irpo"] = Case(preference.irpo, _INPUTS["sums"] | _LENGTHS, {})
for _name in ("forward_kl", "reverse_kl", "symmetric_kl", "jensen_shannon", "alpha_divergence", "total_variation"):
    _divergence = getattr(jaxkd, _name)
    _divergence = _divergence if isinstance(_divergence, jaxkd.Divergence) else _divergence()
    CASES[f"f_po {_name}"] = Case(preference.f_po, _INPUTS["sums"], {"divergence": _divergence})

ONE_OF_EACH_KIND = ("dpo", "ipo", "cpo", "orpo", "kto", "bco", "grpo", "dapo", "gspo", "cispo")
WITH_BASELINE = ("kto", "bco")  # of the whole batch
PAIRED = [name for name, case in CASES.items() if "policy_chosen" in case.inputs]
TOKENS = list(_KINDS["tokens"])
