"""The vocabulary of bytes: which bytes of which file. Pure data, below every room that reads or writes."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["FileRange", "FileSpan", "Record", "RecordPart", "after", "lay_out", "place_in"]


class Record(NamedTuple):
    """A contiguous range of bytes with a name and at most one checksum. The data of a tensor is one record or several.

    Attributes:
        name: The name in messages: that of the tensor, or that of the record in its file if it is no tensor.
        offset: Position of the first byte in the run of all files.
        nbytes: Length in bytes.
        crc32: CRC-32 of the bytes, as recorded in the checkpoint. ``None`` if the checkpoint records none.
    """

    name: str
    offset: int
    nbytes: int
    crc32: int | None


class RecordPart(NamedTuple):
    """Contiguous bytes of a record.

    Attributes:
        record: The number of the record.
        start: Position of the first byte in the record.
        nbytes: Length in bytes.
    """

    record: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileRange:
    """A range of bytes in one file of a directory.

    Attributes:
        file: Name of the file in the directory.
        offset: Position of the first byte in the file.
        nbytes: Length in bytes.
    """

    file: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The position of its end in the file."""
        return self.offset + self.nbytes


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


def after(buffers: Sequence[Any], count: int) -> Sequence[Any]:
    """Returns buffers (``bytes`` or byte views) without their first ``count`` bytes, which are done."""
    done = 0
    while done < len(buffers) and count >= len(buffers[done]):
        count -= len(buffers[done])
        done += 1
    return [memoryview(buffers[done])[count:], *buffers[done + 1 :]] if count else buffers[done:]
