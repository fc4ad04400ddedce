"""Looking into what is traced: every equation, at any depth."""

import math


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it: loops, branches, calls, kernels."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def products(jaxpr):
    return [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]


def shapes(jaxpr):
    """The shapes of all values that are computed."""
    return {tuple(v.aval.shape) for equation in equations(jaxpr) for v in equation.outvars if hasattr(v.aval, "shape")}


def most_rows(jaxpr, width, heads):
    """How many rows of the vocabulary's ``width`` the largest value holds that has not the shape of a head."""
    rows = [math.prod(shape) // width for shape in shapes(jaxpr) if width in shape and shape not in heads]
    return max(rows, default=0)
