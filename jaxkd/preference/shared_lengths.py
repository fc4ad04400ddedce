"""LD-DPO: log-probabilities of answers in which what one has beyond the length of the other counts less."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.loop.checks import check_scalar
from jaxkd.preference.counted_answers import check_shape, checked_rows


def length_desensitized_log_probs(
    chosen: ArrayLike,
    rejected: ArrayLike,
    chosen_mask: ArrayLike,
    rejected_mask: ArrayLike,
    *,
    alpha: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Sums over the tokens of two answers; those beyond as many as both have count ``alpha`` times.

    Where both answers of a pair have at least n tokens, and one has more, the first n of each count once. Taken of the
    policy and of the reference, with the same masks, for `jaxkd.preference.dpo` or any other loss of summed
    log-probabilities.

    Args:
      chosen, rejected: (B, T) log-probabilities, as `jaxkd.token_log_probs` returns them; the two T may differ.
      chosen_mask, rejected_mask: (B, T) booleans or 0 and 1: the answers' tokens. What the others hold is never read.
      alpha: in [0, 1]; 1 is plain sums. TRL's ``ld_alpha``.

    Returns:
      (B,) each: the arguments ``policy_chosen, policy_rejected`` or ``reference_chosen, reference_rejected``.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Source: Liu et al., "Length Desensitization in Direct Preference Optimization" (arXiv 2409.06411).

    >>> answers = jnp.array([[-1.0, -2.0, -4.0]]), jnp.array([[-1.0, -1.0]])
    >>> masks = jnp.array([[True, True, True]]), jnp.array([[True, False]])
    >>> print(*length_desensitized_log_probs(*answers, *masks, alpha=0.5))
    [-4.] [-1.]
    """
    check_scalar("alpha", alpha, at_least=0, at_most=1)
    log_probs, masks = [], []
    for name, x, mask in (("chosen", chosen, chosen_mask), ("rejected", rejected, rejected_mask)):
        (checked,), _ = checked_rows({name: x}, None, None, axes="BT")
        check_shape(f"{name}_mask", mask, checked.shape, name)
        log_probs.append(checked)
        masks.append(jnp.asarray(mask, bool))
    if len(log_probs[0]) != len(log_probs[1]):
        raise ValueError(f"`rejected` has B={len(log_probs[1])} but `chosen` has B={len(log_probs[0])}; give pairs")
    shared = jnp.minimum(*(jnp.sum(mask, axis=1, keepdims=True) for mask in masks))
    chosen_sums, rejected_sums = (_sums(x, mask, shared, alpha) for x, mask in zip(log_probs, masks, strict=True))
    return chosen_sums, rejected_sums


def _sums(log_probs: jax.Array, mask: jax.Array, shared: jax.Array, alpha: ArrayLike) -> jax.Array:
    is_shared = jnp.cumsum(mask, axis=1) <= shared
    factors = jnp.where(is_shared, 1, jnp.asarray(alpha, log_probs.dtype))
    return jnp.sum(jnp.where(mask, factors * log_probs, 0), axis=1)
