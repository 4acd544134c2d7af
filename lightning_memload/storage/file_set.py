"""Several files as one run of bytes."""

from __future__ import annotations

import contextlib
import copy
import os
from bisect import bisect_right
from collections.abc import Sequence

from lightning_memload.bytes import lay_out, place_in
from lightning_memload.storage.local import LocalFile
from lightning_memload.storage.places import open_file

__all__ = ["FileSet"]

# With more files than this, each file is reopened for every read: many systems limit a process to 1024 open files.
_MAX_OPEN_FILES = 64


class FileSet:
    """Several files as one run of bytes, laid out by :func:`lay_out`. Offsets of an index are positions in this run.

    Args:
        paths: The files, in the order of the index. The set opens and closes them.

    Attributes:
        files: The open files.
        spans: The place of each file in the run.
        mappable: Those of the files that the kernel can map.

    Raises:
        OSError: A file cannot be opened.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        keep_open = len(paths) <= _MAX_OPEN_FILES
        self.files = tuple(open_file(os.fspath(path), keep_open=keep_open) for path in paths)
        self.mappable = tuple(file for file in self.files if isinstance(file, LocalFile))
        self.spans = lay_out((file.name, file.size_bytes) for file in self.files)
        self._starts = [span.start for span in self.spans]
        self._drop_behind = False

    @property
    def nbytes(self) -> int:
        """Length of the run in bytes, from the first byte of the first file to the last byte of the last file."""
        return self.spans[-1].start + self.spans[-1].nbytes if self.spans else 0

    @property
    def can_map(self) -> bool:
        """Whether the kernel can map all files."""
        return len(self.mappable) == len(self.files)

    @property
    def is_remote(self) -> bool:
        """Whether a read may be a request over a network."""
        return any(file.is_remote for file in self.files)

    def reopened(self) -> FileSet:
        """The same files under independent descriptors, see :meth:`LocalFile.reopened`.

        Raises:
            OSError: A file cannot be opened, or was changed since it was opened. No new descriptor stays open.
        """
        assert self.can_map
        other = copy.copy(self)
        with contextlib.ExitStack() as stack:
            other.files = other.mappable = tuple(stack.enter_context(file.reopened()) for file in self.mappable)
            stack.pop_all()
        return other

    def changed_files(self) -> list[str]:
        """The files that were changed in place since they were opened, judged by size and modification time."""
        return [file.name for file in self.files if file.is_changed()]

    @property
    def drop_behind(self) -> bool:
        """Whether pages that were not cached before are dropped after they were read."""
        return self._drop_behind

    @drop_behind.setter
    def drop_behind(self, enabled: bool) -> None:
        self._drop_behind = enabled
        for file in self.files:
            file.drop_behind = enabled

    def place(self, offset: int) -> tuple[str, int]:
        """The file at an offset and the position within it, see :class:`ByteSource`."""
        return place_in(self.spans, offset)

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an offset, see :class:`ByteSource`. One call reads from one file only."""
        number = bisect_right(self._starts, offset) - 1
        start, size = self._starts[number], self.spans[number].nbytes
        if offset < start + size or number + 1 == len(self.files):
            return self.files[number].readv(buffers, offset - start)
        # Padding between two files. A read that spans a small gap between two tensors includes it; the value is unused.
        gap = min(len(buffers[0]), self._starts[number + 1] - offset)
        buffers[0][:gap] = bytes(gap)
        return gap

    def close(self) -> None:
        """Closes all files. A second call does nothing."""
        for file in self.files:
            file.close()
