"""What losses return beside their value."""

from typing import Any

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


def metrics_of(values: dict[str, Any]) -> Metrics:
    """The values in float32 and without gradient: metrics are for reading."""
    return {name: jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for name, x in values.items()}
