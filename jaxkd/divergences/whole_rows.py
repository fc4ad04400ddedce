"""Soft losses of a whole row of logits: those that are no sum over the vocabulary of a term of (log p, log q).

    loss, metrics = jaxkd.distillation_loss(student, teacher, labels, divergence=jaxkd.cosine_distance)

Each is a function of the teacher's and the student's logits of a chunk; its gradient is `jax.vjp`'s, a chunk at a time,
in XLA. Masks, weights, temperature and the hard loss are those of every divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.divergences.declaration import RowDivergence
from jaxkd.logits.array_ops import logits_dtype
from jaxkd.loop.checks import check_scalar, check_size


def _open(teacher: jax.Array, student: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which columns have a logit on both sides, and these logits, 0 elsewhere."""
    is_open = (teacher != -jnp.inf) & (student != -jnp.inf)
    return is_open, jnp.where(is_open, teacher, 0), jnp.where(is_open, student, 0)


def _cosine_distance(teacher, student):
    _, teacher, student = _open(teacher, student)
    lengths = [jnp.sum(jnp.square(z), axis=-1, keepdims=True) for z in (teacher, student)]
    is_zero = [x == 0 for x in lengths]
    unit = [
        z * jax.lax.rsqrt(jnp.where(zero, 1, x))
        for z, x, zero in zip((teacher, student), lengths, is_zero, strict=True)
    ]
    # |a - b|^2 / 2 of the unit vectors is 1 - cos, without losing the digits of a small one.
    distance = jnp.sum(jnp.square(unit[0] - unit[1]), axis=-1) / 2
    return jnp.where((is_zero[0] | is_zero[1])[..., 0], 1, distance)


cosine_distance = RowDivergence(_cosine_distance, is_nonnegative=True)
"""1 - cos(z_teacher, z_student) of the two logit vectors, in [0, 2]; 1 where one of them is all zero.

The temperature cancels. It sees no common factor of the logits, but a common shift of them, which softmax does not see.
A token with a logit of -inf on either side is left out.

For (3, 4) and (4, 3) it is 1 - 24 / 25 = 0.04.

Source: named in Liger Kernel's RFC 371.
"""


def _mse(teacher, student):
    is_open, teacher, student = _open(teacher, student)
    count = jnp.sum(is_open, axis=-1, dtype=student.dtype)
    return jnp.sum(jnp.square(student - teacher), axis=-1) / jnp.maximum(count, 1)


mse = RowDivergence(_mse, is_nonnegative=True)
"""Logit regression: the mean over the vocabulary of (z_student - z_teacher)^2, both at the temperature.

A mean, as `torch.nn.MSELoss`'s, not a sum: its size, and so a ``soft_weight`` that fits, does not hang on the width of
the vocabulary. A common shift of the logits counts. A token with a logit of -inf on either side is left out, of the
count too. For (1, 2, -inf) and (2, 0, 5) it is (1 + 4) / 2 = 2.5.

Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?" (arXiv 1312.6184).
"""


def _earth_mover(teacher, student):
    p, q = (jnp.sort(jax.nn.softmax(z, axis=-1), axis=-1) for z in (teacher, student))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(width - x.shape[-1], 0)]) for x in (p, q))  # the smallest come first
    return jnp.sum(jnp.abs(p - q), axis=-1) / 2


earth_mover = RowDivergence(_earth_mover, vocabulary="own", is_nonnegative=True)
"""1/2 sum |sort(p) - sort(q)|, at most 1: Wasserstein-1 with unit cost between the sorted probabilities.

It knows no token, only how peaked a distribution is, and so compares models of different tokenizers: each keeps its own
vocabulary, and zeros fill up the shorter list. Two models with one tokenizer and swapped tokens are at distance 0.
For p = (0.5, 0.3, 0.2) and q = (0.1, 0.9) it is (0.4 + 0.2 + 0.2) / 2 = 0.4. Its slope is 0 where the two are equal.

Source: Boizard et al., "Towards Cross-Tokenizer Distillation" (Universal Logit Distillation, arXiv 2402.12030).
"""


def _gap(teacher, student):
    return jax.nn.softmax(student, axis=-1) - jax.nn.softmax(teacher, axis=-1)


def _identity_kernel(teacher, student):
    return jnp.sum(jnp.square(_gap(teacher, student)), axis=-1)


def _linear_kernel(teacher, student, embeddings):
    embeddings = _rows_of(embeddings, student.shape[-1])
    return jnp.sum(jnp.square(_gap(teacher, student) @ embeddings), axis=-1)


@dataclass(frozen=True)
class _PolynomialKernel:
    degree: int

    def __call__(self, teacher, student, embeddings, offset):
        gap = _gap(teacher, student)
        through_kernel = self.product(jax.lax.stop_gradient(gap), _rows_of(embeddings, gap.shape[-1]), offset)
        # A quadratic form of value d K d and derivative 2 K d: nothing of the product has to be kept or differentiated.
        value = jnp.sum(gap * through_kernel, axis=-1)
        return 2 * value - jax.lax.stop_gradient(value)

    def product(self, gap, embeddings, offset):
        """``gap @ kernel``, the (V, V) kernel formed as many rows at a time as ``gap`` has."""
        width, size = gap.shape[1], min(gap.shape)

        def block(i, result):
            start = jnp.minimum(i * size, width - size)  # the last block goes over columns that are done again
            some = jax.lax.dynamic_slice_in_dim(embeddings, start, size)  # (B, E)
            kernel = (some @ embeddings.T + offset) ** self.degree  # (B, V)
            return jax.lax.dynamic_update_slice_in_dim(result, gap @ kernel.T, start, axis=1)

        return jax.lax.fori_loop(0, -(-width // size), block, jnp.zeros_like(gap))


def kernel_distance(embeddings: ArrayLike | None = None, *, degree: int = 1, offset: ArrayLike = 1.0) -> RowDivergence:
    """The squared maximum mean discrepancy (p - q)' K (p - q) of the two distributions over tokens.

    K_vw = k(e_v, e_w) says how alike two tokens are, by a kernel of the caller's choice: without ``embeddings`` the
    identity, sum (p - q)^2; with degree 1 the linear kernel, |sum_v (p_v - q_v) e_v|^2; with a higher degree the
    polynomial kernel (e_v . e_w + offset)^degree. The RFC names a "KVD" loss and gives no formula; this is our reading.

    The (V, V) kernel is never formed: the linear one is a product with the embeddings, and a polynomial one is formed a
    block of as many rows as a chunk has, V / C times in each chunk (V^2 (C + E) multiplications a chunk of C rows).

    Args:
      embeddings: (V, E): one row a token of the common vocabulary, such as the teacher's input embeddings; further rows
        are not read. Products with it run in the type of the logits. It gets no gradient.
      degree: a positive integer.
      offset: at least 0; it may be traced. In the linear kernel a constant drops out.

    Raises:
      TypeError, ValueError: values out of range; when it is used, embeddings for fewer tokens than are compared.

    Source: named in Liger Kernel's RFC 371; Gretton et al., "A Kernel Two-Sample Test", 2012.

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    >>> e = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> for distance in (kernel_distance(), kernel_distance(e), kernel_distance(e, degree=2)):
    ...     print(f"{distance(p, q)[0]:.4f}")
    0.1250
    0.2500
    2.0000
    """
    if embeddings is None:
        return RowDivergence(_identity_kernel, is_nonnegative=True)
    check_size("degree", degree)
    check_scalar("offset", offset, at_least=0)
    _check_embeddings("embeddings", embeddings)
    if degree == 1:
        return RowDivergence(_linear_kernel, (embeddings,), is_nonnegative=True)
    return RowDivergence(_PolynomialKernel(degree), (embeddings, offset), is_nonnegative=True)


@dataclass(frozen=True)
class _Sinkhorn:
    """Its embeddings have unit length."""

    top: int
    iterations: int

    def __call__(self, teacher, student, teacher_embeddings, student_embeddings, epsilon):
        p, q = (self.sides(*x) for x in ((teacher, teacher_embeddings), (student, student_embeddings)))
        between, within_p, within_q = (self.transport(a, b, epsilon) for a, b in ((p, q), (p, p), (q, q)))
        return between - within_p / 2 - within_q / 2

    def sides(self, logits, embeddings):
        """The likeliest tokens: log-probabilities among them (C, K) and embeddings (C, K, E)."""
        top, tokens = jax.lax.top_k(logits, min(self.top, logits.shape[-1]))
        return jax.nn.log_softmax(top), _rows_of(embeddings, logits.shape[-1])[tokens]

    def transport(self, p, q, epsilon):
        """The dual of entropic transport, by updates that treat both sides alike, the last one in full."""
        (log_p, e_p), (log_q, e_q) = p, q
        cost = 1 - jnp.einsum("cke,cle->ckl", e_p, e_q)

        def best(log_weight, potential, cost):
            return -epsilon * jax.nn.logsumexp(log_weight[:, None] + (potential[:, None] - cost) / epsilon, axis=2)

        @jax.checkpoint
        def step(potentials, _):
            f, g = potentials
            best_f, best_g = best(log_q, g, cost), best(log_p, f, jnp.swapaxes(cost, 1, 2))
            return ((f + best_f) / 2, (g + best_g) / 2), None

        (f, g), _ = jax.lax.scan(step, (jnp.zeros_like(log_p), jnp.zeros_like(log_q)), length=self.iterations)
        f, g = best(log_q, g, cost), best(log_p, f, jnp.swapaxes(cost, 1, 2))
        return jnp.sum(jnp.exp(log_p) * f, axis=1) + jnp.sum(jnp.exp(log_q) * g, axis=1)


def sinkhorn(
    embeddings: ArrayLike,
    student_embeddings: ArrayLike | None = None,
    *,
    top: int = 32,
    epsilon: ArrayLike = 0.1,
    iterations: int = 20,
) -> RowDivergence:
    """The Sinkhorn divergence: what it takes to move the teacher's probability to the student's, token by token.

        S(p, q) = OT(p, q) - OT(p, p) / 2 - OT(q, q) / 2

    with OT the entropic transport cost at ``epsilon`` and 1 - cos(e_v, e_w) the cost of moving from token v to w: a
    near-synonym is a short way. The two subtracted terms make it 0 at p = q. A cost for all pairs of tokens would be a
    (V, V) matrix in each of many iterations, so each side keeps its ``top`` likeliest tokens, renormalised; the others
    have no gradient. ``iterations`` are run, no more and no less, and the gradient is that of what they compute.

    Args:
      embeddings: (Vt, E): one row a token of the teacher's vocabulary; further rows are not read. No gradient.
      student_embeddings: (V, E) in the same space, for a student of another vocabulary; None is the teacher's.
      top: tokens a side. Each chunk holds (C, top, E) of embeddings and (C, top, top) of costs.
      epsilon: positive; it may be traced. The smaller, the nearer to transport proper and the more iterations.
      iterations: a positive integer.

    Raises:
      TypeError, ValueError: values out of range; when it is used, embeddings for fewer tokens than a side has.

    Source: SinKD (arXiv 2402.17110); Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences" (arXiv 1810.08278), for the subtracted terms and the updates.

    Two tokens at a right angle, all of the probability moved from one to the other:

    >>> far = sinkhorn(jnp.eye(2), epsilon=0.01)(jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 50.0]]))
    >>> print(f"{far[0]:.4f}")
    1.0000
    """
    check_size("top", top)
    check_size("iterations", iterations)
    check_scalar("epsilon", epsilon, above=0)
    tables = {"embeddings": embeddings, "student_embeddings": embeddings}
    if student_embeddings is not None:
        tables["student_embeddings"] = student_embeddings
    for name, table in tables.items():
        _check_embeddings(name, table)
    sizes = [jnp.shape(table)[1] for table in tables.values()]
    if sizes[0] != sizes[1]:
        raise ValueError(f"`student_embeddings` has E={sizes[1]} but `embeddings` has E={sizes[0]}; give one space")
    teacher_table, student_table = (_unit(table) for table in tables.values())
    return RowDivergence(
        _Sinkhorn(top, iterations), (teacher_table, student_table, epsilon), vocabulary="own", is_nonnegative=True
    )


def _unit(table: ArrayLike) -> jax.Array:
    table = jnp.asarray(table, logits_dtype(table))
    length = jnp.linalg.norm(table, axis=1, keepdims=True)
    return table / jnp.where(length == 0, 1, length)


def _check_embeddings(name: str, x: Any) -> None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating) or len(x.shape) != 2:
        what = f"{jnp.dtype(x.dtype).name} of shape {x.shape}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
        raise TypeError(f"`{name}` is {what}; give a floating-point array (V, E)")


def _rows_of(embeddings: jax.Array, width: int) -> jax.Array:
    if embeddings.shape[0] < width:
        raise ValueError(f"`embeddings` has {embeddings.shape[0]} rows but there are {width} tokens; give one row each")
    return embeddings[:width]
