"""Cuts the reads of a transfer into stripes that the ranks read in turn. Pure functions on integers.

All ranks plan the same reads. They are exchanged in rounds: in each round, rank ``k`` reads stripe ``k``, and the ranks
send their stripes to each other. A stripe is a run of consecutive reads. Within a stripe each read has a place of its
own. Every read is in exactly one stripe, and no stripe is longer than the limit. This module does not know torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "ALIGNMENT_BYTES",
    "Stripe",
    "StripeRound",
    "choose_read_bytes",
    "choose_stripe_bytes",
    "cut_stripes",
    "digest_plan",
]

# Tensors of any dtype can be viewed at such a place.
ALIGNMENT_BYTES = 64
# With smaller stripes, an exchange costs more than a read. Such a budget is for too many ranks.
_MIN_STRIPE_BYTES = 64 << 10
# A larger stripe is no faster, and the first one cannot overlap with any exchange.
_MAX_STRIPE_BYTES = 64 << 20
# A stripe has at least so many reads, so that several threads can read it, and stripes have about the same length.
_READS_PER_STRIPE = 4


class Stripe(NamedTuple):
    """The reads ``[first, last)``, and the place of each of them in the stripe, in bytes."""

    first: int
    last: int
    places: tuple[int, ...]


class StripeRound(NamedTuple):
    """One stripe for each rank.

    Attributes:
        stripes: The stripes, by rank. A stripe may be empty.
        nbytes: Length of the longest stripe in bytes, rounded up to the alignment.
    """

    stripes: tuple[Stripe, ...]
    nbytes: int


def choose_stripe_bytes(budget_bytes: int, num_ranks: int) -> int | None:
    """The maximum length of a stripe, such that two rounds fit into a budget. The one is read, the other is exchanged.

    Args:
        budget_bytes: Memory for the stripes of all ranks.
        num_ranks: Number of ranks.

    Returns:
        The length in bytes. ``None`` if the budget is too small for so many ranks.
    """
    # Each stripe is followed by a flag of its rank.
    most = budget_bytes // (2 * num_ranks) - ALIGNMENT_BYTES
    stripe_bytes = min(most, _MAX_STRIPE_BYTES) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    return stripe_bytes if stripe_bytes >= _MIN_STRIPE_BYTES else None


def choose_read_bytes(stripe_bytes: int, block_bytes: int) -> int:
    """The maximum length of one read, at most ``block_bytes``, such that a stripe has several reads."""
    return min(block_bytes, stripe_bytes // _READS_PER_STRIPE // ALIGNMENT_BYTES * ALIGNMENT_BYTES)


def cut_stripes(sizes: Sequence[int], num_ranks: int, stripe_bytes: int) -> list[StripeRound]:
    """Cuts reads into rounds of stripes of about the same length.

    Args:
        sizes: Length of each read in bytes, at most half of ``stripe_bytes`` when rounded up to the alignment.
        num_ranks: Number of ranks.
        stripe_bytes: Maximum length of a stripe.

    Returns:
        The rounds. As few as possible, except that a stripe may be shorter by the length of the longest read.

    Raises:
        ValueError: A read is too long.
    """
    padded = [_aligned(size) for size in sizes]
    longest, total = max(padded, default=0), sum(padded)
    if 2 * longest > stripe_bytes:
        raise ValueError(f"A read of {longest} bytes is too long for stripes of {stripe_bytes} bytes.")
    if not total:
        return []
    # A stripe ends with the first read that reaches its share. So it exceeds its share by less than one read.
    num_stripes = num_ranks * -(-total // (num_ranks * (stripe_bytes - longest)))
    stripes: list[Stripe] = []
    first = position = 0
    for number in range(num_stripes):
        end = total * (number + 1) // num_stripes
        start, last, places = position, first, []
        while last < len(padded) and position < end:
            places.append(position - start)
            position += padded[last]
            last += 1
        stripes.append(Stripe(first, last, tuple(places)))
        first = last
    rounds = [tuple(stripes[at : at + num_ranks]) for at in range(0, num_stripes, num_ranks)]
    return [StripeRound(of_round, max(_length(stripe, padded) for stripe in of_round)) for of_round in rounds]


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


def _length(stripe: Stripe, padded: Sequence[int]) -> int:
    return stripe.places[-1] + padded[stripe.last - 1] if stripe.places else 0


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
