"""Writes records with several threads: the bytes come from memory of any device and go to a target.

Each thread takes the next write in order. Host memory is written directly, without a copy. Device memory is copied
through staging buffers, so the copies of one thread overlap with the writes of another. The checksums are computed on
the way. This module does not know pickles, archives, temporary files or Lightning.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from zlib_ng import zlib_ng

from lightning_memload.bytes import RecordPart
from lightning_memload.pickles.pickling import SavedStorage
from lightning_memload.transfer.checksums import PartialChecksums
from lightning_memload.transfer.contents import Content, GatheredBytes, memory_of, size_of
from lightning_memload.transfer.cuda_context import on_device, on_stream
from lightning_memload.transfer.sinks import RecordWriter
from lightning_memload.transfer.snapshot import Releasing, Snapshot
from lightning_memload.transfer.staging import MIN_BUDGET_BYTES, RingLayout, StagingRing, choose_layout
from lightning_memload.transfer.threads import default_threads, run_threads
from lightning_memload.transfer.write_plan import plan_writes

__all__ = ["WriteEngine", "WriteOrder"]

# Small enough to stay in the core's cache: the checksum reads the bytes first, and the write reads them again.
_DIRECT_BLOCK_BYTES = 1 << 20
# A copy reads the bytes once. Larger blocks take the interpreter's lock less often.
_COPIED_BLOCK_BYTES = 8 << 20
# Copying so few bytes takes less time than making a view of them, and starts the collector less often.
_TINY_BYTES = 1024
# Each part has three buffers: header, data and descriptor. One pwritev takes at most 1024 buffers (IOV_MAX).
_MAX_PARTS = 1024 // 3


@dataclass(frozen=True, slots=True)
class WriteOrder:
    """Which storages are written first, and what to call when they are written.

    Attributes:
        first: Whether a storage is one of the first.
        on_first: Called when all of the first storages are written and all threads have started.
    """

    first: Callable[[torch.UntypedStorage], bool]
    on_first: Callable[[], object]


class WriteEngine:
    """The records of one save, with the threads and staging buffers to write them.

    Args:
        contents: The data of each record. They must not change until they are written or copied.
        host_budget_bytes: Maximum host memory for staging data from devices.
        num_threads: Maximum number of writing threads. With one thread, the writes are in the order of the records.

    Attributes:
        sizes: Bytes of each record.
        num_threads: Number of writing threads.
        staging_bytes: Host memory for staging, 0 if no data is on a device.
        snapshot: The copies of the contents, ``None`` without :meth:`copy`.

    Raises:
        ValueError: The budget is below 512 KiB, or ``num_threads`` is below 1.
    """

    def __init__(self, contents: Sequence[Content], host_budget_bytes: int, num_threads: int) -> None:
        choose_layout(host_budget_bytes, num_threads)  # raises for options that cannot be met
        self._contents: Sequence[Content | memoryview] = contents
        self.sizes = [size_of(content) for content in contents]
        self.snapshot: Snapshot | None = None
        on_devices = [c for c in contents if not isinstance(c, bytes) and not c.is_in_host_memory]
        # The ring is not larger than the device data, so a small checkpoint does not take the whole budget.
        device_bytes = sum(content.nbytes for content in on_devices)
        self._ring_bytes = min(host_budget_bytes, max(device_bytes, MIN_BUDGET_BYTES)) if device_bytes else 0
        layout = choose_layout(self._ring_bytes, num_threads) if device_bytes else None
        devices = {content.storage.device for content in on_devices if content.storage.device.type == "cuda"}
        # Kernels on this thread's stream may still be computing the values, and another thread may write them.
        self._ready_events = {device: torch.cuda.current_stream(device).record_event() for device in devices}
        self.num_threads = num_threads
        self._layout = layout
        self.staging_bytes = layout.nbytes if layout else 0

    @property
    def copied_sizes(self) -> list[int]:
        """Bytes that :meth:`copy` copies of each record: 0 for records that are ``bytes``, which cannot change."""
        return [0 if isinstance(content, bytes) else content.nbytes for content in self._contents]

    def copy(self) -> None:
        """Copies all contents to host memory. They may change after that, and are no longer referenced.

        After an error nothing has changed.

        Raises:
            MemoryError: The kernel refuses the memory.

        Peak memory: ``copied_sizes``, and the budget if data is on devices. :meth:`write` frees the copies chunk by
        chunk, and :meth:`close` the rest.
        """
        sizes = self.copied_sizes
        num_threads = default_threads(next(iter(self._ready_events), torch.device("cpu")))
        layout = _layout_of_copies(self._ring_bytes, num_threads) if self._ring_bytes else None
        snapshot = Snapshot(sizes)
        try:
            with self._ring(layout) as ring:
                block_bytes = layout.block_bytes if layout else _COPIED_BLOCK_BYTES
                writing = _Writing(snapshot, self._contents, sizes, block_bytes, ring, self._ready_events)
                writing.run(num_threads, needs_crc32s=False)
        except BaseException:
            snapshot.close()
            raise
        self._contents = [
            content if isinstance(content, bytes) else snapshot.copy_of(record)
            for record, content in enumerate(self._contents)
        ]
        self._layout, self._ready_events, self.snapshot = None, {}, snapshot

    def write(self, target: RecordWriter, order: WriteOrder | None = None) -> list[int]:
        """Writes all records. Blocks until ``target`` has all bytes. Call it once.

        After an error ``target`` has some of the bytes, and all threads have ended.

        Args:
            target: The destination.
            order: What to write first. Its ``on_first`` is called once, by any thread.

        Returns:
            The CRC-32 of each record.

        Raises:
            OSError: ``target`` raised it.

        Peak memory: ``staging_bytes``.
        """
        if self.snapshot is not None:
            target = Releasing(target, self.snapshot)
        block_bytes = self._layout.block_bytes if self._layout else _DIRECT_BLOCK_BYTES
        with self._ring(self._layout) as ring:
            writing = _Writing(target, self._contents, self.sizes, block_bytes, ring, self._ready_events, order)
            return writing.run(self.num_threads)

    def close(self) -> None:
        """Frees the copies, and no longer refers to the contents. A second call does nothing."""
        self._contents = ()
        if self.snapshot is not None:
            self.snapshot.close()

    def _ring(self, layout: RingLayout | None) -> AbstractContextManager[StagingRing | None]:
        if layout is None:
            return nullcontext()
        # This may be another thread than the one that created this object, with another current GPU.
        device = next(iter(self._ready_events), None)
        return StagingRing(layout, pinned=device is not None, device=device)


def _layout_of_copies(budget_bytes: int, num_threads: int) -> RingLayout:
    """One buffer for each thread: it waits for its copy from the device, and copies the buffer. The others overlap."""
    layout = choose_layout(budget_bytes, num_threads)
    per_thread = layout.num_buffers // layout.num_threads
    return RingLayout(layout.num_threads, layout.num_threads, per_thread * layout.block_bytes)


class _Writing:
    def __init__(
        self,
        target: RecordWriter,
        contents: Sequence[Content | memoryview],
        sizes: Sequence[int],
        block_bytes: int,
        ring: StagingRing | None,
        made: Mapping[torch.device, torch.cuda.Event],
        order: WriteOrder | None = None,
    ) -> None:
        self._target = target
        self._contents = contents
        self._sizes = sizes
        self._needs_crc32s = True
        writes = plan_writes(sizes, block_bytes=block_bytes, max_parts=_MAX_PARTS)
        self._num_first = 1  # one extra count: released when all threads have started
        self._on_first = None if order is None else order.on_first
        if order is not None:
            urgent = [
                not isinstance(content, (bytes, memoryview)) and order.first(content.storage) for content in contents
            ]
            later = [not any(urgent[part.record] for part in parts) for parts in writes]
            self._num_first += later.count(False)
            writes = [parts for _, parts in sorted(zip(later, writes, strict=True), key=lambda pair: pair[0])]
        self._num_writes = len(writes)
        self._next = enumerate(writes, start=1)
        self._buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for buffer in ring.tensors if ring else ():
            self._buffers.put(buffer)
        self._streams = {device: torch.cuda.Stream(device) for device in made}
        for device, stream in self._streams.items():
            stream.wait_event(made[device])
        self._lock = threading.Lock()
        self._stopped = False
        self._crc32s = [0] * len(contents)
        self._checksums = PartialChecksums(sizes)

    def run(self, num_threads: int, *, needs_crc32s: bool = True) -> list[int]:
        self._needs_crc32s = needs_crc32s
        num_threads = max(1, min(num_threads, self._num_writes))
        num_first = self._num_first

        def work_alone() -> None:
            self._finish_first()
            self._work(num_first)

        try:
            run_threads(
                lambda: self._work(num_first),
                num_threads,
                self._stop,
                meanwhile=lambda started: self._finish_first(),
                alone=work_alone,
            )
        finally:
            # After a failure copies may still be running, and the ring is freed next.
            for stream in self._streams.values():
                stream.synchronize()
        return self._crc32s

    def _stop(self) -> None:
        self._stopped = True

    def _work(self, num_first: int) -> None:
        with on_device(next(iter(self._streams), None)):
            self._write_all(num_first)

    def _write_all(self, num_first: int) -> None:
        while (write := self._next_write()) is not None:
            number, parts = write
            with ExitStack() as stack:
                data = self._to_host(parts, stack)
                self._target.write(parts, data, self._crc32s_of(parts, data))
            if number < num_first:
                self._finish_first()

    def _finish_first(self) -> None:
        with self._lock:
            self._num_first -= 1
            if self._num_first or self._on_first is None:
                return
        self._on_first()

    def _next_write(self) -> tuple[int, tuple[RecordPart, ...]] | None:
        with self._lock:
            return None if self._stopped else next(self._next, None)

    def _to_host(self, parts: tuple[RecordPart, ...], stack: ExitStack) -> list[memoryview]:
        """The bytes of all parts in host memory. They are valid while the stack is open."""
        found = []
        buffer: torch.Tensor | None = None
        used = 0
        devices: set[torch.device] = set()
        tiny = _Copies(sum(part.nbytes for part in parts if part.nbytes <= _TINY_BYTES))
        for part in parts:
            content = self._contents[part.record]
            if isinstance(content, (bytes, memoryview)):
                found.append(memoryview(content)[part.start : part.start + part.nbytes])
            elif not part.nbytes:
                found.append(memoryview(b""))
            elif isinstance(content, GatheredBytes) and content.is_in_host_memory:
                found.append(content.gather(part.start, part.nbytes).numpy().data)
            elif isinstance(content, SavedStorage) and content.is_in_host_memory:
                address = content.storage.data_ptr() + content.start + part.start
                is_tiny = part.nbytes <= _TINY_BYTES
                found.append(tiny.copy(address, part.nbytes) if is_tiny else memory_of(address, part.nbytes))
            else:
                if buffer is None:
                    buffer = self._buffers.get()
                    stack.callback(self._buffers.put, buffer)
                staged = buffer[used : used + part.nbytes]
                self._copy(content, part, staged)
                devices.add(content.storage.device)
                found.append(memory_of(staged.data_ptr(), part.nbytes))
                used += part.nbytes
        for device in devices:
            if device in self._streams:
                event = torch.cuda.Event()
                event.record(self._streams[device])
                event.synchronize()
        return found

    def _copy(self, content: SavedStorage | GatheredBytes, part: RecordPart, staged: torch.Tensor) -> None:
        device = content.storage.device
        with on_stream(self._streams.get(device)):
            if isinstance(content, GatheredBytes):
                values = content.gather(part.start, part.nbytes)
            else:
                values = torch.empty(0, dtype=torch.uint8, device=device)
                values.set_(content.storage, content.start + part.start, (part.nbytes,), (1,))
            staged.copy_(values, non_blocking=device in self._streams)

    def _crc32s_of(self, parts: tuple[RecordPart, ...], data: list[memoryview]) -> list[int | None]:
        if not self._needs_crc32s:
            return [None] * len(parts)
        return [self._add_crc32(part, zlib_ng.crc32(view)) for part, view in zip(parts, data, strict=True)]

    def _add_crc32(self, part: RecordPart, crc32: int) -> int | None:
        """Adds the checksum of a part. Returns the checksum of the record if this part completes it."""
        if part.nbytes == self._sizes[part.record]:
            self._crc32s[part.record] = crc32
            return crc32
        whole = self._checksums.add(part.record, part.start, part.nbytes, crc32)
        if whole is not None:
            self._crc32s[part.record] = whole
        return whole


class _Copies:
    """Copies of what is tiny, in one buffer.

    Args:
        nbytes: Bytes of all together.
    """

    def __init__(self, nbytes: int) -> None:
        self._view = memoryview(bytearray(nbytes))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._view)) if nbytes else 0
        self._used = 0

    def copy(self, address: int, nbytes: int) -> memoryview:
        """A copy of the bytes at an address."""
        start = self._used
        self._used += nbytes
        ctypes.memmove(self._address + start, address, nbytes)
        return self._view[start : self._used]
