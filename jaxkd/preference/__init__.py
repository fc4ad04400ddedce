"""Preference losses: pure functions of log-probabilities, so that nothing here ever sees a vocabulary.

`jaxkd.sequence_log_probs` and `jaxkd.token_log_probs` make the log-probabilities without forming logits, and carry the
gradient back. Every loss returns ``(loss, metrics)`` and takes ``weights`` and ``normalizer``. The arguments of a kind
come in one order:

* pairs with a reference: ``(policy_chosen, policy_rejected, reference_chosen, reference_rejected)``, (B,) each
* pairs without: ``(policy_chosen, policy_rejected)``
* unpaired answers: ``(policy, reference, is_desirable)``, (B,) each
* tokens: ``(policy, old, reference, advantages, mask)``, (B, T), the advantages (B,) or (B, T)

Besides there are what makes their arguments: `group_advantages`, `leave_one_out_advantages`,
`length_desensitized_log_probs`; and what is handed to them: estimates of the KL divergence (`k1`, `k2`, `k3`,
`bias_corrected`) and scores of `f_dpo`.

This room holds the losses of log-probabilities already made, one file a kind. It may import `jaxkd.losses`,
`jaxkd.loop`, `jaxkd.logits` and `jaxkd.divergences`, never `jaxkd.embedding`; of jaxkd only ``jaxkd/__init__.py``
imports it.
"""

from jaxkd.preference.advantages import group_advantages, leave_one_out_advantages
from jaxkd.preference.anchored import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from jaxkd.preference.answer_ratios import gmpo, gspo, luspo, rloo, vespo
from jaxkd.preference.counted_answers import Metrics as Metrics
from jaxkd.preference.counted_answers import Result as Result
from jaxkd.preference.kl_estimates import KLEstimate, bias_corrected, k1, k2, k3
from jaxkd.preference.margins import cdpo, discopop, dpo, exo_pair, f_po, hinge, ipo, irpo, robust
from jaxkd.preference.policy_divergences import alpha_score, f_dpo, forward_kl_score, jensen_shannon_score
from jaxkd.preference.reference_free import cpo, cpo_simpo, orpo, sft, simpo
from jaxkd.preference.sampled_tokens import sampled_kl
from jaxkd.preference.shared_lengths import length_desensitized_log_probs
from jaxkd.preference.sorted_pairs import aot, aot_unpaired
from jaxkd.preference.tokens import cispo, dapo, dr_grpo, grpo, sapo
from jaxkd.preference.unpaired import bco, kto

__all__ = [
    "KLEstimate",
    "alpha_score",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco",
    "bco_pair",
    "bias_corrected",
    "cdpo",
    "cispo",
    "cpo",
    "cpo_simpo",
    "dapo",
    "discopop",
    "dpo",
    "dr_grpo",
    "exo_pair",
    "f_dpo",
    "f_po",
    "forward_kl_score",
    "gmpo",
    "group_advantages",
    "grpo",
    "gspo",
    "hinge",
    "ipo",
    "irpo",
    "jensen_shannon_score",
    "k1",
    "k2",
    "k3",
    "kto",
    "leave_one_out_advantages",
    "length_desensitized_log_probs",
    "luspo",
    "nca_pair",
    "orpo",
    "rloo",
    "robust",
    "sampled_kl",
    "sapo",
    "sft",
    "simpo",
    "sppo_hard",
    "vespo",
]
