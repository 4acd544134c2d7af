"""Checksums of records that several ranks have read together.

Each rank computes the CRC-32s of the bytes that it has read. For a record that no rank has read alone, the ranks
exchange these CRC-32s, and each rank combines them to the CRC-32 of the whole record. No byte is read twice, and all
ranks come to the same result. A part that is in no complete run of parts is not compared, see :func:`combine_parts`.
Apart from the exchange all functions are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from zlib_ng import zlib_ng

__all__ = ["CombinedChecksum", "PartChecksum", "combine_parts", "gather_checksums", "merge_parts"]


class PartChecksum(NamedTuple):
    """The CRC-32 of a part of a record: ``nbytes`` bytes from byte ``start`` of the record on."""

    start: int
    nbytes: int
    crc32: int


class CombinedChecksum(NamedTuple):
    """The CRC-32 of a whole record.

    Attributes:
        crc32: The CRC-32 of the bytes that were read.
        ranks: The ranks that have read these bytes, in ascending order.
    """

    crc32: int
    ranks: tuple[int, ...]


def merge_parts(parts: Iterable[PartChecksum]) -> list[PartChecksum]:
    """Merges the parts of one record that follow each other, to make a message short.

    Args:
        parts: The parts that one rank has read, in any order, not overlapping.

    Returns:
        The parts in ascending order. No two of them touch.
    """
    merged: list[PartChecksum] = []
    for part in sorted(parts):
        if merged and merged[-1].start + merged[-1].nbytes == part.start:
            start, nbytes, crc32 = merged[-1]
            merged[-1] = PartChecksum(start, nbytes + part.nbytes, _combine(crc32, part))
        else:
            merged.append(part)
    return merged


def combine_parts(parts: Mapping[int, Iterable[PartChecksum]], nbytes: int) -> list[CombinedChecksum]:
    """Combines the parts of one record.

    Parts are combined if they touch: the end of one part is the start of the next part. Several ranks may have read the
    same bytes. Each way through the parts is then followed, so the parts of all these ranks are compared.

    Args:
        parts: The parts that each rank has read, by rank, in any order.
        nbytes: Length of the record in bytes.

    Returns:
        Nothing if no run of touching parts covers the record. One checksum if the ranks have read the same bytes.
        Several checksums, in ascending order, if ranks have read different bytes.
    """
    flat = sorted((part, rank) for rank, of_rank in parts.items() for part in of_rank if part.nbytes)
    # For each position that runs of parts reach from byte 0: the CRC-32s of these runs, and who read them.
    reached: dict[int, dict[int, set[int]]] = {0: {0: set()}}
    for part, rank in flat:
        for crc32, ranks in reached.get(part.start, {}).items():
            ending = reached.setdefault(part.start + part.nbytes, {})
            ending.setdefault(_combine(crc32, part), set()).update(ranks, (rank,))
    return [CombinedChecksum(crc32, tuple(sorted(ranks))) for crc32, ranks in sorted(reached.get(nbytes, {}).items())]


def gather_checksums(
    parts: Mapping[int, Iterable[PartChecksum]],
    sizes: Mapping[int, int],
    agree: Callable[[Any], Mapping[int, Any]],
) -> dict[int, list[CombinedChecksum]]:
    """Exchanges the parts of all ranks and combines them. Every rank must call it.

    Args:
        parts: The parts that this rank has read, not overlapping, by any number that names a record on all ranks, such
            as its file offset.
        sizes: Length of the records in bytes, by the same number. It has all records of all ranks.
        agree: Sends a JSON message to all ranks and returns the messages of all ranks by rank, such as
            ``Companions.agree``. Its errors pass through.

    Returns:
        For each record of which any rank has sent a part: see :func:`combine_parts`. Equal on all ranks.
    """
    told = agree([[record, merge_parts(of_record)] for record, of_record in sorted(parts.items())])
    by_record: dict[int, dict[int, list[PartChecksum]]] = {}
    for rank, message in told.items():
        for record, of_record in message:
            by_record.setdefault(record, {})[rank] = [PartChecksum(*part) for part in of_record]
    return {record: combine_parts(by_record[record], sizes[record]) for record in sorted(by_record)}


def _combine(crc32: int, part: PartChecksum) -> int:
    return int(zlib_ng.crc32_combine(crc32, part.crc32, part.nbytes))
