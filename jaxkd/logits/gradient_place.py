"""Where the gradient of a chunk's logits goes: alone, or among the rows of an array that is written in pieces."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Place(NamedTuple):
    """Where the gradient of some rows' logits goes: into ``rows`` from row ``first`` on."""

    rows: Float[Array, "_ V"]
    first: Int[Array, ""]

    @classmethod
    def alone(cls, num_rows: int, width: int, dtype: jnp.dtype) -> "Place":
        """For a gradient that goes nowhere: rows that hold anything until it is written."""
        return cls(jax.lax.empty((num_rows, width), dtype), jnp.zeros((), jnp.int32))


def placed(gradient: Float[Array, "C V"], place: Place | None) -> Float[Array, "_ V"]:
    """The rows of ``place`` with the gradient among them, or the gradient alone."""
    if place is None:
        return gradient
    return jax.lax.dynamic_update_slice_in_dim(place.rows, gradient, place.first, axis=0)
