"""CRC-32s of records whose bytes several threads bring in any order.

Each thread takes the checksum of what it has just read, while that is still in its cache; the last one puts the parts
of a record together.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from zlib_ng import zlib_ng

__all__ = ["PartialChecksums"]


class PartialChecksums:
    """Collects the parts of records until they are whole.

    Args:
        nbytes: The length of every record, none of them 0.
    """

    def __init__(self, nbytes: Sequence[int]) -> None:
        self._nbytes = nbytes
        self._lock = threading.Lock()
        # For each record that has begun: bytes still to come, and start, length and CRC-32 of each part.
        self._parts: dict[int, list[tuple[int, int, int]]] = {}
        self._missing: dict[int, int] = {}

    def update(self, record: int, start: int, parts: Sequence[memoryview]) -> int | None:
        """Takes in bytes of a record. Every byte must come once.

        Args:
            record: Position of the record.
            start: Where in the record the bytes begin.
            parts: The bytes, one after the other.

        Returns:
            The record's CRC-32 when these were the last of its bytes, else ``None``.
        """
        crc = nbytes = 0
        for part in parts:
            crc = zlib_ng.crc32(part, crc)
            nbytes += len(part)
        with self._lock:
            found = self._parts.setdefault(record, [])
            found.append((start, nbytes, crc))
            missing = self._missing.get(record, self._nbytes[record]) - nbytes
            self._missing[record] = missing
            if missing:
                return None
            del self._parts[record], self._missing[record]
        found.sort()
        _, _, whole = found[0]
        for _, nbytes, crc in found[1:]:
            whole = zlib_ng.crc32_combine(whole, crc, nbytes)
        return int(whole)
