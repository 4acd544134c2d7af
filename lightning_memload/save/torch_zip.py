"""Saving an object as ``torch.save`` does, with host memory bounded by a budget, in one step that others can see.

The file is an ordinary torch checkpoint for every reader. Bytes go from the tensors to the file, in host memory from
where they lie and from devices through the staging ring; the only copy of anything is the ring.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import IO

import torch
from zlib_ng import zlib_ng

from lightning_memload.save.layout import (
    ALIGNMENT_BYTES,
    Entry,
    Piece,
    data_descriptor,
    directory,
    directory_bytes,
    lay_out,
    local_header,
)
from lightning_memload.save.pickling import Pickled, Stretch, UnstreamableError, pickle_object
from lightning_memload.save.replacement import Replacement, put_back
from lightning_memload.save.saving import (
    DEFAULT_BUDGET_BYTES,
    Clock,
    Plan,
    Save,
    SaveStats,
    default_save_threads,
    stats_of,
)
from lightning_memload.save.writing import Content, LocalSink, Order, Records, Sink, StreamSink, Target, size_of

__all__ = ["Archive", "plan_torch_save", "save_torch", "write_torch"]

# What torch.save calls the archive that it writes to a buffer.
_ARCHIVE = "archive"


def save_torch(
    obj: object,
    path: str | os.PathLike[str],
    *,
    host_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    num_threads: int | None = None,
    durable: bool = True,
) -> SaveStats:
    """Saves an object as an ordinary torch checkpoint, or leaves what was there untouched.

    The file replaces another one only when it is complete. It differs from one of ``torch.save`` in one point: of a
    storage of which the saved tensors span a part, only that part is saved. What cannot be streamed (storages without
    memory) is left to ``torch.save``, with a warning, into the same temporary file.

    Args:
        obj: Anything that ``torch.save`` takes.
        path: A local file in an existing directory. A symbolic link is replaced itself, and so is a directory of
            ``save_directory``.
        host_budget_bytes: The most host memory for the bytes of tensors on devices.
        num_threads: Threads to write with; ``None``: up to 4, as many as there are CPUs.
        durable: Return only when the file is on the disk, so that it survives a power failure.

    Returns:
        What it cost.

    Raises:
        CheckpointWriteError: There is not enough space, or writing failed or is not allowed.
        ValueError: The budget is below 512 KiB, or there is no thread.
        Exception: Whatever pickling the object raises; nothing has been written then.

    Peak memory: the budget if tensors are on devices, else nothing; and the pickle, which holds no tensors.
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
) -> Save:
    """Does the first part of :func:`save_torch`, all that concerns more of the object than its tensors' memory."""
    name = os.fspath(path)
    put_back(name)
    threads = default_save_threads() if num_threads is None else num_threads
    return Save(name, lambda: _plan(obj, name, host_budget_bytes, threads), durable=durable)


def write_torch(obj: object, file: IO[bytes], *, name: str, host_budget_bytes: int = DEFAULT_BUDGET_BYTES) -> SaveStats:
    """Writes an object as an ordinary torch checkpoint to a file that can only be written from beginning to end.

    Args:
        obj: Anything that ``torch.save`` takes; see :func:`save_torch`.
        file: Open for writing in binary, for example by fsspec.
        name: What to call it in the result.
        host_budget_bytes: The most host memory for the bytes of tensors on devices. The file's own buffers are apart.

    Returns:
        What it cost.

    Raises:
        ValueError: The budget is below 512 KiB.
        Exception: Whatever pickling the object or the file raises.
    """
    clock = Clock()
    plan = _plan(obj, name, host_budget_bytes, num_threads=1)
    clock.lap()
    if isinstance(plan, _File):
        plan.write_to(StreamSink(file))
        bytes_written = plan.nbytes
    else:
        torch.save(obj, file)
        bytes_written = file.tell()
    clock.lap()
    clock.lap()
    return stats_of(name, plan, bytes_written, clock)


class Archive:
    """A torch zip file that is to be written: every byte but the checksums is known.

    Args:
        pickled: The pickle, and the storages it names.
        storages: What the file holds of each storage.

    Attributes:
        contents: Its records, but for one at the end that depends on the others.
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
        self.contents = [content for _, content in records]
        self._entries = lay_out((f"{_ARCHIVE}/{name}", size_of(content)) for name, content in records)
        # Its value comes from the other records' checksums, its size and place do not.
        (self._identity,) = lay_out([(f"{_ARCHIVE}/.data/serialization_id", 40)], start=self._entries[-1].end)
        self.nbytes: int = self._identity.end + directory_bytes([*self._entries, self._identity])

    def target(self, sink: Sink) -> Target:
        """Where the contents go, for :class:`Records`."""
        return _Entries(sink, self._entries)

    def write_end(self, sink: Sink, crc32s: Sequence[int]) -> None:
        """Writes what follows the contents.

        Raises:
            OSError: The sink's.
        """
        # Like torch's: from the names, and from the checksums. It identifies the content and is never compared.
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


class _File:
    """A torch zip file with everything in it, see :class:`Plan`."""

    is_directory = False
    streamed = True
    bytes_linkable = bytes_linked = 0
    names = ()

    def __init__(self, pickled: Pickled, host_budget_bytes: int, num_threads: int) -> None:
        self.stretches = pickled.stretches
        self._archive = Archive(pickled, pickled.stretches)
        self._records = Records(self._archive.contents, host_budget_bytes, num_threads)
        self.num_threads = self._records.num_threads
        self.staging_bytes = self._records.staging_bytes
        self.nbytes: int = self._archive.nbytes

    def write(self, place: Replacement, *, durable: bool, order: Order | None) -> int:
        """Writes it to a temporary file."""
        self.write_to(LocalSink(place.descriptor, start_writeback=durable), order)
        return self.nbytes

    def write_to(self, sink: Sink, order: Order | None = None) -> None:
        """Writes it; without an order from its first byte to its last if there is one thread.

        Raises:
            OSError: The sink's.
        """
        self._archive.write_end(sink, self._records.write(self._archive.target(sink), order))

    def finish(self, place: Replacement) -> None:
        """Nothing is left to do."""


class _ByTorch:
    """What only ``torch.save`` can write."""

    is_directory = streamed = False
    num_threads, staging_bytes, bytes_linkable, bytes_linked = 1, 0, 0, 0
    names = ()
    stretches: tuple[Stretch, ...] = ()
    nbytes: int | None = None

    def __init__(self, obj: object) -> None:
        self._obj = obj

    def write(self, place: Replacement, *, durable: bool, order: Order | None) -> int:
        """Writes it to a temporary file, see :class:`Plan`."""
        with os.fdopen(os.dup(place.descriptor), "wb") as file:
            torch.save(self._obj, file)
        return os.fstat(place.descriptor).st_size

    def finish(self, place: Replacement) -> None:
        """Nothing is left to do."""


class _Entries:
    """The entries of an archive as a target."""

    def __init__(self, sink: Sink, entries: Sequence[Entry]) -> None:
        self._sink = sink
        self._entries = entries

    def write(self, pieces: Sequence[Piece], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Writes data with what stands around it in a zip."""
        first = self._entries[pieces[0].record]
        offset = first.data_offset + pieces[0].start if pieces[0].start else first.header_offset
        buffers: list[bytes | memoryview] = []
        late: tuple[bytes, int] | None = None
        for piece, view, crc32 in zip(pieces, data, crc32s, strict=True):
            entry = self._entries[piece.record]
            if not piece.start:
                buffers.append(local_header(entry))
            buffers.append(view)
            if crc32 is None:
                continue
            if piece.start + piece.nbytes == entry.nbytes:
                buffers.append(data_descriptor(entry, crc32))
            else:  # another thread has already written the end of this record
                late = data_descriptor(entry, crc32), entry.data_end
        self._sink.write(buffers, offset)
        if late is not None:
            self._sink.write([late[0]], late[1])


def _plan(obj: object, name: str, host_budget_bytes: int, num_threads: int) -> Plan:
    try:
        pickled = pickle_object(obj)
    except UnstreamableError as reason:
        warnings.warn(
            f"{name} is written by torch.save, one whole tensor after the other and without a bound on host memory: "
            f"{reason}.",
            stacklevel=2,
        )
        return _ByTorch(obj)
    return _File(pickled, host_budget_bytes, num_threads)
