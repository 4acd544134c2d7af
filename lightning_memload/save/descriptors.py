"""Descriptors of a save, which a forked child closes at once.

``O_CLOEXEC`` closes them when another program starts, not in a child that goes on as it is, such as the worker of a
data loader. That child would hold a writer's lock, and keep a removed file on the disk, for as long as it lives.
"""

from __future__ import annotations

import contextlib
import os
from typing import ClassVar

__all__ = ["OwnDescriptors"]


class OwnDescriptors:
    """Opens and closes the descriptors that belong to this process alone."""

    _open: ClassVar[set[int]] = set()

    @classmethod
    def open(cls, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """Opens a file as ``os.open`` does.

        Raises:
            OSError: It cannot be opened.
        """
        descriptor = os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd)
        cls._open.add(descriptor)
        return descriptor

    @classmethod
    def close(cls, descriptor: int) -> None:
        """Closes what :meth:`open` opened."""
        # Forgotten first: another file may get the number, and a child must not close that.
        cls._open.discard(descriptor)
        os.close(descriptor)

    @classmethod
    def close_in_child(cls) -> None:
        """Closes all of them. The locks on them stay with the parent."""
        while cls._open:
            with contextlib.suppress(OSError):
                os.close(cls._open.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OwnDescriptors.close_in_child)
