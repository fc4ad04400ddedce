"""The distillation losses: what users call, and the row loss that they hand to the loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxkd.divergences import AnyDivergence, check_divergence, forward_kl, jensen_shannon
from jaxkd.kernels import ChunkRows, RowLosses, RowOptions, row_losses_for
from jaxkd.logits import LinearLogits, Place, Source, take_rows
from jaxkd.loop import Metrics, Sharding, metrics_of, sum_rows, weighted
from jaxkd.loop.checks import (
    check_row_arguments,
    check_same_rows,
    check_scalar,
    check_source,
    check_vocabulary,
    known_to_be,
    known_value,
    sound_temperature,
)
from jaxkd.loop.flattening import on_auto_axes
from jaxkd.loop.partitioning import ROWS, Partitioning
from jaxkd.losses.flat_models import flat_models, partitioning_of_models
from jaxkd.teachers import Teacher, TeacherRows, check_teacher, rows_of


def distillation_loss(
    student: Source,
    teacher: Teacher,
    labels: ArrayLike | None = None,
    *,
    divergence: AnyDivergence = forward_kl,
    temperature: ArrayLike = 1.0,
    soft_weight: ArrayLike = 1.0,
    hard_weight: ArrayLike = 0.0,
    ignore_index: int = -100,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    vocabulary: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """Distils a teacher into a student without ever forming the (N, V) logits of either.

        loss = sum_n weights_n (soft_weight soft_n + hard_weight hard_n) / normalizer

    where, for each of the N rows (token positions) that count, ``soft_n`` is ``divergence`` between the teacher's and
    the student's softmax at ``temperature``, and ``hard_n`` the cross-entropy of the student's untempered logits with
    the label. A row counts when its label is not ``ignore_index``; without labels all do. A row that does not count
    adds exactly nothing to the loss or to any gradient, whatever its states hold.

    With a ``mask`` the two parts have rows of their own: soft_n counts in the rows of the mask, hard_n where the label
    does, and each is divided by the sum of its own rows' weights. (DistilBERT has labels on 15 % of the tokens and the
    soft loss on all.) A row in neither is never read.

    Logits, losses and the sum of the head's gradient over chunks are float32 whatever the inputs (float64 for float64
    hidden states); matrix products run in the type of the hidden states. Gradients come in the type of their primal.

    Args:
      student: `LinearLogits` with hidden states (..., D) and head (V, D), or `Logits`; gradients reach all its arrays.
      teacher: the same with leading axes equal to the student's and a width of its own; or `TopKLogProbs`, what is kept
        of a teacher that is not there; a `Mixture` of several; a `Routed`, one of several for each row; a
        `VocabularyMap`, of another tokenizer. No gradient ever reaches it.
      labels: (...) integers, or None: ``labels[:, t]`` is the token after position t, for which position t's logits
        are. One outside the student's vocabulary other than ``ignore_index`` makes the loss NaN.
      divergence: `forward_kl`, `jensen_shannon(beta)`, `earth_mover`, ... or a `Divergence` or `RowDivergence` of your
        own.
      temperature: divides both models' logits in the soft loss. The loss is not multiplied by its square, as it is in
        Hinton's recipe: pass ``soft_weight=temperature**2 * w`` for that. A traced one that is not above 0, which no
        error can name, makes the loss NaN.
      soft_weight, hard_weight: the weights of the two parts; a non-zero ``hard_weight`` needs labels. With the number 0
        for ``soft_weight`` the teacher's head is not multiplied.
      ignore_index: the label of a row that does not count.
      weights: (...) non-negative factors of the rows, or None for 1.
      normalizer: what divides the sum; None is the sum of the counted rows' weights. With the token count of a global
        batch, the losses and gradients of its micro-batches add up to those of the whole. It divides both parts where a
        ``mask`` gives them rows of their own. Where it is 0, so is all that it divides.
      mask: (...) booleans, the rows of the soft loss, or None for those whose label counts.
      vocabulary: for models of one tokenizer whose widths differ, an error unless it is said: "truncate" compares the
        common first columns, both sides renormalised over them (heads that are padded differently); "mask" gives a side
        -inf where it has no token. Different tokenizers need a `VocabularyMap`, or `earth_mover` or `sinkhorn`.
      chunk_size: rows whose logits, or gradients of these, exist at a time, at most; None chooses by rows, bytes and
        platform, so that temporaries are at most a quarter of the dense formula's from some 1000 rows on. The head's
        gradient, summed in float32, is not made smaller by chunks.
      implementation: "mosaic" (the kernel for Hopper GPUs), "triton" (the kernel for CUDA GPUs), "xla", or None for the
        first of these that can run the call.
      sharding: a `Sharding` that says which axes of a device mesh hold the rows and the vocabulary; None is one device,
        or on Explicit mesh axes what the types of the student's arrays say. ``chunk_size`` then counts the rows of each
        device.

    Temperature, weights, normalizer and the divergence's parameter may be traced. They are constants to
    differentiation: asking for their gradient raises an error.

    Returns:
      The loss, a float32 scalar (float64 for float64), and metrics ``{"soft", "hard", "num_rows"}``: the two parts,
      normalised as the loss is but not weighted by ``soft_weight`` and ``hard_weight`` ("hard" is 0 without labels,
      "soft" where ``soft_weight`` is the number 0), and the number of rows that count, for either part. Metrics are for
      reading and carry no gradient: to change what is trained on, use ``soft_weight`` and ``hard_weight``.

    Raises:
      TypeError, ValueError: shapes, types or values that do not fit, named, before any work.

    The idea of forming gradients chunk by chunk in the forward pass is Liger Kernel's (pull request 408, RFC 371).

    >>> student = LinearLogits(jnp.ones((3, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> teacher = LinearLogits(jnp.ones((3, 1)), jnp.array([[0.0], [1.0], [3.0]]))
    >>> loss, metrics = distillation_loss(student, teacher, jnp.array([0, 2, -100]), hard_weight=0.5)
    >>> print(f"{loss:.4f} = {metrics['soft']:.4f} + 0.5 * {metrics['hard']:.4f}, {metrics['num_rows']:.0f} rows")
    0.7091 = 0.1834 + 0.5 * 1.0514, 2 rows
    """
    arguments = _Arguments(
        labels=labels,
        divergence=divergence,
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        weights=weights,
        normalizer=normalizer,
        mask=mask,
        vocabulary=vocabulary,
        chunk_size=chunk_size,
        implementation=implementation,
        sharding=sharding,
    )
    return _distillation_loss(student, teacher, arguments, prefixes=("student.", "teacher."))


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
    mask: ArrayLike | None = None,
    vocabulary: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """The generalised Jensen-Shannon distillation loss of two linear heads: `distillation_loss` in one line.

    JSD = beta KL(P‖M) + (1 - beta) KL(Q‖M), M = beta P + (1 - beta) Q, with P the teacher's and Q the student's softmax
    at ``temperature``. ``beta=0`` is forward KL and ``beta=1`` reverse KL.

    Args:
      student_hidden: (..., D) floating; student_weight: (V, D); student_bias: (V,) or None. They get gradients.
      teacher_hidden: (..., Dt) floating; teacher_weight: (Vt, Dt); teacher_bias: (Vt,) or None. They get none.
      labels: (...) integers or None; ``labels[:, t]`` is the token after position t.
      beta: the teacher's weight in the mixture, in [0, 1]; strictly inside if traced.

    The other arguments, the result ``(loss, metrics)``, units and errors are those of `distillation_loss`; metrics
    carry no gradient, ``soft_weight`` and ``hard_weight`` say what is trained on.

    Source: Liger Kernel, pull request 408; GKD (arXiv 2306.13649) for the divergence.

    >>> loss, _ = fused_linear_jsd(jnp.ones((3, 2)), jnp.eye(2), jnp.ones((3, 1)), jnp.array([[0.0], [1.0]]))
    >>> print(f"{loss:.4f}")
    0.0285
    """
    arguments = _Arguments(
        labels=labels,
        divergence=jensen_shannon(beta),
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        weights=weights,
        normalizer=normalizer,
        mask=mask,
        vocabulary=vocabulary,
        chunk_size=chunk_size,
        implementation=implementation,
        sharding=sharding,
    )
    student = LinearLogits(student_hidden, student_weight, student_bias)
    teacher = LinearLogits(teacher_hidden, teacher_weight, teacher_bias)
    return _distillation_loss(student, teacher, arguments, prefixes=("student_", "teacher_"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Arguments:
    """What the loss is asked for beside the two models, as `distillation_loss` describes it."""

    labels: Any
    divergence: AnyDivergence
    temperature: Any
    soft_weight: Any
    hard_weight: Any
    weights: Any
    normalizer: Any
    mask: Any
    ignore_index: int = field(metadata={"static": True})
    vocabulary: str | None = field(metadata={"static": True})
    chunk_size: int | None = field(metadata={"static": True})
    implementation: str | None = field(metadata={"static": True})
    sharding: Sharding | None = field(metadata={"static": True})

    def check(self, student: Any, teacher: Any, prefixes: tuple[str, str]) -> None:
        """Raises an error for what does not fit; ``prefixes`` are what the fields of the models are called."""
        check_source(student, prefixes[0])
        check_divergence(self.divergence)
        check_scalar("temperature", self.temperature, above=0)
        check_teacher(teacher, prefixes[1], student, self.divergence, self.temperature)
        name = prefixes[0] + student.ROWS
        check_same_rows(student, teacher, (name, prefixes[1] + teacher.ROWS))
        check_row_arguments(
            student,
            name,
            labels=self.labels,
            weights=self.weights,
            normalizer=self.normalizer,
            mask=self.mask,
            ignore_index=self.ignore_index,
            chunk_size=self.chunk_size,
        )
        check_scalar("soft_weight", self.soft_weight, at_least=0)
        check_scalar("hard_weight", self.hard_weight, at_least=0)
        if self.labels is None and not known_to_be(self.hard_weight, 0):
            what = "traced" if known_value(self.hard_weight) is None else self.hard_weight
            raise ValueError(f"`hard_weight` is {what} but there are no `labels`; give labels or leave it 0")
        check_vocabulary(self.vocabulary)

    def row_options(self) -> RowOptions:
        return RowOptions(
            vocabulary=self.vocabulary or "truncate",
            has_labels=self.labels is not None,
            is_tempered=not known_to_be(self.temperature, 1),
        )


def _distillation_loss(
    student: Source, teacher: Teacher, arguments: _Arguments, prefixes: tuple[str, str]
) -> tuple[jax.Array, Metrics]:
    arguments.check(student, teacher, prefixes)
    rows = rows_of(teacher, arguments.temperature)
    partitioning = partitioning_of_models(
        arguments.sharding, student, teacher, rows, arguments.divergence, arguments.vocabulary
    )
    has_soft = not known_to_be(arguments.soft_weight, 0)
    function = partial(_loss_of_arrays, partitioning=partitioning, options=arguments.row_options())
    return on_auto_axes(partitioning, function, student, rows if has_soft else None, arguments)


def _loss_of_arrays(
    student: Any, teacher: Any, arguments: _Arguments, *, partitioning: Partitioning, options: RowOptions
) -> tuple[jax.Array, Metrics]:
    models = flat_models(
        partitioning,
        student,
        teacher,
        vocabulary=options.vocabulary,
        chunk_size=arguments.chunk_size,
        implementation=arguments.implementation,
        divergence=arguments.divergence,
    )
    dtype, teacher = models.student.dtype, models.teacher
    divergence = None
    if teacher is not None:
        divergence = jax.tree.map(lambda x: jnp.asarray(x, dtype), arguments.divergence)
    in_buckets = teacher is not None and teacher.IN_BUCKETS
    rows = models.count_rows(
        labels=arguments.labels,
        weights=arguments.weights,
        normalizer=arguments.normalizer,
        mask=arguments.mask,
        ignore_index=arguments.ignore_index,
    )
    loss = _RowLoss(
        teacher=teacher,
        labels=jnp.zeros_like(rows.weights, jnp.int32) if rows.labels is None else rows.labels,
        weights=rows.weights,
        label_weights=rows.label_weights,
        soft_weight=jnp.asarray(arguments.soft_weight, dtype),
        hard_weight=jnp.asarray(arguments.hard_weight, dtype),
        temperature=sound_temperature(arguments.temperature, dtype),
        divergence=divergence,
        row_losses=row_losses_for(arguments.implementation, models.chunk, divergence, in_buckets=in_buckets),
        options=replace(options, shards=models.shards),
    )
    sums = sum_rows(loss, models.student, rows.is_counted, rows.normalizer, models.plan)
    return sums["loss"], metrics_of({"soft": sums["soft"], "hard": sums["hard"], "num_rows": rows.num_rows})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _RowLoss:
    """The weighted sum of the soft and the hard loss of each row, for the loop over chunks."""

    teacher: TeacherRows | None
    labels: Any
    weights: Any
    label_weights: Any  # of the hard loss, where they are others; else None
    soft_weight: Any
    hard_weight: Any
    temperature: Any
    divergence: AnyDivergence | None
    row_losses: RowLosses = field(metadata={"static": True})
    options: RowOptions = field(metadata={"static": True})
    names = ("loss", "soft", "hard")
    DIMS: ClassVar = {"labels": (ROWS,), "weights": (ROWS,), "label_weights": (ROWS,)}

    def take(self, index: Int[Array, " C"]) -> "_RowLoss":
        return replace(
            self,
            teacher=None if self.teacher is None else self.teacher.take(index),
            labels=take_rows(self.labels, index),
            weights=take_rows(self.weights, index),
            label_weights=None if self.label_weights is None else take_rows(self.label_weights, index),
        )

    def __call__(
        self, logits: Float[Array, "C V"], gradient_dtype: Any, place: Place | None
    ) -> tuple[Metrics, jax.Array | None]:
        hard_weights = self.weights if self.label_weights is None else self.label_weights
        rows = ChunkRows(
            student=logits,
            teacher=None if self.teacher is None else self.teacher.compared(logits.dtype),
            labels=self.labels,
            soft_scale=self.soft_weight * self.weights,
            hard_scale=self.hard_weight * hard_weights,
            temperature=self.temperature,
            divergence=self.divergence,
        )
        result = self.row_losses(rows, replace(self.options, gradient_dtype=gradient_dtype), place)
        sums = {
            "loss": weighted(rows.soft_scale, result.soft) + weighted(rows.hard_scale, result.hard.loss),
            "soft": weighted(self.weights, result.soft),
            "hard": weighted(hard_weights, result.hard.loss),
        }
        return sums, result.gradient
