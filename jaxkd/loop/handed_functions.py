"""What a function that a user hands over must satisfy, found by tracing it on shapes alone, before any work.

A function of rows gives one number for each, which depends on no other row; a term is elementwise. Both are traced a
second time on sizes that no other axis has: there an axis of that size is the rows', and a sum, a sort or a shift along
it is seen. What mixes rows in other ways (by an index, say) is not.
"""

from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxkd.loop.traced import live_equations

SIZES = (211, 223, 227, 229, 233, 239, 241, 251)  # primes, of which those are taken that no argument has


def check_row_function(
    name: str, function: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]], num_rows: int
) -> tuple[str, ...]:
    """The names of the metrics of a function that returns (C,), or (C,) and a dict of metrics (C,).

    Args:
      name: what the caller calls the function.
      arguments: the shapes of its arguments for a number of rows.
      num_rows: of a chunk.

    Raises:
      TypeError, ValueError: what it returns, or that a row's number depends on other rows.
    """
    metrics = _check_result(name, jax.eval_shape(function, *arguments(num_rows)), num_rows)
    rows = next(x for x in SIZES if x not in _sizes(arguments(num_rows)))
    try:
        jaxpr, result = jax.make_jaxpr(function, return_shape=True)(*arguments(rows))
    except Exception as error:
        raise ValueError(
            f"`{name}` runs on {num_rows} rows and not on {rows}; it has to on any number, which is not yours to know"
        ) from error
    _check_result(name, result, rows)
    if mixing := mixes(jaxpr, rows):
        raise ValueError(
            f"`{name}` has {mixing} along the axis of rows; a row's number may depend on no other row: sum over axis 1 "
            "alone, and leave means over rows to `weights` and `normalizer`"
        )
    return metrics


def _check_result(name: str, result: Any, num_rows: int) -> tuple[str, ...]:
    rows, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(metrics, dict):
        raise TypeError(f"`{name}` returns {result}; give (C,), or (C,) and a dict of metrics (C,)")
    for what, x in {"the loss": rows, **metrics}.items():
        if not hasattr(x, "shape"):
            raise TypeError(f"`{name}` returns {x!r} as {what}; give an array of one number a row")
        if x.shape != (num_rows,):
            raise ValueError(f"`{name}` returns {x.shape} as {what}; give one number a row, here ({num_rows},)")
    return tuple(sorted(metrics))


def check_elementwise(
    name: str, function: Callable[..., Any], parameters: tuple[Any, ...], is_differentiated: bool, num_arrays: int = 2
) -> None:
    """Of a function of arrays of one shape, and of parameters: that it gives an array of that shape, elementwise.

    Raises:
      TypeError, ValueError: it does not; or it has to be differentiated forward and knows no such derivative.
    """
    shapes = tuple(jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.float32) for x in parameters)
    _check_elementwise(name, function, shapes, is_differentiated, num_arrays)


@lru_cache(maxsize=256)
def _check_elementwise(
    name: str, function: Callable[..., Any], parameters: tuple[Any, ...], is_differentiated: bool, num_arrays: int
) -> None:
    shape = SIZES[:2]
    arrays = (jax.ShapeDtypeStruct(shape, jax.numpy.float32),) * num_arrays
    hint = "a function of whole rows is a jaxkd.RowDivergence"
    with jax.enable_x64(False):
        jaxpr, result = jax.make_jaxpr(function, return_shape=True)(*arrays, *parameters)
    if getattr(result, "shape", None) != shape:
        got = f"an array {result.shape}" if hasattr(result, "shape") else repr(result)
        of = "log-probabilities" if num_arrays == 2 else "numbers"
        raise ValueError(f"`{name}` makes {got} of {of} {shape}; give one number for each; {hint}")
    if mixing := mixes(jaxpr, *shape):
        raise ValueError(f"`{name}` has {mixing} along an axis; it has to be elementwise; {hint}")
    if is_differentiated and any(x.primitive.name.startswith("custom_vjp_call") for x in _equations(jaxpr.jaxpr)):
        raise TypeError(
            f"`{name}` has a function with a `jax.custom_vjp`, which has no forward derivative; give the divergence's "
            "`slope` too, or that function a `jax.custom_jvp`"
        )


def mixes(closed: ClosedJaxpr, *sizes: int) -> str | None:
    """The first operation along an axis of one of ``sizes``, by name."""
    for equation in _equations(closed.jaxpr):
        if set(_mixed(equation)) & set(sizes):
            return f"a `{equation.primitive.name}`"
    return None


def _mixed(equation: Any) -> Iterator[int]:
    """The sizes of the axes along which an operation mixes what it is given."""
    name, parameters = equation.primitive.name, equation.params
    shapes = [getattr(x.aval, "shape", ()) for x in equation.invars]
    if name == "dot_general":
        ((left, _), _) = parameters["dimension_numbers"]
        yield from (shapes[0][axis] for axis in left)
    elif name == "concatenate":
        yield equation.outvars[0].aval.shape[parameters["dimension"]]
    elif name == "sort":
        yield shapes[0][parameters["dimension"]]
    elif name.startswith("cum"):
        yield shapes[0][parameters["axis"]]
    elif "axes" in parameters and name.startswith(("reduce_", "arg")):
        yield from (shapes[0][axis] for axis in parameters["axes"])


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Those that matter, of what they call too."""
    for equation in live_equations(jaxpr):
        yield equation
        for x in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))
        ):
            if isinstance(x, (ClosedJaxpr, Jaxpr)):
                yield from _equations(x.jaxpr if isinstance(x, ClosedJaxpr) else x)


def _sizes(arguments: tuple[Any, ...]) -> set[Hashable]:
    return {size for x in jax.tree.leaves(arguments) for size in jax.numpy.shape(x)}
