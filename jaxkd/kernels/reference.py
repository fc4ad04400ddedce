"""The rows of one chunk in plain XLA: logits of student and teacher -> losses of each row and the logits' gradient.

`pallas_triton` and `pallas_mosaic_gpu` have the same function as GPU kernels. This is the definition of what they
compute.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkd.kernels.kernel_math import LogSumExp
from jaxkd.kernels.signature import ChunkRows, RowOptions, RowResult, VocabularyShards
from jaxkd.logits import Place, placed
from jaxkd.loop.collectives import psum
from jaxkd.loop.partitioning import Axes


def row_losses(rows: ChunkRows, options: RowOptions, place: Place | None = None) -> RowResult:
    """The losses of each row and their gradient, for a divergence that is a sum over tokens.

    soft = D(softmax(teacher / temperature), softmax(student / temperature)) over the common vocabulary;
    hard = -log softmax(student)[label], over the student's, and 0 without labels.
    With ``slope = d term / d log q`` the gradient of soft is ``(slope - q sum(slope)) / temperature``. What comes back
    of the gradient is `placed`.
    """
    student, teacher, labels = rows.student, rows.teacher, rows.labels
    width, shards = student.shape[1], options.shards
    axes = () if shards is None else shards.axes
    if shards is None:
        z_q, z_p = align(student, teacher, options.vocabulary)
    else:
        labels = own_labels(student, labels, axes)
        student, z_q, z_p = align_shards(student, teacher, shards, options.vocabulary)
    is_same = z_q.shape == student.shape and (shards is None or shards.student <= shards.teacher)
    if options.is_tempered:
        z_q, z_p = z_q / rows.temperature, z_p / rows.temperature
    log_q, log_p = log_softmax(z_q, axes), log_softmax(z_p, axes)
    if options.gradient_dtype is None:
        term, slope = rows.divergence.terms(log_p, log_q), None
    else:
        term, slope = rows.divergence.term_and_slope(log_p, log_q)
    soft = psum(jnp.sum(term, axis=1), axes)
    if rows.divergence.is_nonnegative:
        soft = jnp.maximum(soft, 0)  # only rounding takes it below
    hard = jnp.zeros_like(soft)
    if options.has_labels:
        plain_log_q = log_q if is_same and not options.is_tempered else log_softmax(student, axes)
        hard = -at_label(plain_log_q, labels, axes)
    if slope is None:
        return soft, hard, None

    d = slope - jnp.exp(log_q) * psum(jnp.sum(slope, axis=1, keepdims=True), axes)
    scale = (rows.soft_scale / rows.temperature)[:, None]
    d = jnp.where(scale == 0, 0, scale * d)[:, :width]
    d = jnp.pad(d, ((0, 0), (0, width - d.shape[1])))
    if options.has_labels:
        d = d + hard_gradient(plain_log_q, labels, rows.hard_scale)
    return soft, hard, placed(d.astype(options.gradient_dtype), place)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The student over its vocabulary, and both over one, with -inf in columns that are in none."""
    axes = shards.axes
    student, teacher = own_columns(student, shards.student, axes), own_columns(teacher, shards.teacher, axes)
    if vocabulary == "mask" or shards.student == shards.teacher:
        return student, student, teacher
    common = min(shards.student, shards.teacher)
    return student, own_columns(student, common, axes), own_columns(teacher, common, axes)


def own_columns(z: Float[Array, "C V"], width: int, axes: Axes) -> Float[Array, "C V"]:
    """A device's columns of a vocabulary of ``width`` tokens, -inf in those that are filling."""
    column = first_column(z, axes) + jnp.arange(z.shape[1])
    return jnp.where(column < width, z, -jnp.inf)


def first_column(z: Float[Array, "C V"], axes: Axes) -> Int[Array, ""] | int:
    """Which token the first of a device's columns is."""
    return jax.lax.axis_index(axes) * z.shape[1] if axes else 0


def log_softmax(z: Float[Array, "C V"], axes: Axes = ()) -> Float[Array, "C V"]:
    """Over the columns of all devices along the mesh ``axes``: a maximum and a sum of each row are exchanged."""
    if not axes:
        return jax.nn.log_softmax(z)
    z = z - jax.lax.pmax(jnp.max(z, axis=1, keepdims=True), axes)
    return z - jnp.log(psum(jnp.sum(jnp.exp(z), axis=1, keepdims=True), axes))


def at_label(x: Float[Array, "C V"], labels: Int[Array, " C"], axes: Axes = ()) -> Float[Array, " C"]:
    """The column of the label; a label outside the vocabulary has been answered by a NaN weight before."""
    found = jnp.take_along_axis(x, labels[:, None], axis=1, mode="clip")[:, 0]
    if not axes:
        return found
    return psum(jnp.where((labels >= 0) & (labels < x.shape[1]), found, 0), axes)


def own_labels(z: Float[Array, "C V"], labels: Int[Array, " C"], axes: Axes) -> Int[Array, " C"]:
    """The column of the label, if it is a device's own."""
    return labels - jnp.asarray(first_column(z, axes)).astype(labels.dtype)


def top_token(z: Float[Array, "C V"], axes: Axes = ()) -> Int[Array, " C"]:
    """The token of the largest logit, the first of several."""
    own = jnp.argmax(z, axis=1).astype(jnp.int32)
    if not axes:
        return own
    largest = jnp.max(z, axis=1)
    is_largest = largest == jax.lax.pmax(largest, axes)
    return jax.lax.pmin(jnp.where(is_largest, own + first_column(z, axes), jnp.iinfo(jnp.int32).max), axes)


def label_log_probs(
    student: Float[Array, "C V"],
    labels: Int[Array, " C"],
    scale: Float[Array, " C"],
    gradient_dtype: jnp.dtype | None,
    shards: VocabularyShards | None = None,
    place: Place | None = None,
) -> tuple[Float[Array, " C"], Float[Array, "_ V"] | None]:
    """log softmax(student)[label] of each row, and the gradient of their sum weighed by ``scale``."""
    axes = () if shards is None else shards.axes
    if shards is not None:
        labels = own_labels(student, labels, axes)
        student = own_columns(student, shards.student, axes)
    log_q = log_softmax(student, axes)
    values = at_label(log_q, labels, axes)
    if gradient_dtype is None:
        return values, None
    return values, placed(hard_gradient(log_q, labels, -scale).astype(gradient_dtype), place)


def hard_gradient(
    log_q: Float[Array, "C V"], labels: Int[Array, " C"], hard_scale: Float[Array, " C"]
) -> Float[Array, "C V"]:
    """Of ``sum(hard_scale * hard)``, to the student's logits: 0 in a row of scale 0 whatever it holds."""
    scale = hard_scale[:, None]
    d = jnp.exp(log_q) - jax.nn.one_hot(labels, log_q.shape[1], dtype=log_q.dtype)
    return jnp.where(scale == 0, 0, scale * d)


def hard_loss(rows: ChunkRows, lse: LogSumExp, options: RowOptions) -> Float[Array, " C"]:
    """Cross-entropy with the label where the student's log-sum-exps (C,) are known, and 0 without labels."""
    if not options.has_labels:
        return jnp.zeros_like(lse.top)
    return lse.log_total - (at_label(rows.student, rows.labels) - lse.top)
