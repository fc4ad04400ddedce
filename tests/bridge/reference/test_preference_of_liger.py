"""The preference losses against Liger Kernel's functions of log-probabilities, in float64, where they mean the same.

Skipped where it is not installed.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from preference_cases import CASES
from preference_deviations import DEVIATIONS

from jaxkd import preference

BETA = 0.3
LIGER_DPO = {
    "dpo": ("sigmoid", {}),
    "robust": ("robust", {"label_smoothing": 0.1}),
    "hinge": ("hinge", {}),
    "exo_pair": ("exo_pair", {"label_smoothing": 0.01}),
    "nca_pair": ("nca_pair", {}),
    "bco_pair": ("bco_pair", {}),
    "sppo_hard": ("sppo_hard", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {}),
}
LIGER_GRPO = {
    "grpo": ({"loss_type": "grpo"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo", "max_completion_length": 8}, {"max_length": 8}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        {},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3}, {"max_ratio": 1.3}),
    "sapo": ({"loss_type": "sapo"}, {}),
    "vespo": ({"loss_type": "vespo"}, {}),
    "dapo, two-sided": ({"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.4}, {"delta": 1.4}),
    "dapo, bias-corrected": (
        {"loss_type": "dapo", "epsilon_high": 0.28, "use_bias_correction_kl": True},
        {"kl_estimate": preference.bias_corrected(preference.k3)},
    ),
    "grpo, importance": ({"loss_type": "grpo", "vllm_is_ratio": 1.7}, {"importance_weights": 1.7}),
}


def tensors(name):
    return {k: torch.tensor(x) for k, x in CASES[name].inputs.items()}


def ours(name, **options):
    arrays = {k: jnp.asarray(x) for k, x in CASES[name].inputs.items() if k != "chosen_lengths"}
    return CASES[name].function(**arrays, **options)


@pytest.mark.parametrize("name", LIGER_DPO)
def test_liger_dpo(name, x64):
    liger = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss").LigerFusedLinearDPOFunction
    x, (loss_type, options) = tensors(name), LIGER_DPO[name]
    count = len(x["policy_chosen"])
    theirs = liger.preference_loss_fn(
        x["policy_chosen"],
        x["policy_rejected"],
        torch.zeros(2 * count, 1),
        x["reference_chosen"],
        x["reference_rejected"],
        beta=BETA,
        loss_type=loss_type,
        **options,
    )
    loss, metrics = ours(name, beta=BETA, **options)
    np.testing.assert_allclose(loss, theirs[0], rtol=1e-6)  # its smoothing is a float32
    np.testing.assert_allclose(metrics["chosen_rewards"], theirs[1].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["rejected_rewards"], theirs[2].mean(), rtol=1e-6)


@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo"])
def test_liger_without_reference(name, x64):
    """Theirs without the likelihood of the chosen answer, which they add outside of these functions."""
    module = pytest.importorskip(f"liger_kernel.chunked_loss.{name}_loss")
    liger = {"cpo": "CPO", "simpo": "SimPO", "orpo": "ORPO"}[name]
    function = getattr(module, f"LigerFusedLinear{liger}Function").preference_loss_fn
    x = tensors(name)
    target = torch.zeros(2 * len(x["policy_chosen"]), 1)
    smoothing = {} if name == "orpo" else {"label_smoothing": 0.1}
    theirs = function(x["policy_chosen"], x["policy_rejected"], target, beta=BETA, **smoothing)
    options = {"cpo": {"alpha": 0.0, "chosen_lengths": 1}}.get(name, {})
    loss, metrics = ours(name, beta=BETA, **smoothing, **options)
    nll = float(metrics["nll"]) if name == "orpo" else 0.0
    np.testing.assert_allclose(float(loss) - nll, float(theirs[0]), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics["chosen_rewards"], theirs[1].mean(), rtol=1e-6)


def test_liger_kto(x64):
    liger = pytest.importorskip("liger_kernel.chunked_loss.kto_loss").LigerFusedLinearKTOFunction
    x = tensors("kto")
    theirs = liger.preference_loss_fn(
        x["policy"], x["is_desirable"], x["policy"][:, None], x["reference"], beta=BETA, kl=torch.tensor(0.4)
    )
    loss, metrics = ours("kto", beta=BETA, kl_log_ratios=0.4)
    np.testing.assert_allclose(loss, theirs[0], rtol=1e-6)
    np.testing.assert_allclose(metrics["chosen_rewards"], theirs[1] / x["is_desirable"].sum(), rtol=1e-6)


@pytest.mark.parametrize("name", LIGER_GRPO)
def test_liger_grpo(name, x64):
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction
    loss_name, (options, our_options) = name.partition(",")[0], LIGER_GRPO[name]
    x = tensors(loss_name)
    if "importance_weights" in our_options:
        our_options = {"importance_weights": jnp.full(x["mask"].shape, our_options["importance_weights"])}
    theirs, (kl, clipped) = liger.ppo_loss_fn(
        x["policy"], x["mask"].double(), x["advantages"], x["mask"], x["reference"], x["old"], beta=BETA, **options
    )
    loss, metrics = ours(loss_name, beta=BETA, **our_options)
    np.testing.assert_allclose(loss, theirs, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-6)
    # Theirs leaves out tokens of negative advantage that are cut off by `max_ratio` or `delta`.
    if "clip_fraction" in metrics and name not in ("cispo", "dapo, two-sided"):
        np.testing.assert_allclose(metrics["clip_fraction"], clipped, rtol=1e-6)


def test_liger_deviates_as_the_table_says():
    dpo = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss").LigerFusedLinearDPOFunction.preference_loss_fn
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction

    def of(*values):
        return [torch.tensor([float(x)]) for x in values]

    pair, one = torch.zeros(2, 1), torch.ones(1, 1)
    grpo = LigerFusedLinearGRPOFunction.ppo_loss_fn
    answers = torch.tensor([-1.0, -2.0]), torch.tensor([True, False]), pair, torch.tensor([-3.0, -2.0])
    theirs = {
        "smoothed DPO": dpo(*of(-1, -3), pair, *of(-2, -2), beta=0.5, label_smoothing=0.1)[0],
        "ORPO of certain answers": LigerFusedLinearORPOFunction.preference_loss_fn(*of(0, 0), pair)[0],
        "DiscoPOP far below": dpo(*of(-2000, 0), pair, *of(0, 0), beta=0.5, loss_type="discopop")[0],
        "KTO without a KL estimate": LigerFusedLinearKTOFunction.preference_loss_fn(*answers, beta=0.5)[0],
        "CISPO's bound": grpo(-one, one, torch.ones(1), one, beta=0.0, loss_type="cispo")[0],
        "KL far from the reference": grpo(-100 * one, one, torch.zeros(1), one, 0 * one, beta=1.0)[0],
    }
    for name, value in theirs.items():
        np.testing.assert_allclose(value, DEVIATIONS[name][1], rtol=1e-5)
    with pytest.raises(NotImplementedError):
        dpo(*of(-1, -3), pair, *of(-2, -2), loss_type="ipo")
