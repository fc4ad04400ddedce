"""The distillation losses: what users call, and the row loss that they hand to the loop."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.checks import check_integer, check_same_rows, check_scalar, check_size, check_source
from jaxkd.chunked import default_chunk_size, sum_rows
from jaxkd.divergences import Divergence, forward_kl, jensen_shannon
from jaxkd.implementation import Chunk, RowLosses, row_losses_for
from jaxkd.logits import LinearLogits, Source, take_rows
from jaxkd.rows import RowOptions

Metrics = dict[str, jax.Array]


def distillation_loss(
    student: Source,
    teacher: Source,
    labels: ArrayLike | None = None,
    *,
    divergence: Divergence = forward_kl,
    temperature: ArrayLike = 1.0,
    soft_weight: ArrayLike = 1.0,
    hard_weight: ArrayLike = 0.0,
    ignore_index: int = -100,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    vocabulary: str = "truncate",
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """Distils a teacher into a student without ever forming the (N, V) logits of either.

        loss = sum_n weights_n (soft_weight soft_n + hard_weight hard_n) / normalizer

    where, for each of the N rows (token positions) that count, ``soft_n`` is ``divergence`` between the teacher's and
    the student's softmax at ``temperature``, and ``hard_n`` the cross-entropy of the student's untempered logits with
    the label. A row counts when its label is not ``ignore_index``; without labels all do. A row that does not count
    adds exactly nothing to the loss or to any gradient, whatever its states hold.

    Logits, losses and the sum of the head's gradient over chunks are float32 whatever the inputs (float64 for float64
    hidden states); matrix products run in the type of the hidden states. Gradients come in the type of their primal.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`; gradients reach all its arrays.
      teacher: the same with leading axes equal to the student's and a width of its own; no gradient ever reaches it.
      labels: (...) integers, or None. One outside the student's vocabulary other than ``ignore_index`` makes the loss
        NaN.
      divergence: `forward_kl`, `jensen_shannon(beta)`, ... or a `Divergence` of your own.
      temperature: divides both models' logits in the soft loss. The loss is not multiplied by its square, as it is in
        Hinton's recipe: pass ``soft_weight=temperature**2 * w`` for that.
      soft_weight, hard_weight: the weights of the two parts; a non-zero ``hard_weight`` needs labels.
      ignore_index: the label of a row that does not count.
      weights: (...) non-negative factors of the rows, or None for 1.
      normalizer: what divides the sum; None is the sum of the counted rows' weights. With the token count of a global
        batch, the losses and gradients of its micro-batches add up to those of the whole.
      vocabulary: for models of different widths: "truncate" compares the common first columns, both sides renormalised
        over them; "mask" gives a side -inf where it has no token.
      chunk_size: rows whose logits exist at a time, at most; None chooses by the widths of the vocabularies.
      implementation: "mosaic" (the kernel for Hopper GPUs), "triton" (the kernel for CUDA GPUs), "xla", or None for the
        first of these that can run the call.

    Temperature, weights, normalizer and the divergence's parameter may be traced. They are constants to
    differentiation: asking for their gradient raises an error.

    Returns:
      The loss, a float32 scalar (float64 for float64), and metrics ``{"soft", "hard", "num_rows"}``: the two parts,
      normalised as the loss is but not weighted by ``soft_weight`` and ``hard_weight`` ("hard" is 0 without labels),
      and the number of rows that count. Metrics are for reading and carry no gradient: to change what is trained on,
      use ``soft_weight`` and ``hard_weight``.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    The idea of forming gradients chunk by chunk in the forward pass is Liger Kernel's (pull request 408, RFC 371).

    >>> student = LinearLogits(jnp.ones((3, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> teacher = LinearLogits(jnp.ones((3, 1)), jnp.array([[0.0], [1.0], [3.0]]))
    >>> loss, metrics = distillation_loss(student, teacher, jnp.array([0, 2, -100]), hard_weight=0.5)
    >>> print(f"{loss:.4f} = {metrics['soft']:.4f} + 0.5 * {metrics['hard']:.4f}, {metrics['num_rows']:.0f} rows")
    0.7091 = 0.1834 + 0.5 * 1.0514, 2 rows
    """
    return _distillation_loss(
        student,
        teacher,
        labels,
        prefixes=("student.", "teacher."),
        divergence=divergence,
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        weights=weights,
        normalizer=normalizer,
        vocabulary=vocabulary,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def fused_linear_jsd(
    student_hidden: ArrayLike,
    student_weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    beta: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    soft_weight: ArrayLike = 1.0,
    hard_weight: ArrayLike = 0.0,
    student_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    ignore_index: int = -100,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """The generalised Jensen-Shannon distillation loss of two linear heads: `distillation_loss` in one line.

    JSD = beta KL(P‖M) + (1 - beta) KL(Q‖M), M = beta P + (1 - beta) Q, with P the teacher's and Q the student's softmax
    at ``temperature``. ``beta=0`` is forward KL and ``beta=1`` reverse KL.

    Args:
      student_hidden: (..., D) floating; student_weight: (V, D); student_bias: (V,) or None. They get gradients.
      teacher_hidden: (..., Dt) floating; teacher_weight: (Vt, Dt); teacher_bias: (Vt,) or None. They get none.
      labels: (...) integers or None.
      beta: the teacher's weight in the mixture, in [0, 1]; strictly inside if traced.

    The other arguments, the result ``(loss, metrics)``, units and errors are those of `distillation_loss`; metrics
    carry no gradient, ``soft_weight`` and ``hard_weight`` say what is trained on.

    Source: Liger Kernel, pull request 408; GKD (arXiv 2306.13649) for the divergence.

    >>> loss, _ = fused_linear_jsd(jnp.ones((3, 2)), jnp.eye(2), jnp.ones((3, 1)), jnp.array([[0.0], [1.0]]))
    >>> print(f"{loss:.4f}")
    0.0285
    """
    return _distillation_loss(
        LinearLogits(student_hidden, student_weight, student_bias),
        LinearLogits(teacher_hidden, teacher_weight, teacher_bias),
        labels,
        prefixes=("student_", "teacher_"),
        divergence=jensen_shannon(beta),
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        weights=weights,
        normalizer=normalizer,
        vocabulary="truncate",
        chunk_size=chunk_size,
        implementation=implementation,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _RowLoss:
    """The weighted sum of the soft and the hard loss of each row, for the loop in `jaxkd.chunked`."""

    teacher: Any
    labels: Any
    weights: Any
    soft_weight: Any
    hard_weight: Any
    temperature: Any
    divergence: Divergence
    row_losses: RowLosses = field(metadata={"static": True})
    options: RowOptions = field(metadata={"static": True})
    names = ("loss", "soft", "hard")

    def take(self, index: Int[Array, " C"]) -> "_RowLoss":
        return replace(
            self,
            teacher=self.teacher.take(index),
            labels=take_rows(self.labels, index),
            weights=take_rows(self.weights, index),
        )

    def __call__(self, logits: Float[Array, "C V"], gradient_dtype: Any) -> tuple[Metrics, Float[Array, "C V"] | None]:
        soft_scale, hard_scale = self.soft_weight * self.weights, self.hard_weight * self.weights
        soft, hard, gradient = self.row_losses(
            logits,
            self.teacher.logits().astype(logits.dtype),
            self.labels,
            soft_scale,
            hard_scale,
            self.temperature,
            self.divergence,
            replace(self.options, gradient_dtype=gradient_dtype),
        )
        sums = {
            "loss": _scaled(soft_scale, soft) + _scaled(hard_scale, hard),
            "soft": _scaled(self.weights, soft),
            "hard": _scaled(self.weights, hard),
        }
        return sums, gradient


def _scaled(scale: jax.Array, x: jax.Array) -> jax.Array:
    """``scale * x``, and 0 where the scale is 0 whatever ``x`` is: what masks a row."""
    return jnp.where(scale == 0, 0, scale * x)


def _distillation_loss(
    student: Source,
    teacher: Source,
    labels: Any,
    *,
    prefixes: tuple[str, str],
    divergence: Divergence,
    temperature: Any,
    soft_weight: Any,
    hard_weight: Any,
    ignore_index: int,
    weights: Any,
    normalizer: Any,
    vocabulary: str,
    chunk_size: int | None,
    implementation: str | None,
) -> tuple[jax.Array, Metrics]:
    for source, prefix in ((student, prefixes[0]), (teacher, prefixes[1])):
        check_source(source, prefix)
    rows_names = [prefix + source.ROWS for source, prefix in ((student, prefixes[0]), (teacher, prefixes[1]))]
    check_same_rows(student, teacher, labels, weights, (rows_names[0], rows_names[1]))
    if not isinstance(divergence, Divergence):
        raise TypeError(f"`divergence` is {divergence!r}; give a jaxkd.Divergence such as jaxkd.jensen_shannon(0.5)")
    check_scalar("temperature", temperature, above=0)
    check_scalar("soft_weight", soft_weight, at_least=0)
    check_scalar("hard_weight", hard_weight, at_least=0)
    if labels is None and not (isinstance(hard_weight, (int, float)) and hard_weight == 0):
        raise ValueError(f"`hard_weight` is {hard_weight} but there are no `labels`; give labels or leave it 0")
    if normalizer is not None:
        check_scalar("normalizer", normalizer, above=0)
    if vocabulary not in ("truncate", "mask"):
        raise ValueError(f'`vocabulary` is {vocabulary!r}; give "truncate" or "mask"')
    check_integer("ignore_index", ignore_index)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)

    teacher = jax.lax.stop_gradient(teacher)
    student, teacher = student.flat(), teacher.flat().prepared()
    dtype = student.dtype
    num_rows = student.leading_shape[0]
    if chunk_size is None:
        chunk_size = default_chunk_size(num_rows, (student.vocabulary + teacher.vocabulary) * dtype.itemsize)
    chunk_size = max(min(chunk_size, num_rows), 1)
    row_losses = row_losses_for(implementation, Chunk(chunk_size, student.vocabulary, teacher.vocabulary, dtype))

    row_weights = jnp.ones(num_rows, dtype) if weights is None else jnp.reshape(jnp.asarray(weights, dtype), -1)
    if labels is None:
        row_labels = jnp.zeros(num_rows, jnp.int32)
        labelled = None
        counted = jnp.asarray(num_rows, dtype)
    else:
        row_labels = jnp.reshape(jnp.asarray(labels), -1)
        if row_labels.dtype != jnp.int64:
            row_labels = row_labels.astype(jnp.int32)  # from a narrow or unsigned type, so that V and -100 fit
        labelled = row_labels != ignore_index
        counted = jnp.sum(labelled, dtype=dtype)
        outside = labelled & ((row_labels < 0) | (row_labels >= student.vocabulary))
        row_weights = jnp.where(outside, jnp.nan, jnp.where(labelled, row_weights, 0))
    total = jnp.sum(row_weights) if normalizer is None else jnp.asarray(normalizer, dtype)
    sums = sum_rows(
        _RowLoss(
            teacher=teacher,
            labels=row_labels,
            weights=row_weights,
            soft_weight=jnp.asarray(soft_weight, dtype),
            hard_weight=jnp.asarray(hard_weight, dtype),
            temperature=jnp.asarray(temperature, dtype),
            divergence=jax.tree.map(lambda x: jnp.asarray(x, dtype), divergence),
            row_losses=row_losses,
            options=RowOptions(
                vocabulary=vocabulary,
                has_labels=labels is not None,
                is_tempered=not (isinstance(temperature, (int, float)) and temperature == 1),
            ),
        ),
        student,
        counts=None if labels is None and weights is None else row_weights != 0,
        normalizer=total,
        chunk_size=chunk_size,
    )
    metrics = {"soft": sums["soft"], "hard": sums["hard"], "num_rows": counted}
    return sums["loss"], {name: jax.lax.stop_gradient(x).astype(jnp.float32) for name, x in metrics.items()}
