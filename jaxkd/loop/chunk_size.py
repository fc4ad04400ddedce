"""How many rows are together: the one rule for chunks, and for the pieces in which their logits are formed."""

from typing import Any, NamedTuple

from jaxkd.logits.sources import Source
from jaxkd.loop.partitioning import ONE_DEVICE, Partitioning

# The logits of a chunk, student and teacher together, would take at most this many bytes unless `chunk_size` says
# otherwise. Where they can be formed a piece at a time, those of a piece take at most half.
CHUNK_BYTES = 5 * 2**29
PIECE_BYTES = CHUNK_BYTES // 2
CHUNK_MULTIPLE = 128


class Chunks(NamedTuple):
    """How many rows are together.

    Args:
      size: whose gradients go through the student's head.
      piece: whose logits are formed; `size` is a multiple of it.
    """

    size: int
    piece: int


def rows_of_chunk(
    chunk_size: int | None, student: Source, *others: Any, partitioning: Partitioning = ONE_DEVICE
) -> Chunks:
    """``chunk_size``, or one chosen by the widths, and in how many pieces; hardly more than a device has rows."""
    num_rows = partitioning.local_rows(student.leading_shape[0])
    width = partitioning.gather_size * sum(partitioning.local_width(x.vocabulary) for x in (student, *others))
    bytes_per_row = width * student.dtype.itemsize
    size = default_chunk_size(num_rows, bytes_per_row) if chunk_size is None else chunk_size
    size = max(min(size, num_rows), 1)
    if not student.is_linear:
        return Chunks(size, size)
    return in_pieces(size, bytes_per_row, largest=chunk_size or 2 * size)


def default_chunk_size(num_rows: int, bytes_per_row: int) -> int:
    """The power of two that `CHUNK_BYTES` allow, evened out over the rows there are.

    A chunk more is a pass more over the head's gradient, and powers of two fill the tiles of a matrix product.
    """
    largest = CHUNK_MULTIPLE
    while 2 * largest * bytes_per_row <= CHUNK_BYTES:
        largest *= 2
    if num_rows <= largest:
        return max(num_rows, 1)
    rows = -(-num_rows // -(-num_rows // largest))
    return -(-rows // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def in_pieces(chunk_size: int, bytes_per_row: int, largest: int) -> Chunks:
    """A power of two of pieces that `PIECE_BYTES` allow; the chunk is rounded to them, and never above ``largest``."""
    pieces = 1
    while chunk_size * bytes_per_row > pieces * PIECE_BYTES and pieces < chunk_size:
        pieces *= 2
    piece = -(-chunk_size // pieces)
    if pieces * piece > largest:
        piece = chunk_size // pieces
    return Chunks(pieces * piece, piece)
