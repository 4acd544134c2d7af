"""Descriptors of a save, which a forked child closes at once.

``O_CLOEXEC`` closes them when another program starts, not in a child that goes on as it is, such as the worker of a
data loader. That child would hold a writer's lock, and keep a removed file on the disk, for as long as it lives.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import ClassVar

__all__ = ["OwnDescriptors"]

# Opening a file takes milliseconds, on a network too.
_LONGEST_SECONDS = 5.0


class OwnDescriptors:
    """Opens and closes the descriptors that belong to this process alone."""

    _open: ClassVar[set[int]] = set()
    # A fork between the opening of a file and the note of it would give the child a descriptor that it does not know.
    # Reentrant: a signal handler may fork in the thread that opens.
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
        """Closes what :meth:`open` opened."""
        with cls._no_fork():
            cls._open.discard(descriptor)
            os.close(descriptor)

    @classmethod
    @contextlib.contextmanager
    def _no_fork(cls) -> Iterator[None]:
        """Holds off forks, unless another thread does so for too long.

        A signal handler may have interrupted that thread and wait for this one: for the end of a save. A child that is
        forked right then might hold a file that it does not know, which is the lesser evil.
        """
        has_lock = cls._lock.acquire(timeout=_LONGEST_SECONDS)
        try:
            yield
        finally:
            if has_lock:
                cls._lock.release()

    @classmethod
    def before_fork(cls) -> None:
        """Waits while a file is opened or closed."""
        cls._lock.acquire()

    @classmethod
    def after_fork(cls) -> None:
        """Ends what :meth:`before_fork` began."""
        cls._lock.release()

    @classmethod
    def close_in_child(cls) -> None:
        """Closes all of them. The locks on them stay with the parent."""
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
