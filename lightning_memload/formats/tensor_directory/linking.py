"""Writes one file for each record, or hard-links the file of the previous checkpoint if its bytes are equal.

Neither checksums nor version counters are trusted: each part is compared with the old file before it is written. A
tensor is copied from its device only once. If a later part differs, the equal parts are copied from the old file. A
file that differs from its first bytes on, as every trained one does, costs a read of one page. A linked file is one
file with two names: a change in place changes both checkpoints.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import threading
from collections.abc import Sequence

from lightning_memload.bytes import RecordPart
from lightning_memload.storage.descriptors import OwnDescriptors
from lightning_memload.transfer.sinks import LocalSink

__all__ = ["LinkingFiles"]

# A trained tensor differs in its first bytes. An equal one is read in blocks that stay in the core's cache while they
# are compared.
_FIRST_BYTES = 4 << 10
_COMPARE_BYTES = 256 << 10


class LinkingFiles:
    """A record writer with one file for each record. Close it when all records are written, or after an error.

    Args:
        names: The files to create. They must not exist.
        sizes: Bytes of each file, at least 1.
        old_names: For each file: an old file that may have equal bytes, or ``None``.
        start_writeback: See :class:`LocalSink`.

    Peak memory: 256 KiB for each thread if there are old files.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], old_names: Sequence[str | None], *, start_writeback: bool
    ) -> None:
        self._files = [
            _GrowingFile(name, nbytes, old_name, start_writeback)
            for name, nbytes, old_name in zip(names, sizes, old_names, strict=True)
        ]

    @property
    def bytes_linked(self) -> int:
        """Size of the files that have been linked so far."""
        return sum(file.nbytes for file in self._files if file.is_linked)

    def write(self, parts: Sequence[RecordPart], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Writes or compares parts, in any order and from any thread, see :class:`RecordWriter`."""
        for part, view in zip(parts, data, strict=True):
            self._files[part.record].take(view, part.start)

    def close(self) -> None:
        """Closes the old files."""
        for file in self._files:
            file.close()


class _GrowingFile:
    """One file that is being written, and the old file to compare it with."""

    def __init__(self, name: str, nbytes: int, old_name: str | None, start_writeback: bool) -> None:
        self.nbytes = nbytes
        self.is_linked = False
        self._name = name
        self._old_name = old_name
        self._start_writeback = start_writeback
        self._lock = threading.Lock()
        self._old = -1
        # Start and length of the equal parts. They are written only if another part differs.
        self._same: list[tuple[int, int]] = []
        self._missing = nbytes

    def take(self, view: memoryview, start: int) -> None:
        if self._is_same(view, start):
            with self._lock:
                self._same.append((start, len(view)))
        else:
            self._write(view, start)
        with self._lock:
            self._missing -= len(view)
            if self._missing:
                return
        if not self._link():
            for position, nbytes in self._same:
                self._copy(position, nbytes)
        self.close()

    def close(self) -> None:
        if self._old >= 0:
            OwnDescriptors.close(self._old)
            self._old = -1

    def _is_same(self, view: memoryview, start: int) -> bool:
        with self._lock:
            if self._old_name is None:
                return False
            if self._old < 0 and not self._open_old(self._old_name):
                self._old_name = None
                return False
        if _has_bytes(self._old, start, view):
            return True
        with self._lock:
            self._old_name = None  # the other parts need not be compared
        return False

    def _open_old(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            self._old = OwnDescriptors.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            status = os.fstat(self._old)
            if stat.S_ISREG(status.st_mode) and status.st_size == self.nbytes:
                return True
            self.close()
        return False

    def _write(self, view: memoryview, start: int) -> None:
        # The first part to arrive creates the file.
        descriptor = OwnDescriptors.open(self._name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            LocalSink(descriptor, start_writeback=self._start_writeback).write([view], start)
        finally:
            OwnDescriptors.close(descriptor)

    def _link(self) -> bool:
        """Hard-links the old file if all bytes are equal. Returns whether that succeeded."""
        if self._old_name is None:
            return False
        try:
            os.link(self._old_name, self._name, follow_symlinks=False)
        except OSError:
            return False  # removed, on another file system, owned by another user, or with too many links
        # Another file may have this name since the old file was opened.
        self.is_linked = os.path.samestat(os.lstat(self._name), os.fstat(self._old))
        if not self.is_linked:
            os.unlink(self._name)
        return self.is_linked

    def _copy(self, start: int, nbytes: int) -> None:
        end = start + nbytes
        while start < end:
            data = os.pread(self._old, min(_COMPARE_BYTES, end - start), start)
            if not data:
                raise OSError(f"{self._name}: the file of the previous checkpoint was truncated while it was copied")
            self._write(memoryview(data), start)
            start += len(data)


def _has_bytes(descriptor: int, start: int, view: memoryview) -> bool:
    """Whether a file has these bytes at ``start``. ``False`` if it cannot be read."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    buffer = bytearray(min(_COMPARE_BYTES, len(view)))
    into = memoryview(buffer)
    read = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    done, step = 0, _FIRST_BYTES
    while done < len(view):
        try:
            count = os.preadv(descriptor, [into[: min(step, len(view) - done)]], start + done)
        except OSError:
            return False
        if not count or compare(read, address + done, count):
            return False
        done, step = done + count, _COMPARE_BYTES
    return True
