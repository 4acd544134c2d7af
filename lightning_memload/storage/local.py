"""Sources of bytes: one class for each kind of place, all with the same two methods.

A source fills buffers from an offset and names the file at an offset. It does not know tensors. Several threads use a
source at once, so it has no position. A read may be short; :func:`read_fully` reads all bytes or raises.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

from lightning_memload.bytes import lay_out, place_in
from lightning_memload.errors import CheckpointReadError

__all__ = ["ByteSource", "FilePart", "FileSet", "LocalFile", "read_fully"]

# With more files than this, each file is reopened for every read: many systems limit a process to 1024 open files.
_MAX_OPEN_FILES = 64
# The kernel takes at most 1024 buffers in one preadv (IOV_MAX).
_MAX_BUFFERS_PER_READ = 1024


class ByteSource(Protocol):
    """A place that bytes are read from."""

    def place(self, offset: int) -> tuple[str, int]:
        """The file at ``offset``, by its name for messages, and the position in it."""
        ...

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills ``buffers`` one after the other with the bytes that start at ``offset``.

        Args:
            buffers: Writable byte views.
            offset: Position of the first byte.

        Returns:
            Number of bytes read, at least 1 unless the end is reached. A short read is not an error.

        Raises:
            OSError: The read failed.
        """
        ...


def read_fully(
    source: ByteSource, buffers: Sequence[memoryview], offset: int, *, name_at: Callable[[int], str | None]
) -> None:
    """Fills all buffers with the bytes that start at an offset, with as many reads as needed.

    Args:
        source: The source of the bytes.
        buffers: Writable byte views. None of them is empty.
        offset: Position of the first byte.
        name_at: Returns the name of the tensor at an offset. Called only if reading fails there.

    Raises:
        CheckpointReadError: A read failed or reached the end of the file.
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
                "truncated while it was read.",
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
        drop_behind: Drop pages from the page cache after they were read, but only pages that were not cached before.
            For a cold file this is the fastest way to read it once, and it charges a memory cgroup less. Pages that
            other processes keep cached stay cached. Do not use it if other ranks read the same file.
        keep_open: ``False``: reopen the file for every read, and check that it is still the same file.

    Raises:
        OSError: The file cannot be opened.
    """

    # A flag of Linux >= 4.14. Without it drop_behind has no effect.
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
        """Whether pages that were not cached before are dropped after they were read."""
        return self._drop_behind

    @drop_behind.setter
    def drop_behind(self, enabled: bool) -> None:
        self._drop_behind = enabled and bool(self._NOWAIT)
        if self._NOWAIT and self._fd >= 0:
            self._advise(self._fd)

    def _advise(self, descriptor: int) -> None:
        # No read-ahead: the next block would then look as if another process had cached it.
        advice = os.POSIX_FADV_RANDOM if self._drop_behind else os.POSIX_FADV_NORMAL
        os.posix_fadvise(descriptor, 0, 0, advice)

    def __reduce__(self) -> str:
        raise TypeError(f"An open file ({self._path}) cannot be copied or pickled.")

    def open_descriptor(self) -> int:
        """A new descriptor of the same file. The caller closes it.

        Raises:
            OSError: The file cannot be opened, or it was changed or replaced.
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
        """Whether this object has a descriptor: it is not closed, and does not reopen the file for every read."""
        return self._fd >= 0

    def fileno(self) -> int:
        """The descriptor, which this object owns. -1 if there is none."""
        return self._fd

    def reopened(self) -> LocalFile:
        """The same file under an independent descriptor, even if the file has been renamed since.

        Raises:
            OSError: The file cannot be opened, or it was changed since it was opened.
        """
        other = LocalFile(self._path if self._reopens else f"/proc/self/fd/{self._fd}")
        other._path = self._path
        if other._state != self._state:
            other.close()
            raise OSError(errno.ESTALE, "the file was changed since the checkpoint was opened", self._path)
        return other

    def is_changed(self) -> bool:
        """Whether the file has another size or modification time than when it was opened.

        ``False`` for a file that was replaced by another one of the same name: the file itself has not changed.
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
            # The file system cannot tell cached pages from others. Keep them all: other processes may use them.
            self.drop_behind = False
            return os.preadv(descriptor, buffers, offset)
        if cached:
            # This part was cached before: keep it cached. The caller reads the rest with another call.
            return cached
        count = os.preadv(descriptor, buffers, offset)
        if count:
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Reads exactly ``nbytes`` at ``offset``; fewer only at the end of the file.

        Raises:
            OSError: The read failed, or the file is reopened for every read and was changed or replaced.
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
        """Closes the descriptor. Reading fails from then on. A second call does nothing."""
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
    """A part of a file that is read like a separate file.

    The constructor reads its first and last bytes: formats keep their headers there, and parse them with a dozen small
    reads.

    Args:
        file: The file. It must stay open.
        name: The name of the part in messages.
        start: Position of its first byte in the file.
        nbytes: Its length. The whole part must be within the file.
    """

    # The zip headers around one tensor in torch's layout take less than this.
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
        """Reads exactly ``nbytes`` at ``offset`` within the part; fewer only at its end."""
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
    """Several files as one run of bytes, laid out by :func:`lay_out`. Offsets of an index are positions in this run.

    Args:
        paths: The files, in the order of the index. The set opens and closes them.

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
        """Length of the run in bytes, from the first byte of the first file to the last byte of the last file."""
        return self.spans[-1].start + self.spans[-1].nbytes if self.spans else 0

    def reopened(self) -> FileSet:
        """The same files under independent descriptors, see :meth:`LocalFile.reopened`.

        Raises:
            OSError: A file cannot be opened, or was changed since it was opened. No new descriptor stays open.
        """
        other = copy.copy(self)
        with contextlib.ExitStack() as stack:
            other.files = tuple(stack.enter_context(file.reopened()) for file in self.files)
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
