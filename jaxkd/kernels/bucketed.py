"""Teachers that do not know the probability of each of the student's tokens: a comparison by buckets of tokens.

Some tokens, the entries, are each a bucket of their own, and all the others are one together, the rest. A divergence of
the K + 1 probabilities on either side is the loss of a row. Its gradient to the student's logits at the temperature is

    dz_v = slope_b(v) q_v / q_b(v) - q_v sum(slope),        slope_b = d row / d log q_b,

with b(v) the bucket of token v: what `reference` has, where a bucket has one token.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkd.divergences import weigh
from jaxkd.kernels.reference import hard_gradient, hard_part
from jaxkd.kernels.signature import ChunkRows, RowOptions, RowResult, RowSums
from jaxkd.logits import Place, placed


class Partition(NamedTuple):
    """The buckets of V tokens; K entries."""

    ids: jax.Array  # (K,): the token of each entry, V for one that is not used
    is_used: jax.Array  # (K,): whether it names a token, as the first to do so
    of_token: jax.Array  # (V,): its entry, or K where it is of the rest


class Buckets(NamedTuple):
    """Log-probabilities of a row."""

    buckets: jax.Array  # (K + 1,): of the entries, -inf where one is not used, and of the rest
    tokens: jax.Array  # (V,)
    share: jax.Array  # (V,): the probability of a token in its bucket


class BucketTeacher(Protocol):
    """The rows of a chunk of a teacher that is compared by buckets."""

    tail: str  # what is done with the rest: "bucket", "renormalize" (no probability there), "zero" (it adds no term)

    def partition(self, width: int) -> Partition:
        """The buckets of the student's tokens: for each row, or for all."""

    def bucket_log_probs(
        self, partition: Partition, student: Buckets, temperature: jax.Array
    ) -> tuple[Float[Array, "C K1"], Bool[Array, " C"]]:
        """The teacher's log-probabilities of the K + 1 buckets, and which rows are sound: the others become NaN."""


def token_ids(ids: Any) -> jax.Array:
    """In a type that any width of a vocabulary fits."""
    ids = jnp.asarray(ids)
    return ids if ids.dtype == jnp.int64 else ids.astype(jnp.int32)


def partition_by(ids: Int[Array, " K"], is_listed: Any, width: int) -> Partition:
    """The first of the entries that are listed gets a token; one outside ``width`` is not used."""
    ids = jnp.where(is_listed & (ids >= 0) & (ids < width), ids, width).astype(jnp.int32)
    entry = jnp.arange(ids.size, dtype=jnp.int32)
    of_token = jnp.full(width, ids.size, jnp.int32).at[ids].min(entry, mode="drop")
    return Partition(ids, of_token.at[ids].get(mode="fill", fill_value=ids.size) == entry, of_token)


def buckets_of(z: Float[Array, " V"], partition: Partition, tail: str = "bucket") -> Buckets:
    """A softmax in buckets."""
    ids, is_used, of_token = partition
    is_rest = of_token == ids.size
    if tail == "renormalize":
        z = jnp.where(is_rest & is_used.any(), -jnp.inf, z)
    tokens = jax.nn.log_softmax(z)
    entries = jnp.where(is_used, tokens.at[ids].get(mode="fill", fill_value=-jnp.inf), -jnp.inf)
    # The sum of what is there, not 1 - sum of the entries: it keeps its digits however small it is.
    rest = jax.nn.logsumexp(jnp.where(is_rest, tokens, -jnp.inf))
    rest = jnp.where(is_used.any() & (tail == "bucket"), rest, -jnp.inf)
    share = jnp.where(is_rest, jnp.where(rest == -jnp.inf, 0, jnp.exp(tokens - rest)), 1)
    return Buckets(jnp.append(entries, rest), tokens, share)


def row_losses(rows: ChunkRows, options: RowOptions, place: Place | None = None) -> RowResult:
    """As `reference.row_losses`, for a teacher that is compared by buckets."""
    student, teacher, temperature = rows.student, rows.teacher, rows.temperature
    partition = teacher.partition(student.shape[1])
    axis = 0 if partition.ids.ndim == 2 else None  # a partition for each row, or one for all
    z = student / temperature if options.is_tempered else student
    own = jax.vmap(partial(buckets_of, tail=teacher.tail), in_axes=(0, axis))(z, partition)
    log_p, is_sound = teacher.bucket_log_probs(partition, own, temperature)
    term, slope = rows.divergence.term_and_slope(log_p, own.buckets)
    total = jnp.sum(term, axis=1)
    divergence = replace(rows.divergence, is_nonnegative=False) if teacher.tail == "zero" else rows.divergence
    soft = divergence.of_total(total)
    # Not earlier: XLA may compile the exponential of a select for numbers alone, and then selects none that is not one.
    soft = jnp.where(is_sound, soft, jnp.nan)
    plain, hard = hard_part(rows, options)
    sums = RowSums(plain)
    if options.gradient_dtype is None:
        return RowResult(soft, hard, sums, None)

    slope_of_token = jax.vmap(lambda x, of_token: x[of_token], in_axes=(0, axis))(slope, partition.of_token)
    d = own.share * slope_of_token - jnp.exp(own.tokens) * jnp.sum(slope, axis=1, keepdims=True)
    d = jnp.where(is_sound[:, None], d, jnp.nan)
    scale = weigh(rows.soft_scale / temperature, divergence.outer_slope(total))[:, None]
    d = jnp.where(scale == 0, 0, scale * d)
    if options.has_labels:
        d = d + hard_gradient(rows, options, student, plain)
    return RowResult(soft, hard, sums, placed(d.astype(options.gradient_dtype), place))
