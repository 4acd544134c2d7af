"""Saving an object as ``torch.save`` does, with host memory bounded by a budget, in one step that others can see.

The file is an ordinary torch checkpoint for every reader. Bytes go from the tensors to the file, in host memory from
where they lie and from devices through the staging ring; the only copy of anything is the ring. Not promised: a
snapshot. Tensors that change while they are saved are saved with some bytes of before and some of after.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import IO

import torch
from zlib_ng import zlib_ng

from lightning_memload.errors import CheckpointWriteError
from lightning_memload.save.layout import ALIGNMENT_BYTES, data_descriptor, directory, lay_out, local_header
from lightning_memload.save.pickling import Pickled, Stretch, UnstreamableError, pickle_object
from lightning_memload.save.replacement import Replacement
from lightning_memload.save.writing import Content, LocalSink, Sink, StreamSink, write_records
from lightning_memload.transfer import MIN_BUDGET_BYTES, StagingRing, available_cpus, choose_layout

__all__ = ["SaveStats", "save_torch", "write_torch"]

DEFAULT_BUDGET_BYTES = 128 << 20
# A file takes one writer at a time on most file systems: more threads than it takes to copy and sum up meanwhile only
# wait for one another.
_MAX_THREADS = 4
# What torch.save calls the archive that it writes to a buffer.
_ARCHIVE = "archive"


@dataclass(frozen=True, slots=True)
class SaveStats:
    """What a save did.

    Attributes:
        path: The file, or what the caller calls it.
        bytes_written: Size of the file.
        tensor_bytes: Bytes of storages in it.
        num_storages: Storages in it.
        seconds: Wall time of everything.
        pickle_seconds: Part of it until the pickle and the plan were there.
        write_seconds: Part of it in which bytes were brought and written.
        commit_seconds: Part of it for the disk to take them, and for the file to get its name.
        num_threads: Threads that wrote.
        staging_bytes: Host memory of the staging ring, 0 when no byte went through it.
        streamed: Whether the bytes were streamed; ``False`` when ``torch.save`` wrote the file.
    """

    path: str
    bytes_written: int
    tensor_bytes: int
    num_storages: int
    seconds: float
    pickle_seconds: float
    write_seconds: float
    commit_seconds: float
    num_threads: int
    staging_bytes: int
    streamed: bool


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
        path: A local file in an existing directory. A symbolic link is replaced itself.
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
    path = os.fspath(path)
    if num_threads is None:
        num_threads = min(_MAX_THREADS, available_cpus())
    clock = _Clock()
    archive = _archive_of(obj, path, host_budget_bytes, num_threads)
    clock.lap()
    replacement: Replacement | None = None
    try:
        with Replacement(path) as replacement:
            if archive is None:
                with os.fdopen(os.dup(replacement.descriptor), "wb") as file:
                    torch.save(obj, file)
            else:
                _check_space(path, archive.nbytes)
                archive.write(LocalSink(replacement.descriptor, start_writeback=durable))
            bytes_written = os.fstat(replacement.descriptor).st_size
            clock.lap()
            replacement.commit(durable=durable)
    except OSError as error:
        if isinstance(error, CheckpointWriteError):
            raise
        needed_bytes = archive.nbytes if archive is not None else None
        is_committed = replacement is not None and replacement.is_committed
        raise _failure(path, needed_bytes, error, is_committed=is_committed) from error
    return _stats(path, archive, bytes_written, clock)


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
    clock = _Clock()
    archive = _archive_of(obj, name, host_budget_bytes, num_threads=1)
    clock.lap()
    if archive is None:
        torch.save(obj, file)
    else:
        archive.write(StreamSink(file))
    clock.lap()
    return _stats(name, archive, file.tell() if archive is None else archive.nbytes, clock)


class _Archive:
    """A checkpoint that is to be written: every byte but the checksums is known."""

    def __init__(self, pickled: Pickled, host_budget_bytes: int, num_threads: int) -> None:
        self.stretches = pickled.stretches
        records: list[tuple[str, Content]] = [
            ("data.pkl", pickled.data),
            (".format_version", b"1"),
            (".storage_alignment", str(ALIGNMENT_BYTES).encode()),
            ("byteorder", sys.byteorder.encode()),
            *((f"data/{key}", stretch) for key, stretch in enumerate(pickled.stretches)),
            ("version", b"3\n"),
        ]
        self._contents = [content for _, content in records]
        sizes = [content.nbytes if isinstance(content, Stretch) else len(content) for content in self._contents]
        names = [f"{_ARCHIVE}/{name}" for name, _ in records]
        self._entries = lay_out(zip(names, sizes, strict=True))
        # Its value comes from the other records' checksums, its size and place do not.
        (self._identity,) = lay_out([(f"{_ARCHIVE}/.data/serialization_id", 40)], start=self._entries[-1].end)
        device_bytes = sum(s.nbytes for s in self.stretches if not s.is_in_host_memory)
        # A small checkpoint needs no more buffers than it has bytes.
        budget_bytes = min(host_budget_bytes, max(device_bytes, num_threads * MIN_BUDGET_BYTES))
        layout = choose_layout(budget_bytes, num_threads)
        self._layout = layout if device_bytes else None
        self._pinned = any(s.storage.device.type == "cuda" for s in self.stretches)
        self.num_threads = layout.num_threads if device_bytes else num_threads
        self.staging_bytes = layout.nbytes if device_bytes else 0
        self.nbytes = self._identity.end + len(self._end([0] * len(records), 0))

    def write(self, sink: Sink) -> None:
        """Writes it from its first byte to its last.

        Raises:
            OSError: The sink's.
        """
        with contextlib.ExitStack() as stack:
            ring = stack.enter_context(StagingRing(self._layout, pinned=self._pinned)) if self._layout else None
            crc32s = write_records(sink, self._entries, self._contents, ring, num_threads=self.num_threads)
        # Like torch's: from the names, and from the checksums. It identifies the content and is never compared.
        names = zlib_ng.crc32("".join(entry.name for entry in self._entries).encode())
        content = zlib_ng.crc32(b"".join(crc32.to_bytes(4, "little") for crc32 in crc32s))
        identity = f"{names:020d}{content:020d}".encode()
        crc32 = zlib_ng.crc32(identity)
        tail = [
            local_header(self._identity),
            identity,
            data_descriptor(self._identity, crc32),
            self._end(crc32s, crc32),
        ]
        sink.write(tail, self._identity.header_offset)

    def _end(self, crc32s: list[int], identity_crc32: int) -> bytes:
        return directory([*self._entries, self._identity], [*crc32s, identity_crc32])


@dataclass(slots=True)
class _Clock:
    """Times at the start and after each phase."""

    times: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def lap(self) -> None:
        self.times.append(time.perf_counter())


def _archive_of(obj: object, name: str, host_budget_bytes: int, num_threads: int) -> _Archive | None:
    """Plans the archive; ``None`` says that only ``torch.save`` can write it."""
    choose_layout(host_budget_bytes, num_threads)  # raises for options that cannot be met
    try:
        return _Archive(pickle_object(obj), host_budget_bytes, num_threads)
    except UnstreamableError as reason:
        warnings.warn(
            f"{name} is written by torch.save, one whole tensor after the other and without a bound on host memory: "
            f"{reason}.",
            stacklevel=3,
        )
        return None


def _stats(path: str, archive: _Archive | None, bytes_written: int, clock: _Clock) -> SaveStats:
    clock.lap()
    started, pickled, written, ended = clock.times
    stretches = archive.stretches if archive is not None else ()
    return SaveStats(
        path=path,
        bytes_written=bytes_written,
        tensor_bytes=sum(stretch.nbytes for stretch in stretches),
        num_storages=len(stretches),
        seconds=ended - started,
        pickle_seconds=pickled - started,
        write_seconds=written - pickled,
        commit_seconds=ended - written,
        num_threads=archive.num_threads if archive is not None else 1,
        staging_bytes=archive.staging_bytes if archive is not None else 0,
        streamed=archive is not None,
    )


def _check_space(path: str, needed_bytes: int) -> None:
    free_bytes = _free_bytes(path)
    if free_bytes is not None and free_bytes < needed_bytes:
        raise _failure(path, needed_bytes, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _failure(
    path: str, needed_bytes: int | None, error: OSError, *, is_committed: bool = False
) -> CheckpointWriteError:
    free_bytes = _free_bytes(path)
    sizes = "" if needed_bytes is None else f" It takes {needed_bytes} bytes"
    if sizes and free_bytes is not None:
        sizes += f", and {free_bytes} are free in {os.path.dirname(path) or '.'}"
    outcome = "It has its place, but may not survive a power failure" if is_committed else "What was there is untouched"
    return CheckpointWriteError(
        f"{path} could not be saved: {error.strerror or error}.{sizes and sizes + '.'} {outcome}.",
        path=path,
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
        errno=error.errno,
    )


def _free_bytes(path: str) -> int | None:
    """What this process may still write beside ``path``; ``None`` if nobody knows."""
    try:
        status = os.statvfs(os.path.dirname(path) or ".")
    except OSError:
        return None
    # Some file systems (FUSE, object stores) count nothing.
    if not status.f_blocks:
        return None
    return status.f_frsize * (status.f_bfree if os.geteuid() == 0 else status.f_bavail)
