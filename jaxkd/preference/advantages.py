"""From rewards to advantages, for answers that stand in groups: those to one prompt, one after another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.loop.checks import check_floating, check_integer, check_mask, check_scalar


def group_advantages(
    rewards: ArrayLike,
    *,
    group_size: int,
    is_scaled: bool = True,
    epsilon: ArrayLike = 1e-4,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """GRPO's: each reward less its group's mean, over the group's standard deviation plus ``epsilon``.

    Args:
      rewards: (B,), answers to one prompt beside each other.
      group_size: answers to a prompt; it divides B.
      is_scaled: whether to divide; Dr. GRPO does not. The deviation is that of a sample, over n - 1.
      epsilon: above 0.
      mask: (B,) booleans: the rewards that count, or None for all. Others are never read, and have advantage 0, as has
        the only one of a group.

    Returns:
      (B,) advantages, for `jaxkd.preference.grpo` and others.

    Source: Shao et al., "DeepSeekMath" (arXiv 2402.03300), as in TRL.

    >>> print(group_advantages(jnp.array([1.0, 0.0, 2.0, 2.0]), group_size=2).round(3))
    [ 0.707 -0.707  0.     0.   ]
    """
    groups, counts = _groups(rewards, mask, group_size)
    check_scalar("epsilon", epsilon, above=0)
    number = jnp.sum(counts, axis=1, keepdims=True)
    centred = jnp.where(counts, groups - jnp.sum(groups, axis=1, keepdims=True) / jnp.maximum(number, 1), 0)
    if is_scaled:
        variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / jnp.maximum(number - 1, 1)
        centred = centred / (jnp.sqrt(variance) + jnp.asarray(epsilon, groups.dtype))
    return centred.reshape(-1)


def leave_one_out_advantages(rewards: ArrayLike, *, group_size: int, mask: ArrayLike | None = None) -> jax.Array:
    """RLOO's: each reward less the mean of the others of its group.

    The arguments and the result are those of `group_advantages`.

    Source: Ahmadian et al., "Back to Basics" (arXiv 2402.14740).

    >>> print(leave_one_out_advantages(jnp.array([1.0, 0.0, 2.0, 5.0, 5.0, 5.0]), group_size=3))
    [ 0.  -1.5  1.5  0.   0.   0. ]
    """
    groups, counts = _groups(rewards, mask, group_size)
    others = jnp.sum(counts, axis=1, keepdims=True) - 1
    baseline = (jnp.sum(groups, axis=1, keepdims=True) - groups) / jnp.maximum(others, 1)
    return jnp.where(counts & (others > 0), groups - baseline, 0).reshape(-1)


def _groups(rewards: ArrayLike, mask: ArrayLike | None, group_size: int) -> tuple[jax.Array, jax.Array]:
    """The rewards, 0 where they do not count, and which count: (B / group_size, group_size)."""
    check_floating("rewards", rewards)
    check_integer("group_size", group_size)
    shape = jnp.shape(rewards)
    if len(shape) != 1 or group_size < 1 or shape[0] % group_size:
        raise ValueError(f"`rewards` has shape {shape}; give (B,) with B a multiple of group_size={group_size}")
    if mask is not None:
        check_mask(mask, shape, "rewards")
    counts = (jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)).reshape(-1, group_size)
    dtype = jnp.promote_types(jnp.result_type(rewards), jnp.float32)
    return jnp.where(counts, jnp.asarray(rewards, dtype).reshape(-1, group_size), 0), counts
