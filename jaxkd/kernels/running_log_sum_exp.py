"""Log-sum-exps to the base 2 as they grow, in a thread, a warp and a cluster, for `pallas_mosaic_gpu`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from jaxkd.kernels.kernel_math import LN2, LOWEST
from jaxkd.kernels.thread_values import (
    repeat_in_thread,
    rounded_product,
    scaled_difference,
    thread_reduce,
    thread_value,
    warp_reduce,
)


class RunningLogSumExp(NamedTuple):
    """``log2 sum 2 ** (z * factor)`` of what was seen, as reference + log2(total): thread values.

    ``reference`` is ``top * factor`` as it was rounded, so that ``z * factor - reference`` is exact where all logits
    are large.
    """

    top: jax.Array  # no more than the largest logit: finite where all are -inf
    reference: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, top: jax.Array, total: jax.Array, factor: jax.Array) -> "RunningLogSumExp":
        return cls(top, rounded_product(top, factor), total)

    @classmethod
    def nothing(cls, factor: jax.Array) -> "RunningLogSumExp":
        return cls.of(thread_value(LOWEST), thread_value(0.0), factor)

    def add(self, z: jax.Array, top: jax.Array, factor: jax.Array) -> "RunningLogSumExp":
        """With a step of logits, of which ``top`` is the largest of each thread."""
        top = jnp.maximum(self.top, top)
        reference = rounded_product(top, factor)
        more = thread_reduce(jnp.exp2(scaled_difference(z, factor, reference)), arith.addf)
        return RunningLogSumExp(top, reference, self.total * jnp.exp2(self.reference - reference) + more)

    def log2_probability(self, z: jax.Array, factor: jax.Array) -> jax.Array:
        return scaled_difference(z, factor, self.reference) - repeat_in_thread(jnp.log2(self.total))

    def log_sum_exp(self) -> jax.Array:
        """``log sum exp``, a natural logarithm."""
        return (self.reference + jnp.log2(self.total)) * LN2

    def log_total(self, factor: jax.Array) -> jax.Array:
        """The same of the distances to ``top``."""
        return (jnp.log2(self.total) - scaled_difference(self.top, factor, self.reference)) * LN2


def merged(sums: Sequence[Sequence[RunningLogSumExp]], factors: Sequence[jax.Array]) -> list[RunningLogSumExp]:
    """Each of several over the threads of a warp, in which a thread may have more than one of it."""
    tops = warp_reduce([functools.reduce(jnp.maximum, [x.top for x in each]) for each in sums], arith.maximumf)
    references = [rounded_product(top, factor) for top, factor in zip(tops, factors, strict=True)]
    totals = [
        functools.reduce(jnp.add, [x.total * jnp.exp2(x.reference - reference) for x in each])
        for reference, each in zip(references, sums, strict=True)
    ]
    return list(map(RunningLogSumExp, tops, references, warp_reduce(totals, arith.addf)))
