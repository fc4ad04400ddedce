"""The preference losses in both libraries: of log-probabilities as a model has them, and through a model's head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

import jaxkd
from jaxkd import preference
from torch_bridge import reference
from torch_bridge.parity.comparison import Comparison, Tensors
from torch_bridge.reference import preference as dense

Options = dict[str, Any]

PAIRS, LENGTH, HIDDEN, VOCABULARY = 13, 37, 48, 523
WITH_REFERENCE: dict[str, Options] = {
    "dpo": {},
    "cdpo": {},
    "robust": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {},
    "discopop": {},
    "irpo": {"chosen_lengths": None},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
}
WITHOUT_REFERENCE: dict[str, Options] = {
    "cpo": {"chosen_lengths": None},
    "simpo": {"beta": 2.0, "label_smoothing": 0.1},
    "cpo_simpo": {"chosen_lengths": None, "beta": 2.0, "alpha": 0.5},
    "orpo": {"chosen_lengths": None},
}
CHOSEN: dict[str, Options] = {"sft": {"chosen_lengths": None}}
UNPAIRED: dict[str, Options] = {"kto": {"undesirable_weight": 1.3}, "bco": {}}
ESTIMATES: dict[str, Any] = {
    "k1": (preference.k1, dense.k1),
    "k2": (preference.k2, dense.k2),
    "corrected k3": (preference.bias_corrected(preference.k3), dense.bias_corrected(dense.k3)),
}
# A word stands for the array or the estimate of that name.
BY_TOKEN: Options = {"advantages": "token_advantages", "importance_weights": "token_importance"}
BY_TOKEN |= {"entropies": "entropies", "entropy_weight": 0.1, "kl_estimate": "corrected k3"}
BY_ANSWER: Options = BY_TOKEN | {"advantages": "advantages", "importance_weights": "importance"}
TOKENS: dict[str, Options] = {
    "grpo": {},
    "grpo, by token": BY_TOKEN | {"delta": 1.5},
    "dr_grpo": {"max_length": 40},
    "dr_grpo, by token": BY_TOKEN | {"max_length": 40, "delta": 1.5},
    "dapo": {},
    "dapo, by token": BY_TOKEN | {"delta": 1.5},
    "dapo(kl_estimate=k1)": {"kl_estimate": "k1"},
    "dapo(kl_estimate=k2)": {"kl_estimate": "k2"},
    "gspo": {},
    "gspo, by token": BY_TOKEN | {"delta": 1.1},
    "gspo, by answer": BY_ANSWER | {"delta": 1.1},
    "luspo": {},
    "luspo, by answer": BY_ANSWER,
    "cispo": {"max_ratio": 1.2},
    "cispo, by token": BY_TOKEN | {"max_ratio": 1.2},
    "sapo": {},
    "sapo, by token": BY_TOKEN,
    "gmpo": {},
    "gmpo, by answer": BY_ANSWER,
    "rloo": {},
    "rloo, by answer": BY_ANSWER | {"delta": 1.5},
    "vespo": {},
    "vespo, by token": {key: value for key, value in BY_TOKEN.items() if key != "importance_weights"},
    "sampled_kl": {},
    "sampled_kl, by token": {"importance_weights": "token_importance", "max_ratio": 1.2},
    "sampled_kl(kl_estimate=k2)": {"kl_estimate": "k2"},
}
DIVERGENCES: dict[str, tuple[jaxkd.Divergence, reference.Divergence]] = {
    "forward_kl": (jaxkd.forward_kl, reference.forward_kl),
    "reverse_kl": (jaxkd.reverse_kl, reference.reverse_kl),
    "symmetric_kl()": (jaxkd.symmetric_kl(), reference.symmetric_kl()),
    "jensen_shannon()": (jaxkd.jensen_shannon(), reference.jensen_shannon()),
    "alpha_divergence()": (jaxkd.alpha_divergence(), reference.alpha_divergence()),
}
SCORES: dict[str, Any] = {
    "forward_kl": (preference.forward_kl_score, dense.forward_kl_score),
    "jensen_shannon": (preference.jensen_shannon_score, dense.jensen_shannon_score),
    "alpha(0.3)": (preference.alpha_score(0.3), dense.alpha_score(0.3)),
}
PLAIN = ("dpo", "simpo", "kto", "bco", "grpo", "dapo")
AVERAGED = ("ipo", "simpo", "cpo_simpo", "orpo")  # take log-probabilities a token


def comparisons(device: str = "cpu") -> list[Comparison]:
    """Every loss weighted, one of each kind plain, and some of hidden states, in float32 and bfloat16."""
    data = _data(device)
    options = WITH_REFERENCE | WITHOUT_REFERENCE | CHOSEN | UNPAIRED | TOKENS
    options |= {f"f_po({name})": {"divergence": both} for name, both in DIVERGENCES.items()}
    options |= {f"f_dpo({name})": {"score": both} for name, both in SCORES.items()}
    rows = [_of_log_probs(name, data, weighted=False, options=options[name]) for name in PLAIN]
    rows += [_of_log_probs(name, data, weighted=True, options=options[name]) for name in options]
    return rows + [
        _of_hidden_states(name, dtype, device)
        for dtype in (torch.float32, torch.bfloat16)
        for name in ("dpo", "orpo", "kto", "grpo")
    ]


def _data(device: str) -> dict[str, torch.Tensor]:
    """Answers of 1 to 37 tokens; policy and reference have moved apart by a third of a nat a token."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (2 * PAIRS, 1), generator=generator)
    token_log_probs = -3 * torch.rand(2 * PAIRS, LENGTH, generator=generator) ** 2
    near = [token_log_probs + 0.35 * torch.randn(2 * PAIRS, LENGTH, generator=generator) for _ in range(2)]
    lengths = mask.sum(1)
    data = {"mask": mask, "policy": token_log_probs, "old": near[0], "reference": near[1], "lengths": lengths}
    data["advantages"] = torch.randn(2 * PAIRS, generator=generator)
    for name in ("policy", "reference"):
        data[f"{name}_sums"] = (data[name] * mask).sum(1)
        data[f"{name}_means"] = data[f"{name}_sums"] / lengths
    data["token_advantages"] = torch.randn(2 * PAIRS, LENGTH, generator=generator)
    data["importance"] = 2 * torch.rand(2 * PAIRS, generator=generator)
    data["token_importance"] = 2 * torch.rand(2 * PAIRS, LENGTH, generator=generator)
    data["entropies"] = 3 * torch.rand(2 * PAIRS, LENGTH, generator=generator)
    data["weights"] = torch.randint(3, (2 * PAIRS,), generator=generator).float()  # a third does not count
    return {name: x.to(device) for name, x in data.items()}


def _of_log_probs(name: str, data: dict[str, torch.Tensor], weighted: bool, options: Options) -> Comparison:
    loss, _, setting = name.partition(", ")
    function, is_unpaired, is_token = loss.partition("(")[0], name in UNPAIRED, name in TOKENS
    constants: Options
    if is_token:
        options = {key: (data | ESTIMATES)[x] if isinstance(x, str) else x for key, x in options.items()}
        inputs = {"policy": data["policy"]}
        if "entropies" in options:
            inputs["entropies"] = options.pop("entropies")
        constants = {key: data[key] for key in ("old", "reference", "advantages", "mask")}
        if function == "sampled_kl":
            del constants["advantages"]
        weights = data["weights"]
    elif is_unpaired:
        inputs = {"policy": data["policy_sums"]}
        constants = {"reference": data["reference_sums"], "is_desirable": data["advantages"] > 0}
        weights = data["weights"]
    else:
        kind = "means" if function in AVERAGED else "sums"
        halves = {model: data[f"{model}_{kind}"].split(PAIRS) for model in ("policy", "reference")}
        inputs = {"policy_chosen": halves["policy"][0], "policy_rejected": halves["policy"][1]}
        constants = {"reference_chosen": halves["reference"][0], "reference_rejected": halves["reference"][1]}
        if name in WITHOUT_REFERENCE | CHOSEN:
            constants = {}
        if name in CHOSEN:
            del inputs["policy_rejected"]
        weights = data["weights"][:PAIRS]
    if "chosen_lengths" in options:
        options = options | {"chosen_lengths": data["lengths"][:PAIRS]}
    if weighted:
        options = options | {"weights": weights, "normalizer": 11.0}
        if "chosen_lengths" in options and name not in ("irpo", "sft"):
            options["nll_normalizer"] = 150.0
    in_jax, in_torch = ({key: pick(x) for key, x in (constants | options).items()} for pick in (_for_jax, _for_torch))

    def of_jax(arrays: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return getattr(preference, function)(**arrays, **in_jax)

    def of_torch(tensors: Tensors) -> torch.Tensor:
        return getattr(dense, function)(**tensors, **in_torch)

    settings = ["weighted" if weighted else "plain", *filter(None, [setting])]
    return Comparison("preference", loss, ", ".join(settings), inputs, of_jax, of_torch)


def _of_hidden_states(name: str, dtype: torch.dtype, device: str) -> Comparison:
    """Policy and reference share their head; the answers are of ragged length."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2 * PAIRS, LENGTH, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5
    lengths = torch.randint(1, LENGTH + 1, (2 * PAIRS, 1), generator=generator)
    if name != "orpo":  # an answer without tokens, whose odds would be infinite
        lengths[1] = 0
    counted = torch.arange(LENGTH) < lengths
    labels = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH), generator=generator).masked_fill(~counted, -100).to(device)
    inputs = {"hidden": hidden.to(device, dtype), "weight": weight.to(device, dtype)}
    moved = hidden + 0.1 * torch.randn(hidden.shape, generator=generator)
    anchor = _dense_log_probs(moved.to(device, dtype).double(), inputs["weight"].double(), labels).float()
    desirable = (torch.arange(2 * PAIRS) % 3 == 0).to(device)
    advantages = torch.randn(2 * PAIRS, generator=generator).to(device)
    mask = labels != -100

    def loss(library: Any, log_probs: Any, constant: Callable[[torch.Tensor], Any]) -> Any:
        """From log-probabilities (2 B, T) in either library."""
        if name == "grpo":
            old, counts = constant(anchor), constant(mask)
            return library.grpo(log_probs, old, old, constant(advantages), counts)
        sums, anchors = log_probs.sum(1), constant(anchor.sum(1))
        if name == "kto":
            return library.kto(sums, anchors, constant(desirable))
        if name == "dpo":
            return library.dpo(sums[:PAIRS], sums[PAIRS:], anchors[:PAIRS], anchors[PAIRS:])
        means = sums / constant(mask.sum(1).clamp(min=1).float())
        return library.orpo(means[:PAIRS], means[PAIRS:])

    def of_jax(arrays: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        student = jaxkd.LinearLogits(arrays["hidden"], arrays["weight"])
        return loss(preference, jaxkd.token_log_probs(student, _for_jax(labels), chunk_size=128), _for_jax)

    def of_torch(tensors: Tensors) -> torch.Tensor:
        return loss(dense, _dense_log_probs(tensors["hidden"], tensors["weight"], labels), _for_torch)

    return Comparison("preference", name, "from hidden states", inputs, of_jax, of_torch)


def _dense_log_probs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_probs = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return log_probs.masked_fill(labels == -100, 0)


def _for_jax(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0]
    return jnp.asarray(value.cpu().numpy()) if isinstance(value, torch.Tensor) else value


def _for_torch(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[1]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
