"""A file for each record: written, or a hard link to a file of the checkpoint before that has the same bytes.

That they are the same is not concluded from checksums or version counters. They are compared, piece by piece, when they
are about to be written, so a tensor is brought from its device once: what was the same in a file that turns out to
differ is copied from the old one. A file that differs from its first bytes on, as every trained one does, costs a read
of one page. Linked files are one file with two names: whoever changes it in place changes both checkpoints.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import threading
from collections.abc import Sequence

from lightning_memload.save.layout import Piece
from lightning_memload.save.writing import LocalSink

__all__ = ["LinkingFiles"]

# What is trained differs at once. What does not is read in stretches that stay in the core's cache for the comparison.
_FIRST_BYTES = 4 << 10
_COMPARE_BYTES = 256 << 10


class LinkingFiles:
    """A target for :class:`Records`: one file for each. Close it when all are written, or writing failed.

    Args:
        names: The files to make. They must not be there.
        sizes: Bytes of each, at least 1.
        old_names: A file that may have the same bytes, ``None`` where there is none.
        start_writeback: See :class:`LocalSink`.

    Peak memory: 256 KiB a thread where there are old files.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], old_names: Sequence[str | None], *, start_writeback: bool
    ) -> None:
        self._files = [
            _File(name, nbytes, old_name, start_writeback)
            for name, nbytes, old_name in zip(names, sizes, old_names, strict=True)
        ]

    @property
    def bytes_linked(self) -> int:
        """Size of the files that are links so far."""
        return sum(file.nbytes for file in self._files if file.is_linked)

    def write(self, pieces: Sequence[Piece], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Takes pieces of records, in any order and from any thread, see :class:`Target`."""
        for piece, view in zip(pieces, data, strict=True):
            self._files[piece.record].take(view, piece.start)

    def close(self) -> None:
        """Lets go of old files."""
        for file in self._files:
            file.close()


class _File:
    """One file on its way, and the old one beside it."""

    def __init__(self, name: str, nbytes: int, old_name: str | None, start_writeback: bool) -> None:
        self.nbytes = nbytes
        self.is_linked = False
        self._name = name
        self._old_name = old_name
        self._start_writeback = start_writeback
        self._lock = threading.Lock()
        self._old = -1
        # Start and length of what need not be written if all the rest is the same too.
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
            os.close(self._old)
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
            self._old_name = None  # the other pieces need not be compared
        return False

    def _open_old(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            self._old = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            status = os.fstat(self._old)
            if stat.S_ISREG(status.st_mode) and status.st_size == self.nbytes:
                return True
            self.close()
        return False

    def _write(self, view: memoryview, start: int) -> None:
        # The first piece to come creates it.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._name, flags, 0o666)
        try:
            LocalSink(descriptor, start_writeback=self._start_writeback).write([view], start)
        finally:
            os.close(descriptor)

    def _link(self) -> bool:
        """Makes the file a link to the old one, if that has all its bytes and the file system lets us."""
        if self._old_name is None:
            return False
        try:
            os.link(self._old_name, self._name, follow_symlinks=False)
        except OSError:
            return False  # gone, on another file system, of another owner, or it has too many names
        # Another checkpoint may have taken the name after it was opened.
        self.is_linked = os.path.samestat(os.lstat(self._name), os.fstat(self._old))
        if not self.is_linked:
            os.unlink(self._name)
        return self.is_linked

    def _copy(self, start: int, nbytes: int) -> None:
        end = start + nbytes
        while start < end:
            data = os.pread(self._old, min(_COMPARE_BYTES, end - start), start)
            if not data:
                raise OSError(f"{self._name}: the file of the checkpoint before lost its end while it was copied")
            self._write(memoryview(data), start)
            start += len(data)


def _has_bytes(descriptor: int, start: int, view: memoryview) -> bool:
    """Whether a file has these bytes, from ``start`` on; ``False`` if it cannot be read."""
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
