"""B sampled answers of T tokens: what their arrays must be, and what the losses of them have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.loop.checks import known_value
from jaxkd.loop.row_weights import weighted
from jaxkd.preference.counted_answers import Mean, Result, check_shape, checked_rows, number, result
from jaxkd.preference.kl_estimates import KLEstimate, exp_of, without_value


@dataclass(frozen=True)
class Tokens:
    """B answers of T tokens. A token that does not count is all zeros, and so is an answer of weight 0."""

    policy: jax.Array  # (B, T)
    reference: jax.Array | None  # (B, T)
    log_ratio: jax.Array  # (B, T), policy against old; (B, 1) where an answer has one ratio
    advantages: jax.Array  # (B, T), or (B, 1) of answers
    mask: jax.Array  # (B, T)
    weights: jax.Array  # (B,)
    beta: jax.Array  # ()
    kl_estimate: KLEstimate
    importance_weights: jax.Array | None  # (B, T) or (B, 1)
    entropies: jax.Array | None  # (B, T)
    entropy_weight: jax.Array  # ()

    @staticmethod
    def of(
        policy: ArrayLike,
        old: ArrayLike | None,
        reference: ArrayLike | None,
        advantages: ArrayLike,
        mask: ArrayLike,
        beta: ArrayLike,
        kl_estimate: KLEstimate,
        importance_weights: ArrayLike | None,
        entropies: ArrayLike | None,
        entropy_weight: ArrayLike,
        weights: ArrayLike | None,
        normalizer: ArrayLike | None,
    ) -> "Tokens":
        given: dict[str, Any] = {"policy": policy, "old": old, "reference": reference, "entropies": entropies}
        arrays = {name: x for name, x in given.items() if name == "policy" or x is not None}
        checked, row_weights = checked_rows(arrays, weights, normalizer, axes="BT")
        shape, dtype = checked[0].shape, checked[0].dtype
        check_shape("mask", mask, shape, "policy")
        if not isinstance(kl_estimate, KLEstimate):
            raise TypeError(f"`kl_estimate` is {kl_estimate!r}; give a KLEstimate such as jaxkd.preference.k3")
        beta = number("beta", beta, dtype, at_least=0)
        known_weight, entropy_weight = known_value(entropy_weight), number("entropy_weight", entropy_weight, dtype)
        if entropies is None and known_weight is not None and known_weight != 0:
            raise ValueError(f"`entropy_weight` is {known_weight:g} but `entropies` is None; give both")
        counts = jnp.asarray(mask, bool) & (row_weights != 0)[:, None]
        by_token = {name: jnp.where(counts, x, 0) for name, x in zip(arrays, checked, strict=True)}
        new = by_token["policy"]
        before, anchor = (jax.lax.stop_gradient(by_token.get(name, new)) for name in ("old", "reference"))
        return Tokens(
            policy=new,
            reference=None if reference is None else anchor,
            log_ratio=new - before,
            advantages=_constants("advantages", advantages, counts, dtype),
            mask=counts,
            weights=row_weights,
            beta=beta,
            kl_estimate=kl_estimate,
            importance_weights=None
            if importance_weights is None
            else _constants("importance_weights", importance_weights, counts, dtype),
            entropies=by_token.get("entropies"),
            entropy_weight=entropy_weight,
        )

    @property
    def ratio(self) -> jax.Array:
        return exp_of(self.log_ratio)

    @property
    def above_reference(self) -> jax.Array:
        """policy - reference, and 0 without one: (B, T)."""
        return jnp.zeros_like(self.policy) if self.reference is None else self.policy - self.reference

    @property
    def kl(self) -> jax.Array:
        """The estimate of each token: (B, T)."""
        if self.reference is None:
            return jnp.zeros_like(self.policy)
        return self.kl_estimate(self.above_reference, self.log_ratio)

    @property
    def penalty(self) -> jax.Array:
        """What every loss adds to each token: (B, T)."""
        penalty = self.beta * self.kl
        return penalty if self.entropies is None else penalty - self.entropy_weight * self.entropies

    @property
    def lengths(self) -> jax.Array:
        """The tokens of each answer, and 1 for an answer without: (B,)."""
        return jnp.maximum(self.sums(jnp.ones_like(self.policy)), 1)

    def number(self, name: str, value: ArrayLike, **bounds: float) -> jax.Array:
        return number(name, value, self.policy.dtype, **bounds)

    def with_one_ratio(self) -> "Tokens":
        """With the geometric mean of its tokens' ratios as the ratio of each answer.

        Where tokens have advantages of their own each keeps its own gradient: that of GSPO-token.
        """
        mean = (self.sums(self.log_ratio) / self.lengths)[:, None]
        if self.advantages.shape == self.policy.shape:
            mean = jax.lax.stop_gradient(mean) + without_value(self.log_ratio)
        return replace(self, log_ratio=mean)

    def only_of_answers(self, loss: str, **arrays: ArrayLike | None) -> None:
        """An error for arguments of tokens in a loss whose surrogate is one of whole answers."""
        for name, x in arrays.items():
            if x is not None and jnp.ndim(x) != 1:
                raise ValueError(
                    f"`{name}` has shape {jnp.shape(x)}; {loss} has one surrogate an answer, give {self.weights.shape}"
                )

    def clipped_surrogate(
        self, epsilon_low: ArrayLike, epsilon_high: ArrayLike, delta: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array]:
        """-min(min(r, delta) A, clip(r) A), and where its gradient has stopped."""
        low = 1 - self.number("epsilon_low", epsilon_low, at_least=0)
        high = 1 + self.number("epsilon_high", epsilon_high, at_least=0)
        largest = jnp.inf if delta is None else self.number("delta", delta, above=0)
        ratio, gains, loses = self.ratio, self.advantages > 0, self.advantages < 0
        upper = jnp.where(gains, jnp.minimum(high, largest), jnp.maximum(high, largest))
        is_above, is_below = ratio > upper, loses & (ratio < low)
        clipped = ((gains | loses) & is_above) | is_below
        return -jnp.where(clipped, jnp.where(is_below, low, upper), ratio) * self.advantages, clipped

    def losses(self, surrogate: jax.Array) -> jax.Array:
        """Of each token: (B, T)."""
        return self.by_importance(surrogate) + self.penalty

    def by_importance(self, surrogate: jax.Array) -> jax.Array:
        return surrogate if self.importance_weights is None else weighted(self.importance_weights, surrogate)

    def sums(self, x: jax.Array) -> jax.Array:
        """Over the tokens of each answer: (B,)."""
        return jnp.sum(jnp.where(self.mask, x, 0), axis=1)

    def mean_of_answers(self, normalizer: ArrayLike | None) -> Mean:
        return Mean.of(self.weights, normalizer)

    def mean_of_tokens(self, normalizer: ArrayLike | None) -> Mean:
        return Mean.of(self.weights, normalizer, counts=self.sums(jnp.ones_like(self.policy)))

    def result(
        self, losses: jax.Array, mean: Mean, clipped: jax.Array | None = None, kl: jax.Array | None = None
    ) -> Result:
        """The mean of one loss an answer, (B,), and the metrics: plain means over the tokens that count."""
        metrics = {"kl": self.kl if kl is None else kl, "log_probs": self.policy}
        if clipped is not None:
            metrics["clip_fraction"] = clipped.astype(losses.dtype)
        if self.entropies is not None:
            metrics["entropy"] = self.entropies
        num_tokens = jnp.sum(self.mask)
        count = jnp.maximum(num_tokens, 1).astype(self.policy.dtype)
        means = {name: jnp.sum(self.sums(x)) / count for name, x in metrics.items()}
        return result(mean(losses), means | {"num_tokens": num_tokens})


def _constants(name: str, value: ArrayLike, counts: jax.Array, dtype: Any) -> jax.Array:
    """Of answers (B,) as (B, 1), or of tokens (B, T), and 0 where nothing counts."""
    if jnp.shape(value) not in (counts.shape, counts.shape[:1]):
        raise ValueError(
            f"`{name}` has shape {jnp.shape(value)} but `policy` asks for {counts.shape[:1]}, one an answer, or "
            f"{counts.shape}, one a token; give that"
        )
    if jnp.ndim(value) == 1:
        value, counts = jnp.asarray(value)[:, None], jnp.any(counts, axis=1, keepdims=True)
    return jax.lax.stop_gradient(jnp.where(counts, jnp.asarray(value, dtype), 0))
