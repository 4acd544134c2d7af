"""A name for a checkpoint that is still being written: until then it stands for the complete one before it.

The name is made of hard links, so it costs no bytes, and it stays complete when the checkpoint that it was made from is
removed. The new checkpoint takes its place in one step.
"""

from __future__ import annotations

import os

from lightning_memload.checkpoint.tensor_manifest import foreign_names
from lightning_memload.save.replacement import Replacement

__all__ = ["identity", "reserve"]


def identity(path: str) -> tuple[int, ...] | None:
    """Tells a checkpoint from another one that has its name later; ``None`` if there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_mode, status.st_mtime_ns)


def reserve(path: str, checkpoint: str) -> None:
    """Gives a complete checkpoint a second name, in one step.

    What somebody has put into the directory of a checkpoint beside it stays there.

    Args:
        path: The name. It must be free.
        checkpoint: A file, or a directory of ``save_directory``.

    Raises:
        OSError: The file system has no hard links, ``path`` is on another one, or something is there.
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
