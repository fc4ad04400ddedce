"""`matryoshka`: a loss of embeddings cut to several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.embedding.candidates import Guide
from jaxkd.embedding.similarity import unit, widened
from jaxkd.loop import Metrics, metrics_of
from jaxkd.loop.checks import check_integer


def matryoshka(
    loss: Callable[..., tuple[jax.Array, Metrics]],
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = True,
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """A loss summed over embeddings cut to several sizes, so that their first components are embeddings by themselves.

        loss = sum_k weights_k loss(embeddings[..., :dims_k])

    Args:
      loss: one of this module, or a function of yours that returns ``(loss, metrics)``.
      dims: the sizes, distinct, none larger than the embeddings. Name the full size too if it shall be trained.
      weights: one factor for each of ``dims``, or None for 1. ``weights=`` of the rows go to the function returned.
      normalize: whether cut embeddings are brought to length 1 first, in float32, as sentence-transformers does. It
        decides what a Euclidean distance means. `info_nce` and `cosent` do not see lengths: for them False gives the
        same, without the float32 copies.

    Returns:
      A function with the arguments of ``loss``, of which all floating arrays with two axes or more are embeddings,
      except for ``teacher_scores`` given by name and for what a `Guide` holds. Its metrics are those of each size with
      the size in their name, and its loss: ``{"loss_64", "accuracy_64", ...}``.

    Raises:
      TypeError, ValueError: sizes or weights that do not fit.

    Sources: Kusupati et al., "Matryoshka Representation Learning" (arXiv 2205.13147); ``MatryoshkaLoss`` of
    sentence-transformers.

    >>> from jaxkd.embedding import info_nce
    >>> anchors, positives = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> loss, metrics = matryoshka(info_nce, dims=(2, 1))(anchors, positives, scale=1.0)
    >>> print(f"{loss:.4f} = {metrics['loss_2']:.4f} + {metrics['loss_1']:.4f}")
    1.1723 = 0.4791 + 0.6931
    """
    if not callable(loss):
        raise TypeError(f"`loss` is {loss!r}; give a function such as jaxkd.embedding.info_nce")
    for dim in dims:
        check_integer("dims", dim)
    if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
        raise ValueError(f"`dims` is {tuple(dims)}; give distinct positive sizes")
    factors = (1.0,) * len(dims) if weights is None else tuple(weights)
    if len(factors) != len(dims):
        raise ValueError(f"`weights` has {len(factors)} values but `dims` has {len(dims)}; give one for each")

    def is_embedding(x: Any) -> bool:
        return getattr(x, "ndim", 0) > 1 and jnp.issubdtype(jnp.result_type(x), jnp.floating)

    def cut(x: Any, dim: int) -> Any:
        if not is_embedding(x):
            return x
        if x.shape[-1] < dim:
            raise ValueError(
                f"`dims` has {dim} but embeddings of shape {x.shape} have D={x.shape[-1]}; give sizes up to that, and "
                "labels of shape (B,), and `teacher_scores` by name: every other floating array with two axes or more "
                "is taken as embeddings"
            )
        return unit(x[..., :dim]) if normalize else x[..., :dim]

    mapped = partial(jax.tree.map, is_leaf=lambda x: isinstance(x, Guide))

    def total_loss(*arguments: Any, **options: Any) -> tuple[jax.Array, Metrics]:
        given = {name: x for name, x in options.items() if name == "teacher_scores"}
        given_arguments = arguments, {name: x for name, x in options.items() if name not in given}
        if normalize:  # widened before they are cut, so that gradients add up in float32
            given_arguments = mapped(lambda x: widened(x) if is_embedding(x) else x, given_arguments)
        losses, metrics = [], Metrics()
        for dim, factor in zip(dims, factors, strict=True):
            args, kwargs = mapped(partial(cut, dim=dim), given_arguments)
            value, parts = _checked(loss(*args, **kwargs, **given))
            losses.append(factor * value)
            metrics |= {f"{name}_{dim}": x for name, x in {"loss": value, **parts}.items()}
        return sum(losses[1:], losses[0]), metrics_of(metrics)

    return total_loss


def _checked(result: Any) -> tuple[jax.Array, Metrics]:
    """What a loss that was handed in returned, if it is what a loss returns."""
    is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
    if not is_pair or jnp.shape(result[0]) != ():
        what = f"a loss of shape {jnp.shape(result[0])}" if is_pair else f"a {type(result).__name__}"
        raise TypeError(f"`loss` returns {what}; give a function that returns (loss, metrics), a scalar and a dict")
    return result
