"""CRC-32s of records whose bytes are read by several threads, in any order.

Each thread computes the checksum of the bytes that it has just read, while they are still in its cache. The thread that
reads the last part of a record combines the checksums of all parts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from zlib_ng import zlib_ng

from lightning_memload.distributed import PartChecksum

__all__ = ["PartialChecksums"]


class PartialChecksums:
    """Collects the checksums of parts until each record is complete.

    Args:
        nbytes: Length of each record in bytes, none of them 0.
    """

    def __init__(self, nbytes: Sequence[int]) -> None:
        self._nbytes = nbytes
        self._lock = threading.Lock()
        # For each incomplete record: start, length and CRC-32 of each part, and the number of missing bytes.
        self._parts: dict[int, list[tuple[int, int, int]]] = {}
        self._missing: dict[int, int] = {}

    def update(self, record: int, start: int, parts: Sequence[memoryview]) -> int | None:
        """Adds bytes of a record. Every byte must be added exactly once.

        Args:
            record: Position of the record in ``nbytes``.
            start: Offset of the bytes in the record.
            parts: The bytes, as consecutive buffers.

        Returns:
            The CRC-32 of the record if it is now complete, else ``None``.
        """
        crc32 = nbytes = 0
        for part in parts:
            crc32 = zlib_ng.crc32(part, crc32)
            nbytes += len(part)
        return self.add(record, start, nbytes, crc32)

    def add(self, record: int, start: int, nbytes: int, crc32: int) -> int | None:
        """Adds the checksum of bytes of a record, see :meth:`update`."""
        with self._lock:
            found = self._parts.setdefault(record, [])
            found.append((start, nbytes, crc32))
            missing = self._missing.get(record, self._nbytes[record]) - nbytes
            self._missing[record] = missing
            if missing:
                return None
            del self._parts[record], self._missing[record]
        found.sort()
        _, _, whole = found[0]
        for _, length, part_crc32 in found[1:]:
            whole = zlib_ng.crc32_combine(whole, part_crc32, length)
        return int(whole)

    def incomplete(self) -> dict[int, list[PartChecksum]]:
        """The parts of the records that are not complete. Other ranks may have read the other parts."""
        with self._lock:
            return {record: [PartChecksum(*part) for part in parts] for record, parts in self._parts.items()}
