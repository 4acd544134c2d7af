"""Copies of torch zip files in memory, because ``torch.load`` maps files of this machine only.

A hollow copy has everything of a file but the bytes of its tensors, each at its own position. The holes take no memory.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator

from lightning_memload.errors import CheckpointFormatError
from lightning_memload.formats.torch_zip.directory import ListedRecord, list_records
from lightning_memload.formats.torch_zip.layout import LOCAL_MAGIC
from lightning_memload.formats.torch_zip.records import read_records
from lightning_memload.storage import LocalFile, StoredFile

__all__ = ["hollow_copy", "memory_file"]

# A hole smaller than a page saves nothing.
_MIN_HOLE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_BLOCK_BYTES = 16 << 20
# A local header: its magic bytes, and the lengths of the name and of what fills it up.
_LOCAL = struct.Struct("<4s22x2H")


@contextlib.contextmanager
def memory_file(parts: Iterable[tuple[int, bytes]], nbytes: int = 0) -> Iterator[LocalFile]:
    """A context with a file in memory. Needs Linux.

    Args:
        parts: Position and content of each part.
        nbytes: The least size of the file. What no part covers is a hole.
    """
    descriptor = os.memfd_create("memload", os.MFD_CLOEXEC)
    try:
        os.truncate(descriptor, nbytes)
        with open(descriptor, "wb", closefd=False) as file:
            for position, content in parts:
                file.seek(position)
                file.write(content)
        with LocalFile(f"/proc/self/fd/{descriptor}") as opened:
            yield opened
    finally:
        os.close(descriptor)


def hollow_copy(file: StoredFile) -> contextlib.AbstractContextManager[LocalFile]:
    """A context with a copy of a torch zip file in memory, without the bytes of its tensors.

    Raises:
        CheckpointFormatError: The file is damaged, or was changed since it was opened.
        OSError: Reading failed.

    Peak memory: the pickle, the directory of the file, and a page or two for each tensor.
    """
    return memory_file(_parts_of(file), file.size_bytes)


def _parts_of(file: StoredFile) -> Iterator[tuple[int, bytes]]:
    listed = list_records(file) if file.is_remote else None
    if listed is not None:
        yield from _listed_parts(file, *listed)
        return
    records, _ = read_records(file)
    holes = [record for name, record in records.items() if name.startswith("data/") and record.nbytes > _MIN_HOLE_BYTES]
    position = 0
    for hole in sorted(holes, key=lambda record: record.offset):
        yield from _blocks(file, position, hole.offset)
        position = hole.offset + hole.nbytes
    yield from _blocks(file, position, file.size_bytes)


def _listed_parts(file: StoredFile, records: list[ListedRecord], directory: int) -> Iterator[tuple[int, bytes]]:
    """The parts of a file whose local headers are not asked for: those of the tensors are made from the directory.

    torch reads of such a header where the data begins, and nothing else.
    """
    for record in records:
        if "/data/" in record.name:
            name = record.name.encode()
            extra = record.offset - record.header - _LOCAL.size - len(name)
            yield record.header, _LOCAL.pack(LOCAL_MAGIC, len(name), extra) + name
        else:
            yield from _blocks(file, record.header, record.offset + record.nbytes)
    yield from _blocks(file, directory, file.size_bytes)


def _blocks(file: StoredFile, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    while start < end:
        data = file.pread(min(_BLOCK_BYTES, end - start), start)
        if not data:
            raise CheckpointFormatError(
                f"{file.name} became shorter while it was loaded. Load it again.", path=file.name
            )
        yield start, data
        start += len(data)
