"""A teacher with another tokenizer, compared over the tokens that both have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxkd.divergences import AnyDivergence, Divergence
from jaxkd.kernels import Buckets, Partition, buckets_of, partition_by, token_ids
from jaxkd.logits import Source
from jaxkd.logits.array_ops import ShownBriefly
from jaxkd.loop.checks import check_source, check_token_ids, known_value


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class VocabularyMap(ShownBriefly):
    """A teacher for `distillation_loss` whose tokenizer shares S tokens with the student's.

    Both distributions become S + 1 buckets, compared by any pointwise divergence: each shared token, and all other
    tokens of that model together.

    Rows must still stand for the same place in the text on both sides.

    Where all the student's tokens are shared and the teacher has others, forward KL is infinite, an error. So it is for
    a draft model whose vocabulary is a part of the teacher's (speculative decoding): slice the teacher's head instead,

        teacher = LinearLogits(teacher_hidden, teacher_weight[token_ids])

    with the teacher's token of each of the student's. It is the teacher renormalised over these tokens, and logits of
    the others are never formed. Where all the teacher's tokens are shared and the student has others, so it is for
    reverse KL and the student's head. `jensen_shannon` is finite in both.

    Args:
      teacher: `LinearLogits` or `Logits`, of its own vocabulary; no gradient ever reaches it.
      student_ids, teacher_ids: (S,) integers: the token ``student_ids[s]`` of the student is ``teacher_ids[s]`` of the
        teacher. Each id at most once a side, within its vocabulary; traced ids that are not make the loss NaN.
        `torch_bridge.match_vocabularies` finds them for two tokenizers.

    Student tokens 0 and 2 are the teacher's 1 and 0. The teacher has (0.5, 0.2, 0.2, 0.1), so (0.2, 0.5, 0.3) in
    buckets, and the student 1/4 each, so (0.25, 0.25, 0.5):

    >>> from jaxkd import Logits, distillation_loss
    >>> teacher = Logits(jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1]])))
    >>> ids = jnp.array([0, 2]), jnp.array([1, 0])
    >>> loss, _ = distillation_loss(Logits(jnp.zeros((1, 4))), VocabularyMap(teacher, *ids))
    >>> print(f"{loss:.4f}")  # 0.2 log 0.8 + 0.5 log 2 + 0.3 log 0.6
    0.1487
    """

    DIMS: ClassVar[dict[str, Any]] = {}
    IN_BUCKETS: ClassVar[bool] = True

    teacher: Any
    student_ids: Any
    teacher_ids: Any

    tail: ClassVar[str] = "bucket"

    @property
    def ROWS(self) -> str:
        return f"teacher.{self.teacher.ROWS}"

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.teacher.leading_shape

    @property
    def vocabulary(self) -> int:
        return self.teacher.vocabulary

    @property
    def dtype(self) -> jnp.dtype:
        return self.teacher.dtype

    def check(self, name: str, student: Source, divergence: AnyDivergence, temperature: Any) -> None:
        """Raises an error for what does not fit the student's tokens."""
        check_source(self.teacher, f"{name}.teacher.")
        shapes = {}
        for side, vocabulary in (("student", student.vocabulary), ("teacher", self.vocabulary)):
            ids, ids_name = getattr(self, f"{side}_ids"), f"{name}.{side}_ids"
            check_token_ids(ids_name, ids)
            shapes[side] = jnp.shape(ids)
            known = known_value(ids)
            if known is None or not known.size:
                continue
            if known.min() < 0 or known.max() >= vocabulary:
                wrong = known.min() if known.min() < 0 else known.max()
                raise ValueError(f"`{ids_name}` has {wrong:.0f} but the {side} has V={vocabulary}; give its own ids")
            ids_there, counts = np.unique(known, return_counts=True)
            if counts.max() > 1:
                raise ValueError(f"`{ids_name}` has {ids_there[counts.argmax()]:.0f} more than once; give each id once")
        if len(shapes["student"]) != 1 or shapes["student"] != shapes["teacher"] or not shapes["student"][0]:
            raise ValueError(
                f"`{name}.student_ids` and `{name}.teacher_ids` have shapes {shapes['student']} and "
                f"{shapes['teacher']}; give (S,) both, with one pair at least"
            )
        self._check_is_finite(name, student.vocabulary, divergence)

    def _check_is_finite(self, name: str, width: int, divergence: AnyDivergence) -> None:
        """Raises an error where one side has no token that the other side's rest could be, and that is infinite."""
        shared, widths = jnp.shape(self.student_ids)[0], {"student": width, "teacher": self.vocabulary}
        for side, other, log_p, log_q in (("student", "teacher", -1, -jnp.inf), ("teacher", "student", -jnp.inf, -1)):
            if shared == widths[side] < widths[other] and _is_infinite(divergence, log_p, log_q):
                raise ValueError(
                    f"`{name}` maps all V={shared} tokens of the {side}, and the {other} has {widths[other] - shared} "
                    f"more: their probability makes this `divergence` infinite. Slice the {other}'s head, "
                    f"jaxkd.LinearLogits(hidden, weight[token_ids]) with the {other}'s token of each of the {side}'s: "
                    f"token_ids = {other}_ids[jnp.argsort({side}_ids)], without a VocabularyMap; or give a divergence "
                    "that is finite there, such as jaxkd.jensen_shannon(0.5)"
                )

    def at(self, temperature: Any) -> "VocabularyMap":
        return jax.lax.stop_gradient(self)

    def flat(self) -> "VocabularyMap":
        return replace(self, teacher=self.teacher.flat())

    def prepared(self) -> "VocabularyMap":
        return replace(self, teacher=self.teacher.prepared())

    def take(self, index: Int[Array, " C"]) -> "VocabularyMap":
        return replace(self, teacher=self.teacher.take(index))

    def compared(self, dtype: jnp.dtype) -> "VocabularyMap":
        return self

    def partition(self, width: int) -> Partition:
        return partition_by(token_ids(self.student_ids), True, width)

    def bucket_log_probs(
        self, partition: Partition, student: Buckets, temperature: jax.Array
    ) -> tuple[Float[Array, "C S1"], Bool[Array, " C"]]:
        z = self.teacher.logits().astype(student.tokens.dtype) / temperature
        own = partition_by(token_ids(self.teacher_ids), True, z.shape[1])
        is_sound = jnp.broadcast_to(jnp.all(partition.is_used & own.is_used), z.shape[:1])
        return jax.vmap(buckets_of, in_axes=(0, None))(z, own).buckets, is_sound


def _is_infinite(divergence: AnyDivergence, log_p: float, log_q: float) -> bool:
    """Whether its term is, as far as can be known at tracing: not where a parameter is traced."""
    if not isinstance(divergence, Divergence) or any(known_value(x) is None for x in divergence.parameters):
        return False
    with jax.ensure_compile_time_eval():
        term = divergence.term(jnp.asarray(log_p, jnp.float32), jnp.asarray(log_q, jnp.float32), *divergence.parameters)
        return bool(jnp.isinf(term))
