"""A `Mixture` of teachers of which the likeliest tokens are known, each with a list of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkd.kernels import Buckets, Partition, partition_by
from jaxkd.logits import take_rows
from jaxkd.teachers.top_k import TopKLogProbs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixedTopK:
    """The buckets of a `Mixture` of `TopKLogProbs`: the tokens of all their lists, and the rest."""

    ROWS: ClassVar[str] = "weights"
    DIMS: ClassVar = {"weights": ("rows", None)}
    IN_BUCKETS: ClassVar[bool] = True

    teachers: tuple[TopKLogProbs, ...]
    weights: Any  # (..., M)

    @property
    def tail(self) -> str:
        return self.teachers[0].tail

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.weights.shape[:-1]

    @property
    def vocabulary(self) -> int:
        """How many columns there are, not tokens."""
        return sum(x.vocabulary for x in self.teachers)

    def flat(self) -> "MixedTopK":
        weights = jnp.reshape(self.weights, (-1, len(self.teachers)))
        return replace(self, teachers=tuple(x.flat() for x in self.teachers), weights=weights)

    def prepared(self) -> "MixedTopK":
        return self

    def take(self, index: Int[Array, " C"]) -> "MixedTopK":
        teachers = tuple(x.take(index) for x in self.teachers)
        return replace(self, teachers=teachers, weights=take_rows(self.weights, index))

    def compared(self, dtype: jnp.dtype) -> "MixedTopK":
        return self

    def partition(self, width: int) -> Partition:
        """Of the lists one after the other; that of a teacher of weight 0 is empty."""
        has_weight = self.weights != 0
        is_listed = [x.is_listed & has_weight[:, i : i + 1] for i, x in enumerate(self.teachers)]
        entries = jnp.concatenate([x.token_ids for x in self.teachers], axis=1), jnp.concatenate(is_listed, axis=1)
        return jax.vmap(lambda ids, is_listed: partition_by(ids, is_listed, width))(*entries)

    def bucket_log_probs(
        self, partition: Partition, student: Buckets, temperature: jax.Array
    ) -> tuple[Float[Array, "C K1"], Bool[Array, " C"]]:
        width = student.tokens.shape[1]
        weights = self.weights.astype(student.tokens.dtype)
        is_sound = jnp.all(weights >= 0, axis=1) & jnp.any(weights > 0, axis=1)
        each, has_entries = [], []
        for i, teacher in enumerate(self.teachers):
            own = teacher.partition(width)
            log_p, is_own_sound = teacher.bucket_log_probs(own, student, temperature)
            each.append(_moved(log_p, own, partition))
            is_sound &= is_own_sound | (weights[:, i] == 0)
            has_entries.append(jnp.any(own.is_used, axis=1))
        weights = jnp.where(jnp.stack(has_entries, axis=1), weights, 0)
        total = jnp.sum(weights, axis=1, keepdims=True)
        log_weights = jnp.log(weights) - jnp.log(jnp.where(total == 0, 1, total))  # (C, M)
        log_p = jnp.where(log_weights[:, :, None] == -jnp.inf, -jnp.inf, log_weights[:, :, None] + jnp.stack(each, 1))
        log_p = jax.nn.logsumexp(log_p, axis=1)  # (C, K1)

        # Where all tokens are entries, what a teacher leaves has no bucket.
        lists_all = (jnp.sum(partition.is_used, axis=1) == width)[:, None]
        log_p = jnp.where(lists_all & (jnp.arange(log_p.shape[1]) == log_p.shape[1] - 1), -jnp.inf, log_p)
        log_sum = jax.nn.logsumexp(log_p, axis=1, keepdims=True)
        return jnp.where(lists_all, log_p - log_sum, log_p), is_sound


def _moved(log_p: Float[Array, "C K1"], own: Partition, to: Partition) -> Float[Array, "C L1"]:
    """The log-probabilities of a teacher's own buckets in those of all lists."""

    def row(log_p: Float[Array, " K1"], ids: Int[Array, " K"], of_token: Int[Array, " V"]) -> Float[Array, " L1"]:
        rest = to.ids.shape[1]
        entry = of_token.at[ids].get(mode="fill", fill_value=rest)
        moved = jnp.full(rest + 1, -jnp.inf, log_p.dtype).at[entry].max(log_p[:-1])
        return moved.at[rest].set(log_p[-1])

    return jax.vmap(row)(log_p, own.ids, to.of_token)
