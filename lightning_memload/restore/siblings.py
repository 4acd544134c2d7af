"""Which other checkpoint to take when one is damaged: the newest in the same directory that is not.

Only checkpoints of a training are looked at, those with a ``state_dict``: weights alone that lie beside them are no
replacement. Each is read completely and verified before it is named.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

from lightning_memload.checkpoint import open_checkpoint
from lightning_memload.errors import MemloadError
from lightning_memload.transfer import verify_checkpoint

__all__ = ["Siblings", "find_siblings"]

_STEP = re.compile(r"step=?(\d+)")


class _Late(Exception):
    """The time is over."""


@dataclass(frozen=True, slots=True)
class Siblings:
    """The other checkpoints in the directory of one.

    Attributes:
        intact: The newest in which nothing is wrong, ``None`` if there is none or the time was over.
        damaged: Those that are newer, but damaged.
        unknown: Those that could not be looked at in time, newest first.
    """

    intact: str | None
    damaged: tuple[str, ...]
    unknown: tuple[str, ...]


def find_siblings(path: str, *, timeout_seconds: float | None = None) -> Siblings:
    """Verifies the other checkpoints in the directory of a checkpoint, newest first, until one is intact.

    The newest is the one that was modified last; of two at the same time, the one with the larger step in its name.

    Args:
        path: A local checkpoint, damaged or not. What is the same file under another name is no sibling.
        timeout_seconds: How long to look. ``None``: as long as it takes, at most one read of each.

    Raises:
        OSError: The directory cannot be listed.

    Peak memory: as for ``verify_checkpoint``.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds

    def hurry(*_: int) -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise _Late

    damaged: list[str] = []
    candidates = _newest_first(path)
    for number, candidate in enumerate(candidates):
        try:
            hurry()
            if not any(tensor.path[0] == "state_dict" for tensor in open_checkpoint(candidate) if tensor.path):
                continue
            if not verify_checkpoint(candidate, progress=hurry).is_damaged:
                return Siblings(candidate, tuple(damaged), ())
            damaged.append(candidate)
        except _Late:
            return Siblings(None, tuple(damaged), tuple(candidates[number:]))
        except (MemloadError, OSError):
            # No checkpoint at all, or one that is damaged beyond an index.
            continue
    return Siblings(None, tuple(damaged), ())


def _newest_first(path: str) -> list[str]:
    """Everything beside a checkpoint, each file once, without what is hidden: temporary files of a save are."""
    folder = os.path.dirname(path) or "."
    seen: set[tuple[int, int]] = set()
    if os.path.exists(path):
        status = os.stat(path)
        seen.add((status.st_dev, status.st_ino))
    found: list[tuple[int, int, str]] = []
    # Links last, so that of a link and its target the target is named.
    for name in sorted(os.listdir(folder), key=lambda name: (os.path.islink(os.path.join(folder, name)), name)):
        candidate = os.path.join(os.path.dirname(path), name)
        try:
            status = os.stat(candidate)
        except OSError:
            continue  # a link to nowhere, or gone meanwhile
        identity = (status.st_dev, status.st_ino)
        if name.startswith(".") or identity in seen:
            continue
        seen.add(identity)
        step = _STEP.search(name)
        found.append((status.st_mtime_ns, int(step[1][:18]) if step else -1, candidate))
    return [candidate for _, _, candidate in sorted(found, reverse=True)]
