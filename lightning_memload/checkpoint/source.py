"""Where bytes come from: one class per place, all with the same two methods.

A source fills buffers at an offset and says which file is there; it knows nothing of tensors. Sources are used by
several threads at once and keep no position. Whoever needs every byte asks through :func:`read_fully`.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

from lightning_memload.checkpoint.index import lay_out, place_in
from lightning_memload.errors import CheckpointReadError

__all__ = ["ByteSource", "FilePart", "FileSet", "LocalFile", "read_fully"]

# More than this many files are opened anew for every read: a process may often have no more than 1024 open.
_MAX_OPEN_FILES = 64
# The kernel takes at most 1024 buffers in one preadv (IOV_MAX).
_MAX_BUFFERS_PER_READ = 1024


class ByteSource(Protocol):
    """What the transfer asks of a place that holds bytes."""

    def place(self, offset: int) -> tuple[str, int]:
        """Which file is at ``offset``, as messages should call it, and the position within it."""
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


def read_fully(
    source: ByteSource, buffers: Sequence[memoryview], offset: int, *, name_at: Callable[[int], str | None]
) -> None:
    """Fills all buffers with the bytes from an offset on, however many reads that takes.

    Args:
        source: Where the bytes are.
        buffers: Writable byte views, none of them empty.
        offset: Position of the first byte.
        name_at: Which tensor lies at an offset. Asked only when reading fails there.

    Raises:
        CheckpointReadError: A read failed or met the end of the file.
    """
    while buffers:
        batch = buffers[:_MAX_BUFFERS_PER_READ]
        try:
            count = source.readv(batch, offset)
        except OSError as error:
            name = name_at(offset)
            path, position = source.place(offset)
            raise CheckpointReadError(
                f"Reading {name or 'a tensor'} from {path} failed at byte {position}: {error}. The file is untouched; "
                "check the disk or the mount and start again.",
                path=path,
                key=name,
                offset=position,
                errno=error.errno,
            ) from error
        if count <= 0:
            name = name_at(offset)
            missing = sum(len(buffer) for buffer in buffers)
            path, position = source.place(offset)
            raise CheckpointReadError(
                f"{path} ends at byte {position}, but {name or 'a tensor'} needs {missing} bytes more: the file was "
                "cut short while it was read.",
                path=path,
                key=name,
                offset=position,
            )
        offset += count
        done = 0
        while done < len(batch) and count >= len(batch[done]):
            count -= len(batch[done])
            done += 1
        buffers = buffers[done:]
        if count:
            buffers = [buffers[0][count:], *buffers[1:]]


class LocalFile:
    """A file on this machine, read with ``preadv``.

    ``preadv`` takes the offset as an argument and releases the interpreter's lock, so threads share one descriptor.

    Args:
        path: The file.
        drop_behind: Give the page cache of what was read back to the kernel, but only where it was not cached before
            the read. On a cold file this is the fastest way to read once, and a memory cgroup is charged less; what
            other processes keep warm stays warm. Leave it off when other ranks read the same file.
        keep_open: ``False`` opens the file anew for every read, and makes sure that it is still the same.

    Raises:
        OSError: The file cannot be opened.
    """

    # Flags of Linux >= 4.14; absent elsewhere, where drop_behind then does nothing.
    _NOWAIT = getattr(os, "RWF_NOWAIT", 0)

    def __init__(self, path: str | os.PathLike[str], *, drop_behind: bool = False, keep_open: bool = True) -> None:
        self._path = os.fspath(path)
        self._fd = -1
        self._drop_behind = False
        descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._state = _state_of(descriptor)
        self.size_bytes = self._state[2]
        if keep_open:
            self._fd = descriptor
        else:
            os.close(descriptor)
        self._reopens = not keep_open
        self.drop_behind = drop_behind

    @property
    def name(self) -> str:
        """The path."""
        return self._path

    def place(self, offset: int) -> tuple[str, int]:
        """The path and the offset, see :class:`ByteSource`."""
        return self._path, offset

    @property
    def drop_behind(self) -> bool:
        """Whether cold pages are given back after they were read."""
        return self._drop_behind

    @drop_behind.setter
    def drop_behind(self, enabled: bool) -> None:
        self._drop_behind = enabled and bool(self._NOWAIT)
        if self._NOWAIT and self._fd >= 0:
            self._advise(self._fd)

    def _advise(self, descriptor: int) -> None:
        # No reading ahead: it would make the next block look as if somebody else had kept it warm.
        advice = os.POSIX_FADV_RANDOM if self._drop_behind else os.POSIX_FADV_NORMAL
        os.posix_fadvise(descriptor, 0, 0, advice)

    def __reduce__(self) -> str:
        raise TypeError(f"An open file ({self._path}) cannot be copied or pickled.")

    def open_descriptor(self) -> int:
        """A descriptor of this very file for the caller, who closes it.

        Raises:
            OSError: The file cannot be opened, or another one has taken its place.
        """
        if not self._reopens:
            return os.dup(self._fd)
        descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if _state_of(descriptor) != self._state:
            os.close(descriptor)
            raise OSError(errno.ESTALE, "the file was changed or replaced since the checkpoint was opened", self._path)
        if self._drop_behind:
            self._advise(descriptor)
        return descriptor

    @property
    def is_open(self) -> bool:
        """Whether this holds a descriptor: neither closed nor opened anew for every read."""
        return self._fd >= 0

    def fileno(self) -> int:
        """The descriptor, which stays this object's; -1 when there is none."""
        return self._fd

    def reopened(self) -> LocalFile:
        """The very same file, whatever its name is by now, under a descriptor that shares nothing with this one.

        Raises:
            OSError: It cannot be opened, or it was changed since it was opened.
        """
        other = LocalFile(self._path if self._reopens else f"/proc/self/fd/{self._fd}")
        other._path = self._path
        if other._state != self._state:
            other.close()
            raise OSError(errno.ESTALE, "the file was changed since the checkpoint was opened", self._path)
        return other

    def is_changed(self) -> bool:
        """Whether the file has another size or time of modification than when it was opened.

        One that has lost its name to another file is not changed.
        """
        try:
            state = _state_from(os.fstat(self._fd) if self.is_open else os.stat(self._path))
        except OSError:
            return False
        return state[:2] == self._state[:2] and state != self._state

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an offset, see :class:`ByteSource`."""
        if not self._reopens:
            return self._readv(self._fd, buffers, offset)
        descriptor = self.open_descriptor()
        try:
            return self._readv(descriptor, buffers, offset)
        finally:
            os.close(descriptor)

    def _readv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not self._drop_behind:
            return os.preadv(descriptor, buffers, offset)
        try:
            cached = os.preadv(descriptor, buffers, offset, self._NOWAIT)
        except BlockingIOError:
            cached = 0
        except OSError:
            # The file system cannot tell cold from warm. Then the cache is nobody's but everybody's: leave it alone.
            self.drop_behind = False
            return os.preadv(descriptor, buffers, offset)
        if cached:
            # The cached part was warm before: keep it. The caller comes back for the rest.
            return cached
        count = os.preadv(descriptor, buffers, offset)
        if count:
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Reads exactly ``nbytes`` at ``offset``; fewer only at the end of the file.

        Raises:
            OSError: The read failed, or the file is opened anew for every read and another one has taken its place.
        """
        descriptor = self.open_descriptor() if self._reopens else self._fd
        chunks = []
        try:
            while nbytes > 0:
                chunk = os.pread(descriptor, nbytes, offset)
                if not chunk:
                    break
                chunks.append(chunk)
                nbytes -= len(chunk)
                offset += len(chunk)
        finally:
            if self._reopens:
                os.close(descriptor)
        return b"".join(chunks)

    def close(self) -> None:
        """Closes the descriptor; reading fails from then on. Closing twice is fine."""
        self._reopens = False
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


class FilePart:
    """A stretch of a file that is read like a file of its own.

    Its first and last bytes are read once: formats describe themselves there, in a dozen small reads.

    Args:
        file: The file. It stays open.
        name: What messages call the part.
        start: Its first byte.
        nbytes: Its length. All of it must lie in the file.
    """

    # A record of one tensor in torch's layout is described by fewer than these.
    _EDGE_BYTES = 1024

    def __init__(self, file: LocalFile, name: str, start: int, nbytes: int) -> None:
        self.name = name
        self.start = start
        self.size_bytes = nbytes
        self._file = file
        if nbytes <= 2 * self._EDGE_BYTES:
            self._head = self._tail = file.pread(nbytes, start)
        else:
            self._head = file.pread(self._EDGE_BYTES, start)
            self._tail = file.pread(self._EDGE_BYTES, start + nbytes - self._EDGE_BYTES)
        self._tail_start = nbytes - len(self._tail)

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Reads exactly ``nbytes`` at ``offset`` from the part's start; fewer only at its end."""
        end = min(offset + nbytes, self.size_bytes)
        if end <= len(self._head):
            return self._head[offset:end]
        if offset >= self._tail_start:
            return self._tail[offset - self._tail_start : end - self._tail_start]
        return self._file.pread(end - offset, self.start + offset)


def _state_of(descriptor: int) -> tuple[int, int, int, int]:
    return _state_from(os.fstat(descriptor))


def _state_from(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class FileSet:
    """Several files as one run of bytes, laid out as :func:`lay_out` says: what an index calls an offset.

    Args:
        paths: The files, in the order of the index. Closed together with the set.

    Raises:
        OSError: A file cannot be opened.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        keep_open = len(paths) <= _MAX_OPEN_FILES
        self.files = tuple(LocalFile(path, keep_open=keep_open) for path in paths)
        self.spans = lay_out((file.name, file.size_bytes) for file in self.files)
        self._starts = [span.start for span in self.spans]
        self._drop_behind = False

    @property
    def nbytes(self) -> int:
        """Length of the run, from the first byte of the first file to the last byte of the last."""
        return self.spans[-1].start + self.spans[-1].nbytes if self.spans else 0

    def reopened(self) -> FileSet:
        """The very same files under other descriptors, see :meth:`LocalFile.reopened`.

        Raises:
            OSError: One cannot be opened, or was changed since it was opened. None stays open.
        """
        other = copy.copy(self)
        with contextlib.ExitStack() as stack:
            other.files = tuple(stack.enter_context(file.reopened()) for file in self.files)
            stack.pop_all()
        return other

    def changed_files(self) -> list[str]:
        """Those that were written to in place since they were opened, as far as size and time tell."""
        return [file.name for file in self.files if file.is_changed()]

    @property
    def drop_behind(self) -> bool:
        """Whether cold pages are given back after they were read."""
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
        """Fills buffers from an offset, see :class:`ByteSource`. Ends at the end of a file at the latest."""
        number = bisect_right(self._starts, offset) - 1
        start, size = self._starts[number], self.spans[number].nbytes
        if offset < start + size or number + 1 == len(self.files):
            return self.files[number].readv(buffers, offset - start)
        # Between two files. A read over a small gap between two tensors takes it along, and nobody looks at it.
        gap = min(len(buffers[0]), self._starts[number + 1] - offset)
        buffers[0][:gap] = bytes(gap)
        return gap

    def close(self) -> None:
        """Closes all files. Closing twice is fine."""
        for file in self.files:
            file.close()
