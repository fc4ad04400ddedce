"""The arithmetic that the GPU kernels share: log-probabilities, and the term of a divergence as a kernel evaluates it.

In a term `expm1` and `log1p` are replaced: Mosaic GPU has neither, and libdevice's cost more than the rest of a term.
The ones here are a polynomial near 0, where they have to be exact relative to their result, and `exp` and `log`
elsewhere: relative errors below 1e-6. Replaced are also a few primitives that a kernel's compiler lacks and that are
others' in other words; what it lacks after that, `term_primitives` knows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxkd.divergences import Divergence
from jaxkd.divergences.declaration import zero_where_closed
from jaxkd.divergences.sums_over_tokens import LN2
from jaxkd.loop.traced import CALLS, called, live_equations

LOG2E = 1 / LN2
LOWEST = -1e38  # below every logit, yet finite, so that -inf minus it is -inf and not NaN

NEAR = 0.25  # where the polynomials hold
# Chebyshev fits there of expm1(x) / x and log1p(x) / x, from the constant up: 9e-8 and 1.4e-7 off at most.
EXPM1 = (1.0, 0.499998302, 0.16666623, 0.0417753009, 0.00835195337)
LOG1P = (0.999999985, -0.500003684, 0.333340907, -0.249533512, 0.199401399, -0.18127313, 0.157813577)


def expm1(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < NEAR, x * polynomial(x, EXPM1), jnp.exp(x) - 1)


def log1p(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < NEAR, x * polynomial(x, LOG1P), jnp.log(1 + x))


def polynomial(x: jax.Array, coefficients: Sequence[Any]) -> jax.Array:
    """Of coefficients from the constant up."""
    return reduce(lambda value, c: value * x + c, coefficients[-2::-1], coefficients[-1])


def integer_pow(x: jax.Array, y: int) -> jax.Array:
    """By squaring; Mosaic GPU has no negative powers."""
    if y < 0:
        return 1 / integer_pow(x, -y)
    if y < 2:
        return x if y else jnp.ones_like(x)
    half = integer_pow(x, y // 2)
    return half * half * x if y % 2 else half * half


# By primitive; each is given the primitive's operands and parameters.
REPLACEMENTS: dict[str, Callable[..., jax.Array]] = {
    "expm1": lambda x, **_: expm1(x),
    "log1p": lambda x, **_: log1p(x),
    "add_any": lambda x, y: jnp.add(x, y),  # how derivatives add
    "integer_pow": lambda x, *, y: integer_pow(x, y),
    "polynomial": lambda x, *coefficients, **_: jnp.broadcast_to(polynomial(x, coefficients), x.shape),
}
# What gives its operands back.
IDENTITIES = ("copy", "copy_p", "stop_gradient", "optimization_barrier")


def kernel_term_and_slope(divergence: Divergence, log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`Divergence.term_and_slope` of float32 with the arithmetic of the kernels, outside of them."""
    parameters = (jnp.asarray(x, jnp.float32) for x in divergence.parameters)
    return base_2_term_and_slope_of(divergence)(log_p * LOG2E, log_q * LOG2E, *parameters)


def with_kernel_math(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the primitives above replaced, in its derivatives too, and nothing computed twice."""

    def replaced(*arguments: jax.Array) -> Any:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*map(jax.typeof, arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluate_without_repetition(jaxpr, {}, *arguments))

    return replaced


def term_and_slope_of(divergence: Divergence) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A function of ``(log_p, log_q, *parameters)`` for a kernel, which has the parameters as scalars of its own."""
    return with_kernel_math(lambda p, q, *parameters: replace(divergence, parameters=parameters).term_and_slope(p, q))


def outer_and_slope_of(divergence: Divergence) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A function of ``(total, *parameters)``: the divergence of rows whose terms have this sum, and its derivative."""

    def outer_and_slope(total: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = replace(divergence, parameters=parameters)
        return own.of_total(total), own.outer_slope(total)

    return with_kernel_math(outer_and_slope)


def base_2_term_and_slope_of(divergence: Divergence) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The same of logarithms to the base 2, by the divergence's form for kernels where it has one.

    Both are 0 where both logarithms are -inf, which is what fills a row up to whole blocks.
    """
    form = divergence.kernel_form
    if form is None:
        term_and_slope = term_and_slope_of(divergence)
        return lambda p, q, *parameters: term_and_slope(p * LN2, q * LN2, *parameters)

    def term_and_slope_of_form(p: jax.Array, q: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(zero_where_closed(form, p, q, x) for x in form(p, q, *parameters))

    return with_kernel_math(term_and_slope_of_form)


def _evaluate_without_repetition(closed: ClosedJaxpr, known: dict[Any, Any], *arguments: Any) -> list[Any]:
    """An interpreter of jaxprs with common-subexpression elimination: a term and its slope share most operations.

    ``known`` has the operations done so far, by primitive, parameters and identity of the inputs. Calls are inlined:
    what they share is seen, and no kernel has a rule for a derivative that is somebody's own. An accuracy that is asked
    of an operation is not handed on: a kernel has one.
    """
    environment = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    environment |= dict(zip(closed.jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else environment[variable]

    for equation in live_equations(closed.jaxpr):
        inputs = [read(variable) for variable in equation.invars]
        name = equation.primitive.name
        if name in CALLS:
            outputs = _evaluate_without_repetition(called(equation), known, *inputs)
        elif name in IDENTITIES:
            outputs = inputs
        else:
            parameters = {key: None if key == "accuracy" else x for key, x in equation.params.items()}
            same = (name, str(parameters), *(x if np.isscalar(x) else id(x) for x in inputs))
            if same not in known:
                operation = REPLACEMENTS.get(name, equation.primitive.bind)
                # The inputs are kept, so that no other gets their id.
                known[same] = inputs, operation(*inputs, **parameters)
            result = known[same][1]
            outputs = result if equation.primitive.multiple_results else [result]
        environment |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in closed.jaxpr.outvars]
