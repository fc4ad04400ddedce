"""What a `TopKLogProbs` keeps of a source: a pass over its rows, of whose logits a chunk exists at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.kernels import VocabularyShards, at_tokens, log_sum_exp, own_columns, top_tokens
from jaxkd.logits import Place, Source
from jaxkd.loop import Plan, Sharding, count_rows, read_rows, rows_of_chunk
from jaxkd.loop.checks import check_row_arguments, check_same_rows, check_size, check_source
from jaxkd.loop.flattening import check_sources, flat_sources, on_auto_axes, with_leading_axes
from jaxkd.loop.partitioning import Partitioning, partitioning_of

PADDING = -1


def tokens_of_source(
    teacher: Source,
    k: int,
    chosen_by: Source | None,
    *,
    temperature: float,
    mask: Any,
    chunk_size: int | None,
    sharding: Sharding | None,
) -> tuple[Float[Array, "... K"], Int[Array, "... K"]]:
    """Log-probabilities and token ids as `TopKLogProbs.of` describes them; the temperature has been checked."""
    check_source(teacher, "teacher.")
    name = f"teacher.{teacher.ROWS}"
    check_size("k", k)
    if k > teacher.vocabulary:
        raise ValueError(f"`k` is {k} but `teacher` has V={teacher.vocabulary}; give at most as many")
    if chosen_by is not None:
        check_source(chosen_by, "chosen_by.")
        check_same_rows(teacher, chosen_by, (name, f"chosen_by.{chosen_by.ROWS}"))
        if chosen_by.vocabulary != teacher.vocabulary:
            raise ValueError(
                f"`chosen_by` has V={chosen_by.vocabulary} but `teacher` has V={teacher.vocabulary}; give sources of "
                "one tokenizer, with heads cut to one width"
            )
    check_row_arguments(teacher, name, mask=mask, chunk_size=chunk_size)
    partitioning = partitioning_of(sharding, teacher)
    check_sources(partitioning, teacher, chosen_by)
    of_arrays = partial(_of_arrays, partitioning, k, temperature, chunk_size)
    return on_auto_axes(partitioning, of_arrays, *jax.lax.stop_gradient((teacher, chosen_by)), mask, gives_rows=True)


def _of_arrays(
    partitioning: Partitioning,
    k: int,
    temperature: float,
    chunk_size: int | None,
    teacher: Any,
    chosen_by: Any,
    mask: Any,
) -> tuple[jax.Array, jax.Array]:
    leading_shape, width = teacher.leading_shape, partitioning.whole_width(teacher.vocabulary)
    shards = VocabularyShards(partitioning.vocabulary, width, width) if partitioning.vocabulary else None
    rows = count_rows(partitioning, leading_shape, width, teacher.dtype, weights=mask)
    teacher, chosen_by = flat_sources(partitioning, teacher, chosen_by)
    others = () if chosen_by is None else (chosen_by.prepared(),)
    chunks = rows_of_chunk(chunk_size, teacher, *others, partitioning=partitioning)
    tokens = _Tokens(others, jnp.asarray(temperature, teacher.dtype), k, shards, teacher.dtype)
    values = read_rows(tokens, teacher, rows.is_counted, Plan(chunks, partitioning))
    is_read = (rows.weights != 0)[:, None]  # else the row is one of padding
    log_probs = jnp.where(is_read, values["log_probs"], -jnp.inf)
    token_ids = jnp.where(is_read, values["token_ids"], PADDING)
    return tuple(with_leading_axes(partitioning, x, leading_shape) for x in (log_probs, token_ids))  # type: ignore[return-value]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Tokens:
    """For the loop over chunks: the tokens of each row and their log-probabilities."""

    chosen_by: tuple[Any, ...]  # whose likeliest tokens they are, or nothing for the rows' own
    temperature: jax.Array
    k: int = field(metadata={"static": True})
    shards: VocabularyShards | None = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})
    DIMS: ClassVar[dict[str, Any]] = {}
    names: ClassVar = ("log_probs", "token_ids")

    @property
    def kinds(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"log_probs": ((self.k,), self.dtype), "token_ids": ((self.k,), jnp.int32)}

    def take(self, index: Int[Array, " C"]) -> "_Tokens":
        return replace(self, chosen_by=tuple(x.take(index) for x in self.chosen_by))

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: Any, place: Place | None
    ) -> tuple[dict[str, jax.Array], None]:
        z, axes = self._own(logits), () if self.shards is None else self.shards.axes
        at_temperature = log_sum_exp(z / self.temperature, axes)
        if self.chosen_by:
            _, ids = top_tokens(self._own(self.chosen_by[0].logits()), self.k, axes)
            found = at_tokens(z, ids, axes)
        else:
            found, ids = top_tokens(z, self.k, axes)
        top, log_total = at_temperature.top[:, None], at_temperature.log_total[:, None]
        return {"log_probs": (found / self.temperature - top) - log_total, "token_ids": ids}, None

    def _own(self, logits: Float[Array, "C V"]) -> Float[Array, "C V"]:
        return logits if self.shards is None else own_columns(logits, self.shards.teacher, self.shards.axes)
