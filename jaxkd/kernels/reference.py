"""The rows of one chunk in plain XLA: logits of a student, and of a teacher -> losses of each row, sums, a gradient.

`pallas_triton` and `pallas_mosaic_gpu` have the same function as GPU kernels. This is the definition of what they
compute.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkd.divergences import weigh
from jaxkd.kernels.kernel_math import kernel_term_and_slope
from jaxkd.kernels.signature import ChunkRows, HardLosses, LogSumExp, RowOptions, RowResult, RowSums, VocabularyShards
from jaxkd.logits import Place, placed
from jaxkd.loop.collectives import psum
from jaxkd.loop.partitioning import Axes
from jaxkd.loop.platform import target_platform


def row_losses(rows: ChunkRows, options: RowOptions, place: Place | None = None) -> RowResult:
    """The losses of each row and their gradient, for a divergence that is a sum over tokens.

    soft = D(softmax(teacher / temperature), softmax(student / temperature)) over the common vocabulary;
    hard as `RowResult` has it, over the student's.
    With ``slope = d term / d log q`` the gradient of soft is ``(slope - q sum(slope)) / temperature``. What comes back
    of the gradient is `placed`.
    """
    z, axes = _aligned(rows, options), _axes(options)
    has_soft, slope = rows.divergence is not None, None
    student = log_sum_exp(z.student, axes) if has_soft else None
    sums = RowSums(
        plain=student if student is not None and z.is_one else log_sum_exp(z.plain, axes),
        student=student,
        teacher=log_sum_exp(z.teacher, axes) if has_soft and z.teacher is not None else None,
    )
    soft = jnp.zeros_like(sums.plain.top)
    if has_soft:
        log_p, log_q = _log_probabilities(z, sums)
        if options.gradient_dtype is None and not options.keeps_sums:
            term = rows.divergence.terms(log_p, log_q)
        else:
            term, slope = rows.divergence.term_and_slope(log_p, log_q)
            sums = sums._replace(slope_sum=psum(jnp.sum(slope, axis=1), axes))
        total = psum(jnp.sum(term, axis=1), axes)
        soft, sums = rows.divergence.of_total(total), sums._replace(outer_slope=rows.divergence.outer_slope(total))
    hard = _hard_losses(rows, options, z.plain, sums.plain)
    gradient = None
    if options.gradient_dtype is not None:
        gradient = _gradient(rows, options, z, sums, slope, place)
    return RowResult(soft, hard, sums if options.keeps_sums else RowSums(sums.plain), gradient)


def row_gradient(
    rows: ChunkRows, options: RowOptions, sums: RowSums, place: Place | None = None
) -> Float[Array, "_ V"]:
    """`RowResult.gradient` where the sums are known: elementwise, so XLA reads each logit once, on every platform."""
    z, slope = _aligned(rows, options), None
    if rows.divergence is not None:
        log_p, log_q = _log_probabilities(z, sums)
        # On a GPU the functions that CUDA's library has would take longer than the memory.
        has_kernels = target_platform() == "cuda" and log_q.dtype == jnp.float32
        term_and_slope = (
            partial(kernel_term_and_slope, rows.divergence) if has_kernels else rows.divergence.term_and_slope
        )
        _, slope = term_and_slope(log_p, log_q)
    return _gradient(rows, options, z, sums, slope, place)


class _Logits(NamedTuple):
    """The logits of a chunk as its losses have them, with -inf in columns that are in no vocabulary."""

    plain: Float[Array, "C V"]  # of the hard loss
    student: Float[Array, "C V"]  # of the soft one
    teacher: Float[Array, "C V"] | None
    is_one: bool  # whether the student's softmax is the same in both


def _aligned(rows: ChunkRows, options: RowOptions) -> _Logits:
    plain, teacher, shards = rows.student, rows.teacher, options.shards
    if shards is not None:
        plain = own_columns(plain, shards.student, shards.axes)
    student = plain
    if teacher is not None:
        if shards is None:
            student, teacher = align(plain, teacher, options.vocabulary)
        else:
            student, teacher = align_shards(plain, teacher, shards, options.vocabulary)
    is_one = student.shape == plain.shape and (shards is None or shards.student <= shards.teacher)
    if options.is_tempered:
        student, teacher = student / rows.temperature, None if teacher is None else teacher / rows.temperature
        if options.tempers_labels:
            plain = plain / rows.temperature
    return _Logits(plain, student, teacher, is_one and not options.has_plain_sums)


def _axes(options: RowOptions) -> Axes:
    return () if options.shards is None else options.shards.axes


def _log_probabilities(z: _Logits, sums: RowSums) -> tuple[jax.Array, jax.Array]:
    """Teacher, student; twice the student's where there is no teacher."""
    log_q = _log_probability(z.student, sums.student)
    return log_q if z.teacher is None else _log_probability(z.teacher, sums.teacher), log_q


def _log_probability(z: Float[Array, "C V"], lse: LogSumExp | None) -> Float[Array, "C V"]:
    assert lse is not None
    return LogSumExp(lse.top[:, None], lse.log_total[:, None]).log_probability(z)


def _gradient(
    rows: ChunkRows, options: RowOptions, z: _Logits, sums: RowSums, slope: jax.Array | None, place: Place | None
) -> Float[Array, "_ V"]:
    d, width = jnp.zeros_like(z.plain), z.plain.shape[1]
    if slope is not None and sums.slope_sum is not None and sums.outer_slope is not None:
        q = jnp.exp(_log_probability(z.student, sums.student))
        scale = weigh(rows.soft_scale / rows.temperature, sums.outer_slope)[:, None]
        d = jnp.where(scale == 0, 0, scale * (slope - q * sums.slope_sum[:, None]))[:, :width]
        d = jnp.pad(d, ((0, 0), (0, width - d.shape[1])))
    if options.has_labels:
        d = d + hard_gradient(rows, options, z.plain, sums.plain)
    return placed(d.astype(options.gradient_dtype), place)


def align(student: jax.Array, teacher: jax.Array, vocabulary: str) -> tuple[jax.Array, jax.Array]:
    """Both over one vocabulary: the common one ("truncate"), or the wider one with -inf where a side has no token."""
    if vocabulary == "truncate":
        width = min(student.shape[1], teacher.shape[1])
        return student[:, :width], teacher[:, :width]
    width = max(student.shape[1], teacher.shape[1])
    pad = [jnp.pad(z, ((0, 0), (0, width - z.shape[1])), constant_values=-jnp.inf) for z in (student, teacher)]
    return pad[0], pad[1]


def align_shards(
    student: Float[Array, "C V"], teacher: Float[Array, "C V"], shards: VocabularyShards, vocabulary: str
) -> tuple[jax.Array, jax.Array]:
    """Both over one vocabulary, the student over its own before, with -inf in columns that are in none."""
    axes = shards.axes
    teacher = own_columns(teacher, shards.teacher, axes)
    if vocabulary == "mask" or shards.student == shards.teacher:
        return student, teacher
    common = min(shards.student, shards.teacher)
    return own_columns(student, common, axes), own_columns(teacher, common, axes)


def own_columns(z: Float[Array, "C V"], width: int, axes: Axes) -> Float[Array, "C V"]:
    """A device's columns of a vocabulary of ``width`` tokens, -inf in those that are filling."""
    return jnp.where(_is_token(z, width, axes), z, -jnp.inf)


def _is_token(z: Float[Array, "C V"], width: int, axes: Axes) -> Bool[Array, " V"]:
    return first_column(z, axes) + jnp.arange(z.shape[1]) < width


def first_column(z: Float[Array, "C V"], axes: Axes) -> Int[Array, ""] | int:
    """Which token the first of a device's columns is."""
    return jax.lax.axis_index(axes) * z.shape[1] if axes else 0


def log_sum_exp(z: Float[Array, "C V"], axes: Axes = ()) -> LogSumExp:
    """Over the columns of all devices along the mesh ``axes``: a maximum and a sum of each row are exchanged."""
    top = jnp.max(z, axis=1)
    if axes:
        top = jax.lax.pmax(top, axes)
    return LogSumExp(top, jnp.log(psum(jnp.sum(jnp.exp(z - top[:, None]), axis=1), axes)))


def at_label(x: Float[Array, "C V"], labels: Int[Array, " C"], axes: Axes = ()) -> Float[Array, " C"]:
    """The column of the label; a label outside the vocabulary has been answered by a NaN weight before."""
    found = jnp.take_along_axis(x, labels[:, None], axis=1, mode="clip")[:, 0]
    if not axes:
        return found
    return psum(jnp.where((labels >= 0) & (labels < x.shape[1]), found, 0), axes)


def own_labels(z: Float[Array, "C V"], labels: Int[Array, " C"], axes: Axes) -> Int[Array, " C"]:
    """The column of the label, if it is a device's own."""
    return labels - jnp.asarray(first_column(z, axes)).astype(labels.dtype)


def top_token(
    z: Float[Array, "C V"], shards: VocabularyShards | None = None, of_teacher: bool = False
) -> Int[Array, " C"]:
    """The token of the largest logit, the first of several."""
    axes = () if shards is None else shards.axes
    if shards is not None:
        z = own_columns(z, shards.teacher if of_teacher else shards.student, axes)
    own = jnp.argmax(z, axis=1).astype(jnp.int32)
    if not axes:
        return own
    largest = jnp.max(z, axis=1)
    is_largest = largest == jax.lax.pmax(largest, axes)
    return jax.lax.pmin(jnp.where(is_largest, own + first_column(z, axes), jnp.iinfo(jnp.int32).max), axes)


def hard_gradient(rows: ChunkRows, options: RowOptions, z: Float[Array, "C V"], lse: LogSumExp) -> Float[Array, "C V"]:
    """Of ``sum(hard_scale * hard)``, to the student's logits: 0 in a row of scale 0 whatever it holds."""
    axes, scale = _axes(options), rows.hard_scale[:, None]
    q = jnp.exp(_log_probability(z, lse))
    if rows.z_loss is not None:
        q = q * (1 + 2 * rows.z_loss * lse.value)[:, None]
    labels = own_labels(z, rows.labels, axes)
    target = jax.nn.one_hot(labels, z.shape[1], dtype=z.dtype)
    if rows.label_smoothing is not None:
        target = target + rows.label_smoothing * (1 / num_tokens(rows, options) - target)
    if options.is_tempered and options.tempers_labels:
        scale = scale / rows.temperature
    return jnp.where(scale == 0, 0, scale * (q - target))


def num_tokens(rows: ChunkRows, options: RowOptions) -> int:
    """Of the student's vocabulary, on all devices and without filling."""
    return rows.student.shape[1] if options.shards is None else options.shards.student


def hard_part(rows: ChunkRows, options: RowOptions) -> tuple[LogSumExp, HardLosses]:
    """What is hard of a `RowResult`, for a soft loss that is computed elsewhere."""
    lse = log_sum_exp(rows.student)
    return lse, _hard_losses(rows, options, rows.student, lse)


def _hard_losses(rows: ChunkRows, options: RowOptions, z: Float[Array, "C V"], lse: LogSumExp) -> HardLosses:
    if not options.has_labels:
        return HardLosses(*[jnp.zeros_like(lse.top)] * 3)
    axes, distance_sum = _axes(options), None
    label_logit = at_label(z, own_labels(z, rows.labels, axes), axes)
    if rows.label_smoothing is not None:
        distances = z - label_logit[:, None]
        if options.shards is not None:
            distances = jnp.where(_is_token(z, options.shards.student, axes), distances, 0)
        distance_sum = psum(jnp.sum(distances, axis=1), axes)
    return hard_losses(rows, lse, label_logit, distance_sum, num_tokens(rows, options))


def hard_losses(
    rows: ChunkRows, lse: LogSumExp, label_logit: Float[Array, " C"], distance_sum: jax.Array | None, width: int
) -> HardLosses:
    """Where the sums over columns are known.

    Args:
      distance_sum: of ``z - label_logit``, if there is label smoothing: the differences, not the logits, which may all
        be large.
    """
    nll = lse.log_total - (label_logit - lse.top)
    hard = nll
    if rows.label_smoothing is not None:
        # A label of probability 0 makes it infinite; the distances from it are no numbers.
        assert distance_sum is not None
        uniform = jnp.where(label_logit == -jnp.inf, jnp.inf, nll - distance_sum / width)
        hard = weigh(1 - rows.label_smoothing, nll) + weigh(rows.label_smoothing, uniform)
    if rows.z_loss is not None:
        hard = hard + rows.z_loss * jnp.square(lse.value)
    return HardLosses(hard, nll, (label_logit >= lse.top).astype(nll.dtype))
