"""The plan of writes: the bytes of records that each write contains. Pure functions on integers."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_memload.bytes import RecordPart

__all__ = ["plan_writes"]


def plan_writes(sizes: Sequence[int], *, block_bytes: int, max_parts: int) -> list[tuple[RecordPart, ...]]:
    """Divides records into writes: small records share a write, a large record is split into several writes.

    Args:
        sizes: Bytes of each record, in the order of the archive.
        block_bytes: Maximum data of one write in bytes, at least 1.
        max_parts: Maximum number of records in one write, at least 1.

    Returns:
        The parts of each write, in the order of the archive. Every byte of every record is in exactly one part. A
        record without data is one empty part. The parts of a write are adjacent in the archive. Each write of a split
        record holds one part of it and nothing else.

    Raises:
        ValueError: A limit is not positive.
    """
    if block_bytes < 1 or max_parts < 1:
        raise ValueError(f"block_bytes and max_parts must be at least 1, got {block_bytes} and {max_parts}")
    writes: list[tuple[RecordPart, ...]] = []
    together: list[RecordPart] = []
    room = block_bytes
    for record, nbytes in enumerate(sizes):
        if together and (nbytes > room or len(together) == max_parts):
            writes.append(tuple(together))
            together, room = [], block_bytes
        if nbytes > block_bytes:
            for start in range(0, nbytes, block_bytes):
                writes.append((RecordPart(record, start, min(block_bytes, nbytes - start)),))
            continue
        together.append(RecordPart(record, 0, nbytes))
        room -= nbytes
    if together:
        writes.append(tuple(together))
    return writes
