"""What a loop of an unknown number of chunks gives: reverse mode does not go through it, and says so in words.

The loop forms gradients itself, so `jax.grad` never enters it. A derivative of these gradients does.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_once(tree: Any) -> Any:
    """The same arrays; an error where the reverse mode would go through them, in place of JAX's about its loops."""
    return jax.tree.map(_reverse_once_p.bind, tree)


def _transpose(cotangent: Any, x: Any) -> Any:
    raise TypeError(
        "a jaxkd loss is differentiated once in reverse mode, and this goes a second time through its gradients, or "
        "the value that came with them, over several chunks of rows: take forward over reverse (jax.hessian, or "
        "jax.jvp of jax.grad), or `jax.lax.stop_gradient` of the gradients, or a `chunk_size` for all rows"
    )


_reverse_once_p = Primitive("reverse_once")
_reverse_once_p.def_impl(lambda x: x)
_reverse_once_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_reverse_once_p, _transpose)
batching.defvectorized(_reverse_once_p)
mlir.register_lowering(_reverse_once_p, lambda context, x: [x])
