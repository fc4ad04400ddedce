"""Several teachers at once: their distributions mixed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.divergences import AnyDivergence
from jaxkd.logits import Source, take_rows
from jaxkd.loop.checks import check_same_rows, check_source, known_value


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixture:
    """Several teachers for `distillation_loss`: p = sum_i w_i softmax(z_i / temperature) / sum_i w_i.

    Probabilities are mixed, not logits: where one teacher is sure and another is not, the mixture doubts between them.
    The teachers' logits are formed a chunk at a time, one teacher after the other. What goes on to the loss is
    temperature * log p as one teacher's logits, so every divergence and implementation takes it, and it is the mixture
    that is cut to a narrower student's vocabulary.

    Args:
      teachers: `LinearLogits` or `Logits` with the student's rows and one vocabulary; hidden sizes of their own. No
        gradient ever reaches them.
      weights: (M,), or (..., M) for each row its own; at least 0, normalised here, and may be traced. None is the mean.
        A teacher of weight 0 in a row adds exactly nothing there, whatever it holds; a row whose weights are all 0 is
        NaN. They are constants: asking for their gradient raises an error.

    With (1/2, 1/2) and (1/4, 3/4) and weights 1 and 3, p is (5/16, 11/16), and the student has 1/2 each:

    >>> from jaxkd import Logits, distillation_loss
    >>> teachers = [Logits(jnp.log(jnp.array([[0.5, 0.5]]))), Logits(jnp.log(jnp.array([[0.25, 0.75]])))]
    >>> loss, _ = distillation_loss(Logits(jnp.zeros((1, 2))), Mixture(teachers, jnp.array([1.0, 3.0])))
    >>> print(f"{loss:.4f}")  # 5/16 log(5/8) + 11/16 log(11/8)
    0.0721
    """

    teachers: Sequence[Any]
    weights: ArrayLike | None = None

    @property
    def ROWS(self) -> str:
        return f"teachers[0].{self.teachers[0].ROWS}"

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.teachers[0].leading_shape

    @property
    def vocabulary(self) -> int:
        return self.teachers[0].vocabulary

    def check(self, name: str, student: Source, divergence: AnyDivergence, temperature: Any) -> None:
        """Raises an error for teachers that do not fit one another and weights that do not fit them."""
        if not isinstance(self.teachers, list | tuple):
            kind = type(self.teachers).__name__
            raise TypeError(f"`{name}.teachers` is a {kind}; give a list of LinearLogits or Logits")
        if not self.teachers:
            raise ValueError(f"`{name}.teachers` is empty; give one LinearLogits or Logits at least")
        for i, teacher in enumerate(self.teachers):
            own = f"{name}.teachers[{i}]"
            check_source(teacher, f"{own}.")
            check_same_rows(self.teachers[0], teacher, (f"{name}.{self.ROWS}", f"{own}.{teacher.ROWS}"))
            if teacher.vocabulary != self.vocabulary:
                raise ValueError(
                    f"`{own}` has V={teacher.vocabulary} but `{name}.teachers[0]` has V={self.vocabulary}; give "
                    "teachers of one tokenizer, with heads cut to one width"
                )
        if self.weights is None:
            return
        shape, count = jnp.shape(self.weights), len(self.teachers)
        by_row = (*self.leading_shape, count)
        if shape not in ((count,), by_row):
            raise ValueError(f"`{name}.weights` has shape {shape}; give ({count},), or {by_row} for each row its own")
        known = known_value(self.weights)
        if known is not None and (known < 0).any():
            raise ValueError(f"`{name}.weights` has a negative value ({known.min():g}); weights are at least 0")
        if known is not None and not known.sum():
            raise ValueError(f"`{name}.weights` are all 0; give one teacher some weight")

    def at(self, temperature: Any) -> "MixtureLogits":
        """The mixture at the temperature of a loss."""
        weights = jnp.ones(len(self.teachers)) if self.weights is None else jnp.asarray(self.weights)
        weights = jnp.broadcast_to(weights, (*self.leading_shape, len(self.teachers)))
        return MixtureLogits(jax.lax.stop_gradient(tuple(self.teachers)), weights, temperature)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixtureLogits:
    """``temperature * log p`` of a `Mixture`: what any other teacher's logits are to the loop."""

    ROWS: ClassVar[str] = "weights"
    DIMS: ClassVar = {"weights": ("rows", None)}
    IN_BUCKETS: ClassVar[bool] = False

    teachers: tuple[Any, ...]
    weights: Any  # (..., M)
    temperature: Any

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.weights.shape[:-1]

    @property
    def vocabulary(self) -> int:
        return self.teachers[0].vocabulary

    def flat(self) -> "MixtureLogits":
        weights = jnp.reshape(self.weights, (-1, len(self.teachers)))
        return replace(self, teachers=tuple(x.flat() for x in self.teachers), weights=weights)

    def prepared(self) -> "MixtureLogits":
        return replace(self, teachers=tuple(x.prepared() for x in self.teachers))

    def take(self, index: Int[Array, " C"]) -> "MixtureLogits":
        teachers = tuple(x.take(index) for x in self.teachers)
        return replace(self, teachers=teachers, weights=take_rows(self.weights, index))

    def compared(self, dtype: jnp.dtype) -> Float[Array, "C V"]:
        return self.logits().astype(dtype)

    def logits(self) -> Float[Array, "C V"]:
        dtype = jnp.result_type(*(teacher.dtype for teacher in self.teachers))
        weights = self.weights.astype(dtype)
        log_weights = jnp.log(weights) - jnp.log(jnp.sum(weights, axis=1, keepdims=True))
        temperature = jnp.asarray(self.temperature, dtype)
        log_p = jnp.asarray(-jnp.inf, dtype)
        for i, teacher in enumerate(self.teachers):
            own = jax.nn.log_softmax(teacher.logits().astype(dtype) / temperature)
            weight = log_weights[:, i : i + 1]
            log_p = jnp.logaddexp(log_p, jnp.where(weight == -jnp.inf, -jnp.inf, weight + own))
        return temperature * log_p
