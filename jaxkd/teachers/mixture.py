"""Several teachers at once: their distributions mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.divergences import AnyDivergence
from jaxkd.logits import Source, take_rows
from jaxkd.logits.array_ops import ShownBriefly
from jaxkd.loop.checks import check_same_rows, known_value
from jaxkd.teachers.mixed_top_k import MixedTopK
from jaxkd.teachers.several import check_is_list, check_sources_alike
from jaxkd.teachers.top_k import TopKLogProbs


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Mixture(ShownBriefly):
    """Several teachers for `distillation_loss`: p = sum_i w_i softmax(z_i / temperature) / sum_i w_i.

    Probabilities are mixed, not logits: where one teacher is sure and another is not, the mixture doubts between them.
    The teachers' logits are formed a chunk at a time, one teacher after the other. What goes on to the loss is
    temperature * log p as one teacher's logits, so every divergence and implementation takes it, and it is the mixture
    that is cut to a narrower student's vocabulary.

    Of `TopKLogProbs` it is compared by buckets as one of them is: each token that some teacher lists, and the rest.
    With p_i,v of the tokens that teacher i lists, and r_i what it leaves,

        p_v = sum_i w_i p_i,v over the teachers that list v        p_rest = sum_i w_i r_i        with sum_i w_i = 1:

    what a teacher says of a token that only others list is unknown, and stays in the rest. So p_v is too small by at
    most sum_i w_i r_i over all tokens together, and exact where the lists are of the same tokens, as with
    ``TopKLogProbs.of(..., chosen_by=student)``. With ``tail="renormalize"`` each teacher is renormalised over its own
    list, and r_i is 0. In a row where a teacher has no entries, its weight goes to the others. Where every token of the
    student is listed there is no rest, and p_v is renormalised.

    Args:
      teachers: `LinearLogits` or `Logits` with the student's rows and one vocabulary; hidden sizes of their own. Or
        `TopKLogProbs` all, of one ``tail``; `TopKLogProbs.of` makes one of another source. No gradient ever reaches
        them.
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
    def IN_BUCKETS(self) -> bool:
        return isinstance(self.teachers, list | tuple) and any(isinstance(x, TopKLogProbs) for x in self.teachers)

    @property
    def ROWS(self) -> str:
        return f"teachers[0].{self.teachers[0].ROWS}"

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return self.teachers[0].leading_shape

    def check(self, name: str, student: Source, divergence: AnyDivergence, temperature: Any) -> None:
        """Raises an error for teachers that do not fit one another and weights that do not fit them."""
        if self.IN_BUCKETS:
            self._check_top_k(f"{name}.teachers", student, divergence, temperature)
        else:
            check_sources_alike(f"{name}.teachers", self.teachers)
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

    def _check_top_k(self, name: str, student: Source, divergence: AnyDivergence, temperature: Any) -> None:
        check_is_list(name, self.teachers)
        for i, teacher in enumerate(self.teachers):
            own = f"{name}[{i}]"
            if not isinstance(teacher, TopKLogProbs):
                raise TypeError(
                    f"`{own}` is a {type(teacher).__name__} beside a TopKLogProbs; give one kind of teacher, "
                    "jaxkd.TopKLogProbs.of(teacher, k) of a source"
                )
            teacher.check(own, student, divergence, temperature)
            check_same_rows(self.teachers[0], teacher, (f"{name}[0].{self.teachers[0].ROWS}", f"{own}.{teacher.ROWS}"))
            if teacher.tail != self.teachers[0].tail:
                raise ValueError(
                    f"`{own}.tail` is {teacher.tail!r} but `{name}[0].tail` is {self.teachers[0].tail!r}; give all one"
                )

    def at(self, temperature: Any) -> "MixtureLogits | MixedTopK":
        """The mixture at the temperature of a loss."""
        weights = jnp.ones(len(self.teachers)) if self.weights is None else jnp.asarray(self.weights)
        weights = jnp.broadcast_to(weights, (*self.leading_shape, len(self.teachers)))
        teachers = jax.lax.stop_gradient(tuple(self.teachers))
        return MixedTopK(teachers, weights) if self.IN_BUCKETS else MixtureLogits(teachers, weights, temperature)


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
