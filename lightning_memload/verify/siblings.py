"""Finds a replacement for a damaged checkpoint: the newest intact checkpoint in the same directory.

Only checkpoints of a training are candidates, that is, those with a ``state_dict``. Files that hold only weights are
not. Each candidate is read completely and verified before it is returned.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_memload.errors import MemloadError
from lightning_memload.formats import find_format, open_checkpoint
from lightning_memload.verify.verification import verify_checkpoint

__all__ = [
    "Siblings",
    "Verdict",
    "find_siblings",
    "fingerprint",
    "is_training_checkpoint",
    "judge_sibling",
    "list_siblings",
]

Verdict = Literal["intact", "damaged", "other"]

_STEP = re.compile(r"step=?(\d+)")


class _Late(Exception):
    """The timeout has expired."""


@dataclass(frozen=True, slots=True)
class Siblings:
    """The other checkpoints in the directory of a checkpoint.

    Attributes:
        intact: The newest checkpoint without damage. ``None`` if there is none, or if the timeout expired.
        damaged: The damaged checkpoints that are newer than ``intact``, or all that were found if it is ``None``.
        unknown: The files and directories that were not examined before the timeout, newest first.
    """

    intact: str | None
    damaged: tuple[str, ...]
    unknown: tuple[str, ...]


def find_siblings(path: str, *, timeout_seconds: float | None = None) -> Siblings:
    """Verifies the other checkpoints in the directory of a checkpoint, newest first, until one is intact.

    The newest checkpoint is the one that was modified last. If two have the same time, it is the one with the larger
    step in its name.

    Args:
        path: A local checkpoint, damaged or not. The same file under another name is not a sibling.
        timeout_seconds: Maximum time of the search. ``None`` means no limit; each checkpoint is read at most once.

    Raises:
        OSError: The directory cannot be listed.

    Peak memory: as for ``verify_checkpoint``.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds

    def hurry(*_: int) -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise _Late

    damaged: list[str] = []
    candidates = list_siblings(path)
    for number, candidate in enumerate(candidates):
        try:
            hurry()
            verdict = judge_sibling(candidate, progress=hurry)
        except _Late:
            return Siblings(None, tuple(damaged), tuple(candidates[number:]))
        if verdict == "intact":
            return Siblings(candidate, tuple(damaged), ())
        if verdict == "damaged":
            damaged.append(candidate)
    return Siblings(None, tuple(damaged), ())


def is_training_checkpoint(candidate: str) -> bool:
    """Whether the index of a file or directory has tensors under ``state_dict``. No tensor is read."""
    try:
        return any(tensor.path[0] == "state_dict" for tensor in open_checkpoint(candidate) if tensor.path)
    except (MemloadError, OSError):
        return False


def judge_sibling(candidate: str, *, progress: Callable[[int, int], None]) -> Verdict:
    """Verifies a checkpoint of a training.

    Args:
        candidate: A file or directory beside a checkpoint.
        progress: As for ``verify_checkpoint``. An exception that it raises ends the verification.

    Returns:
        ``"intact"``, ``"damaged"`` or ``"other"``. ``"other"`` means that the candidate is not a checkpoint of a
        training, or that its index cannot be read.

    Peak memory: as for ``verify_checkpoint``.
    """
    if not is_training_checkpoint(candidate):
        return "other"
    try:
        return "damaged" if verify_checkpoint(candidate, progress=progress).is_damaged else "intact"
    except (MemloadError, OSError):
        return "other"


def fingerprint(path: str) -> str | None:
    """Returns a fingerprint: equal for copies of an intact checkpoint, different for different checkpoints.

    It is computed from the checksums that the checkpoint records. No tensor data is read.

    Returns:
        The fingerprint. ``None`` if the checkpoint has bytes without a checksum, or cannot be read.
    """
    try:
        records = find_format(path).take_inventory(path).records
    except (MemloadError, OSError):
        return None
    if any(record.crc32 is None and record.nbytes for record in records):
        return None
    words = sorted(f"{record.name} {record.nbytes} {record.crc32}" for record in records)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def list_siblings(path: str) -> list[str]:
    """Lists the files and directories beside a checkpoint, newest first, each file once.

    Hidden names are ignored: files of a save in progress have hidden names.

    Raises:
        OSError: The directory cannot be listed.
    """
    folder = os.path.dirname(path) or "."
    seen: set[tuple[int, int]] = set()
    if os.path.exists(path):
        status = os.stat(path)
        seen.add((status.st_dev, status.st_ino))
    found: list[tuple[int, int, str]] = []
    # Links last: if a link and its target are both here, the target is listed.
    for name in sorted(os.listdir(folder), key=lambda name: (os.path.islink(os.path.join(folder, name)), name)):
        candidate = os.path.join(os.path.dirname(path), name)
        try:
            status = os.stat(candidate)
        except OSError:
            continue  # a broken link, or deleted since listdir
        identity = (status.st_dev, status.st_ino)
        if name.startswith(".") or identity in seen:
            continue
        seen.add(identity)
        step = _STEP.search(name)
        found.append((status.st_mtime_ns, int(step[1][:18]) if step else -1, candidate))
    return [candidate for _, _, candidate in sorted(found, reverse=True)]
