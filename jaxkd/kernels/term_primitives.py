"""Which terms of a divergence the GPU kernels can have: what is tested to be lowered, by primitive.

A term and its slope are traced as the kernel evaluates them, and each operation is looked up in the kernel's table.
Elsewhere `reference` computes any term.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr

from jaxkd.divergences import Divergence
from jaxkd.kernels.kernel_math import base_2_term_and_slope_of, outer_and_slope_of, term_and_slope_of
from jaxkd.loop.traced import CALLS, called

# fmt: off
BOTH = frozenset({
    "abs", "add", "and", "atan2", "broadcast_in_dim", "clamp", "convert_element_type", "convert_element_type bfloat16",
    "convert_element_type float16", "convert_element_type int32", "cos", "div", "eq", "exp", "exp2", "ge", "gt", "le",
    "log", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or", "rsqrt",
    "select_n", "sign", "sin", "sqrt", "square", "sub", "tanh", "xor",
})
TABLES = {
    "triton": BOTH | {
        "acos", "acosh", "asin", "asinh", "atan", "atanh", "bitcast_convert_type int32", "cbrt", "ceil", "cosh",
        "erf_inv", "floor", "is_finite", "pow", "rem", "shift_right_arithmetic int32", "sinh", "tan",
    },
    "mosaic": BOTH | {"and uint32", "bitcast_convert_type uint32", "erf", "round"},
}
# fmt: on
FORMS = {"triton": term_and_slope_of, "mosaic": base_2_term_and_slope_of}
BLOCK = 8  # any: a term is elementwise


def lacking(implementation: str, divergence: Divergence) -> tuple[str, ...]:
    """The operations of a divergence that an implementation is not known to have."""
    static = replace(divergence, parameters=())
    return _lacking(implementation, static, len(divergence.parameters))


@lru_cache(maxsize=256)
def _lacking(implementation: str, divergence: Divergence, num_parameters: int) -> tuple[str, ...]:
    found = set(operations(FORMS[implementation](divergence), num_parameters))
    found |= set(operations(outer_and_slope_of(divergence), num_parameters, num_arrays=1))
    return tuple(sorted(found - TABLES[implementation]))


def operations(term_and_slope: Callable[..., Any], num_parameters: int = 0, num_arrays: int = 2) -> Iterator[str]:
    """Each operation with what the name of its primitive leaves out: types other than float32 and bool, shapes that are
    neither a scalar nor the block, more than two cases."""
    block, number = jax.ShapeDtypeStruct((BLOCK,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    with jax.enable_x64(False):
        closed = jax.make_jaxpr(term_and_slope)(*[block] * num_arrays, *[number] * num_parameters)
    yield from (f"array of shape {jnp.shape(x)}" for x in closed.consts if jnp.ndim(x))
    yield from _operations(closed.jaxpr)


def _operations(jaxpr: Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in CALLS:
            yield from _operations(called(equation).jaxpr)
            continue
        avals = [x.aval for x in (*equation.invars, *equation.outvars)]
        types = sorted({str(getattr(x, "dtype", x)) for x in avals} - {"float32", "bool"})
        shapes = sorted({str(getattr(x, "shape", "")) for x in avals} - {"", "()", f"({BLOCK},)"})
        cases = [f"of {len(equation.invars) - 1}"] if name == "select_n" and len(equation.invars) > 3 else []
        yield " ".join([name, *cases, *types, *shapes])
