"""Which file lies under a range of memory, and whether it is still what it was.

Pages of a file are not copied while nothing needs them, so a rewrite in place shows through. A file that is replaced by
another one of the same name does no harm: the pages are those of the old one.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

__all__ = ["MappedFile", "file_under"]

# A private mapping with a path: range, access, offset, device, inode, path (proc(5)).
_REGION = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r..p [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ (\d+)\s+(/.*)$", re.MULTILINE)

# How coarse times of files are: a kernel's tick of 10 ms at most, or one or two seconds (FAT, NFS, HFS+).
_TICK_NS, _COARSE_TICK_NS, _SECOND_NS = 20_000_000, 2_000_000_000, 1_000_000_000


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A file, as it was.

    Attributes:
        path: Where it is.
        inode: Which it is.
        size_bytes: Its size.
        modified_ns: When it was written.
    """

    path: str
    inode: int
    size_bytes: int
    modified_ns: int

    @property
    def has_changed(self) -> bool:
        """Whether this very file has been written to since."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False  # Its name is gone. Its pages are not.
        if status.st_ino != self.inode:
            return False
        return (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.modified_ns)


def file_under(address: int, nbytes: int) -> MappedFile | None:
    """The file whose private pages a range of memory is, ``None`` if it is other memory or that cannot be told.

    Nor can a file be told that was written this very moment: its time would not show that it is written once more.
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
