"""Labels of a language model: at each position the token that comes next."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.loop.checks import check_integer, check_is_array, check_token_ids


def shift_labels(tokens: ArrayLike, mask: ArrayLike | None = None, ignore_index: int = -100) -> jax.Array:
    """The label of each position: the token after it, and none after the last.

        labels[..., t] = tokens[..., t + 1]     where t + 1 < T and mask[..., t + 1], else ignore_index

    The losses here take labels as they are and shift nothing: hidden states (B, T, D) of ``tokens`` go with
    ``shift_labels(tokens)``.

    Args:
      tokens: (..., T) integers.
      mask: (..., T) booleans or numbers: which tokens are to be predicted, as an attention mask has it, or the mask
        of an answer. A token that is 0 in it is no label, whatever it predicts itself.
      ignore_index: the label of a position that does not count, as in `distillation_loss`.

    Returns:
      (..., T) labels, in the type of ``tokens``; signed, if that is not, so that it holds a negative ``ignore_index``.

    Raises:
      TypeError, ValueError: tokens that are no integers or have no axis of positions; a mask of another shape.

    >>> tokens, is_answer = jnp.array([[5, 6, 7, 8], [5, 9, 0, 0]]), jnp.array([[0, 0, 1, 1], [0, 1, 0, 0]])
    >>> print(shift_labels(tokens))
    [[   6    7    8 -100]
     [   9    0    0 -100]]
    >>> print(shift_labels(tokens, is_answer))
    [[-100    7    8 -100]
     [   9 -100 -100 -100]]
    """
    check_token_ids("tokens", tokens)
    check_integer("ignore_index", ignore_index)
    shape = jnp.shape(tokens)
    if not shape:
        raise ValueError("`tokens` is a scalar; give sequences of token ids, (..., T)")
    labels: Any = jnp.asarray(tokens)
    if not jnp.issubdtype(labels.dtype, jnp.signedinteger) or jnp.iinfo(labels.dtype).bits < 32:
        labels = labels.astype(jnp.int32)
    if mask is not None:
        check_is_array("mask", mask)
        if jnp.shape(mask) != shape:
            raise ValueError(f"`mask` has shape {jnp.shape(mask)} but `tokens` has {shape}; give one value a token")
        labels = jnp.where(jnp.asarray(mask) != 0, labels, ignore_index)
    last = jnp.full((*shape[:-1], min(shape[-1], 1)), ignore_index, labels.dtype)
    return jnp.concatenate([labels[..., 1:], last], axis=-1)
