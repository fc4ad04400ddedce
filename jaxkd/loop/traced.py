"""What a traced function does: its equations, those apart that nothing depends on."""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Calls of a function, which stand for what is called: a derivative of its own is not taken of it any more.
CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
    "remat",
    "remat2",
)


def live_equations(jaxpr: Jaxpr) -> list[Any]:
    """The equations that the results depend on, in order."""
    live, wanted = [], {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            live.append(equation)
            wanted |= {x for x in equation.invars if not isinstance(x, Literal)}
    return live[::-1]


def called(equation: Any) -> ClosedJaxpr:
    """The function of one of the `CALLS`."""
    inner = next(equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params)
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
