"""Finds the file that is mapped at a range of memory, and tells whether it has changed.

Pages of a mapped file are read when they are used, so a write to the file in place changes them. Replacing the file by
another one of the same name is harmless: the pages are those of the old file.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

__all__ = ["MappedFile", "file_under"]

# A private mapping with a path: range, access, offset, device, inode, path (proc(5)).
_REGION = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r..p [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ (\d+)\s+(/.*)$", re.MULTILINE)

# The resolution of the times of files: a kernel's tick of 10 ms at most, or one or two seconds (FAT, NFS, HFS+).
_TICK_NS, _COARSE_TICK_NS, _SECOND_NS = 20_000_000, 2_000_000_000, 1_000_000_000


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A file, and its state when it was found.

    Attributes:
        path: The path of the file.
        inode: Its inode number.
        size_bytes: Its size.
        modified_ns: The time of its last change, in nanoseconds since 1970.
    """

    path: str
    inode: int
    size_bytes: int
    modified_ns: int

    @property
    def has_changed(self) -> bool:
        """Whether the file has been written to since. ``False`` if another file has its name."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False  # The name is gone. The pages still exist.
        if status.st_ino != self.inode:
            return False
        return (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.modified_ns)


def file_under(address: int, nbytes: int) -> MappedFile | None:
    """Returns the file that is mapped privately at a range of memory. ``None`` for other memory, or if it is unknown.

    Also ``None`` for a file that was changed just now: if it changed again, its time could stay the same.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            regions = maps.read()
    except OSError:
        return None
    for start, end, inode, path in _REGION.findall(regions):
        if int(start, 16) <= address and address + nbytes <= int(end, 16):
            try:
                status = os.stat(path)
            except OSError:
                return None
            if status.st_ino != int(inode):
                return None
            tick_ns = _TICK_NS if status.st_mtime_ns % _SECOND_NS else _COARSE_TICK_NS
            if time.time_ns() - status.st_mtime_ns < tick_ns:
                return None
            return MappedFile(path, status.st_ino, status.st_size, status.st_mtime_ns)
    return None
