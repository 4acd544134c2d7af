"""Reserves the name of a checkpoint that is still being written. Until then the name is the previous checkpoint.

The reserved name consists of hard links, so it takes no disk space, and it stays complete when the previous checkpoint
is removed under its own name. The new checkpoint replaces it in one atomic step.
"""

from __future__ import annotations

import os

from lightning_memload.formats.tensor_directory.manifest import foreign_names
from lightning_memload.storage.replacement import Replacement

__all__ = ["identity", "reserve"]


def identity(path: str) -> tuple[int, ...] | None:
    """Identifies the checkpoint at a path, to detect a later replacement. ``None`` if nothing is there."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_mode, status.st_mtime_ns)


def reserve(path: str, checkpoint: str) -> None:
    """Gives a complete checkpoint a second name, in one atomic step.

    Files in a checkpoint directory that are not part of the checkpoint are not linked.

    Args:
        path: The second name. Nothing must exist there.
        checkpoint: A file, or a directory of ``save_directory``.

    Raises:
        OSError: The file system has no hard links, ``path`` is on another file system, or ``path`` exists.
    """
    if not os.path.isdir(checkpoint):
        os.link(checkpoint, path, follow_symlinks=False)
        return
    with Replacement(path, is_directory=True) as place:
        foreign = foreign_names(checkpoint)
        for name in os.listdir(checkpoint):
            if name not in foreign:
                _link(os.path.join(checkpoint, name), os.path.join(place.temporary_path, name))
        place.commit(durable=False)


def _link(old: str, new: str) -> None:
    if not os.path.isdir(old) or os.path.islink(old):
        os.link(old, new, follow_symlinks=False)
        return
    os.mkdir(new)
    for name in os.listdir(old):
        _link(os.path.join(old, name), os.path.join(new, name))
