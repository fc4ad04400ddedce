"""Every kind of teacher that `distillation_loss` takes, and what it has to satisfy."""

from typing import Any, TypeAlias

import jax

from jaxkd.divergences.sums_over_tokens import Divergence
from jaxkd.divergences.whole_rows import AnyDivergence
from jaxkd.logits.sources import Source
from jaxkd.loop.checks import check_source
from jaxkd.teachers.mixture import Mixture
from jaxkd.teachers.top_k import TopKLogProbs
from jaxkd.teachers.vocabulary_map import VocabularyMap

Bucketed: TypeAlias = TopKLogProbs | VocabularyMap
Teacher: TypeAlias = Source | Mixture | Bucketed


def check_teacher(teacher: Any, prefix: str, student: Source, divergence: AnyDivergence, temperature: Any) -> None:
    """Raises an error for a teacher that does not fit; ``prefix`` is what its fields are called by the caller."""
    if not isinstance(teacher, Mixture | TopKLogProbs | VocabularyMap):
        return check_source(teacher, prefix)
    name, kind = prefix.rstrip("._"), type(teacher).__name__
    if isinstance(teacher, Mixture):
        return teacher.check(name)
    if not isinstance(divergence, Divergence):
        raise ValueError(
            f"`divergence` is a function of whole rows of logits, which `{name}`, a {kind}, does not have; give a sum "
            "over tokens such as jaxkd.forward_kl"
        )
    if isinstance(teacher, VocabularyMap):
        return teacher.check(name, student.vocabulary)
    return teacher.check(name, student.vocabulary, divergence, temperature)


def for_loop(teacher: Teacher, temperature: Any) -> Any:
    """What the loop takes rows of: no gradient reaches it, and a mixture is one at the loss's temperature."""
    return teacher.at(temperature) if isinstance(teacher, Mixture) else jax.lax.stop_gradient(teacher)
