"""Divergences that are a function of a sum over tokens: a term, and what is made of the sum of a row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.divergences.declaration import Divergence
from jaxkd.divergences.sums_over_tokens import alpha_divergence_term, forward_kl, parameter, total_variation_slope


def _overlap_nll_term(log_p, log_q):
    return jnp.exp(jnp.minimum(log_p, log_q))


def _overlap_slope(log_p, log_q):
    # Half of q where p = q, by the measure of the total variation: the gradient there is 0.
    return jnp.exp(log_q) / 2 - total_variation_slope(log_p, log_q)


def _overlap_outer(overlap: jax.Array) -> jax.Array:
    return -jnp.log(overlap)


overlap_nll = Divergence(_overlap_nll_term, slope=_overlap_slope, outer=_overlap_outer, is_nonnegative=True)
"""-log sum min(p, q), the negative logarithm of the rate at which a teacher accepts the student's drafts.

Infinite where the two have no token in common, 0 where they agree: -log(1 - `total_variation`).

Source: LK losses (arXiv 2602.23881).

>>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
>>> print(f"{overlap_nll(p, q):.6f}")
0.287682
"""


def _renyi_term(log_p, log_q, alpha):
    # Of a high order the sum is 1 and more, and what it is more keeps its digits; of a low one it may be next to 0.
    low = jnp.exp(alpha * log_p + (1 - alpha) * log_q)
    return jnp.where(alpha < 1, low, alpha_divergence_term(log_p, log_q, alpha))


def _renyi_outer(total: jax.Array, alpha: Any) -> jax.Array:
    return jnp.where(alpha < 1, jnp.log(total), jnp.log1p(alpha * (alpha - 1) * total)) / (alpha - 1)


def renyi(alpha: ArrayLike = 0.5) -> Divergence:
    """Renyi's divergence log(sum p^alpha q^(1 - alpha)) / (alpha - 1) of a positive order.

    ``alpha=1`` is forward KL, its limit, recognised when ``alpha`` is known at tracing; a traced ``alpha`` is any other
    positive number. At 0.5 it is symmetric, -2 log(1 - `hellinger`). From alpha = 1 on it is infinite where q = 0 < p.
    The sum is 1 + alpha (alpha - 1) `alpha_divergence`. Just below 1 a float32 value is off by 1e-7 / (1 - alpha).

    Source: Renyi, "On measures of entropy and information", 1961.

    Raises:
      ValueError: ``alpha`` is not a positive finite number.

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{renyi(0.5)(p, q):.6f} {renyi(2.0)(p, q):.6f}")
    0.069336 0.287682
    """
    alpha = parameter("alpha", alpha, 0.0, jnp.inf, high_is_in=False)
    if isinstance(alpha, float) and alpha == 0:
        raise ValueError("`alpha` is 0; give a number above 0")
    if isinstance(alpha, float) and alpha == 1:
        return forward_kl
    return Divergence(_renyi_term, (alpha,), outer=_renyi_outer, is_nonnegative=True)
