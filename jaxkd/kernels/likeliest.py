"""The likeliest tokens of rows of logits, whose columns may be split over devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.kernels.reference import first_column
from jaxkd.loop.collectives import psum, varying
from jaxkd.loop.partitioning import Axes


def top_tokens(z: Float[Array, "C V"], k: int, axes: Axes = ()) -> tuple[Float[Array, "C K"], Int[Array, "C K"]]:
    """The k largest logits and their tokens, the largest first; of equal ones the first token.

    Each device along the mesh ``axes`` names its own k, and these alone are gathered.
    """
    largest, ids = jax.lax.top_k(z, min(k, z.shape[1]))
    ids = ids.astype(jnp.int32)
    if not axes:
        return largest, ids
    ids = ids + jnp.asarray(first_column(z, axes), jnp.int32)
    largest, ids = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (largest, ids))
    largest, place = jax.lax.top_k(largest, k)
    return _alike(largest, axes), _alike(jnp.take_along_axis(ids, place, axis=1), axes)


def at_tokens(x: Float[Array, "C V"], ids: Int[Array, "C K"], axes: Axes = ()) -> Float[Array, "C K"]:
    """The columns of tokens, each of which some device has."""
    own = ids - jnp.asarray(first_column(x, axes), ids.dtype)
    found = jnp.take_along_axis(x, own, axis=1, mode="clip")
    return psum(jnp.where((own >= 0) & (own < x.shape[1]), found, 0), axes) if axes else found


def _alike(x: jax.Array, axes: Axes) -> jax.Array:
    """What is equal on all devices, of a type that says so."""
    varied = tuple(axis for axis in axes if axis in varying(x))
    return jax.lax.pmax(x, varied) if varied else x
