"""A private, lazily read view of the bytes of files as torch storages.

``torch.load(mmap=True)`` maps the same way but reserves memory for the whole file, so it refuses files larger than
RAM and swap; this mapping reserves nothing. Pages are copied when they are written, never written back. The mapping
knows which of its bytes somebody wrote (:meth:`FileMapping.are_pristine`), and can let go of the file while tensors on
top of it live on (:meth:`FileMapping.detach`), by itself if a :class:`FileWatch` guards it. Linux only: all of this
rests on ``/proc/self/pagemap``, ``mremap`` and leases.
"""

from __future__ import annotations

import ctypes
import errno
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

from lightning_memload.checkpoint.index import FileSpan
from lightning_memload.checkpoint.lease import FileWatch
from lightning_memload.checkpoint.source import FileSet, LocalFile
from lightning_memload.checkpoint.steps import wait_for_steps
from lightning_memload.errors import CheckpointReadError

__all__ = ["DetachedError", "FileMapping"]

_PAGE = mmap.PAGESIZE
# Python names MAP_NORESERVE from 3.11 on; the value is the one of x86-64 and arm64.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_FIXED = 0x10
_MREMAP_MAYMOVE_FIXED = 0x1 | 0x2
_PROT_NONE = 0
# detach() copies this much at a time, so that its own need stays small.
_DETACH_CHUNK_BYTES = 32 << 20
# Beside other threads less, which takes some 3 ms: what they write to these bytes meanwhile is lost.
_SMALL_CHUNK_BYTES = 8 << 20
# How long a writer to the file is held for optimizers, of the 45 s that Linux gives.
_STEPS_SECONDS = 20.0
# pagemap is read for this many pages at a time, with 8 bytes for each.
_PAGEMAP_CHUNK_PAGES = 256 << 10


class DetachedError(RuntimeError):
    """The mapping has let go of the file already."""


class FileMapping:
    """Maps files privately, one after the other, and hands out torch storages over parts of them.

    The mapping lives until the last storage and the mapping object itself are gone. It keeps the files open as long as
    it shows their bytes.

    Args:
        source: The open files. Unless a watch guards them, they must not be changed in place while tensors on top of
            the mapping are read: that changes their values, or kills the process (SIGBUS), as with every mapping.
        watch: Watches these files. When one is about to change, the mapping detaches. It then reads what it needs from
            the watch's files, so ``source`` may be closed before, and ends the watch with the last storage.

    Raises:
        DetachedError: A file is being changed already.
        OSError: The kernel refuses the mapping.
    """

    supported = sys.platform == "linux"

    def __init__(self, source: FileSet, watch: FileWatch | None = None) -> None:
        self.source = source
        self.nbytes = max(1, source.nbytes)
        # Addresses for all of them first: nobody else can then take the place of the next file.
        reserved = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._base = _mmap(None, self.nbytes, _PROT_NONE, reserved, -1)
        try:
            for file, span in zip(source.files, source.spans, strict=True):
                if span.nbytes:
                    _map_file(file, span, self._base)
        except BaseException:
            _munmap(self._base, self.nbytes)
            raise
        # A class of its own for each mapping: plain ctypes arrays take no weak reference.
        region: Any = type("_MappedBytes", (ctypes.c_char * self.nbytes,), {}).from_address(self._base)  # type: ignore[attr-defined]
        # Not at exit: parameters may still lie here, and others' exit handlers may read them.
        weakref.finalize(region, _munmap, self._base, self.nbytes).atexit = False
        self._bytes: memoryview | None = memoryview(region).cast("B")
        # Every span that a storage was given, its start and its length: torch holds the memoryview until the storage
        # dies. A list of references, since a weak dictionary takes 3 us more for each of very many storages.
        self._spans: list[tuple[weakref.ref[memoryview], int, int]] = []
        self._attached = True
        self._pagemap: tuple[int, int] | None = None
        # Storages are made, and the file is let go, by one thread at a time. A finalizer may do so within either.
        self._lock = threading.RLock()
        self._is_detaching = False
        self._is_watched = watch is not None
        if watch is not None:
            assert watch.files is not None
            self.source = watch.files
            weakref.finalize(region, watch.end).atexit = False
            if not watch.guard(lambda: self.detach(beside_others=True)):
                raise DetachedError(f"{source.files[0].name} is being rewritten in place.")

    def storage(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """A CPU storage over ``nbytes`` of the file from ``offset`` on. No byte is read.

        Writing to it is safe and stays in this process.

        Raises:
            DetachedError: The file was let go of.
            ValueError: There are no such bytes.
        """
        if not 0 <= offset < offset + nbytes <= self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are not within the {self.nbytes} mapped bytes")
        with self._lock:
            if self._bytes is None or not self._attached:
                raise DetachedError(f"{self.source.place(offset)[0]} was let go of.")
            span = self._bytes[offset : offset + nbytes]
            self._spans.append((weakref.ref(span), offset, nbytes))
            return torch.frombuffer(span, dtype=torch.uint8).untyped_storage()

    def leave_to_storages(self) -> None:
        """Hands out no more storages. From here on the mapping goes with the last of them, whoever refers to this."""
        self._bytes = None

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """File offset of the tensor's first element, ``None`` when its memory is not the file's."""
        if not self._attached or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return None
        offset = tensor.data_ptr() - self._base
        return offset if 0 <= offset < self.nbytes else None

    @property
    def referenced_bytes(self) -> int:
        """Bytes under storages that are still alive."""
        return sum(nbytes for span, _, nbytes in list(self._spans) if span() is not None)

    def are_pristine(self, ranges: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether nobody wrote to these bytes since they were mapped, so that the file still tells what they are.

        The kernel's own page table answers, so writes through numpy, ``.data`` or foreign code count too. A page is the
        unit: a neighbour's write makes it ``False``. ``False`` also when the system does not tell.

        Args:
            ranges: Start and end of each range, in bytes from the start of the file. None of them empty.
        """
        # The mapping starts on a page, so offsets in the file and addresses round alike.
        pages = [(start // _PAGE, (end - 1) // _PAGE + 1) for start, end in ranges]
        written = self._find_written(pages)
        if not written:
            return [written is not None] * len(pages)
        return [bisect_left(written, start) == bisect_left(written, end) for start, end in pages]

    def _find_written(self, pages: Sequence[tuple[int, int]]) -> list[int] | None:
        """Which pages of some ranges of pages somebody wrote to, in order; ``None`` when the system does not tell."""
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
        """The descriptor of this process's page table. A fork inherits one that shows the parent's."""
        if self._pagemap is None or self._pagemap[0] != os.getpid():
            self._pagemap = os.getpid(), os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._pagemap[1])
        return self._pagemap[1]

    def detach(self, *, beside_others: bool = False) -> int:
        """Lets go of the file: what storages still refer to becomes ordinary memory, at the same addresses.

        Tensors keep their values and stay valid. Afterwards the process maps no byte of the file and holds no
        descriptor of it, so it can be deleted and its disk space is returned. A watch closes its own.

        What nobody wrote to is read from the file, not from the mapping: of a file that was cut short meanwhile, that
        would kill the process.

        Args:
            beside_others: Other threads go on meanwhile. Optimizers are waited for, so that none of what they write is
                lost, for 20 s at most.

        Returns:
            Bytes that were copied because somebody still refers to them.

        Raises:
            CheckpointReadError: Reading failed. Nothing of the file is mapped all the same; what could not be read is
                zero.

        Peak memory is the returned bytes, which stay, plus at most 32 MiB.
        """
        with self._lock:
            if not self._attached or self._is_detaching:
                return 0
            # The addresses are this mapping's for as long as one of these is: the rest may go meanwhile.
            region = self._bytes
            spans = [span for ref, _, _ in self._spans if (span := ref()) is not None]
            self._is_detaching = True
            try:
                alive = [(start, nbytes) for ref, start, nbytes in self._spans if ref() is not None]
                copied, failure = 0, None
                if alive or region is not None:
                    copied, failure = self._take_out(alive, beside_others)
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

    def _take_out(self, alive: list[tuple[int, int]], beside_others: bool) -> tuple[int, CheckpointReadError | None]:
        """Puts ordinary memory in the place of some ranges, and nothing in the place of all others."""
        copied = 0
        position = 0
        failure: CheckpointReadError | None = None
        chunk_bytes = _SMALL_CHUNK_BYTES if beside_others else _DETACH_CHUNK_BYTES
        deadline = time.monotonic() + (_STEPS_SECONDS if beside_others else 0.0)
        for start, end in _page_ranges(sorted(alive), self.nbytes):
            self._blank(position, start)
            for chunk in range(start, end, chunk_bytes):
                size = min(chunk_bytes, end - chunk)
                # Filled beside and moved over the old pages in one step, so that no other thread sees a gap.
                fresh = _mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
                wait_for_steps(deadline)
                failure = self._copy(chunk, min(size, self.nbytes - chunk), fresh) or failure
                _mremap_over(fresh, size, self._base + chunk)
                copied += size
            position = end
        self._blank(position, _page_up(self.nbytes))
        return copied, failure

    def _copy(self, start: int, nbytes: int, address: int) -> CheckpointReadError | None:
        """Copies bytes, from the first of a page on: of pages that somebody wrote to from there, else from the file."""
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
                    # One of many files, each opened anew for reading, has lost its name; the mapping has it still.
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
                    "cut short while it was restored.",
                    path=path, key=None, offset=position,
                )  # fmt: skip
            buffer, offset = buffer[count:], offset + count
        return None

    def _blank(self, start: int, end: int) -> None:
        """Replaces unused pages of the file by reserved address space, which costs nothing.

        Unmapping them would let others take the addresses, which the final munmap would then tear down.
        """
        if end > start:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
            _mmap(self._base + start, end - start, _PROT_NONE, flags, -1)


def _written_pages(entries: bytearray) -> list[int]:
    """Positions of the pagemap entries that are neither absent pages nor unmodified pages of a file.

    Bits 63 (present), 62 (swapped) and 61 (page of a file), see Documentation/admin-guide/mm/pagemap.rst. A page that
    was written in a private mapping is anonymous: present without bit 61, or swapped.
    """
    if int.from_bytes(entries[:8], sys.byteorder) >> 61 in (0, 5) and entries == entries[:8] * (len(entries) // 8):
        return []  # All alike: the usual answer, that nobody touched anything.
    states = (torch.frombuffer(entries, dtype=torch.int64) >> 61) & 7
    written = (states != 0) & (states != 5)
    return written.nonzero().flatten().tolist() if written.any() else []


def _page_ranges(ranges: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Merges (offset, nbytes) ranges, sorted, into page-aligned (start, end) ranges that do not overlap."""
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


_LIBC = ctypes.CDLL(None, use_errno=True) if FileMapping.supported else None


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    """``mmap(2)``: the standard library's module can neither place a mapping nor give up its descriptor."""
    assert _LIBC is not None
    call = _LIBC.mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    result = call(address, nbytes, protection, flags, fd, 0)
    if result is None or result == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, f"cannot map {nbytes} bytes: {os.strerror(error)}")
    return int(result)


def _map_file(file: LocalFile, span: FileSpan, base: int) -> None:
    descriptor = file.open_descriptor()
    try:
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE | _MAP_FIXED
        _mmap(base + span.start, span.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor)
    finally:
        os.close(descriptor)


def _munmap(address: int, nbytes: int) -> None:
    assert _LIBC is not None
    call = _LIBC.munmap
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    call(address, nbytes)


def _mremap_over(address: int, nbytes: int, target: int) -> None:
    """Moves pages from ``address`` to ``target``, replacing what is mapped there, in one atomic step."""
    assert _LIBC is not None
    call = _LIBC.mremap
    call.restype = ctypes.c_void_p
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    if call(address, nbytes, nbytes, _MREMAP_MAYMOVE_FIXED, target) != target:
        error = ctypes.get_errno()
        _munmap(address, nbytes)
        raise OSError(error, f"cannot move {nbytes} bytes into place: {os.strerror(error)}")
