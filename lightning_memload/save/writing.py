"""Writes records: the threads that bring bytes from memory, of any device, to where they belong.

Each thread takes the next write in order. Host memory is written from where it lies; what lies on a device comes
through staging buffers, so that the copies of one thread run while another writes. Checksums are taken on the way.
What this does not know: pickles, archives, temporary files, Lightning.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, Protocol

import torch
from zlib_ng import zlib_ng

from lightning_memload.save.layout import Piece, plan_writes
from lightning_memload.save.pickling import Stretch
from lightning_memload.transfer import (
    MIN_BUDGET_BYTES,
    RingLayout,
    StagingRing,
    choose_layout,
    on_device,
    on_stream,
    run_threads,
)

__all__ = [
    "Content",
    "Gathered",
    "LocalSink",
    "Order",
    "Records",
    "Sink",
    "Split",
    "StreamSink",
    "Target",
    "memory_of",
    "size_of",
]

# A checksum of host memory leaves in the core's cache what is written next.
_DIRECT_BLOCK_BYTES = 1 << 20
# To copy so few takes less time than to make a view of them, and the collector less often starts.
_TINY_BYTES = 1024
# Header, data and descriptor of each; the kernel takes at most 1024 buffers in one pwritev (IOV_MAX).
_MAX_PIECES = 1024 // 3

_GATHERED_ELEMENTS = 64 << 10
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Gathered:
    """The elements of a tensor in their order, wherever they lie, as one run of bytes.

    Brought piece by piece: a piece takes memory of its own on the tensor's device, and 512 KiB for positions.

    Args:
        tensor: Strided, with elements of 1, 2, 4 or 8 bytes.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._integers = tensor.detach().view(_INTEGERS[tensor.dtype.itemsize])
        self.storage = tensor.untyped_storage()
        self.nbytes = tensor.nbytes

    @property
    def is_in_host_memory(self) -> bool:
        """Whether the bytes can be read where they are."""
        return self.storage.device.type == "cpu"

    def gather(self, start: int, nbytes: int) -> torch.Tensor:
        """``nbytes`` from ``start`` on, both whole elements: uint8, on the tensor's device."""
        integers, itemsize = self._integers, self._integers.dtype.itemsize
        first, end = start // itemsize, (start + nbytes) // itemsize
        values = integers.new_empty(end - first)
        for done in range(first, end, _GATHERED_ELEMENTS):
            positions = torch.arange(done, min(done + _GATHERED_ELEMENTS, end), device=integers.device)
            torch.take(integers, positions, out=values[done - first : done - first + len(positions)])
        return values.view(torch.uint8)


Content = bytes | Stretch | Gathered


def size_of(content: Content) -> int:
    """Bytes of a content."""
    return len(content) if isinstance(content, bytes) else content.nbytes


@dataclass(frozen=True, slots=True)
class Order:
    """What to write before all else, and who wants to know.

    Attributes:
        first: Whether what lies in a storage is to be written first.
        on_first: Called when all such are written, and no new thread is needed any more.
    """

    first: Callable[[torch.UntypedStorage], bool]
    on_first: Callable[[], object]


class Sink(Protocol):
    """Where the bytes of a file go."""

    def write(self, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Writes all buffers, one after the other, from ``offset`` on.

        Raises:
            OSError: Not all of them could be written.
        """
        ...


class LocalSink:
    """An open file on this machine. Threads share it.

    Args:
        descriptor: Open for writing; stays the caller's.
        start_writeback: Have the disk begin with every write at once, so that a later fsync finds little left to do.
    """

    def __init__(self, descriptor: int, *, start_writeback: bool = False) -> None:
        self._descriptor = descriptor
        self._start_writeback = start_writeback

    def write(self, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Writes buffers at an offset, see :class:`Sink`."""
        start = offset
        while buffers:
            count = os.pwritev(self._descriptor, buffers, offset)
            offset += count
            if count == sum(map(len, buffers)):
                break
            done = 0
            while done < len(buffers) and count >= len(buffers[done]):
                count -= len(buffers[done])
                done += 1
            buffers = buffers[done:]
            if count:
                buffers = [memoryview(buffers[0])[count:], *buffers[1:]]
        if self._start_writeback:
            # Linux starts to write dirty pages out when told that they are not needed, and keeps them until then.
            os.posix_fadvise(self._descriptor, start, offset - start, os.POSIX_FADV_DONTNEED)


class StreamSink:
    """A file that can only be written from its beginning to its end, by one thread.

    Args:
        file: Open for writing in binary.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0

    def write(self, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Writes buffers, see :class:`Sink`; ``offset`` must be where the last write ended."""
        assert offset == self._position
        for buffer in buffers:
            self._file.write(buffer)
            self._position += len(buffer)


class Target(Protocol):
    """Where records go: one after the other into an archive, each into a file of its own."""

    def write(self, pieces: Sequence[Piece], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Writes the pieces of one write. Called by several threads at once.

        Args:
            pieces: Neighbours in the order of the records.
            data: The bytes of each.
            crc32s: The CRC-32 of each piece's record, if this was the last piece of it to come; else ``None``.

        Raises:
            OSError: Not all could be written.
        """
        ...


class Split:
    """Several targets as one.

    Args:
        parts: How many of the records go to each, in their order, and the target.
    """

    def __init__(self, *parts: tuple[int, Target]) -> None:
        self._ends = list(accumulate(count for count, _ in parts))
        self._parts = parts

    def write(self, pieces: Sequence[Piece], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Hands each piece to the target of its record, see :class:`Target`."""
        start = 0
        for end, (count, target) in zip(self._ends, self._parts, strict=True):
            stop = start + sum(piece.record < end for piece in pieces[start:])
            if stop > start:
                moved = [piece._replace(record=piece.record - end + count) for piece in pieces[start:stop]]
                target.write(moved, data[start:stop], crc32s[start:stop])
            start = stop


class Records:
    """Records that are to be written, and the threads and buffers for it.

    Args:
        contents: The data of each, which must stay as they are until they have been written.
        host_budget_bytes: The most host memory for what lies on devices.
        num_threads: The most threads to write with. With one, writes follow one another in the order of the records.

    Attributes:
        sizes: Bytes of each record.
        num_threads: Threads that write.
        staging_bytes: Host memory for what lies on devices, 0 if nothing does.

    Raises:
        ValueError: The budget is below 512 KiB, or there is no thread.
    """

    def __init__(self, contents: Sequence[Content], host_budget_bytes: int, num_threads: int) -> None:
        choose_layout(host_budget_bytes, num_threads)  # raises for options that cannot be met
        self._contents = contents
        self.sizes = [size_of(content) for content in contents]
        on_devices = [c for c in contents if not isinstance(c, bytes) and not c.is_in_host_memory]
        self._layout: RingLayout | None = None
        if any(content.nbytes for content in on_devices):
            # A small checkpoint needs no more buffers than it has bytes.
            device_bytes = max(sum(content.nbytes for content in on_devices), MIN_BUDGET_BYTES)
            self._layout = choose_layout(min(host_budget_bytes, device_bytes), num_threads)
        devices = {content.storage.device for content in on_devices if content.storage.device.type == "cuda"}
        # The values may still be in the making on the stream of this thread; another one may write them.
        self._made = {device: torch.cuda.current_stream(device).record_event() for device in devices}
        self.num_threads = num_threads
        self.staging_bytes = self._layout.nbytes if self._layout else 0

    def write(self, target: Target, order: Order | None = None) -> list[int]:
        """Writes all of them.

        Returns when all bytes are handed to the target. On failure some have been, others not; all threads have ended.

        Args:
            target: Where to.
            order: What to write before all else. Its ``on_first`` is called once, by any thread.

        Returns:
            The CRC-32 of each record.

        Raises:
            OSError: The target's.

        Peak memory: ``staging_bytes``.
        """
        with ExitStack() as stack:
            # This thread, and with it its GPU, may be another one than that of the caller who made this object.
            device = next(iter(self._made), None)
            ring = None
            if self._layout is not None:
                ring = stack.enter_context(StagingRing(self._layout, pinned=device is not None, device=device))
            return _Writing(target, self._contents, self.sizes, ring, self._made, order).run(self.num_threads)


class _Writing:
    def __init__(
        self,
        target: Target,
        contents: Sequence[Content],
        sizes: Sequence[int],
        ring: StagingRing | None,
        made: Mapping[torch.device, torch.cuda.Event],
        order: Order | None,
    ) -> None:
        self._target = target
        self._contents = contents
        self._sizes = sizes
        block_bytes = ring.layout.block_bytes if ring else _DIRECT_BLOCK_BYTES
        writes = plan_writes(sizes, block_bytes=block_bytes, max_pieces=_MAX_PIECES)
        self._num_first = 1  # one more, for the threads to have started
        self._on_first = None if order is None else order.on_first
        if order is not None:
            urgent = [not isinstance(content, bytes) and order.first(content.storage) for content in contents]
            later = [not any(urgent[piece.record] for piece in pieces) for pieces in writes]
            self._num_first += later.count(False)
            writes = [pieces for _, pieces in sorted(zip(later, writes, strict=True), key=lambda pair: pair[0])]
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
        # Of records that are cut: start, length and CRC-32 of the pieces so far, and the bytes that are missing.
        self._parts: dict[int, list[tuple[int, int, int]]] = {}
        self._missing = list(sizes)

    def run(self, num_threads: int) -> list[int]:
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
            # A thread that failed may have left copies under way, and the ring is about to be freed.
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
            number, pieces = write
            with ExitStack() as stack:
                data = self._bring(pieces, stack)
                crc32s = [self._sum_up(piece, zlib_ng.crc32(view)) for piece, view in zip(pieces, data, strict=True)]
                self._target.write(pieces, data, crc32s)
            if number < num_first:
                self._finish_first()

    def _finish_first(self) -> None:
        with self._lock:
            self._num_first -= 1
            if self._num_first or self._on_first is None:
                return
        self._on_first()

    def _next_write(self) -> tuple[int, tuple[Piece, ...]] | None:
        with self._lock:
            return None if self._stopped else next(self._next, None)

    def _bring(self, pieces: tuple[Piece, ...], stack: ExitStack) -> list[memoryview]:
        """The bytes of all pieces in host memory, valid as long as the stack is open."""
        found = []
        buffer: torch.Tensor | None = None
        used = 0
        devices: set[torch.device] = set()
        tiny = _Copies(sum(piece.nbytes for piece in pieces if piece.nbytes <= _TINY_BYTES))
        for piece in pieces:
            content = self._contents[piece.record]
            if isinstance(content, bytes):
                found.append(memoryview(content)[piece.start : piece.start + piece.nbytes])
            elif not piece.nbytes:
                found.append(memoryview(b""))
            elif isinstance(content, Gathered) and content.is_in_host_memory:
                found.append(content.gather(piece.start, piece.nbytes).numpy().data)
            elif isinstance(content, Stretch) and content.is_in_host_memory:
                address = content.storage.data_ptr() + content.start + piece.start
                is_tiny = piece.nbytes <= _TINY_BYTES
                found.append(tiny.copy(address, piece.nbytes) if is_tiny else memory_of(address, piece.nbytes))
            else:
                if buffer is None:
                    buffer = self._buffers.get()
                    stack.callback(self._buffers.put, buffer)
                staged = buffer[used : used + piece.nbytes]
                self._copy(content, piece, staged)
                devices.add(content.storage.device)
                found.append(memory_of(staged.data_ptr(), piece.nbytes))
                used += piece.nbytes
        for device in devices:
            if device in self._streams:
                event = torch.cuda.Event()
                event.record(self._streams[device])
                event.synchronize()
        return found

    def _copy(self, content: Stretch | Gathered, piece: Piece, staged: torch.Tensor) -> None:
        device = content.storage.device
        with on_stream(self._streams.get(device)):
            if isinstance(content, Gathered):
                values = content.gather(piece.start, piece.nbytes)
            else:
                values = torch.empty(0, dtype=torch.uint8, device=device)
                values.set_(content.storage, content.start + piece.start, (piece.nbytes,), (1,))
            staged.copy_(values, non_blocking=device in self._streams)

    def _sum_up(self, piece: Piece, crc32: int) -> int | None:
        """Takes in the checksum of a piece; returns that of its record if all of it has come."""
        if piece.nbytes == self._sizes[piece.record]:
            self._crc32s[piece.record] = crc32
            return crc32
        with self._lock:
            parts = self._parts.setdefault(piece.record, [])
            parts.append((piece.start, piece.nbytes, crc32))
            self._missing[piece.record] -= piece.nbytes
            if self._missing[piece.record]:
                return None
            del self._parts[piece.record]
        parts.sort()
        _, _, whole = parts[0]
        for _, length, part in parts[1:]:
            whole = zlib_ng.crc32_combine(whole, part, length)
        self._crc32s[piece.record] = whole
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


def memory_of(address: int, nbytes: int) -> memoryview:
    """The bytes at an address, valid as long as their owner."""
    if not nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
