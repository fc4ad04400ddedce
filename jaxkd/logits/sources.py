"""Where logits come from: a head that is multiplied a chunk of rows at a time, or values that already exist.

A source is a pytree. One of its arrays has a row for each token position (``ROWS``); the others serve all rows, and
``DIMS`` says which axes of a flat source's arrays are rows and which the vocabulary, for more than one device. The loop
over chunks takes a chunk of rows from it, asks for their logits, and hands the gradient of the logits back.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.logits.array_ops import ShownBriefly, dot, logits_dtype, power_of_two_into_range, take_rows, unwrapped
from jaxkd.logits.low_rank import low_rank_product, low_rank_pullback

Gradients: TypeAlias = dict[str, Any]  # by the name of the source's field: an array, or a tuple of them as there


class _ArrayFields(ShownBriefly):
    """What the dataclasses of sources share: they hold arrays, and show their shapes."""

    def __post_init__(self) -> None:
        # What is no array wrapped in an object stays: JAX puts all kinds of leaves into a pytree.
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            is_plain = type(value) in (tuple, list)
            array = type(value)(map(unwrapped, value)) if is_plain else unwrapped(value)
            object.__setattr__(self, field.name, array)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class LinearLogits(_ArrayFields):
    """Logits ``z = softcap * tanh(scale * (hidden @ weight.T + (hidden @ A) @ B + bias) / softcap)``, not formed yet.

    Args:
      hidden: (..., D) float32, bfloat16, float16 or float64: a model's last hidden states.
      weight: (V, D): the head, in any of these types; the product runs in the type of ``hidden`` and accumulates in
        float32 (float64 for float64). A Flax ``Linear.kernel`` is (D, V): pass ``kernel.T``.
      bias: (V,) or None.
      low_rank: an adapter (LoRA) of the head, A (D, r) and B (r, V), in any of these types, or None. While ``weight``
        is not differentiated, nothing of its size is formed for their gradients.
      scale: a scalar that multiplies the logits (Cohere's ``logit_scale``), or None.
      softcap: a positive scalar that bounds them (Gemma 2's ``final_logit_softcapping``), or None.

    Each may be an object that wraps an array, as an ``nnx.Param`` does. As the student every one of them can be
    differentiated; ``scale`` and ``softcap`` may be traced.
    """

    ROWS: ClassVar[str] = "hidden"
    DIMS: ClassVar[dict[str, Any]] = {
        "hidden": ("rows", None),
        "weight": ("vocabulary", None),
        "bias": ("vocabulary",),
        "low_rank": ((None, None), (None, "vocabulary")),
    }
    IN_BUCKETS: ClassVar[bool] = False

    hidden: Any
    weight: Any
    bias: Any = None
    _: KW_ONLY
    low_rank: Any = None
    scale: Any = None
    softcap: Any = None

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.hidden.shape[:-1]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the logits: never below float32."""
        return logits_dtype(self.hidden)

    @property
    def gradient_dtype(self) -> jnp.dtype:
        """The narrowest type in which `pullback` can take the gradient of the logits without loss."""
        # float16 is scaled into range first, and a function of the product has to be differentiated before rounding.
        exact = self.hidden.dtype == jnp.float16 or not self.is_linear
        return self.dtype if exact else self.hidden.dtype

    @property
    def is_linear(self) -> bool:
        """Whether `product_pullback` is all of the pullback, which then needs no logits."""
        return all(x is None for x in (self.bias, self.scale, self.softcap))

    def flat(self) -> "LinearLogits":
        """The same with hidden states of shape (N, D)."""
        return replace(self, hidden=jnp.reshape(self.hidden, (-1, self.hidden.shape[-1])))

    def prepared(self) -> "LinearLogits":
        """The same with the head in the type of its product: done once, not a chunk."""
        weight, low_rank = jax.tree.map(lambda x: x.astype(self.hidden.dtype), (self.weight, self.low_rank))
        return replace(self, weight=weight, low_rank=low_rank)

    def take(self, index: Int[Array, " C"]) -> "LinearLogits":
        """The rows ``index`` of a flat source; an index beyond the last row gives a row of zeros."""
        return replace(self, hidden=take_rows(self.hidden, index))

    def compared(self, dtype: jnp.dtype) -> Float[Array, "C V"]:
        """As the teacher: what the student's logits are compared with."""
        return self.logits().astype(dtype)

    def logits(self) -> Float[Array, "C V"]:
        return self._transform(self._product(), self.bias, self.scale, self.softcap)

    def logits_and_pullback(self) -> tuple[Float[Array, "C V"], Callable[..., Gradients]]:
        """The logits, and a function from their gradient and a set of field names to the gradients of these fields.

        Gradients are float32 (float64 for float64), unrounded sums over the rows of the chunk.
        """
        product = self._product()
        if self.is_linear:
            return product, self.product_pullback

        def pullback(dlogits: Float[Array, "C V"], wanted: frozenset[str]) -> Gradients:
            _, transform_pullback = jax.vjp(self._transform, product, self.bias, self.scale, self.softcap)
            dproduct, *rest = transform_pullback(dlogits)
            gradients = dict(zip(("bias", "scale", "softcap"), rest, strict=True))
            gradients = {k: v.astype(self.dtype) for k, v in gradients.items() if k in wanted}
            return gradients | self.product_pullback(dproduct, wanted)

        return self._transform(product, self.bias, self.scale, self.softcap), pullback

    def _product(self) -> Float[Array, "C V"]:
        product = dot(self.hidden, self.weight, (1, 1), self.dtype)
        if self.low_rank is None:
            return product
        a, b = self.low_rank
        return product + low_rank_product(self.hidden, a, b, self.dtype)

    def _transform(self, product, bias, scale, softcap) -> Float[Array, "C V"]:
        z = product
        if bias is not None:
            z = z + bias.astype(self.dtype)
        if scale is not None:
            z = z * jnp.asarray(scale, self.dtype)
        if softcap is not None:
            softcap = jnp.asarray(softcap, self.dtype)
            z = softcap * jnp.tanh(z / softcap)
        return z

    def product_pullback(self, dproduct: Float[Array, "C V"], wanted: frozenset[str]) -> Gradients:
        """All products run in the type of the hidden states, with the logits' gradient rounded to it."""
        scale = power_of_two_into_range(dproduct) if self.hidden.dtype == jnp.float16 else None
        d = dproduct if scale is None else dproduct * scale
        d = d.astype(self.hidden.dtype)

        gradients = {}
        if "hidden" in wanted:
            gradients["hidden"] = dot(d, self.weight, (1, 0), self.dtype)  # (C, D)
        if "weight" in wanted:
            gradients["weight"] = dot(d, self.hidden, (0, 0), self.dtype)  # (V, D)
        if self.low_rank is not None and wanted & {"hidden", "low_rank"}:
            a, b = self.low_rank
            dhidden, *dlow_rank = low_rank_pullback(self.hidden, a, b, d, self.dtype)
            if "hidden" in wanted:
                gradients["hidden"] += dhidden
            if "low_rank" in wanted:
                gradients["low_rank"] = jax.tree.unflatten(jax.tree.structure(self.low_rank), dlow_rank)
        return gradients if scale is None else jax.tree.map(lambda x: x / scale, gradients)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Logits(_ArrayFields):
    """Logits that already exist, of shape (..., V): from a model that cannot hand over its head, or from a file.

    ``values`` may be an object that wraps an array, as an ``nnx.Variable`` does.
    """

    ROWS: ClassVar[str] = "values"
    DIMS: ClassVar[dict[str, Any]] = {"values": ("rows", "vocabulary")}
    IN_BUCKETS: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False  # there is no product

    values: Any

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.values.shape[:-1]

    @property
    def vocabulary(self) -> int:
        return self.values.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        return logits_dtype(self.values)

    @property
    def gradient_dtype(self) -> jnp.dtype:
        return self.dtype

    def flat(self) -> "Logits":
        return Logits(jnp.reshape(self.values, (-1, self.vocabulary)))

    def prepared(self) -> "Logits":
        return self

    def take(self, index: Int[Array, " C"]) -> "Logits":
        return Logits(take_rows(self.values, index))

    def compared(self, dtype: jnp.dtype) -> Float[Array, "C V"]:
        return self.values.astype(dtype)

    def logits(self) -> Float[Array, "C V"]:
        return self.values.astype(self.dtype)

    def logits_and_pullback(self) -> tuple[Float[Array, "C V"], Callable[..., Gradients]]:
        return self.logits(), lambda dlogits, wanted: {"values": dlogits} if "values" in wanted else {}


Source: TypeAlias = LinearLogits | Logits
