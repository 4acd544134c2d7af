"""A file that takes the place of another in one step, or leaves nothing behind.

The new content goes to a temporary file in the same directory and is renamed when it is complete, so that at every
moment a reader finds the old file or the new one, whole. A writer holds a lock on its temporary file as long as it
lives; what a killed writer left is told by the lock being free, and removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import sys
import time

if sys.platform != "win32":
    import fcntl

__all__ = ["Replacement", "remove_leftovers"]

_NAME = re.compile(r"\.memload-(?P<boot>[0-9a-f]{8})-[0-9a-f]{16}\.tmp")
_NUM_TRIES = 100
# On some network file systems a lock is seen on its own machine only. From another one, a file that nobody has written
# to for so long counts as left.
_FOREIGN_LEFTOVER_SECONDS = 3600.0


class Replacement:
    """A temporary file, open for writing, that is to replace ``path``.

    It has the permission bits of a file that ``open`` creates. Use as a context manager: leaving it removes the
    temporary file unless :meth:`commit` has put it in its place. Leftovers in the directory are removed first.

    Args:
        path: What to replace, or to create. A symbolic link is replaced itself, not what it points to.

    Attributes:
        path: The same.
        descriptor: Of the temporary file.
        is_committed: Whether the file has its place.

    Raises:
        IsADirectoryError: ``path`` is a directory.
        OSError: There is no directory to write to, or writing to it is not allowed.
    """

    def __init__(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self.path = path
        self.is_committed = False
        self._directory = os.path.dirname(path) or "."
        remove_leftovers(self._directory)
        self._temporary_path, self.descriptor = _create(self._directory)

    def commit(self, *, durable: bool) -> None:
        """Puts the file in its place.

        Args:
            durable: Return only when content and name are on the disk, so that they survive a power failure. Without,
                the two reach the disk when the kernel finds time, the name possibly first.

        Raises:
            OSError: The disk failed, or ``path`` cannot be replaced.
        """
        if durable:
            os.fsync(self.descriptor)
        os.replace(self._temporary_path, self.path)
        self.is_committed = True
        if durable:
            _sync_directory(self._directory)

    def close(self) -> None:
        """Closes the file, and removes it unless it was committed. Closing twice is fine."""
        if self.descriptor < 0:
            return
        if not self.is_committed:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary_path)
        os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def remove_leftovers(directory: str) -> None:
    """Removes the temporary files of writers that are dead. Those of live writers stay, and whatever is in doubt.

    Raises nothing: a directory that can be written to but not listed is no reason not to save.
    """
    found: list[tuple[str, str]] = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        found = [(entry.path, match["boot"]) for entry in entries if (match := _NAME.fullmatch(entry.name))]
    for path, boot in found:
        with contextlib.suppress(OSError):
            _remove_if_left(path, is_foreign=boot != _boot())


def _create(directory: str) -> tuple[str, int]:
    """Creates and locks a temporary file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(_NUM_TRIES):
        path = os.path.join(directory, f".memload-{_boot()}-{secrets.token_hex(8)}.tmp")
        descriptor = os.open(path, flags, 0o666)
        # Not every file system has locks. There nobody gets one, and nothing is removed.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Somebody may have taken it for a leftover, and locked it to remove it, before we did.
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)
    raise OSError(errno.EBUSY, f"temporary files in {directory} are removed as fast as they are made")


def _remove_if_left(path: str, *, is_foreign: bool) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(descriptor)
        if is_foreign and time.time() - status.st_mtime < _FOREIGN_LEFTOVER_SECONDS:
            return
        if os.path.samestat(status, os.lstat(path)):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _boot() -> str:
    """Names this run of this machine: a lock of another one is not always seen."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read(8)
    except OSError:
        return "0" * 8


def _sync_directory(directory: str) -> None:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return  # it can be written to, but not read: then nobody but the kernel can sync it
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems have no such thing.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
