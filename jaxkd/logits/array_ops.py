"""Operations on the arrays of a source: their type, their rows, products of them."""

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def unwrapped(x: Any) -> Any:
    """The array that stands for ``x``: of an ``nnx.Param`` or a ``keras.Variable``; what is none stays as it is."""
    return x.__jax_array__() if hasattr(type(x), "__jax_array__") and not isinstance(x, jax.Array) else x


def check_floating(name: str, x: Any) -> None:
    """Raises a TypeError unless ``x`` is an array of floating-point numbers that JAX can read."""
    kind = type(x)
    if kind.__module__.partition(".")[0] == "torch":
        raise TypeError(
            f"`{name}` is a torch.{kind.__name__}; give a JAX array, or use torch_bridge.torch_loss, which takes "
            "PyTorch tensors and gives gradients back to PyTorch"
        )
    if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
        raise TypeError(f"`{name}` is a {kind.__name__}; give an array")
    try:
        dtype = jnp.dtype(x.dtype)
    except TypeError:
        raise TypeError(f"`{name}` is a {kind.__module__}.{kind.__name__}; give a JAX or NumPy array") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{name}` is {dtype.name}; give a floating-point array")


def described(x: Any) -> str:
    """For a `repr`: type and shape of an array instead of its numbers, and a function's name without its address."""
    if isinstance(x, (tuple, list)):
        return f"({', '.join(map(described, x))}{',' if len(x) == 1 else ''})"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return getattr(x, "__name__", repr(x))


class ShownBriefly:
    """A dataclass whose `repr` describes its fields, but for those that are None."""

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        shown = ", ".join(f"{name}={described(x)}" for name, x in values.items() if x is not None)
        return f"{type(self).__name__}({shown})"


def is_own(function: Any) -> bool:
    """Whether jaxkd defines it."""
    return (getattr(function, "__module__", None) or "").split(".")[0] == "jaxkd"  # None where code was run by `exec`


def logits_dtype(x: Any) -> jnp.dtype:
    """float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if jnp.result_type(x) == jnp.float64 else jnp.float32)


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """The product of two matrices over one axis of each, accumulated and returned in ``dtype``."""
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=dtype)


def take_rows(x: jax.Array, index: Int[Array, " C"]) -> jax.Array:
    """Rows of ``x``; zeros for an index beyond its last row. ``index`` is increasing."""
    return x.at[index].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)


def power_of_two_into_range(x: jax.Array) -> jax.Array:
    """A power of two that brings the largest finite magnitude of ``x`` to about 2**12: exact to multiply and divide by.

    float16 reaches from 6e-8 to 65504, and near convergence the gradient of most logits lies below.
    """
    largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0))
    exponent = jnp.clip(12 - jnp.ceil(jnp.log2(largest)), -100, 100)
    return jnp.ldexp(jnp.ones_like(largest), exponent.astype(jnp.int32))
