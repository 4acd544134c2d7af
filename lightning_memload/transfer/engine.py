"""The engine: threads that carry out a plan, from a byte source into tensors.

Each thread takes the next read in file order. For CPU memory, a thread reads directly into the destination, or
converts the values itself. For other devices, it reads into a staging buffer, and the calling thread copies the buffer
to the device. Only the calling thread uses the device: threads that share it block each other (25% slower on an H100).
A buffer is reused only after its last copy has ended. Checksums are computed from the bytes as they are read. The
engine does not know modules, optimizers or file formats.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from lightning_memload.bytes import Record
from lightning_memload.checkpoint import span_elements
from lightning_memload.storage import ByteSource, checksum_error, read_fully
from lightning_memload.storage.kernel import populate_memory
from lightning_memload.transfer.buffer import Buffer
from lightning_memload.transfer.checksums import PartialChecksums
from lightning_memload.transfer.copies import TensorCopy, TransferStats
from lightning_memload.transfer.cuda_context import on_stream
from lightning_memload.transfer.flat_bytes import address_of, bytes_of, cut, is_raw
from lightning_memload.transfer.plan import (
    REQUEST_BYTES,
    Read,
    RecordSegment,
    Segment,
    TargetRange,
    TensorBlock,
    complete_records,
    plan_checks,
    plan_reads,
    split_strided,
)
from lightning_memload.transfer.staging import StagingRing
from lightning_memload.transfer.threads import run_threads

__all__ = ["Job", "Transfer", "transfer"]

# For CPU memory: the checksum finds a block of 1 MiB still in the core's cache, twice as fast as with 16 MiB.
_DIRECT_BLOCK_BYTES = 1 << 20
# The pages of smaller parts are faulted in one by one.
_POPULATED_BYTES = 64 << 10


def transfer(
    source: ByteSource,
    copies: Sequence[TensorCopy],
    ring: Callable[[], StagingRing],
    *,
    num_threads: int,
    block_bytes: int,
    records: Sequence[Record] = (),
    on_progress: Callable[[int], None] | None = None,
    on_checksum: Callable[[Record, int], None] | None = None,
) -> TransferStats:
    """Copies every tensor from the source to its destination.

    After a failure, some destinations are filled and others are not. All threads have ended and no copy is in progress.

    Args:
        source: The source of the bytes.
        copies: The tensors. Destinations must not overlap. Empty tensors are skipped.
        ring: Returns the staging ring. Called only if a destination is not in CPU memory or values must be converted.
        num_threads: Number of threads that read.
        block_bytes: Maximum length of one read, at most the ring's block.
        records: Checksums to compare. All bytes of these records are read, also those that no copy needs.
        on_progress: Called after every read with its length in bytes, from the threads, one call at a time.
        on_checksum: Called with each record without a checksum and its CRC-32, from the threads. With it, records are
            also read if no copy needs any of their bytes.

    Returns:
        The counters, when all values have arrived on every device.

    Raises:
        ValueError: The ring has fewer threads, or smaller blocks, than the arguments demand.
        CheckpointReadError: A read failed or reached the end of the file.
        ChecksumError: The bytes of a record do not have the recorded checksum.

    Peak memory: the ring. If values are converted on the device, also one block per buffer of the ring there.
    """
    by_device: dict[torch.device, list[TensorCopy]] = {}
    for copy in copies:
        if copy.destination.numel():
            by_device.setdefault(copy.destination.device, []).append(copy)
    if len(by_device) > 1:
        # Tensors for the CPU lie between those for the device (an optimizer's steps), so one pass reads both.
        on_cpu = by_device.pop(torch.device("cpu"), [])
        next(iter(by_device.values())).extend(on_cpu)
    stats = TransferStats()
    for of_device in by_device.values() or ([[]] if records and on_checksum is not None else []):
        stats += Transfer(source, of_device, ring, num_threads, block_bytes, records, on_progress, on_checksum).run()
    return stats


class Job(NamedTuple):
    """One read and its use: either raw segments, or one block of a tensor that must be rearranged."""

    read: Read
    checks: tuple[RecordSegment, ...] = ()
    block: TensorBlock | None = None


class Transfer:
    """One transfer to the CPU, to a device, or to both. See :func:`transfer` for the arguments."""

    def __init__(
        self,
        source: ByteSource,
        copies: list[TensorCopy],
        ring: Callable[[], StagingRing],
        num_threads: int,
        block_bytes: int,
        records: Sequence[Record],
        on_progress: Callable[[int], None] | None,
        on_checksum: Callable[[Record, int], None] | None = None,
    ) -> None:
        self._on_checksum = on_checksum
        self._source = source
        self._copies = copies
        self._records = sorted(records, key=lambda record: record.offset)
        self._on_progress = on_progress
        # At most one device besides the CPU.
        self._device = next((c.destination.device for c in copies if c.destination.device.type != "cpu"), None)
        on_cuda = self._device is not None and self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_cuda else None
        self._is_raw = [is_raw(copy) for copy in copies]
        jobs = self._plan(block_bytes)
        self._jobs, self._num_jobs = iter(jobs), len(jobs)
        needs_ring = self._device is not None or any(job.block is not None for job in jobs)
        self._ring = ring() if needs_ring else None
        layout = self._ring.layout if self._ring else None
        if layout and (num_threads > layout.num_threads or block_bytes > layout.block_bytes):
            raise ValueError(f"{num_threads} threads with blocks of {block_bytes} bytes do not fit {layout}.")
        self._num_threads = max(1, min(num_threads, len(jobs)))
        self._inference_mode = torch.is_inference_mode_enabled()
        # Those on a device are made when their first bytes have been read: 10 us for each, while threads read.
        self._bytes: list[torch.Tensor | int | None] = [
            copy.destination.data_ptr() if raw and copy.destination.is_cpu else None
            for copy, raw in zip(copies, self._is_raw, strict=True)
        ]
        # Queue of free buffers. ``None`` is the stop sentinel.
        self._empty: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        for view, tensor in zip(self._ring.views, self._ring.tensors, strict=True) if self._ring else ():
            self._empty.put(Buffer(view, tensor, self._stream))
        # Queue of filled buffers. Each thread puts ``None`` when it ends.
        self._full: queue.SimpleQueue[tuple[Job, Buffer] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = False
        self._bytes_read = 0
        self._bytes_verified = 0
        self._checksums = PartialChecksums([record.nbytes for record in self._records])

    def _plan(self, block_bytes: int) -> list[Job]:
        ranges = []
        blocks: list[tuple[Read, TensorBlock]] = []
        for number, copy in enumerate(self._copies):
            itemsize = copy.dtype.itemsize
            if self._is_raw[number]:
                ranges.append(TargetRange(number, copy.offset, copy.destination.numel() * itemsize))
                continue
            shape = tuple(copy.destination.shape)
            for block in split_strided(shape, copy.stride, max_span=max(1, block_bytes // itemsize)):
                nbytes = block.span * itemsize
                segment = Segment(0, nbytes, number, 0)
                blocks.append((Read(copy.offset + block.offset * itemsize, nbytes, (segment,)), block))
        raw_bytes = block_bytes
        if self._device is None:
            # A block that goes directly into CPU memory needs no buffer.
            raw_bytes = REQUEST_BYTES if self._source.is_remote else min(block_bytes, _DIRECT_BLOCK_BYTES)
        reads: list[tuple[Read, TensorBlock | None]] = [
            (read, None) for read in plan_reads(ranges, block_bytes=raw_bytes)
        ]
        reads.extend(blocks)
        reads.sort(key=lambda item: item[0].offset)
        records = [(record.offset, record.nbytes) for record in self._records]
        checks, checked = plan_checks([read for read, _ in reads], records)
        if len(checked) < len(records):
            others = complete_records(
                [read for read, _ in reads],
                records,
                block_bytes=raw_bytes,
                untouched=self._on_checksum is not None,
            )
            reads.extend((read, None) for read in others)
            reads.sort(key=lambda item: item[0].offset)
            checks, _ = plan_checks([read for read, _ in reads], records)
        return [Job(read, check, block) for (read, block), check in zip(reads, checks, strict=True)]

    def run(self) -> TransferStats:
        """Carries out the transfer, see :func:`transfer`."""
        started = time.perf_counter()
        if self._stream is not None:
            # Work that was queued before the destinations were allocated may still use their memory.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            self._carry_out()
        finally:
            if self._stream is not None:
                self._stream.synchronize()
        return TransferStats(
            bytes_read=self._bytes_read,
            bytes_verified=self._bytes_verified,
            seconds=time.perf_counter() - started,
            num_threads=self._num_threads,
            staging_bytes=self._ring.nbytes if self._ring else 0,
        )

    def _carry_out(self) -> None:
        if self._device is None and self._num_jobs == 1:
            self._read_all()  # Thousands of modules may be filled one by one; a thread for each is slower.
        else:
            run_threads(
                self._read_all, self._num_threads, self._stop, meanwhile=self._copy_all, alone=self._read_and_copy
            )

    def _stop(self) -> None:
        self._stopped = True
        for _ in range(self._num_threads):
            self._empty.put(None)

    def _next_job(self) -> Job | None:
        with self._lock:
            return None if self._stopped else next(self._jobs, None)

    def _read_and_copy(self) -> None:
        """Reads and copies in turn, in the calling thread. Used if no thread can be started."""
        with on_stream(self._stream):
            self._read_all(copies=True)

    def _read_all(self, *, copies: bool = False) -> None:
        """Reads, in each thread. The thread also copies if all destinations are on the CPU, or with ``copies``."""
        try:
            # Both modes belong to a thread.
            with torch.inference_mode(self._inference_mode), torch.no_grad():
                while (job := self._next_job()) is not None:
                    if self._device is None and job.block is None:
                        self._read_directly(job)
                    else:
                        buffer = self._empty.get()
                        if buffer is None:
                            return
                        self._read(job, [(0, buffer.view[: job.read.nbytes])])
                        if self._device is None or copies:
                            self._copy(job, buffer)
                            buffer.mark()
                            buffer.wait()
                            self._empty.put(buffer)
                        else:
                            self._full.put((job, buffer))
                    self._advance(job.read.nbytes)
        finally:
            self._full.put(None)

    def _copy_all(self, running: int) -> None:
        """Copies from the staging buffers to the destinations, in the calling thread, until all threads have ended."""
        under_way: deque[Buffer] = deque()
        with torch.no_grad(), on_stream(self._stream):
            while running:
                while under_way and under_way[0].is_free():
                    self._empty.put(under_way.popleft())
                if under_way and self._full.empty():
                    under_way[0].wait()
                    continue
                filled = self._full.get()
                if filled is None:
                    running -= 1
                    continue
                job, buffer = filled
                self._copy(job, buffer)
                buffer.mark()
                under_way.append(buffer)

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_read += nbytes
            if self._on_progress is not None:
                self._on_progress(nbytes)

    def _verify(self, check: RecordSegment, parts: Sequence[memoryview]) -> None:
        actual = self._checksums.update(check.record, check.record_start, parts)
        if actual is None:
            return
        record = self._records[check.record]
        with self._lock:
            self._bytes_verified += record.nbytes
        if record.crc32 is None and self._on_checksum is not None:
            self._on_checksum(record, actual)
        elif actual != record.crc32:
            raise checksum_error(self._source, record, actual)

    def _read(self, job: Job, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Reads into consecutive parts of memory and compares the checksums while the bytes are in the cache."""
        read_fully(self._source, [part for _, part in parts], job.read.offset, name_at=self._name_at)
        for check in job.checks:
            self._verify(check, cut(parts, check.start, check.nbytes))

    def _read_directly(self, job: Job) -> None:
        parts: list[tuple[int, memoryview]] = []
        again: list[Segment] = []
        position = 0
        for segment in job.read.segments:
            if segment.start > position:
                parts.append((position, memoryview(bytearray(segment.start - position))))
                position = segment.start
            end = segment.start + segment.nbytes
            if segment.start < position:
                again.append(segment)
            if end > position:
                skip = position - segment.start
                parts.append((position, self._cpu_bytes(segment, skip)))
                position = end
        if position < job.read.nbytes:  # Bytes of a record that no target wants.
            parts.append((position, memoryview(bytearray(job.read.nbytes - position))))
        self._read(job, parts)
        for segment in again:
            # An earlier target of this read has the same bytes: a tie or a view.
            target_start = 0
            for part in cut(parts, segment.start, segment.nbytes):
                destination = self._cpu_bytes(segment, target_start, len(part))
                ctypes.memmove(address_of(destination), address_of(part), len(part))
                target_start += len(part)

    def _cpu_bytes(self, segment: Segment, skip: int, nbytes: int | None = None) -> memoryview:
        """Returns the writable memory of a segment's target, without its first ``skip`` bytes."""
        start = self._bytes[segment.target]
        assert isinstance(start, int)
        length = segment.nbytes - skip if nbytes is None else nbytes
        address = start + segment.target_start + skip
        if length >= _POPULATED_BYTES:
            populate_memory(address, length)  # by each thread for its own block
        return memoryview((ctypes.c_char * length).from_address(address)).cast("B")

    def _copy(self, job: Job, buffer: Buffer) -> None:
        read = job.read
        if job.block is not None:
            buffer.rearrange(self._copies[read.segments[0].target], job.block, read.nbytes)
            return
        for segment in read.segments:
            target = self._bytes[segment.target]
            if target is None:
                target = self._bytes[segment.target] = bytes_of(self._copies[segment.target].destination)
            if isinstance(target, int):
                # An optimizer's steps: for thousands of scalars, a torch call for each is slower.
                ctypes.memmove(target + segment.target_start, buffer.address + segment.start, segment.nbytes)
                continue
            target[segment.target_start : segment.target_start + segment.nbytes].copy_(
                buffer.tensor[segment.start : segment.start + segment.nbytes], non_blocking=self._stream is not None
            )

    def _name_at(self, offset: int) -> str | None:
        for copy in self._copies:
            span = span_elements(copy.destination.shape, copy.stride)
            if copy.offset <= offset < copy.offset + span * copy.dtype.itemsize:
                return copy.name
        return None
