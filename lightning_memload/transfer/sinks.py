"""Destinations of bytes: a sink is one file, a record writer distributes records over one or several files.

A sink knows offsets, a record writer knows records. Neither knows where the bytes come from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from typing import IO, Protocol

from lightning_memload.bytes import RecordPart, after

__all__ = ["LocalSink", "RecordWriter", "Sink", "SplitWriter", "StreamSink"]


class Sink(Protocol):
    """One output file."""

    def write(self, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Writes all buffers, one after the other, starting at ``offset``.

        Raises:
            OSError: Not all of them could be written.
        """
        ...


class LocalSink:
    """An open local file. Several threads may write to it at once.

    Args:
        descriptor: Open for writing. The caller closes it.
        start_writeback: Start writing to the disk after every write, so that a later fsync has little left to do.
    """

    def __init__(self, descriptor: int, *, start_writeback: bool = False) -> None:
        self._descriptor = descriptor
        self._start_writeback = start_writeback

    def write(self, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Writes buffers at an offset, see :class:`Sink`."""
        start = offset
        while buffers:
            count = os.pwritev(self._descriptor, buffers, offset)
            offset += count
            buffers = after(buffers, count)
        if self._start_writeback:
            # POSIX_FADV_DONTNEED makes Linux start writing dirty pages to the disk. It drops them only once clean.
            os.posix_fadvise(self._descriptor, start, offset - start, os.POSIX_FADV_DONTNEED)


class StreamSink:
    """A file that can only be written sequentially, by one thread.

    Args:
        file: A binary file, open for writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0

    def write(self, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Writes buffers, see :class:`Sink`. ``offset`` must be the end of the last write."""
        assert offset == self._position
        for buffer in buffers:
            self._file.write(buffer)
            self._position += len(buffer)


class RecordWriter(Protocol):
    """The destination of records: for example one archive, or one file for each record."""

    def write(self, parts: Sequence[RecordPart], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Writes the parts of one write. Called by several threads at once.

        Args:
            parts: Parts that are adjacent in the order of the records.
            data: The bytes of each part.
            crc32s: For each part: the CRC-32 of its record if this part is the last of the record to arrive, else
                ``None``.

        Raises:
            OSError: Not all bytes could be written.
        """
        ...


class SplitWriter:
    """Combines several writers into one.

    Args:
        writers: Pairs of a number of records and the writer for them, in the order of the records.
    """

    def __init__(self, *writers: tuple[int, RecordWriter]) -> None:
        self._ends = list(accumulate(count for count, _ in writers))
        self._writers = writers

    def write(self, parts: Sequence[RecordPart], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Passes each part to the writer of its record, see :class:`RecordWriter`."""
        start = 0
        for end, (count, target) in zip(self._ends, self._writers, strict=True):
            stop = start + sum(part.record < end for part in parts[start:])
            if stop > start:
                moved = [part._replace(record=part.record - end + count) for part in parts[start:stop]]
                target.write(moved, data[start:stop], crc32s[start:stop])
            start = stop
