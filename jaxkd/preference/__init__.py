"""Preference losses: pure functions of log-probabilities, so that nothing here ever sees a vocabulary.

`jaxkd.sequence_log_probs` and `jaxkd.token_log_probs` make the log-probabilities without forming logits, and carry the
gradient back. Every loss returns ``(loss, metrics)`` and takes ``weights`` and ``normalizer``. The arguments of a kind
come in one order:

* pairs with a reference: ``(policy_chosen, policy_rejected, reference_chosen, reference_rejected)``, (B,) each
* pairs without: ``(policy_chosen, policy_rejected)``
* unpaired answers: ``(policy, reference, is_desirable)``, (B,) each
* tokens: ``(policy, old, reference, advantages, mask)``, (B, T) but for the (B,) advantages

This room holds the losses of log-probabilities already made, one file a kind. It may import `jaxkd.losses`,
`jaxkd.loop`, `jaxkd.logits` and `jaxkd.divergences`, never `jaxkd.embedding`; of jaxkd only ``jaxkd/__init__.py``
imports it.
"""

from jaxkd.preference.anchored import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from jaxkd.preference.counted_answers import Metrics as Metrics
from jaxkd.preference.counted_answers import Result as Result
from jaxkd.preference.margins import cdpo, discopop, dpo, exo_pair, f_po, hinge, ipo, irpo, robust
from jaxkd.preference.reference_free import cpo, cpo_simpo, orpo, simpo
from jaxkd.preference.tokens import cispo, dapo, dr_grpo, grpo, gspo
from jaxkd.preference.unpaired import bco, kto

__all__ = [
    "apo_down",
    "apo_zero",
    "bco",
    "bco_pair",
    "cdpo",
    "cispo",
    "cpo",
    "cpo_simpo",
    "dapo",
    "discopop",
    "dpo",
    "dr_grpo",
    "exo_pair",
    "f_po",
    "grpo",
    "gspo",
    "hinge",
    "ipo",
    "irpo",
    "kto",
    "nca_pair",
    "orpo",
    "robust",
    "simpo",
    "sppo_hard",
]
