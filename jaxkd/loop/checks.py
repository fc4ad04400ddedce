"""What a call must satisfy, checked on shapes, types and the values known at tracing, before any work."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.logits.array_ops import check_floating as check_floating
from jaxkd.logits.sources import LinearLogits, Logits, Source


def check_source(source: Any, prefix: str) -> None:
    """Ranks, shapes and types of a source; ``prefix`` is what its fields are called in the caller's words."""
    if isinstance(source, LinearLogits):
        _check_linear(source, prefix)
    elif isinstance(source, Logits):
        check_floating(f"{prefix}values", source.values)
        if source.values.ndim < 1:
            raise ValueError(f"`{prefix}values` is a scalar; give logits of shape (..., V)")
    else:
        name = prefix.rstrip("._")
        is_array = isinstance(source, (jax.Array, np.ndarray))
        kind = "an array" if is_array else f"a {type(source).__name__}"
        raise TypeError(
            f"`{name}` is {kind}; give a jaxkd.LinearLogits of hidden states and head, or a jaxkd.Logits of logits"
            + ("; jaxkd.fused_linear_jsd takes arrays as they are" if is_array else "")
        )
    if source.vocabulary < 1:
        raise ValueError(
            f"`{prefix}{'weight' if isinstance(source, LinearLogits) else 'values'}` has no vocabulary (V=0)"
        )


def _check_linear(source: LinearLogits, prefix: str) -> None:
    hidden, weight, bias = source.hidden, source.weight, source.bias
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is not None or name != "bias":
            check_floating(prefix + name, value)
    if weight.ndim != 2:
        raise ValueError(
            f"`{prefix}weight` has shape {weight.shape}; give (V, D), for a Flax kernel of (D, V) `kernel.T`"
        )
    if hidden.ndim < 1:
        raise ValueError(f"`{prefix}hidden` is a scalar; give hidden states of shape (..., D)")
    vocabulary, size = weight.shape
    if hidden.shape[-1] != size:
        hint = ""
        if hidden.shape[-1] == vocabulary and vocabulary < size:
            hint = f"; is it transposed? pass `{prefix}weight.T`"
        elif hidden.shape[-1] == vocabulary:
            hint = (
                f"; these look like logits, which are jaxkd.Logits({prefix}hidden) without a head; if they are hidden "
                f"states after all, pass `{prefix}weight.T`"
            )
        raise ValueError(
            f"`{prefix}weight` is (V={vocabulary}, D={size}) but `{prefix}hidden` has D={hidden.shape[-1]}{hint}"
        )
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(
            f"`{prefix}bias` has shape {bias.shape} but `{prefix}weight` has V={vocabulary}; give ({vocabulary},)"
        )
    if source.low_rank is not None:
        _check_low_rank(source, prefix)
    for name in ("scale", "softcap"):
        value = getattr(source, name)
        if value is not None:
            check_scalar(f"{prefix}{name}", value, above=0 if name == "softcap" else None)


def _check_low_rank(source: LinearLogits, prefix: str) -> None:
    vocabulary, size = source.weight.shape
    pair = source.low_rank
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"`{prefix}low_rank` is a {type(pair).__name__}; give (A (D, r), B (r, V))")
    for name, x in zip("AB", pair, strict=True):
        check_floating(f"{name} of {prefix}low_rank", x)
    a, b = (x.shape for x in pair)
    if len(a) != 2 or len(b) != 2 or a[0] != size or b[1] != vocabulary or a[1] != b[0] or not a[1]:
        is_turned = len(a) == len(b) == 2 and (a[1], b[0]) == (size, vocabulary)
        hint = "; are they transposed? pass (A.T, B.T)" if is_turned else ""
        raise ValueError(
            f"`{prefix}low_rank` has shapes {a} and {b} but `{prefix}weight` is (V={vocabulary}, D={size}); give "
            f"A ({size}, r) and B (r, {vocabulary}){hint}"
        )


def check_same_rows(student: Source, teacher: Any, names: tuple[str, str]) -> None:
    """Leading axes of the teacher against the student's."""
    if teacher.leading_shape != student.leading_shape:
        raise ValueError(
            f"`{names[1]}` has leading shape {teacher.leading_shape} but `{names[0]}` has {student.leading_shape}; "
            "give one row each"
        )


def check_labels(labels: Any, rows: tuple[int, ...], name: str) -> None:
    """Integers of the shape ``rows``, which is that of the argument ``name``."""
    check_token_ids("labels", labels)
    shape = jnp.shape(labels)
    if shape != rows:
        hint = "; take the last axis off, `labels[..., 0]`" if shape == (*rows, 1) else "; give one label a row"
        if rows and shape == (*rows[:-1], rows[-1] - 1):
            hint += ", as jaxkd.shift_labels(tokens) does, with -100 behind the last token"
        raise ValueError(f"`labels` has shape {shape} but `{name}` has leading shape {rows}{hint}")


def check_token_ids(name: str, x: Any) -> None:
    check_is_array(name, x)
    if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        kind = jnp.result_type(x).name
        hint = "; a mask of rows is no label: `jnp.where(mask, token_ids, ignore_index)`" if kind == "bool" else ""
        raise TypeError(f"`{name}` is {kind}; give integer token ids{hint}")


def check_is_array(name: str, x: Any) -> None:
    """Of JAX or NumPy, or a number."""
    if type(x).__module__.split(".")[0] == "torch":
        raise TypeError(f"`{name}` is a torch.{type(x).__name__}; give a JAX array, `torch_bridge` converts them")
    if not isinstance(x, (jax.Array, np.ndarray, np.generic, int, float)):
        raise TypeError(f"`{name}` is a {type(x).__name__}; give an array")


def check_weights(weights: Any, rows: tuple[int, ...], name: str) -> None:
    check_is_array("weights", weights)
    if jnp.shape(weights) != rows:
        raise ValueError(f"`weights` has shape {jnp.shape(weights)} but `{name}` has leading shape {rows}")
    known = known_value(weights)
    if known is not None and (known < 0).any():
        raise ValueError(f"`weights` has a negative value ({known.min():g}); weights are at least 0")


def check_mask(mask: Any, rows: tuple[int, ...], name: str) -> None:
    check_is_array("mask", mask)
    if jnp.result_type(mask) != jnp.bool:
        raise TypeError(f"`mask` is {jnp.result_type(mask).name}; give booleans, True in the rows that count")
    if jnp.shape(mask) != rows:
        raise ValueError(f"`mask` has shape {jnp.shape(mask)} but `{name}` has leading shape {rows}; give one for each")


def check_scalar(
    name: str, value: Any, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> None:
    """A real scalar, finite and in range where its value is known."""
    is_number = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)) and not isinstance(value, bool)
    if not is_number or jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.number):
        raise TypeError(f"`{name}` is {value!r}; give a number")
    known = known_value(value)
    if known is None:
        return
    if above is not None and not known > above:
        raise ValueError(f"`{name}` is {known:g}; give a number above {above:g}")
    if at_least is not None and not known >= at_least:
        raise ValueError(f"`{name}` is {known:g}; give a number of at least {at_least:g}")
    if at_most is not None and not known <= at_most:
        raise ValueError(f"`{name}` is {known:g}; give a number of at most {at_most:g}")


def sound_temperature(temperature: Any, dtype: Any) -> jax.Array:
    """``temperature``, and NaN for a traced one that is not above 0: it cannot be refused."""
    sound = jnp.asarray(temperature, dtype)
    return jnp.where(sound > 0, sound, jnp.nan) if known_value(temperature) is None else sound


def check_row_arguments(
    student: Source,
    name: str,
    *,
    labels: Any = None,
    weights: Any = None,
    normalizer: Any = None,
    mask: Any = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> None:
    """Raises an error for a value that does not fit; ``name`` is what the student's rows are called."""
    if labels is not None:
        check_labels(labels, student.leading_shape, name)
    if weights is not None:
        check_weights(weights, student.leading_shape, name)
    if mask is not None:
        check_mask(mask, student.leading_shape, name)
    if normalizer is not None:
        check_scalar("normalizer", normalizer, at_least=0)
    check_integer("ignore_index", ignore_index)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)


def check_vocabulary(vocabulary: Any) -> None:
    if vocabulary not in (None, "truncate", "mask"):
        raise ValueError(f'`vocabulary` is {vocabulary!r}; give "truncate" or "mask"')


def check_widths(student: int, teacher: int, *, vocabulary: str | None) -> None:
    """Of two vocabularies that are compared token by token: what is done where they differ has to be said."""
    if student != teacher and vocabulary is None:
        raise ValueError(
            f"the student has V={student} tokens but the teacher V={teacher}; for one tokenizer give `vocabulary`, "
            '"truncate" to compare the common first columns or "mask" to give -inf where a side has no token; for '
            "different tokenizers give a jaxkd.VocabularyMap as `teacher`"
        )


def check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` is {value!r}; give an integer")


def check_size(name: str, value: Any) -> None:
    check_integer(name, value)
    if value < 1:
        raise ValueError(f"`{name}` is {value}; give a positive integer or None")


def known_value(x: Any) -> np.ndarray | None:
    """The value of a number or array, or None while it is traced."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x, np.float64)


def known_to_be(value: Any, number: int) -> bool:
    """Whether it is a Python number, and this one: then it is known whatever is traced."""
    return isinstance(value, (int, float)) and value == number
