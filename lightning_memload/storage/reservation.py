"""Addresses for files that the kernel cannot map: an object is loaded on them, and no byte is read for that.

``torch.load`` needs a storage for each tensor. A storage on reserved addresses takes no memory and tells by its address
which bytes it stands for. Nothing may read or write it before :meth:`Reservation.fill`: the process would end. So the
code that loads fills a storage before other code can reach it, or replaces all tensors on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from lightning_memload.storage.file_mapping import FileMapping, page_ranges
from lightning_memload.storage.file_set import FileSet
from lightning_memload.storage.kernel import map_memory, move_memory, reserve_addresses, unmap_memory
from lightning_memload.storage.source import read_fully

__all__ = ["Reservation", "map_or_reserve"]


class Reservation(FileMapping):
    """A :class:`FileMapping` without the files: the addresses are reserved, and :meth:`fill` gives them memory.

    Args:
        source: The open files. The caller closes them.
    """

    def __init__(self, source: FileSet) -> None:
        super().__init__(source)
        self._filled: list[tuple[int, int]] = []

    def _map_files(self) -> None:
        """Nothing is mapped."""

    def fill(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Reads ranges into ordinary memory at their addresses. Pages that were filled before stay as they are.

        Args:
            ranges: Offset and length of each range in the run of all files.

        Raises:
            CheckpointReadError: Reading failed.

        Peak memory: the ranges, rounded to pages. It stays as long as a storage on any of them.
        """
        for start, end in _without(page_ranges(sorted(ranges), self.nbytes), self._filled):
            address = map_memory(end - start)
            try:
                nbytes = min(end, self.nbytes) - start
                buffer = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
                read_fully(self.source, [buffer], start, name_at=lambda _: None)
            except BaseException:
                unmap_memory(address, end - start)
                raise
            move_memory(address, end - start, self._base + start)
            self._filled.append((start, end))
            self._filled.sort()

    def abandon(self) -> None:
        """After a load that failed: makes all other addresses readable, as zeros.

        A traceback may show its variables. Reading one of their tensors would end the process.
        """
        for start, end in _without(page_ranges([(0, self.nbytes)], self.nbytes), self._filled):
            reserve_addresses(end - start, at=self._base + start, readable=True)

    def is_filled(self, offset: int, nbytes: int) -> bool:
        """Whether a whole range is in ordinary memory."""
        return not _without([(offset, offset + nbytes)], self._filled)

    def live_ranges(self) -> list[tuple[int, int]]:
        """Offset and length of each storage that is alive."""
        return [(start, nbytes) for ref, start, nbytes in self._spans if ref() is not None]


def map_or_reserve(source: FileSet) -> FileMapping:
    """Maps files, or reserves addresses for them if the kernel cannot map them.

    Raises:
        OSError: The kernel refuses.
    """
    return FileMapping(source) if source.can_map else Reservation(source)


def _without(ranges: Sequence[tuple[int, int]], taken: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of sorted ranges that are outside of other sorted ranges."""
    left: list[tuple[int, int]] = []
    for start, end in ranges:
        for taken_start, taken_end in taken:
            if taken_start < end and start < taken_end:
                if start < taken_start:
                    left.append((start, taken_start))
                start = max(start, taken_end)
        if start < end:
            left.append((start, end))
    return left
