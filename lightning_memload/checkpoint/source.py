"""Where bytes come from: one class per place, all with the same two methods.

A source fills buffers at an offset and knows its size; it knows nothing of tensors. Sources are used by several
threads at once and keep no position.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

__all__ = ["ByteSource", "LocalFile"]


class ByteSource(Protocol):
    """What the transfer asks of a place that holds bytes."""

    @property
    def name(self) -> str:
        """What to call the source in messages, usually its path."""
        ...

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills ``buffers`` one after the other with the bytes from ``offset`` on.

        Args:
            buffers: Writable byte views.
            offset: Position of the first byte.

        Returns:
            Bytes that were read, at least one unless the end was reached. Fewer than asked for is no error.

        Raises:
            OSError: The read failed.
        """
        ...


class LocalFile:
    """A file on this machine, read with ``preadv``.

    ``preadv`` takes the offset as an argument and releases the interpreter's lock, so threads share one descriptor.

    Args:
        path: The file.
        drop_behind: Give the page cache of what was read back to the kernel, but only where it was not cached before
            the read. On a cold file this is the fastest way to read once, and a memory cgroup is charged less; what
            other processes keep warm stays warm. Leave it off when other ranks read the same file.

    Raises:
        OSError: The file cannot be opened.
    """

    # Flags of Linux >= 4.14; absent elsewhere, where drop_behind then does nothing.
    _NOWAIT = getattr(os, "RWF_NOWAIT", 0)

    def __init__(self, path: str | os.PathLike[str], *, drop_behind: bool = False) -> None:
        self._path = os.fspath(path)
        self._fd = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.size_bytes = os.fstat(self._fd).st_size
        self.drop_behind = drop_behind

    @property
    def name(self) -> str:
        """The path."""
        return self._path

    @property
    def drop_behind(self) -> bool:
        """Whether cold pages are given back after they were read."""
        return self._drop_behind

    @drop_behind.setter
    def drop_behind(self, enabled: bool) -> None:
        self._drop_behind = enabled and bool(self._NOWAIT)
        if self._NOWAIT:
            # No reading ahead: it would make the next block look as if somebody else had kept it warm.
            advice = os.POSIX_FADV_RANDOM if self._drop_behind else os.POSIX_FADV_NORMAL
            os.posix_fadvise(self._fd, 0, 0, advice)

    def __reduce__(self) -> str:
        raise TypeError(f"An open file ({self._path}) cannot be copied or pickled.")

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an offset, see :class:`ByteSource`."""
        if not self._drop_behind:
            return os.preadv(self._fd, buffers, offset)
        try:
            cached = os.preadv(self._fd, buffers, offset, self._NOWAIT)
        except BlockingIOError:
            cached = 0
        except OSError:
            # The file system cannot tell cold from warm. Then the cache is nobody's but everybody's: leave it alone.
            self.drop_behind = False
            return os.preadv(self._fd, buffers, offset)
        if cached:
            # The cached part was warm before: keep it. The caller comes back for the rest.
            return cached
        count = os.preadv(self._fd, buffers, offset)
        if count:
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Reads exactly ``nbytes`` at ``offset``; fewer only at the end of the file."""
        chunks = []
        while nbytes > 0:
            chunk = os.pread(self._fd, nbytes, offset)
            if not chunk:
                break
            chunks.append(chunk)
            nbytes -= len(chunk)
            offset += len(chunk)
        return b"".join(chunks)

    def fileno(self) -> int:
        """The descriptor, owned by this object."""
        return self._fd

    def close(self) -> None:
        """Closes the descriptor. Closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()
