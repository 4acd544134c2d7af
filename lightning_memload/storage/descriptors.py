"""File descriptors that a forked child closes at once.

``O_CLOEXEC`` closes a descriptor on ``exec``, but not in a forked child that runs on, such as a worker of a data
loader. Such a child would hold a writer's lock, and keep a removed file on the disk, as long as it lives.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import ClassVar

__all__ = ["OwnDescriptors"]

# Opening a file takes milliseconds, even on a network file system.
_LONGEST_SECONDS = 5.0


class OwnDescriptors:
    """Opens and closes descriptors that a forked child must not keep."""

    _open: ClassVar[set[int]] = set()
    # Without the lock, a fork between opening a file and recording its descriptor would give the child a descriptor
    # that it does not close. Reentrant: a signal handler may fork in the thread that opens the file.
    _lock: ClassVar[threading.RLock] = threading.RLock()

    @classmethod
    def open(cls, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """Opens a file as ``os.open`` does.

        Raises:
            OSError: It cannot be opened.
        """
        with cls._no_fork():
            descriptor = os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd)
            cls._open.add(descriptor)
        return descriptor

    @classmethod
    def close(cls, descriptor: int) -> None:
        """Closes a descriptor of :meth:`open`."""
        with cls._no_fork():
            cls._open.discard(descriptor)
            os.close(descriptor)

    @classmethod
    @contextlib.contextmanager
    def new_file(cls, path: str) -> Iterator[int]:
        """Creates a file and opens it for writing. The end of the ``with`` block closes it.

        Raises:
            OSError: It exists, or cannot be created.
        """
        descriptor = cls.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            yield descriptor
        finally:
            cls.close(descriptor)

    @classmethod
    @contextlib.contextmanager
    def _no_fork(cls) -> Iterator[None]:
        """Delays forks. Goes on without the lock if another thread holds it for more than 5 seconds.

        A signal handler may have interrupted the thread that holds the lock, and may be waiting for the end of a save
        in this thread. Waiting without a limit would be a deadlock. A child forked at that moment may keep a descriptor
        open, which is less harmful.
        """
        has_lock = cls._lock.acquire(timeout=_LONGEST_SECONDS)
        try:
            yield
        finally:
            if has_lock:
                cls._lock.release()

    @classmethod
    def before_fork(cls) -> None:
        """Waits until no file is being opened or closed."""
        cls._lock.acquire()

    @classmethod
    def after_fork(cls) -> None:
        """Releases the lock that :meth:`before_fork` took."""
        cls._lock.release()

    @classmethod
    def close_in_child(cls) -> None:
        """Closes all descriptors in the child. The parent keeps its file locks."""
        cls._lock.release()
        while cls._open:
            with contextlib.suppress(OSError):
                os.close(cls._open.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=OwnDescriptors.before_fork,
        after_in_parent=OwnDescriptors.after_fork,
        after_in_child=OwnDescriptors.close_in_child,
    )
