"""Maps files privately and gives their bytes to torch storages, which the kernel reads on first access.

``torch.load(mmap=True)`` maps in the same way but reserves memory for the whole file, so it refuses files larger than
RAM and swap. This mapping reserves nothing. Pages are copied when they are written, and never written back. The mapping
knows which of its pages were written (:meth:`FileMapping.are_pristine`). It can release the files while tensors on top
of it stay valid (:meth:`FileMapping.detach`), automatically if a :class:`FileWatch` guards it. Linux only: it needs
``/proc/self/pagemap``, ``mremap`` and leases.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from lightning_memload.errors import CheckpointReadError, DetachedError, UnmappableCheckpointError
from lightning_memload.storage.file_set import FileSet
from lightning_memload.storage.kernel import map_file, map_memory, move_memory, reserve_addresses, unmap_memory
from lightning_memload.storage.lease import FileWatch
from lightning_memload.storage.steps import wait_for_steps

__all__ = ["FileMapping", "page_ranges"]

_PAGE = mmap.PAGESIZE
# detach() copies this much at a time, which bounds its additional memory.
_DETACH_CHUNK_BYTES = 32 << 20
# Smaller while other threads run. Copying takes some 3 ms, and writes of other threads to these bytes are lost then.
_SMALL_CHUNK_BYTES = 8 << 20
# How long detach() waits for optimizer steps. Linux blocks the writer to the file for 45 s at most.
_STEPS_SECONDS = 20.0
# Pages in one read of pagemap, which has 8 bytes for each page.
_PAGEMAP_CHUNK_PAGES = 256 << 10


class FileMapping:
    """Maps files privately into one address range, one after the other, and creates torch storages over parts of it.

    The mapping lives until the last storage and the mapping object itself are gone. It keeps the files open while it
    maps them.

    Args:
        source: The open files. Unless a watch guards them, they must not be changed in place while tensors on top of
            the mapping are read: a write changes the tensors' values, a truncation kills the process (SIGBUS).
        watch: Watches these files. When one is about to change, the mapping detaches. It then reads from the watch's
            files, so ``source`` may be closed earlier. The watch ends with the last storage.

    Raises:
        DetachedError: A file is being changed already.
        UnmappableCheckpointError: A file is at a place whose files the kernel cannot map.
        OSError: The kernel refuses the mapping.
    """

    supported = sys.platform == "linux"

    def __init__(self, source: FileSet, watch: FileWatch | None = None) -> None:
        self.source = source
        self.nbytes = max(1, source.nbytes)
        # Reserve the addresses for all files first, so that no other mapping can take the place of the next file.
        self._base = reserve_addresses(self.nbytes)
        try:
            self._map_files()
        except BaseException:
            unmap_memory(self._base, self.nbytes)
            raise
        # A new class for each mapping: plain ctypes arrays do not support weak references.
        region: Any = type("_MappedBytes", (ctypes.c_char * self.nbytes,), {}).from_address(self._base)  # type: ignore[attr-defined]
        # Not at exit: parameters may still be in this mapping, and other exit handlers may read them.
        weakref.finalize(region, unmap_memory, self._base, self.nbytes).atexit = False
        self._bytes: memoryview | None = memoryview(region).cast("B")
        # Span, start and length for each storage: torch keeps the memoryview until the storage is freed. A list of weak
        # references, because a weak dictionary costs 3 us more for each storage.
        self._spans: list[tuple[weakref.ref[memoryview], int, int]] = []
        self._attached = True
        self._pagemap: tuple[int, int] | None = None
        # One thread at a time creates storages or detaches. Reentrant: a finalizer may detach inside either.
        self._lock = threading.RLock()
        self._is_detaching = False
        self._is_watched = watch is not None
        if watch is not None:
            assert watch.files is not None
            self.source = watch.files
            weakref.finalize(region, watch.end).atexit = False
            if not watch.guard(lambda: self.detach(beside_others=True)):
                raise DetachedError(f"{source.files[0].name} is being rewritten in place.")

    def _map_files(self) -> None:
        if not self.source.can_map:
            path = next(file.name for file in self.source.files if file not in self.source.mappable)
            raise UnmappableCheckpointError(
                f"{path} is not on a disk of this machine, so it cannot be mapped.", path=path
            )
        for file, span in zip(self.source.mappable, self.source.spans, strict=True):
            if span.nbytes:
                descriptor = file.open_descriptor()
                try:
                    map_file(descriptor, span.nbytes, self._base + span.start)
                finally:
                    os.close(descriptor)

    def storage(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """A CPU storage over ``nbytes`` bytes from ``offset`` in the run of all files. No byte is read.

        Writing to the storage is safe: the file does not change.

        Raises:
            DetachedError: The mapping has released the file.
            ValueError: The range is empty or not within the files.
        """
        return torch.frombuffer(self._span(offset, nbytes), dtype=torch.uint8).untyped_storage()

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous CPU tensor with a storage of its own, see :meth:`storage`. A third of the time of both.

        Raises:
            DetachedError: The mapping has released the file.
            ValueError: The tensor is empty, or its bytes are not within the files.
        """
        tensor = torch.frombuffer(self._span(offset, math.prod(shape) * dtype.itemsize), dtype=dtype)
        if len(shape) == 1:
            return tensor
        # Unlike view(), this leaves no trace of another tensor. Torch takes 0.5 us more for sizes in a tuple.
        return tensor.resize_(*shape) if shape else tensor.resize_(())

    def _span(self, offset: int, nbytes: int) -> memoryview:
        """The bytes of a new storage."""
        if not 0 <= offset < offset + nbytes <= self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are not within the {self.nbytes} mapped bytes")
        with self._lock:
            if self._bytes is None or not self._attached:
                raise DetachedError(f"The mapping has released {self.source.place(offset)[0]}.")
            span = self._bytes[offset : offset + nbytes]
            self._spans.append((weakref.ref(span), offset, nbytes))
            return span

    def leave_to_storages(self) -> None:
        """Ends the creation of storages. From now on the mapping is freed with the last storage.

        References to this object no longer keep it.
        """
        self._bytes = None

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Offset of the tensor's first element in the run of all files. ``None`` if its memory is not the mapping's."""
        if not self._attached or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return None
        offset = tensor.data_ptr() - self._base
        return offset if 0 <= offset < self.nbytes else None

    @property
    def referenced_bytes(self) -> int:
        """Bytes under storages that are still alive."""
        return sum(nbytes for span, _, nbytes in list(self._spans) if span() is not None)

    def are_pristine(self, ranges: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether ranges have not been written since they were mapped, so that the file still holds their bytes.

        The answer comes from the kernel's page table, so writes through numpy, ``.data`` or foreign code count too. The
        unit is a page: a write to other bytes of the page makes it ``False``. ``False`` also if the page table cannot
        be read.

        Args:
            ranges: Start and end of each range, in bytes in the run of all files. No range is empty.
        """
        # The mapping starts at a page boundary, so offsets and addresses round to pages alike.
        pages = [(start // _PAGE, (end - 1) // _PAGE + 1) for start, end in ranges]
        written = self._find_written(pages)
        if not written:
            return [written is not None] * len(pages)
        return [bisect_left(written, start) == bisect_left(written, end) for start, end in pages]

    def _find_written(self, pages: Sequence[tuple[int, int]]) -> list[int] | None:
        """The written pages in ranges of pages, in order. ``None`` if the page table cannot be read."""
        written: list[int] = []
        try:
            pagemap = self._open_pagemap()
            position = 0
            for start, end in sorted(pages):
                position = max(position, start)
                while position < end:
                    count = min(end - position, _PAGEMAP_CHUNK_PAGES)
                    data = bytearray(os.pread(pagemap, 8 * count, (self._base // _PAGE + position) * 8))
                    if not data:
                        return None
                    written.extend(position + number for number in _written_pages(data))
                    position += len(data) // 8
        except OSError:
            return None
        return written

    def _open_pagemap(self) -> int:
        """The descriptor of this process's page table. Reopened after a fork: the old one is the parent's."""
        if self._pagemap is None or self._pagemap[0] != os.getpid():
            self._pagemap = os.getpid(), os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._pagemap[1])
        return self._pagemap[1]

    def read_in(self) -> memoryview | None:
        """Reads all files into ordinary memory, at the same addresses. Pages that were written keep what was written.

        The tensors then depend on no file. :meth:`are_pristine` is ``False`` for all ranges from now on.

        Returns:
            The bytes of all files. ``None`` if the mapping has released the files already.

        Raises:
            CheckpointReadError: Reading failed. The unread bytes are zero.

        Peak memory: the size of the files, plus at most 32 MiB.
        """
        with self._lock:
            if self._bytes is None or not self._attached or self._is_detaching:
                return None
            _, failure = self._unmap_file([(0, self.nbytes)], beside_others=False)
            if failure is not None:
                raise failure
            return self._bytes

    def detach(self, *, beside_others: bool = False) -> int:
        """Releases the file: bytes under live storages become ordinary memory, at the same addresses.

        Tensors keep their values and stay valid. Afterwards the process maps no byte of the file and has no descriptor
        of it, so the file can be deleted and its disk space is freed. A watch closes its own descriptors.

        Unwritten pages are read from the file, not through the mapping: reading the mapping of a truncated file would
        kill the process (SIGBUS).

        Args:
            beside_others: Other threads run meanwhile. The call then waits for optimizer steps, for 20 s at most, so
                that their writes are not lost.

        Returns:
            Bytes that were copied because live storages use them.

        Raises:
            CheckpointReadError: Reading failed. The file is released all the same, and the unread bytes are zero.

        Peak memory: the returned bytes, which stay, plus at most 32 MiB.
        """
        with self._lock:
            if not self._attached or self._is_detaching:
                return 0
            # These references keep the address range reserved, even if all storages are freed meanwhile.
            region = self._bytes
            spans = [span for ref, _, _ in self._spans if (span := ref()) is not None]
            self._is_detaching = True
            try:
                alive = [(start, nbytes) for ref, start, nbytes in self._spans if ref() is not None]
                copied, failure = 0, None
                if alive or region is not None:
                    copied, failure = self._unmap_file(alive, beside_others)
                self._attached = False
            finally:
                self._is_detaching = False
                spans.clear()
                span = None
            if not self._is_watched:
                self.source.close()
        if failure is not None:
            raise failure
        return copied

    def _unmap_file(self, alive: list[tuple[int, int]], beside_others: bool) -> tuple[int, CheckpointReadError | None]:
        """Replaces the live ranges by ordinary memory, and unmaps all others."""
        copied = 0
        position = 0
        failure: CheckpointReadError | None = None
        chunk_bytes = _SMALL_CHUNK_BYTES if beside_others else _DETACH_CHUNK_BYTES
        deadline = time.monotonic() + (_STEPS_SECONDS if beside_others else 0.0)
        for start, end in page_ranges(sorted(alive), self.nbytes):
            self._discard_pages(position, start)
            for chunk in range(start, end, chunk_bytes):
                size = min(chunk_bytes, end - chunk)
                # The new pages are filled first and moved over the old ones atomically, so other threads see no gap.
                fresh = map_memory(size)
                wait_for_steps(deadline)
                failure = self._copy(chunk, min(size, self.nbytes - chunk), fresh) or failure
                move_memory(fresh, size, self._base + chunk)
                copied += size
            position = end
        self._discard_pages(position, _page_up(self.nbytes))
        return copied, failure

    def _copy(self, start: int, nbytes: int, address: int) -> CheckpointReadError | None:
        """Copies bytes that start at a page boundary: written pages from the mapping, all others from the file."""
        first, last = start // _PAGE, (start + nbytes - 1) // _PAGE + 1
        written = self._find_written([(first, last)])
        if written is None:
            ctypes.memmove(address, self._base + start, nbytes)
            return None
        failure = None
        buffer = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
        position = 0
        for page in [*written, last]:
            end = min((page - first) * _PAGE, nbytes)
            if position < end:
                failure = self._read(buffer[position:end], start + position) or failure
            position = min(end + _PAGE, nbytes)
            if end < position:
                ctypes.memmove(address + end, self._base + start + end, position - end)
        return failure

    def _read(self, buffer: memoryview, offset: int) -> CheckpointReadError | None:
        while buffer:
            path, position = self.source.place(offset)
            try:
                count = self.source.readv([buffer], offset)
            except OSError as error:
                if error.errno in (errno.ESTALE, errno.ENOENT):
                    # A file that is reopened for each read has lost its name. The mapping still has its bytes.
                    target = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
                    ctypes.memmove(target, self._base + offset, len(buffer))
                    return None
                return CheckpointReadError(
                    f"Reading {path} failed at byte {position}: {error}.",
                    path=path, key=None, offset=position, errno=error.errno,
                )  # fmt: skip
            if count <= 0:
                return CheckpointReadError(
                    f"{path} ends at byte {position}, but a tensor of it that is still in use needs more: the file was "
                    "truncated while it was restored.",
                    path=path, key=None, offset=position,
                )  # fmt: skip
            buffer, offset = buffer[count:], offset + count
        return None

    def _discard_pages(self, start: int, end: int) -> None:
        """Replaces unused pages of the file by reserved address space, which takes no memory.

        After a plain munmap another mapping could take the addresses, and the final munmap would then unmap it.
        """
        if end > start:
            reserve_addresses(end - start, at=self._base + start)


def _written_pages(entries: bytearray) -> list[int]:
    """Positions of the pagemap entries of written pages: all that are neither absent nor unmodified file pages.

    Uses bits 63 (present), 62 (swapped) and 61 (page of a file), see Documentation/admin-guide/mm/pagemap.rst. A
    written page of a private mapping is anonymous: present without bit 61, or swapped.
    """
    if int.from_bytes(entries[:8], sys.byteorder) >> 61 in (0, 5) and entries == entries[:8] * (len(entries) // 8):
        return []  # All entries are equal: no page was written. This is the usual case.
    states = (torch.frombuffer(entries, dtype=torch.int64) >> 61) & 7
    written = (states != 0) & (states != 5)
    return written.nonzero().flatten().tolist() if written.any() else []


def page_ranges(ranges: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Merges sorted (offset, nbytes) ranges into page-aligned (start, end) ranges that do not overlap."""
    merged: list[tuple[int, int]] = []
    for offset, nbytes in ranges:
        start, end = offset // _PAGE * _PAGE, _page_up(min(offset + nbytes, limit))
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _page_up(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
