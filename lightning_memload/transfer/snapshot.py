"""Copies of records in host memory, from which they are written while the originals change.

All copies are in one anonymous mapping, which a forked child does not inherit. The threads that copy also allocate its
pages, so that the kernel clears them in parallel. The memory of a chunk is freed as soon as the chunk is written.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import weakref
from collections.abc import Sequence
from itertools import accumulate

from lightning_memload.bytes import RecordPart
from lightning_memload.storage.kernel import Advice, advise, map_memory, unmap_memory
from lightning_memload.transfer.contents import memory_of
from lightning_memload.transfer.sinks import RecordWriter

__all__ = ["Releasing", "Snapshot"]

# Copies start at multiples of this, so that no two threads write to one line of the cache.
_ALIGNMENT_BYTES = 64
# A huge page is freed only when all of it is. Fewer and larger chunks would make the memory fall in larger steps.
_HUGE_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 16 << 20


class Snapshot:
    """Memory for copies of records. It is also the target that makes them, see :class:`RecordWriter`. Linux only.

    The mapping is unmapped by :meth:`close`, or with the last reference to this object.

    Args:
        sizes: Bytes of each record. A record of 0 bytes has no copy.

    Attributes:
        nbytes: Size of all copies in bytes.
        held_bytes: The part of it that is not freed yet.

    Raises:
        MemoryError: The kernel refuses the mapping.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        padded = (-(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for nbytes in sizes)
        self._offsets = list(accumulate(padded, initial=0))
        self.nbytes = self.held_bytes = self._offsets[-1]
        # Bytes of each chunk that are not written yet.
        self._left = [min(_CHUNK_BYTES, self.nbytes - start) for start in range(0, self.nbytes, _CHUNK_BYTES)]
        self._lock = threading.Lock()
        mapped_bytes = self.nbytes + _HUGE_PAGE_BYTES
        try:
            mapping = map_memory(mapped_bytes)
        except OSError as error:
            raise MemoryError(str(error)) from error
        self._close = weakref.finalize(self, _unmap, mapping, mapped_bytes, os.getpid())
        self._close.atexit = False  # a thread may still be writing from it
        self._address = -(-mapping // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        # A child that lives on, such as a worker of a data loader, would keep the pages after they are freed here.
        advise(mapping, mapped_bytes, Advice.DONTFORK)
        advise(mapping, mapped_bytes, Advice.HUGEPAGE)

    def copy_of(self, record: int) -> memoryview:
        """The copy of a record. It is valid until its memory is freed."""
        return memory_of(self._address + self._offsets[record], self._sizes[record])

    def write(self, parts: Sequence[RecordPart], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Copies the parts of one write. Several threads may call it at once.

        Raises:
            MemoryError: The kernel has not enough memory.
        """
        self._allocate(*self._range_of(parts))
        for part, view in zip(parts, data, strict=True):
            if view:
                # The assignment of a slice would hold the interpreter's lock. This call releases it.
                source = ctypes.addressof(ctypes.c_char.from_buffer(view))
                ctypes.memmove(self._address + self._offsets[part.record] + part.start, source, len(view))

    def release(self, parts: Sequence[RecordPart]) -> None:
        """Frees memory of parts that are written, each one once. Several threads may call it at once."""
        start, end = self._range_of(parts)
        freed: list[int] = []
        with self._lock:
            while start < end:
                chunk = start // _CHUNK_BYTES
                stop = min(end, (chunk + 1) * _CHUNK_BYTES)
                self._left[chunk] -= stop - start
                if not self._left[chunk]:
                    freed.append(chunk * _CHUNK_BYTES)
                start = stop
            for offset in freed:
                nbytes = min(_CHUNK_BYTES, self.nbytes - offset)
                advise(self._address + offset, nbytes, Advice.DONTNEED)
                self.held_bytes -= nbytes

    def close(self) -> None:
        """Frees all memory. No copy may be read after that. A second call does nothing."""
        self.held_bytes = 0
        self._close()

    def _range_of(self, parts: Sequence[RecordPart]) -> tuple[int, int]:
        """Start and end of adjacent parts in the mapping, with the padding behind a whole record."""
        held = [part for part in parts if self._sizes[part.record]]
        if not held:
            return 0, 0
        first, last = held[0], held[-1]
        last_end = last.start + last.nbytes
        is_whole = last_end == self._sizes[last.record]
        end = self._offsets[last.record + 1] if is_whole else self._offsets[last.record] + last_end
        return self._offsets[first.record] + first.start, end

    def _allocate(self, start: int, end: int) -> None:
        if start == end:
            return
        # One call takes less time than a page fault for each page. Linux < 5.14 does not know it: pages are faulted in.
        error = advise(self._address + start, end - start, Advice.POPULATE_WRITE)
        if error not in (0, errno.EINVAL):
            raise MemoryError(f"cannot allocate {end - start} bytes: {os.strerror(error)}")


class Releasing:
    """A target that frees the memory of each part as soon as another target has written it.

    Args:
        target: The other target.
        snapshot: The memory.
    """

    def __init__(self, target: RecordWriter, snapshot: Snapshot) -> None:
        self._target = target
        self._snapshot = snapshot

    def write(self, parts: Sequence[RecordPart], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Writes parts and frees their memory, see :class:`RecordWriter`."""
        self._target.write(parts, data, crc32s)
        self._snapshot.release(parts)


def _unmap(address: int, nbytes: int, pid: int) -> None:
    # A child has other memory at this address, or none.
    if os.getpid() == pid:
        unmap_memory(address, nbytes)
