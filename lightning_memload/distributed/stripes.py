"""Cuts the reads of a transfer into pieces that the ranks read in turn. Pure functions on integers.

All ranks plan the same reads. They are exchanged in rounds: in each round, rank ``k`` reads piece ``k``, and the ranks
send their pieces to each other. A piece is a run of consecutive reads. Within a piece each read has a place of its own.
Every read is in exactly one piece, and no piece is longer than the limit. This module does not know torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "ALIGNMENT_BYTES",
    "Piece",
    "StripeRound",
    "choose_piece_bytes",
    "choose_read_bytes",
    "cut_stripes",
    "digest_plan",
]

# Tensors of any dtype can be viewed at such a place.
ALIGNMENT_BYTES = 64
# With smaller pieces, an exchange costs more than a read. Such a budget is for too many ranks.
_MIN_PIECE_BYTES = 64 << 10
# A larger piece is no faster, and the first one cannot overlap with any exchange.
_MAX_PIECE_BYTES = 64 << 20
# A piece has at least so many reads, so that several threads can read it, and pieces have about the same length.
_READS_PER_PIECE = 4


class Piece(NamedTuple):
    """The reads ``[first, last)``, and the place of each of them in the piece, in bytes."""

    first: int
    last: int
    places: tuple[int, ...]


class StripeRound(NamedTuple):
    """One piece for each rank.

    Attributes:
        pieces: The pieces, by rank. A piece may be empty.
        nbytes: Length of the longest piece in bytes, rounded up to the alignment.
    """

    pieces: tuple[Piece, ...]
    nbytes: int


def choose_piece_bytes(budget_bytes: int, num_ranks: int) -> int | None:
    """The maximum length of a piece, such that two rounds fit into a budget. The one is read, the other is exchanged.

    Args:
        budget_bytes: Memory for the pieces of all ranks.
        num_ranks: Number of ranks.

    Returns:
        The length in bytes. ``None`` if the budget is too small for so many ranks.
    """
    # Each piece is followed by a flag of its rank.
    most = budget_bytes // (2 * num_ranks) - ALIGNMENT_BYTES
    piece_bytes = min(most, _MAX_PIECE_BYTES) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    return piece_bytes if piece_bytes >= _MIN_PIECE_BYTES else None


def choose_read_bytes(piece_bytes: int, block_bytes: int) -> int:
    """The maximum length of one read, at most ``block_bytes``, such that a piece has several reads."""
    return min(block_bytes, piece_bytes // _READS_PER_PIECE // ALIGNMENT_BYTES * ALIGNMENT_BYTES)


def cut_stripes(sizes: Sequence[int], num_ranks: int, piece_bytes: int) -> list[StripeRound]:
    """Cuts reads into rounds of pieces of about the same length.

    Args:
        sizes: Length of each read in bytes, at most half of ``piece_bytes`` when rounded up to the alignment.
        num_ranks: Number of ranks.
        piece_bytes: Maximum length of a piece.

    Returns:
        The rounds. As few as possible, except that a piece may be shorter by the length of the longest read.

    Raises:
        ValueError: A read is too long.
    """
    padded = [_aligned(size) for size in sizes]
    longest, total = max(padded, default=0), sum(padded)
    if 2 * longest > piece_bytes:
        raise ValueError(f"A read of {longest} bytes is too long for pieces of {piece_bytes} bytes.")
    if not total:
        return []
    # A piece ends with the first read that reaches its share. So it exceeds its share by less than one read.
    num_pieces = num_ranks * -(-total // (num_ranks * (piece_bytes - longest)))
    pieces: list[Piece] = []
    first = position = 0
    for number in range(num_pieces):
        end = total * (number + 1) // num_pieces
        start, last, places = position, first, []
        while last < len(padded) and position < end:
            places.append(position - start)
            position += padded[last]
            last += 1
        pieces.append(Piece(first, last, tuple(places)))
        first = last
    rounds = [tuple(pieces[at : at + num_ranks]) for at in range(0, num_pieces, num_ranks)]
    return [StripeRound(of_round, max(_length(piece, padded) for piece in of_round)) for of_round in rounds]


def digest_plan(reads: Iterable[tuple[int, int]], *limits: int) -> str:
    """A word that is equal on two ranks if they plan the same reads.

    Args:
        reads: Offset and length of each read, in order.
        limits: Further numbers that must be equal.
    """
    numbers = array("q", limits)
    for offset, nbytes in reads:
        numbers.append(offset)
        numbers.append(nbytes)
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()


def _length(piece: Piece, padded: Sequence[int]) -> int:
    return piece.places[-1] + padded[piece.last - 1] if piece.places else 0


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
