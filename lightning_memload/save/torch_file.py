"""Saves an object as ``torch.save`` does, in host memory bounded by a budget, and publishes it in one atomic step.

The file is an ordinary torch checkpoint for every reader. Bytes in host memory are written directly, without a copy.
Bytes on devices go through the staging ring, which is the only extra memory.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import IO

import torch
from zlib_ng import zlib_ng

from lightning_memload.bytes import RecordPart
from lightning_memload.errors import UnstreamableError
from lightning_memload.formats.torch_zip.layout import (
    ALIGNMENT_BYTES,
    ZipEntry,
    data_descriptor,
    directory,
    directory_bytes,
    lay_out,
    local_header,
)
from lightning_memload.pickles.pickling import Pickled, pickle_object
from lightning_memload.save.saving import (
    DEFAULT_BUDGET_BYTES,
    CheckpointWriter,
    Clock,
    Save,
    SaveStats,
    default_save_threads,
    stats_of,
)
from lightning_memload.storage.replacement import Replacement, put_back
from lightning_memload.transfer.contents import Content, size_of
from lightning_memload.transfer.sinks import LocalSink, RecordWriter, Sink, StreamSink
from lightning_memload.transfer.writing import WriteEngine, WriteOrder

__all__ = ["TorchFileWriter", "plan_torch_save", "save_torch", "write_torch"]

# The name of the top folder that torch.save uses when it writes to a buffer.
_ARCHIVE = "archive"
# At most one thread for each 8 MiB: the start of more threads, and Python's lock, cost more than they save.
_THREAD_BYTES = 8 << 20


def save_torch(
    obj: object,
    path: str | os.PathLike[str],
    *,
    host_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    num_threads: int | None = None,
    durable: bool = True,
) -> SaveStats:
    """Saves an object as an ordinary torch checkpoint. After an error an existing checkpoint at ``path`` is unchanged.

    The new file replaces the old one only when it is complete. It differs from the file of ``torch.save`` in one point:
    if the saved tensors use only a part of a storage, only that part is saved. An object that cannot be streamed (it
    has storages without memory) is written by ``torch.save`` into the same temporary file, with a warning.

    Args:
        obj: Anything that ``torch.save`` takes.
        path: A local file in an existing directory. A symbolic link at this path is replaced, not its target. A
            directory of ``save_directory`` is replaced too.
        host_budget_bytes: Maximum host memory for staging tensors from devices.
        num_threads: Maximum number of writing threads. There is at most one for each 8 MiB. ``None`` means the number
            of CPUs, at most 4.
        durable: Return only when the file is on the disk, so that it survives a power failure.

    Returns:
        The sizes and times of the save.

    Raises:
        CheckpointWriteError: There is not enough space, or writing failed or is not allowed.
        ValueError: The budget is below 512 KiB, or ``num_threads`` is below 1.
        Exception: Pickling the object failed. Nothing has been written.

    Peak memory: the pickle, which holds no tensors, and the budget if tensors are on devices.
    """
    return plan_torch_save(
        obj, path, host_budget_bytes=host_budget_bytes, num_threads=num_threads, durable=durable
    ).run()


def plan_torch_save(
    obj: object,
    path: str | os.PathLike[str],
    *,
    host_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    num_threads: int | None = None,
    durable: bool = True,
    content_of: Callable[[Content], Content] | None = None,
) -> Save:
    """Plans a :func:`save_torch`. From its return to the end of the save, only the tensors' memory must not change.

    ``content_of`` may replace the bytes of each record by others of the same number, for storages without memory.
    """
    name = os.fspath(path)
    put_back(name)
    threads = default_save_threads() if num_threads is None else num_threads
    return Save(name, lambda: _plan(obj, name, host_budget_bytes, threads, content_of), durable=durable)


def write_torch(obj: object, file: IO[bytes], *, name: str, host_budget_bytes: int = DEFAULT_BUDGET_BYTES) -> SaveStats:
    """Writes an object as an ordinary torch checkpoint to a file that can only be written sequentially.

    Args:
        obj: Anything that ``torch.save`` takes, see :func:`save_torch`.
        file: A binary file open for writing, for example of fsspec.
        name: The name of the file in the returned figures.
        host_budget_bytes: Maximum host memory for staging tensors from devices. The file's own buffers do not count.

    Returns:
        The sizes and times of the save.

    Raises:
        ValueError: The budget is below 512 KiB.
        Exception: Pickling the object or writing to the file failed.
    """
    clock = Clock()
    plan = _plan(obj, name, host_budget_bytes, num_threads=1)
    clock.lap()
    if isinstance(plan, _TorchZipWriter):
        plan.write_to(StreamSink(file))
        bytes_written = plan.nbytes
    else:
        torch.save(obj, file)
        bytes_written = file.tell()
    clock.lap()
    clock.lap()
    return stats_of(name, plan, bytes_written, clock)


class TorchFileWriter:
    """The layout of a torch zip file before it is written: every byte except the checksums is known.

    Args:
        pickled: The pickle, and the storages that it names.
        storages: The content of the file for each storage.

    Attributes:
        num_records: Number of records, without the last one, which depends on the others.
        nbytes: Size of the file.
    """

    def __init__(self, pickled: Pickled, storages: Sequence[Content]) -> None:
        records: list[tuple[str, Content]] = [
            ("data.pkl", pickled.data),
            (".format_version", b"1"),
            (".storage_alignment", str(ALIGNMENT_BYTES).encode()),
            ("byteorder", sys.byteorder.encode()),
            *((f"data/{key}", content) for key, content in enumerate(storages)),
            ("version", b"3\n"),
        ]
        self._contents = [content for _, content in records]
        self.num_records = len(records)
        self._entries = lay_out((f"{_ARCHIVE}/{name}", size_of(content)) for name, content in records)
        # The value of this record depends on the other records' checksums. Its size and position do not.
        (self._identity,) = lay_out([(f"{_ARCHIVE}/.data/serialization_id", 40)], start=self._entries[-1].end)
        self.nbytes: int = self._identity.end + directory_bytes([*self._entries, self._identity])

    def take_contents(self) -> list[Content]:
        """The contents of the records. The writer no longer refers to them. Call it once."""
        contents, self._contents = self._contents, []
        return contents

    def target(self, sink: Sink) -> RecordWriter:
        """The record writer for the contents, for :class:`WriteEngine`."""
        return _ZipWriter(sink, self._entries)

    def write_end(self, sink: Sink, crc32s: Sequence[int]) -> None:
        """Writes the last record and the directory of the archive.

        Raises:
            OSError: Writing failed.
        """
        # Made as torch makes it: from the names and the checksums. It identifies the content; no reader compares it.
        names = zlib_ng.crc32("".join(entry.name for entry in self._entries).encode())
        content = zlib_ng.crc32(b"".join(crc32.to_bytes(4, "little") for crc32 in crc32s))
        identity = f"{names:020d}{content:020d}".encode()
        crc32 = zlib_ng.crc32(identity)
        tail = [
            local_header(self._identity),
            identity,
            data_descriptor(self._identity, crc32),
            directory([*self._entries, self._identity], [*crc32s, crc32]),
        ]
        sink.write(tail, self._identity.header_offset)


class _TorchZipWriter:
    """Plans one torch zip file that holds everything, see :class:`CheckpointWriter`."""

    is_directory = False
    streamed = True
    bytes_linkable = bytes_linked = 0
    names = ()

    def __init__(
        self,
        pickled: Pickled,
        host_budget_bytes: int,
        num_threads: int,
        content_of: Callable[[Content], Content] | None,
    ) -> None:
        self.storage_sizes = [saved.nbytes for saved in pickled.saved_storages]
        self._archive = TorchFileWriter(pickled, pickled.saved_storages)
        contents = self._archive.take_contents()
        if content_of is not None:
            contents = list(map(content_of, contents))
        most_threads = -(-sum(map(size_of, contents)) // _THREAD_BYTES)
        self.records = WriteEngine(contents, host_budget_bytes, min(num_threads, most_threads))
        self.nbytes: int = self._archive.nbytes

    def write(self, place: Replacement, *, durable: bool, order: WriteOrder | None) -> int:
        """Writes everything to the temporary file, see :class:`CheckpointWriter`."""
        self.write_to(LocalSink(place.descriptor, start_writeback=durable), order)
        return self.nbytes

    def write_to(self, sink: Sink, order: WriteOrder | None = None) -> None:
        """Writes the file. With one thread and without an order, the writes are sequential.

        Raises:
            OSError: Writing failed.
        """
        self._archive.write_end(sink, self.records.write(self._archive.target(sink), order))

    def finish(self, place: Replacement) -> None:
        """Nothing is left to do."""


class _TorchSaveWriter:
    """Plans a file that ``torch.save`` writes, see :class:`CheckpointWriter`."""

    is_directory = streamed = False
    bytes_linkable = bytes_linked = 0
    names = storage_sizes = ()
    records = None
    nbytes: int | None = None

    def __init__(self, obj: object) -> None:
        self._obj = obj

    def write(self, place: Replacement, *, durable: bool, order: WriteOrder | None) -> int:
        """Writes everything to the temporary file, see :class:`CheckpointWriter`."""
        with os.fdopen(os.dup(place.descriptor), "wb") as file:
            torch.save(self._obj, file)
        return os.fstat(place.descriptor).st_size

    def finish(self, place: Replacement) -> None:
        """Nothing is left to do."""


class _ZipWriter:
    """Writes records as entries of a zip archive, see :class:`RecordWriter`."""

    def __init__(self, sink: Sink, entries: Sequence[ZipEntry]) -> None:
        self._sink = sink
        self._entries = entries

    def write(self, parts: Sequence[RecordPart], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Writes the data with its local headers and descriptors."""
        first = self._entries[parts[0].record]
        offset = first.data_offset + parts[0].start if parts[0].start else first.header_offset
        buffers: list[bytes | memoryview] = []
        late: tuple[bytes, int] | None = None
        for part, view, crc32 in zip(parts, data, crc32s, strict=True):
            entry = self._entries[part.record]
            if not part.start:
                buffers.append(local_header(entry))
            buffers.append(view)
            if crc32 is None:
                continue
            if part.start + part.nbytes == entry.nbytes:
                buffers.append(data_descriptor(entry, crc32))
            else:  # the last part of this record has been written already, without the descriptor
                late = data_descriptor(entry, crc32), entry.data_end
        self._sink.write(buffers, offset)
        if late is not None:
            self._sink.write([late[0]], late[1])


def _plan(
    obj: object,
    name: str,
    host_budget_bytes: int,
    num_threads: int,
    content_of: Callable[[Content], Content] | None = None,
) -> CheckpointWriter:
    try:
        pickled = pickle_object(obj)
    except UnstreamableError as reason:
        warnings.warn(
            f"{name} is written by torch.save, one whole tensor after the other and without a bound on host memory: "
            f"{reason}.",
            stacklevel=2,
        )
        return _TorchSaveWriter(obj)
    return _TorchZipWriter(pickled, host_budget_bytes, num_threads, content_of)
