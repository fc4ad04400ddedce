"""How a divergence is declared: by the term that is summed over tokens, or by a function of whole rows of logits.

A divergence is a sum over the vocabulary, ``D = sum_v term(log p_v, log q_v)``, of the teacher's log-probabilities
``log p`` and the student's ``log q``. The loss of a row, its gradient (by `jax.jvp` of the term) and the GPU kernel all
follow from the term, so a new divergence is one function:

    def chi_squared_term(log_p, log_q):
        return weigh(jnp.exp(log_q), jnp.expm1(log_p - log_q) ** 2)

    chi_squared = jaxkd.Divergence(chi_squared_term)

Log-probabilities reach -inf (a masked token) and -200 (a token whose probability underflows): `weigh` makes zero
probability times an infinite logarithm the zero that it is in the limit, and a term at (-inf, -inf) must be 0.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from jaxkd.logits.array_ops import ShownBriefly, described, is_own

Pointwise = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Divergence(ShownBriefly):
    """A divergence of two distributions, as a pointwise term of their log-probabilities: outer(sum_v term).

    Args:
      term: ``term(log_p, log_q, *parameters)``, elementwise in the teacher's ``log_p`` and the student's ``log_q``,
        which is checked. It is traced inside the GPU kernels too; what one of them lacks is refused by name, or runs in
        XLA where none was named. Where both logarithms are -inf it is taken as 0. Define it at module level: it is part
        of what `jax.jit` caches on.
      parameters: scalars handed to ``term``. They may be traced, so that a schedule drives them without recompiling.
      slope: ``d term / d log_q``, with the signature of ``term``, where a closed form is faster or safer than the one
        that `jax.jvp` derives.
      kernel_form: ``(log2_p, log2_q, *parameters) -> (term, slope)`` from logarithms to the base 2, where there is a
        form with less arithmetic, or whose sum over a row is the more exact. Its errors may be those of float32 logits,
        not relative to its results: it is for the kernels, and not for float64.
      slope_sum: the sum of the slopes over a row, where it is the same for all distributions.
      outer: ``outer(total, *parameters)``, a function of the sum of the terms, elementwise in rows; None is the sum.
      is_nonnegative: whether the divergence is at least 0 for all distributions. Rounding that takes it below is then
        cut off; otherwise a row's loss is what the formula gives, of either sign.

    Called with log-probabilities of shape (..., V) it returns the divergence of each row, shape (...).
    """

    vocabulary: ClassVar[str] = "common"

    term: Pointwise = field(metadata={"static": True})
    parameters: tuple[Any, ...] = ()
    slope: Pointwise | None = field(default=None, metadata={"static": True})
    kernel_form: Callable[..., tuple[jax.Array, jax.Array]] | None = field(default=None, metadata={"static": True})
    slope_sum: float | None = field(default=None, metadata={"static": True})
    is_nonnegative: bool = field(default=False, metadata={"static": True})
    outer: Callable[..., jax.Array] | None = field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        return _own_spelling(self.term, self.parameters) or super().__repr__()

    def of_total(self, total: jax.Array) -> jax.Array:
        """The divergence of rows whose terms have this sum."""
        value = total if self.outer is None else self.outer(total, *self.parameters)
        return jnp.maximum(value, 0) if self.is_nonnegative else value  # only rounding takes it below

    def outer_slope(self, total: jax.Array) -> jax.Array:
        """The derivative of ``outer``."""
        if self.outer is None:
            return jnp.ones_like(total)
        outer = self.outer
        return jax.jvp(lambda x: outer(x, *self.parameters), (total,), (jnp.ones_like(total),))[1]

    def terms(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """The term, elementwise: 0 for a token that neither side has."""
        return zero_where_closed(self.term, log_p, log_q, self.term(log_p, log_q, *self.parameters))

    def term_and_slope(self, log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The term and its derivative with respect to ``log_q``, elementwise."""
        if self.slope is not None:
            term, slope = self.term(log_p, log_q, *self.parameters), self.slope(log_p, log_q, *self.parameters)
        else:
            term, slope = jax.jvp(lambda x: self.term(log_p, x, *self.parameters), (log_q,), (jnp.ones_like(log_q),))
        return zero_where_closed(self.term, log_p, log_q, term), zero_where_closed(self.term, log_p, log_q, slope)

    def __call__(self, log_p: jax.Array | None = None, log_q: jax.Array | None = None) -> jax.Array:
        if log_p is None or log_q is None:
            raise TypeError(_not_to_be_called(self, "(log_p, log_q)"))
        total = jnp.sum(self.terms(log_p, log_q), axis=-1)
        return total if self.outer is None else self.outer(total, *self.parameters)


def zero_where_closed(form: Callable[..., Any], log_p: jax.Array, log_q: jax.Array, x: jax.Array) -> jax.Array:
    """``x``, and 0 where both sides are -inf, which `jaxkd`'s own forms are there by themselves."""
    if is_own(form):
        return x
    return jnp.where(jnp.maximum(log_p, log_q) == -jnp.inf, 0, x)


def weigh(probability: jax.Array, x: jax.Array) -> jax.Array:
    """``probability * x``, and 0 where the probability is 0 even if ``x`` is infinite or NaN."""
    return jnp.where(probability == 0, 0, probability * x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class RowDivergence(ShownBriefly):
    """A soft loss of a row as a function of both models' logits.

    Args:
      function: ``function(teacher, student, *parameters)`` of logits at the temperature, (C, Vt) and (C, V) in float32
        (float64 for float64), to (C,). A row's number depends on that row alone. Define it at module level: it is part
        of what `jax.jit` compiles.
      parameters: arrays handed to ``function``, traced or not, in the type of the logits. They get no gradient.
      vocabulary: "common" if it compares token with token (both sides then have one width, by the ``vocabulary`` of
        `distillation_loss`), "own" if each side may keep all of its own.
      is_nonnegative: whether it is at least 0 for all logits. Rounding that takes it below is then cut off.
    """

    function: Callable[..., jax.Array] = field(metadata={"static": True})
    parameters: tuple[Any, ...] = ()
    vocabulary: str = field(default="common", metadata={"static": True})
    is_nonnegative: bool = field(default=False, metadata={"static": True})

    def __repr__(self) -> str:
        return _own_spelling(self.function, self.parameters) or super().__repr__()

    def __call__(self, teacher: jax.Array | None = None, student: jax.Array | None = None) -> jax.Array:
        if teacher is None or student is None:
            raise TypeError(_not_to_be_called(self, "(teacher, student), the logits of both"))
        return self.function(teacher, student, *self.parameters)


AnyDivergence: TypeAlias = Divergence | RowDivergence


def check_divergence(divergence: Any) -> None:
    """Raises an error for what is none, with what was probably meant."""
    if isinstance(divergence, Divergence | RowDivergence):
        return
    if isinstance(divergence, str):
        meant = " or ".join(_meant_by(divergence))
        raise TypeError(f"`divergence` is the string {divergence!r}; give the object itself: {meant}")
    if _makes_divergence(divergence):
        raise TypeError(
            f"`divergence` is a function that makes one; call it: {_spelled(divergence.__name__, divergence)}"
        )
    if inspect.isfunction(divergence):
        name = divergence.__name__
        raise TypeError(
            f"`divergence` is the function {name}; give jaxkd.Divergence({name}) if it is a term of (log_p, log_q), "
            f"jaxkd.RowDivergence({name}) if it takes the teacher's and the student's rows of logits"
        )
    raise TypeError(f"`divergence` is {divergence!r}; give a jaxkd.Divergence such as jaxkd.jensen_shannon(0.5)")


def _meant_by(text: str) -> list[str]:
    """The divergences whose names have the text in them, or begin with its letters, or are close to it; else all."""
    known, key = _by_name(), text.lower().replace("-", "_").replace(" ", "_")
    stem = key.removesuffix("d")  # of "kld", "jsd" and "tvd" the last letter stands for divergence or distance
    initials = {name: "".join(word[0] for word in name.split("_")) for name in known}
    names = [key] if key in known else [name for name in known if stem in name or stem == initials[name]]
    for cutoff in (0.7, 0.4):
        names = names or difflib.get_close_matches(key, known, cutoff=cutoff)
    return [_spelled(name, known[name]) for name in names or sorted(known)]


def _by_name() -> dict[str, Any]:
    """All divergences there are under their public names, and the functions that make them."""
    public = vars(sys.modules[__package__])
    return {name: x for name, x in public.items() if isinstance(x, Divergence | RowDivergence) or _makes_divergence(x)}


def _makes_divergence(x: Any) -> bool:
    result = x.__annotations__.get("return") if inspect.isfunction(x) else None
    return getattr(result, "__name__", result) in ("Divergence", "RowDivergence")  # a string where it is not evaluated


def _spelled(name: str, divergence: Any) -> str:
    """How it is handed over."""
    if not _makes_divergence(divergence):
        return f"jaxkd.{name}"
    parameters = inspect.signature(divergence).parameters.values()
    given = [x.name if x.default is x.empty else f"{x.name}={x.default!r}" for x in parameters]
    module = "jaxkd." if _by_name().get(name) is divergence else ""
    return f"{module}{name}({', '.join(given)})"


def _own_spelling(function: Any, parameters: tuple[Any, ...]) -> str | None:
    """For a `repr`: how one of jaxkd's own is written, found by the name of its term; None for another."""
    name = getattr(function, "__name__", "").strip("_").removesuffix("_term")
    found = _by_name().get(name) if is_own(function) else None
    if found is None or not _makes_divergence(found):
        return None if found is None else name
    given = zip(inspect.signature(found).parameters, parameters, strict=False)
    return f"{name}({', '.join(f'{key}={described(x)}' for key, x in given)})"


def _not_to_be_called(divergence: AnyDivergence, arguments: str) -> str:
    name = next((f"jaxkd.{name}" for name, x in _by_name().items() if x is divergence), "this")
    return (
        f"{name} is a divergence and not a function that makes one: give it as it is, `divergence=...`, without "
        f"brackets; what it is called with is {arguments}"
    )
