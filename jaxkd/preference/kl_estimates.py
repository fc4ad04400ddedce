"""Estimates of KL(policy‖reference) from sampled tokens: k1, k2, k3, and each with the gradient of what it estimates.

Of tokens that the policy sampled, k1 and k3 have the divergence as their mean, and k2 nearly. But the slope of a mean
is not the mean of the slopes, for the policy also decides what is sampled. With ``x = policy - reference`` of a token's
log-probabilities:

| | value | descends | `bias_corrected` descends |
| --- | --- | --- | --- |
| `k1` | x | nothing: its slopes have mean 0 | KL(policy‖reference) |
| `k2` | x^2 / 2 | KL(policy‖reference) | the mean of x^2 / 2 |
| `k3` | exp(-x) - 1 + x | KL(reference‖policy) | KL(policy‖reference), with less variance near it |

Above a log-ratio of 20 every exponential is its tangent there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, expm1

import jax
import jax.numpy as jnp

from jaxkd.logits.array_ops import described, is_own

# Above this, at a ratio of 4.9e8, the exponential of a log-ratio goes on as its tangent: it is finite, and its gradient
# neither ends nor turns.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True, repr=False)
class KLEstimate:
    """What a sampled token adds to an estimate of KL(policy‖reference).

    Attributes:
      function: from ``policy - reference``, an array of any shape, to the estimate of each token; elementwise.
      is_corrected: whether it is multiplied by the ratio ``exp(policy - old)``, as `bias_corrected` does.
    """

    function: Callable[[jax.Array], jax.Array]
    is_corrected: bool = False

    def __repr__(self) -> str:
        name = described(self.function)
        name = name.strip("_") if is_own(self.function) else f"KLEstimate({name})"
        return f"bias_corrected({name})" if self.is_corrected else name

    def __call__(self, x: jax.Array, log_ratio: jax.Array) -> jax.Array:
        """Of ``x = policy - reference`` and ``policy - old``."""
        estimate = self.with_slope(x, log_ratio)
        return jax.lax.stop_gradient(exp_of(log_ratio)) * estimate if self.is_corrected else estimate

    def with_slope(self, x: jax.Array, log_ratio: jax.Array) -> jax.Array:
        """The estimate before it is multiplied by the ratio, with the slope of the product over the ratio.

        A ratio's slope is the ratio, so that the product's is ratio (slope + estimate). Far below the reference the
        estimate in it stays as it is at ``x = -20``, or it would outweigh the slope of a tangent, and push the policy
        further down.
        """
        estimate = self.function(x)
        if not self.is_corrected:
            return estimate
        near = jax.lax.stop_gradient(self.function(jnp.maximum(x, -LARGEST_LOG_RATIO)))
        return estimate + near * without_value(log_ratio)


def bias_corrected(estimate: KLEstimate) -> KLEstimate:
    """``estimate`` times the ratio r = exp(policy - old): its gradient is that of the mean that it estimates.

    Of tokens that an older policy sampled the mean is right too. Where ``old`` is None r is 1, but not its slope. With
    `k3` it is the default of TRL 1.16.

    Source: DeepSeek-AI, "DeepSeek-V3.2" (arXiv 2512.02556).
    """
    return replace(estimate, is_corrected=True)


def _k1(x: jax.Array) -> jax.Array:
    return x


def _k2(x: jax.Array) -> jax.Array:
    return jnp.square(x) / 2


def _k3(x: jax.Array) -> jax.Array:
    """Never below 0, nor inf - inf."""
    below, beyond = _split(-x)
    return jnp.expm1(below) - below + expm1(LARGEST_LOG_RATIO) * beyond


k1 = KLEstimate(_k1)
k2 = KLEstimate(_k2)
k3 = KLEstimate(_k3)


def exp_of(x: jax.Array) -> jax.Array:
    """exp(x), and its tangent above 20."""
    below, beyond = _split(x)
    return jnp.exp(below) + exp(LARGEST_LOG_RATIO) * beyond


def expm1_of(x: jax.Array) -> jax.Array:
    below, beyond = _split(x)
    return jnp.expm1(below) + exp(LARGEST_LOG_RATIO) * beyond


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x`` up to 20, and what is left of it."""
    return jnp.minimum(x, LARGEST_LOG_RATIO), jnp.maximum(x - LARGEST_LOG_RATIO, 0)


def without_value(x: jax.Array) -> jax.Array:
    """0, with the gradient of ``x``."""
    return x - jax.lax.stop_gradient(x)
