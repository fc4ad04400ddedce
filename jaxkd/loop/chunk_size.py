"""How many rows are together: the one rule for chunks, and for the pieces in which their logits are formed.

Left to itself it plans for a quarter of the dense formula's temporaries from 1024 rows up, and for half from 512: for
(N, V) logits of each head and as much for their gradients. What no chunk makes smaller is the gradient of the head,
summed over chunks in float32 (V, D): where rows are few and hidden states wide, chunks save less.

A chunk is large since each adds to that sum; a piece is small since its logits are read several times, and are most of
what is planned. So the two are chosen apart, and by what is compiled for.
"""

from typing import Any, NamedTuple

from jaxkd.logits.sources import LinearLogits, Source
from jaxkd.loop.partitioning import ONE_DEVICE, Partitioning
from jaxkd.loop.platform import target_platform

# On a CPU. Logits that outgrow the caches cost more than sums do from 128 rows on.
CPU_ROWS = 32, 256  # of a chunk and of a piece: the least, the most
CPU_PIECE_BYTES = 5 * 2**22  # of the student's logits

# On a GPU, and on what is not known. Below some 1000 rows of a chunk, and 256 of a piece, products wait for the head to
# be read.
CHUNK_BYTES = 5 * 2**28  # of the student's logits, had a chunk them all: 2048 rows of 150k tokens
PIECE_BYTES = 5 * 2**28  # of the logits of all heads
PIECE_ROWS, LEAST_ROWS = 512, 256  # of a piece: that a few rows may be more than an eighth of, and in any case
MULTIPLE = 8  # of a piece's rows, where there are several
ROWS_WITHOUT_PIECES = 1024  # that a chunk has, at least, where all its logits are formed together


class Chunks(NamedTuple):
    """How many rows are together.

    Args:
      size: whose gradients go through the student's head.
      piece: whose logits are formed; `size` is a multiple of it.
    """

    size: int
    piece: int


class Batch(NamedTuple):
    """What decides how many rows are together.

    Args:
      rows: that there are, 1 at least.
      logits: bytes of a row's logits, of all heads.
      student: of the student's alone.
      gradient: of the gradient of the student's, as it goes through the head.
      head_sum: bytes of the head's gradient as it is summed over chunks; 0 without a head.
      is_linear: whether a chunk's logits may be formed in pieces.
    """

    rows: int
    logits: int
    student: int
    gradient: int
    head_sum: int
    is_linear: bool

    def planned_bytes(self, chunks: Chunks) -> int:
        """Temporaries with rows as wide as the vocabulary, by the GPU kernels; without them there are more."""
        head_sum = self.head_sum if chunks.size < self.rows else 0
        return head_sum + chunks.size * self.gradient + chunks.piece * self.logits

    @property
    def dense_bytes(self) -> int:
        return 2 * self.rows * self.logits


def rows_of_chunk(
    chunk_size: int | None, student: Source, *others: Any, partitioning: Partitioning = ONE_DEVICE
) -> Chunks:
    """``chunk_size``, or one chosen by rows, bytes and platform, and in how many pieces; hardly more than there are."""
    batch = batch_of(student, *others, partitioning=partitioning)
    is_cpu = target_platform() == "cpu"
    piece = rows_of_piece(batch, is_cpu)
    if chunk_size is not None:
        return in_pieces(batch, chunk_size, piece, largest=chunk_size)
    most = _most_on_cpu(batch, piece) if is_cpu else _most_elsewhere(batch, piece)
    size = -(-batch.rows // -(-batch.rows // most))  # evened out over the chunks
    return in_pieces(batch, size, piece, largest=2 * size, multiple=1 if is_cpu else MULTIPLE)


def batch_of(student: Source, *others: Any, partitioning: Partitioning = ONE_DEVICE) -> Batch:
    """Of one device, whose chunk has rows of others too where these are gathered."""
    widths = [partitioning.local_width(x.vocabulary) for x in (student, *others)]
    wide, together = student.dtype.itemsize, partitioning.gather_size
    return Batch(
        rows=max(partitioning.local_rows(student.leading_shape[0]), 1),
        logits=together * sum(widths) * wide,
        student=together * widths[0] * wide,
        gradient=together * widths[0] * student.gradient_dtype.itemsize,
        head_sum=widths[0] * student.hidden.shape[-1] * wide if isinstance(student, LinearLogits) else 0,
        is_linear=student.is_linear,
    )


def rows_of_piece(batch: Batch, is_cpu: bool) -> int:
    """A power of two: whose logits are formed together, at most."""
    if is_cpu:
        return power_of_two(CPU_PIECE_BYTES // batch.student, *CPU_ROWS)
    has_teacher = batch.logits > batch.student
    few = min(batch.rows // 4, max(batch.rows // 8, PIECE_ROWS)) if has_teacher else batch.rows // 4
    return power_of_two(min(PIECE_BYTES // batch.logits, few), LEAST_ROWS)


def _most_on_cpu(batch: Batch, piece: int) -> int:
    rows = power_of_two(batch.rows // 8, *CPU_ROWS)
    return rows if batch.is_linear else min(rows, piece)


def _most_elsewhere(batch: Batch, piece: int) -> int:
    """All rows at once where chunks take more than a quarter of the dense bytes, and more than all rows at once do."""
    most = power_of_two(CHUNK_BYTES // batch.student, LEAST_ROWS)
    if not batch.is_linear:
        return min(most, max(power_of_two(batch.rows // 8), ROWS_WITHOUT_PIECES))
    chunks, whole = (batch.planned_bytes(Chunks(size, piece)) for size in (most, batch.rows))
    # Not for many rows: a chunk in which none counts is left out.
    is_whole = chunks > max(whole, batch.dense_bytes // 4) and batch.rows <= 3 * most
    return batch.rows if is_whole else most


def power_of_two(most: int, least: int = 1, limit: int | None = None) -> int:
    """The largest up to ``most``, between ``least`` and ``limit``: such sizes fill the tiles of a matrix product."""
    found = max(1 << max(most, 1).bit_length() - 1, least)
    return found if limit is None else min(found, limit)


def in_pieces(batch: Batch, chunk_size: int, largest_piece: int, largest: int, multiple: int = 1) -> Chunks:
    """Pieces of one size, rounded up to a ``multiple``; the chunk is rounded to them, and never above ``largest``."""
    size = min(chunk_size, batch.rows)
    pieces = -(-size // largest_piece) if batch.is_linear else 1
    if pieces == 1 and size == batch.rows:
        return Chunks(size, size)
    exact = -(-size // pieces)
    sizes = (-(-exact // multiple) * multiple, exact, size // pieces)
    piece = next(x for x in sizes if pieces * x <= largest)
    return Chunks(pieces * piece, piece)
