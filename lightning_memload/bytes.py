"""The vocabulary of bytes: which bytes of which file. Pure data, below every room that reads or writes."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["FileSpan", "lay_out", "place_in"]


@dataclass(frozen=True, slots=True)
class FileSpan:
    """One file of a checkpoint and its place in the run of all of them.

    Attributes:
        path: The file.
        start: Offset of its first byte.
        nbytes: Its size.
    """

    path: str
    start: int
    nbytes: int


def lay_out(files: Iterable[tuple[str, int]]) -> tuple[FileSpan, ...]:
    """Places files one after the other, each on a page of its own.

    Args:
        files: Path and size in bytes of each.
    """
    spans: list[FileSpan] = []
    start = 0
    for path, nbytes in files:
        spans.append(FileSpan(path, start, nbytes))
        # Two files must never share a page, not even when the first is empty: a page has one file under it.
        start += max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
    return tuple(spans)


def place_in(files: Sequence[FileSpan], offset: int) -> tuple[str, int]:
    """The file at an offset of the run of all files, and the position within that file."""
    span = files[bisect_right(files, offset, key=lambda file: file.start) - 1]
    return span.path, offset - span.start
