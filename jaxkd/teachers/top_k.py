"""A teacher of which only the likeliest tokens of each row are known: what inference servers hand out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxkd.divergences import AnyDivergence, forward_kl
from jaxkd.kernels import Buckets, Partition, partition_by, token_ids
from jaxkd.logits import Source, logits_dtype, take_rows
from jaxkd.logits.array_ops import ShownBriefly
from jaxkd.loop import Sharding
from jaxkd.loop.checks import check_floating, check_scalar, check_token_ids, known_value
from jaxkd.teachers.tokens_of_source import PADDING, tokens_of_source

TAILS = ("bucket", "renormalize", "zero")
# Log-probabilities in bfloat16 sum to 1 within 2 percent.
MOST_ABOVE_ONE = 0.05


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class TopKLogProbs(ShownBriefly):
    """Log-probabilities of K tokens a row, in any order: a cached teacher for `distillation_loss`.

    An entry with token id -1 or log-probability -inf is padding, so that K may differ from row to row. Zeros are none:
    they say that token 0 is certain. Of entries with the same token the first counts. A row without entries has loss 0.
    Nothing of size (N, V) is formed. `TopKLogProbs.of` makes one of a teacher that is there.

    Args:
      log_probs: (..., K) floating, of a softmax over the whole vocabulary.
      token_ids: (..., K) integers. An id outside the student's vocabulary other than -1 makes the row's loss NaN, and
        so do probabilities that sum to more than 1.05.
      temperature: at which they were captured, a Python number. At another temperature of the loss the probability of
        the tokens that are not listed is unknown: an error, or NaN where that temperature is traced. Exact are
        "renormalize", and rows that list all tokens.
      tail: what is done about the tokens that are not listed.
        "bucket": on either side they are one more token, of what is left of the probability. By the data-processing
        inequality the loss is a lower bound of that over the whole vocabulary, for every f-divergence (all of jaxkd's
        pointwise ones), and its gradient tells the student how much probability they deserve together.
        "renormalize": both sides are renormalised over the listed tokens; the others have no gradient.
        "zero": forward KL alone, sum p (log p - log q) over the listed tokens with q over the whole vocabulary; its
        gradient is that of a teacher without the others. It may be negative, down to -1/e.

    The missing probability is known to rounding only, and taken as at least one rounding of 1 (1.2e-7 in float32).
    Without a student's token that could have it, it is 0 below 1e-5.

    Source: the bucket is the coarse-graining of Csiszár's f-divergences (1967).

    Two tokens are known of a teacher (0.5, 0.25, 0.2, 0.05), and the student has 1/4 each. Over the whole vocabulary
    the loss is 0.5 log 2 + 0.2 log 0.8 + 0.05 log 0.2 = 0.2215. In buckets it is 0.5 log 2 + 0.25 log 0.5:

    >>> from jaxkd import Logits, distillation_loss
    >>> known = jnp.log(jnp.array([[0.25, 0.5]])), jnp.array([[1, 0]])
    >>> for tail in ("bucket", "renormalize", "zero"):
    ...     loss, _ = distillation_loss(Logits(jnp.zeros((1, 4))), TopKLogProbs(*known, tail=tail))
    ...     print(f"{loss:.4f}")
    0.1733
    0.0566
    0.3466
    """

    ROWS: ClassVar[str] = "log_probs"
    DIMS: ClassVar[dict[str, Any]] = {"log_probs": ("rows", None), "token_ids": ("rows", None)}
    IN_BUCKETS: ClassVar[bool] = True

    log_probs: Any
    token_ids: Any
    temperature: float = field(default=1.0, kw_only=True, metadata={"static": True})
    tail: str = field(default="bucket", kw_only=True, metadata={"static": True})

    @classmethod
    def of(
        cls,
        teacher: Source,
        k: int,
        *,
        chosen_by: Source | None = None,
        temperature: float = 1.0,
        tail: str = "bucket",
        mask: ArrayLike | None = None,
        chunk_size: int | None = None,
        sharding: Sharding | None = None,
    ) -> TopKLogProbs:
        """The k likeliest tokens of each row of a source, without its (N, V) logits: to be kept, or for a `Mixture`.

        Args:
          teacher: `LinearLogits` or `Logits`. No gradient ever reaches it.
          k: how many tokens a row, from the likeliest on; of equally likely ones those with the smaller ids come first.
          chosen_by: a source of the same rows and vocabulary, such as the student: the tokens are its k likeliest, with
            the teacher's log-probabilities. None lets the teacher choose.
          temperature: of the log-probabilities, a Python number; give the loss the same one.
          tail: of the result.
          mask: (...) booleans or None: a row where it is False is never read, and has no entries.
          chunk_size: rows whose logits exist at a time, at most; None chooses by the width of the vocabulary.
          sharding: as in `distillation_loss`. Of a vocabulary that is split each device names its own k likeliest
            tokens, and these alone are gathered.

        Returns:
          Log-probabilities (..., k) in float32 (float64 for float64) and token ids in int32.

        Raises:
          TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

        >>> from jaxkd import Logits
        >>> teacher = Logits(jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]])))
        >>> student = Logits(jnp.array([[5.0, 4.0, 3.0, 2.0]]))
        >>> for top in (TopKLogProbs.of(teacher, 2), TopKLogProbs.of(teacher, 2, chosen_by=student)):
        ...     print(top.token_ids, (100 * jnp.exp(top.log_probs)).round())
        [[3 2]] [[40. 30.]]
        [[0 1]] [[10. 20.]]
        """
        _check_temperature("temperature", temperature)
        _check_tail("tail", tail)
        arrays = tokens_of_source(
            teacher, k, chosen_by, temperature=temperature, mask=mask, chunk_size=chunk_size, sharding=sharding
        )
        return cls(*arrays, temperature=temperature, tail=tail)

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.log_probs.shape[:-1]

    @property
    def vocabulary(self) -> int:
        """How many columns it has, not tokens."""
        return self.log_probs.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        return logits_dtype(self.log_probs)

    def check(self, name: str, student: Source, divergence: AnyDivergence, temperature: Any) -> None:
        """Raises an error for what does not fit the student's tokens, the divergence or the temperature."""
        width = student.vocabulary
        check_floating(f"{name}.log_probs", self.log_probs)
        check_token_ids(f"{name}.token_ids", self.token_ids)
        shape = self.log_probs.shape
        if jnp.shape(self.token_ids) != shape:
            raise ValueError(
                f"`{name}.token_ids` has shape {jnp.shape(self.token_ids)} but `{name}.log_probs` has {shape}; "
                "give one id for each"
            )
        if not shape or not 1 <= shape[-1] <= width:
            raise ValueError(f"`{name}.log_probs` has shape {shape}; give (..., K) with 1 <= K <= V={width}")
        known = known_value(self.log_probs)
        if known is not None and known.size and (known.max(axis=-1) > MOST_ABOVE_ONE).all():  # rows may be ignored
            raise ValueError(f"`{name}.log_probs` has positive values in every row; give log-probabilities, not logits")
        if self._is_padded_with_zeros(known):
            raise ValueError(
                f"`{name}` has rows that list token 0 with log-probability 0, that is as certain, beside other tokens; "
                "pad with token id -1 or log-probability -inf"
            )
        _check_tail(f"{name}.tail", self.tail)
        if self.tail == "zero" and getattr(divergence, "term", None) is not forward_kl.term:
            raise ValueError(
                f'`{name}.tail="zero"` is for `forward_kl`: other divergences, summed over the listed tokens, can be '
                'negative and fall when the student leaves these tokens; give "bucket" or "renormalize"'
            )
        _check_temperature(f"{name}.temperature", self.temperature)
        of_loss = known_value(temperature)
        is_other = of_loss is not None and not _is_one(self.temperature / of_loss)
        if is_other and self.tail != "renormalize" and shape[-1] < width:
            raise ValueError(
                f"`{name}` was captured at temperature {self.temperature:g} and the loss has {of_loss:g}, at which the "
                "probability of the tokens that are not listed is unknown; capture it at that temperature, or give "
                'tail="renormalize"'
            )

    def _is_padded_with_zeros(self, log_probs: np.ndarray | None) -> bool:
        """As far as the values are known."""
        if log_probs is None or not (log_probs == 0).any():
            return False
        ids = known_value(self.token_ids)
        if ids is None:
            return False
        is_zero = (ids == 0) & (log_probs == 0)
        others = np.exp(np.where((ids == 0) | (ids == PADDING), -np.inf, np.minimum(log_probs, 0)))
        return bool((is_zero.any(axis=-1) & (others.sum(axis=-1) > MOST_ABOVE_ONE)).any())

    def at(self, temperature: Any) -> TopKLogProbs:
        return jax.lax.stop_gradient(self)

    def flat(self) -> TopKLogProbs:
        size = self.vocabulary
        return replace(
            self,
            log_probs=jnp.reshape(self.log_probs, (-1, size)),
            token_ids=jnp.reshape(token_ids(self.token_ids), (-1, size)),
        )

    def prepared(self) -> TopKLogProbs:
        return self

    def take(self, index: Int[Array, " C"]) -> TopKLogProbs:
        return replace(self, log_probs=take_rows(self.log_probs, index), token_ids=take_rows(self.token_ids, index))

    def compared(self, dtype: jnp.dtype) -> TopKLogProbs:
        return self

    def partition(self, width: int) -> Partition:
        return jax.vmap(lambda ids, is_listed: partition_by(ids, is_listed, width))(self.token_ids, self.is_listed)

    def bucket_log_probs(
        self, partition: Partition, student: Buckets, temperature: jax.Array
    ) -> tuple[Float[Array, "C K1"], Bool[Array, " C"]]:
        dtype, width = student.tokens.dtype, student.tokens.shape[1]
        ratio = self.temperature / temperature
        log_p = jnp.where(partition.is_used, self.log_probs.astype(dtype) * ratio, -jnp.inf)  # (C, K)
        log_sum = jax.nn.logsumexp(log_p, axis=1)
        count = jnp.sum(partition.is_used, axis=1)
        lists_all = count == width

        rest = jnp.full_like(log_sum, -jnp.inf)
        if self.tail == "renormalize":
            is_whole = is_sound = log_sum < jnp.inf
        else:
            missing = -jnp.expm1(log_sum)
            is_whole = lists_all | ((missing <= 1e-5) & (student.buckets[:, -1] == -jnp.inf))
            is_sound = (log_sum < jnp.inf) & (lists_all | (_is_one(ratio) & (missing >= -MOST_ABOVE_ONE)))
            if self.tail == "bucket":
                has_rest = ~is_whole & (count > 0)
                rest = jnp.where(has_rest, jnp.log(jnp.maximum(missing, jnp.finfo(dtype).eps)), rest)
        log_p = jnp.where(partition.is_used, log_p - jnp.where(is_whole, log_sum, 0)[:, None], -jnp.inf)

        outside = self.is_listed & ((self.token_ids < 0) | (self.token_ids >= width))
        return jnp.concatenate([log_p, rest[:, None]], axis=1), is_sound & ~jnp.any(outside, axis=1)

    @property
    def is_listed(self) -> jax.Array:
        """(..., K): which entries are not padding."""
        return (self.token_ids != PADDING) & (self.log_probs != -jnp.inf)


def _check_tail(name: str, tail: Any) -> None:
    if tail not in TAILS:
        raise ValueError(f"`{name}` is {tail!r}; give one of {TAILS}")


def _check_temperature(name: str, temperature: Any) -> None:
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"`{name}` is {temperature!r}; give a Python number")
    check_scalar(name, temperature, above=0)


def _is_one(ratio: Any) -> Any:
    return abs(ratio - 1) < 1e-6
