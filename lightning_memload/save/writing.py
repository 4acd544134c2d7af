"""Writes the records of an archive: the threads that bring bytes from memory, of any device, to where they belong.

Each thread takes the next write in file order. Host memory is written from where it lies; what lies on a device comes
through staging buffers, so that the copies of one thread run while another writes. Checksums are taken on the way.
What this does not know: pickles, temporary files, Lightning.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import IO, Protocol

import torch
from zlib_ng import zlib_ng

from lightning_memload.save.layout import Entry, Piece, data_descriptor, local_header, plan_writes
from lightning_memload.save.pickling import Stretch
from lightning_memload.transfer import StagingRing

__all__ = ["LocalSink", "Sink", "StreamSink", "write_records"]

# A checksum of host memory leaves in the core's cache what is written next.
_DIRECT_BLOCK_BYTES = 1 << 20
# Header, data and descriptor of each; the kernel takes at most 1024 buffers in one pwritev (IOV_MAX).
_MAX_PIECES = 1024 // 3

Content = bytes | Stretch


class Sink(Protocol):
    """Where the bytes of an archive go."""

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


def write_records(
    sink: Sink,
    entries: Sequence[Entry],
    contents: Sequence[Content],
    ring: StagingRing | None,
    *,
    num_threads: int,
) -> list[int]:
    """Writes all records: headers, data and checksums.

    Returns when all bytes are handed to the sink. On failure some have been, others not; all threads have ended.

    Args:
        sink: Where to. With one thread its writes follow one another without a gap.
        entries: The places of the records, one behind the other.
        contents: The data of each.
        ring: Buffers for what does not lie in host memory; ``None`` if all does.
        num_threads: Threads to write with; with a ring, at most those of its layout.

    Returns:
        The CRC-32 of each record.

    Raises:
        OSError: The sink's.

    Peak memory: the ring, and the headers that are being written.
    """
    return _Writing(sink, entries, contents, ring).run(num_threads)


class _Writing:
    def __init__(
        self,
        sink: Sink,
        entries: Sequence[Entry],
        contents: Sequence[Content],
        ring: StagingRing | None,
    ) -> None:
        self._sink = sink
        self._entries = entries
        self._contents = contents
        block_bytes = ring.layout.block_bytes if ring else _DIRECT_BLOCK_BYTES
        self._writes = plan_writes([e.nbytes for e in entries], block_bytes=block_bytes, max_pieces=_MAX_PIECES)
        self._next = iter(self._writes)
        self._buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for buffer in ring.tensors if ring else ():
            self._buffers.put(buffer)
        devices = {c.storage.device for c in contents if isinstance(c, Stretch)}
        self._streams = {device: torch.cuda.Stream(device) for device in devices if device.type == "cuda"}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._crc32s = [0] * len(entries)
        # Of records that are cut: start, length and CRC-32 of the pieces so far, and the bytes that are missing.
        self._parts: dict[int, list[tuple[int, int, int]]] = {}
        self._missing = [entry.nbytes for entry in entries]

    def run(self, num_threads: int) -> list[int]:
        for device, stream in self._streams.items():
            # The values may still be in the making.
            stream.wait_stream(torch.cuda.current_stream(device))
        num_threads = max(1, min(num_threads, len(self._writes)))
        try:
            with ThreadPoolExecutor(num_threads, thread_name_prefix="memload-save") as pool:
                futures = [pool.submit(self._work) for _ in range(num_threads)]
                try:
                    for future in futures:
                        future.result()
                finally:
                    self._stop.set()
        finally:
            # A thread that failed may have left copies under way, and the ring is about to be freed.
            for stream in self._streams.values():
                stream.synchronize()
        return self._crc32s

    def _work(self) -> None:
        try:
            while (pieces := self._next_write()) is not None:
                with ExitStack() as stack:
                    self._write(pieces, self._bring(pieces, stack))
        except BaseException:
            self._stop.set()
            raise

    def _next_write(self) -> tuple[Piece, ...] | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._next, None)

    def _bring(self, pieces: tuple[Piece, ...], stack: ExitStack) -> list[memoryview]:
        """The bytes of all pieces in host memory, valid as long as the stack is open."""
        found = []
        buffer: torch.Tensor | None = None
        used = 0
        devices: set[torch.device] = set()
        for piece in pieces:
            content = self._contents[piece.record]
            if isinstance(content, bytes):
                found.append(memoryview(content)[piece.start : piece.start + piece.nbytes])
            elif content.is_in_host_memory:
                found.append(_memory(content.storage.data_ptr() + content.start + piece.start, piece.nbytes))
            elif not piece.nbytes:
                found.append(memoryview(b""))
            else:
                if buffer is None:
                    buffer = self._buffers.get()
                    stack.callback(self._buffers.put, buffer)
                staged = buffer[used : used + piece.nbytes]
                self._copy(content, piece, staged)
                devices.add(content.storage.device)
                found.append(_memory(staged.data_ptr(), piece.nbytes))
                used += piece.nbytes
        for device in devices:
            if device in self._streams:
                event = torch.cuda.Event()
                event.record(self._streams[device])
                event.synchronize()
        return found

    def _copy(self, content: Stretch, piece: Piece, staged: torch.Tensor) -> None:
        device = content.storage.device
        values = torch.empty(0, dtype=torch.uint8, device=device)
        values.set_(content.storage, content.start + piece.start, (piece.nbytes,), (1,))
        with torch.cuda.stream(self._streams.get(device)):
            staged.copy_(values, non_blocking=device in self._streams)

    def _write(self, pieces: tuple[Piece, ...], data: Sequence[memoryview]) -> None:
        first = self._entries[pieces[0].record]
        offset = first.data_offset + pieces[0].start if pieces[0].start else first.header_offset
        buffers: list[bytes | memoryview] = []
        late: Entry | None = None
        for piece, view in zip(pieces, data, strict=True):
            entry = self._entries[piece.record]
            is_last = piece.start + piece.nbytes == entry.nbytes
            if not piece.start:
                buffers.append(local_header(entry))
            buffers.append(view)
            if not self._sum_up(piece, zlib_ng.crc32(view)):
                continue
            if is_last:
                buffers.append(data_descriptor(entry, self._crc32s[piece.record]))
            else:
                late = entry  # another thread has already written the end of this record
                late_crc32 = self._crc32s[piece.record]
        self._sink.write(buffers, offset)
        if late is not None:
            self._sink.write([data_descriptor(late, late_crc32)], late.data_end)

    def _sum_up(self, piece: Piece, crc32: int) -> bool:
        """Takes in the checksum of a piece; tells whether that of its record is known now."""
        nbytes = self._entries[piece.record].nbytes
        if piece.nbytes == nbytes:
            self._crc32s[piece.record] = crc32
            return True
        with self._lock:
            parts = self._parts.setdefault(piece.record, [])
            parts.append((piece.start, piece.nbytes, crc32))
            self._missing[piece.record] -= piece.nbytes
            if self._missing[piece.record]:
                return False
            del self._parts[piece.record]
        parts.sort()
        _, _, whole = parts[0]
        for _, length, part in parts[1:]:
            whole = zlib_ng.crc32_combine(whole, part, length)
        self._crc32s[piece.record] = whole
        return True


def _memory(address: int, nbytes: int) -> memoryview:
    if not nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
