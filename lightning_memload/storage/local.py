"""Local files, and the local disk as a place of them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence

from lightning_memload.storage.source import Place, StoredFile

__all__ = ["LocalDisk", "LocalFile", "boot_id"]


class LocalFile(StoredFile):
    """A file on this machine, read with ``preadv``. The kernel can map it.

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
        self.name = os.fspath(path)
        self._fd = -1
        self._drop_behind = False
        descriptor = os.open(self.name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._state = _state_of(descriptor)
        self.size_bytes = self._state[2]
        if keep_open:
            self._fd = descriptor
        else:
            os.close(descriptor)
        self._reopens = not keep_open
        self.drop_behind = drop_behind

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
        raise TypeError(f"An open file ({self.name}) cannot be copied or pickled.")

    def open_descriptor(self) -> int:
        """A new descriptor of the same file. The caller closes it.

        Raises:
            OSError: The file cannot be opened, or it was changed or replaced.
        """
        if not self._reopens:
            return os.dup(self._fd)
        descriptor = os.open(self.name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if _state_of(descriptor) != self._state:
            os.close(descriptor)
            raise OSError(errno.ESTALE, "the file was changed or replaced since the checkpoint was opened", self.name)
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
        other = LocalFile(self.name if self._reopens else f"/proc/self/fd/{self._fd}")
        other.name = self.name
        if other._state != self._state:
            other.close()
            raise OSError(errno.ESTALE, "the file was changed since the checkpoint was opened", self.name)
        return other

    def is_changed(self) -> bool:
        """Whether the file has another size or modification time than when it was opened.

        ``False`` for a file that was replaced by another one of the same name: the file itself has not changed.
        """
        try:
            state = _state_from(os.fstat(self._fd) if self.is_open else os.stat(self.name))
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
        chunks: list[bytes] = []
        try:
            while nbytes > 0:
                chunk = os.pread(descriptor, nbytes, offset)
                if len(chunk) == nbytes and not chunks:
                    return chunk
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

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class LocalDisk(Place):
    """The files and directories of this machine. Paths are local paths."""

    def open(self, path: str, *, keep_open: bool = True) -> LocalFile:
        """Opens a file, see :class:`LocalFile`."""
        return LocalFile(path, keep_open=keep_open)

    def is_file(self, path: str) -> bool:
        """Whether the path is a regular file. Opening a pipe would block."""
        return os.path.isfile(path)

    def is_folder(self, path: str) -> bool:
        """Whether the path is a directory."""
        return os.path.isdir(path)

    def names_in(self, folder: str) -> list[str]:
        """The names in a directory."""
        return os.listdir(folder)

    def size_of(self, path: str, *, follow_links: bool = True) -> int | None:
        """The size of a regular file in bytes. ``None`` for a directory, a pipe, or a link that is not followed."""
        status = os.stat(path, follow_symlinks=follow_links)
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def is_link(self, path: str) -> bool:
        """Whether the path is a symbolic link."""
        return os.path.islink(path)

    def identity(self, path: str) -> tuple[int, int]:
        """Device and inode."""
        status = os.stat(path)
        return status.st_dev, status.st_ino

    @contextlib.contextmanager
    def held(self, path: str) -> Iterator[Callable[[], bool | None]]:
        """Keeps the file or directory open, so that the kernel does not reuse its inode number."""
        before = os.stat(path)
        descriptor = -1
        if stat.S_ISREG(before.st_mode) or stat.S_ISDIR(before.st_mode):
            with contextlib.suppress(OSError):  # no permission, or the system cannot open directories
                descriptor = os.open(path, os.O_RDONLY)

        def is_same() -> bool | None:
            try:
                return os.path.samestat(before, os.stat(path))
            except FileNotFoundError:
                return None

        try:
            yield is_same
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _state_of(descriptor: int) -> tuple[int, int, int, int]:
    return _state_from(os.fstat(descriptor))


def _state_from(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def boot_id() -> str | None:
    """Identifies this machine since its last boot. Unlike names of hosts, it is unique. ``None`` if it is unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return None
