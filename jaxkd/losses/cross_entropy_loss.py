"""Cross-entropy with labels without the (N, V) logits: the loss of one head, its gradient in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.kernels import ChunkRows, RowLosses, RowOptions, row_losses_for
from jaxkd.logits import Place, Source, take_rows
from jaxkd.loop import Metrics, Sharding, metrics_of, sum_rows, weighted
from jaxkd.loop.checks import check_labels, check_row_arguments, check_scalar, check_source, known_to_be
from jaxkd.loop.flattening import check_sources, on_auto_axes
from jaxkd.loop.partitioning import ROWS, Partitioning, partitioning_of
from jaxkd.losses.flat_models import flat_models


def cross_entropy(
    student: Source,
    labels: ArrayLike,
    *,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int = -100,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """Next-token loss (SFT, pre-training) of a linear head without ever forming its (N, V) logits.

        loss = sum_n weights_n row_n / normalizer
        row  = (1 - s) (-log q[label]) + s mean_v(-log q_v) + z (log Z)^2

    with s = ``label_smoothing``, z = ``z_loss``, q = softmax of the student's logits and log Z their log-normaliser.
    The uniform share of the smoothing includes the label, as in optax and PyTorch. A row counts when its label is not
    ``ignore_index``; one that does not adds exactly nothing, whatever its states hold.

    The gradient is formed in the forward pass, chunk by chunk: three products with the head, two if the head is not
    differentiated, one without a gradient. Precision is that of `distillation_loss`.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`; gradients reach all its arrays.
      labels: (...) integers: ``labels[:, t]`` is the token after position t (`jaxkd.shift_labels`). One outside the
        vocabulary other than ``ignore_index`` makes the loss NaN.
      label_smoothing: from 0 to 1.
      z_loss: at least 0; PaLM has 1e-4.
      ignore_index, weights, normalizer, chunk_size, implementation, sharding: as in `distillation_loss`.

    ``label_smoothing``, ``z_loss``, ``weights`` and ``normalizer`` may be traced. They are constants to
    differentiation: asking for their gradient raises an error.

    Returns:
      The loss, a float32 scalar (float64 for float64), and metrics without gradient, each normalised as the loss is:
      "hard", -log q[label]; "log_normalizer", log Z; "accuracy", 1 where no logit is larger than the label's; and
      "num_rows" that count.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    Source: Szegedy et al. (arXiv 1512.00567) for the smoothing, Chowdhery et al., "PaLM" (arXiv 2204.02311) for the
    z-loss; gradients in the forward pass are Liger Kernel's idea.

    >>> import jaxkd
    >>> student = jaxkd.LinearLogits(jnp.ones((3, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> loss, metrics = cross_entropy(student, jnp.array([0, 2, -100]), label_smoothing=0.1)
    >>> print(f"{loss:.4f}, without smoothing {metrics['hard']:.4f}, accuracy {metrics['accuracy']:.2f}")
    1.0681, without smoothing 1.0514, accuracy 0.50
    """
    check_source(student, "student.")
    name = f"student.{student.ROWS}"
    check_labels(labels, student.leading_shape, name)
    check_row_arguments(
        student, name, weights=weights, normalizer=normalizer, ignore_index=ignore_index, chunk_size=chunk_size
    )
    check_scalar("label_smoothing", label_smoothing, at_least=0, at_most=1)
    check_scalar("z_loss", z_loss, at_least=0)
    partitioning = partitioning_of(sharding, student)
    check_sources(partitioning, student)
    of_arrays = partial(_loss_of_arrays, partitioning, ignore_index, chunk_size, implementation)
    smoothing = None if known_to_be(label_smoothing, 0) else label_smoothing
    z_weight = None if known_to_be(z_loss, 0) else z_loss
    return on_auto_axes(partitioning, of_arrays, student, labels, smoothing, z_weight, weights, normalizer)


def _loss_of_arrays(
    partitioning: Partitioning,
    ignore_index: int,
    chunk_size: int | None,
    implementation: str | None,
    student: Any,
    labels: Any,
    label_smoothing: Any,
    z_loss: Any,
    weights: Any,
    normalizer: Any,
) -> tuple[jax.Array, Metrics]:
    models = flat_models(partitioning, student, chunk_size=chunk_size, implementation=implementation)
    dtype = models.student.dtype
    rows = models.count_rows(labels=labels, weights=weights, normalizer=normalizer, ignore_index=ignore_index)
    loss = _CrossEntropy(
        labels=rows.labels,
        weights=rows.weights,
        label_smoothing=None if label_smoothing is None else jnp.asarray(label_smoothing, dtype),
        z_loss=None if z_loss is None else jnp.asarray(z_loss, dtype),
        row_losses=row_losses_for(implementation, models.chunk),
        options=RowOptions(is_tempered=False, shards=models.shards),
    )
    sums = sum_rows(loss, models.student, rows.is_counted, rows.normalizer, models.plan)
    metrics = {name: sums[name] for name in loss.names[1:]}
    return sums["loss"], metrics_of(metrics | {"num_rows": rows.num_rows})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _CrossEntropy:
    """The weighted cross-entropy of each row, for the loop over chunks."""

    labels: Any
    weights: Any
    label_smoothing: Any
    z_loss: Any
    row_losses: RowLosses = field(metadata={"static": True})
    options: RowOptions = field(metadata={"static": True})
    names = ("loss", "hard", "log_normalizer", "accuracy")
    DIMS: ClassVar = {"labels": (ROWS,), "weights": (ROWS,)}

    def take(self, index: Int[Array, " C"]) -> "_CrossEntropy":
        return replace(self, labels=take_rows(self.labels, index), weights=take_rows(self.weights, index))

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: Any, place: Place | None
    ) -> tuple[Metrics, jax.Array | None]:
        rows = ChunkRows(
            student=logits,
            labels=self.labels,
            soft_scale=jnp.zeros_like(self.weights),
            hard_scale=self.weights,
            temperature=jnp.ones((), logits.dtype),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        result = self.row_losses(rows, replace(self.options, gradient_dtype=gradient_dtype), place)
        values = (result.hard.loss, result.hard.nll, result.sums.plain.value, result.hard.is_top)
        return {name: weighted(self.weights, x) for name, x in zip(self.names, values, strict=True)}, result.gradient
