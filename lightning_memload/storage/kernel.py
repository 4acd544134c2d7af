"""Memory mappings by the kernel's own calls. Linux only.

The standard library's module cannot choose the address, and holds the interpreter's lock while the kernel works.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import sys

__all__ = [
    "Advice",
    "advise",
    "map_file",
    "map_memory",
    "move_memory",
    "populate_memory",
    "reserve_addresses",
    "unmap_memory",
]

# Python has the name MAP_NORESERVE from 3.11 on. The value is that of x86-64 and arm64.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_FIXED = 0x10
_MREMAP_MAYMOVE_FIXED = 0x1 | 0x2
_PROT_NONE = 0

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Advice(enum.IntEnum):
    """What :func:`advise` tells the kernel, see madvise(2)."""

    DONTNEED = 4
    """Free the memory. The addresses read as zeros after that."""
    DONTFORK = 10
    """A forked child does not inherit the mapping."""
    HUGEPAGE = 14
    """Use huge pages where possible."""
    POPULATE_WRITE = 23
    """Allocate all pages now. From Linux 5.14 on."""


def reserve_addresses(nbytes: int, *, at: int | None = None, readable: bool = False) -> int:
    """Reserves a range of addresses. It takes no memory, and cannot be read or written.

    Args:
        nbytes: Length of the range.
        at: First address. Existing mappings there are replaced. ``None``: the kernel chooses free addresses.
        readable: The range can be read, as zeros.

    Returns:
        The first address.

    Raises:
        OSError: The kernel refuses.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if at is not None else 0)
    return _mmap(at, nbytes, mmap.PROT_READ if readable else _PROT_NONE, flags, -1)


def map_memory(nbytes: int) -> int:
    """Maps ordinary memory, filled with zeros.

    Raises:
        OSError: The kernel refuses.
    """
    return _mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)


def map_file(descriptor: int, nbytes: int, at: int) -> None:
    """Maps the start of an open file privately, over what is mapped at the address. Reserves no memory.

    Raises:
        OSError: The kernel refuses.
    """
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE | _MAP_FIXED
    _mmap(at, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor)


def advise(address: int, nbytes: int, advice: Advice) -> int:
    """Gives the kernel advice about all pages of a range of memory.

    Returns:
        0, or the number of the error. ``EINVAL``: this kernel does not know the advice.
    """
    assert _LIBC is not None
    call = _LIBC.madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    return ctypes.get_errno() if call(start, address + nbytes - start, advice) else 0


def unmap_memory(address: int, nbytes: int) -> None:
    """Unmaps memory or addresses."""
    assert _LIBC is not None
    call = _LIBC.munmap
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    call(address, nbytes)


def move_memory(address: int, nbytes: int, target: int) -> None:
    """Moves pages from ``address`` to ``target`` in one atomic step. They replace what is mapped there.

    Raises:
        OSError: The kernel refuses.
    """
    assert _LIBC is not None
    call = _LIBC.mremap
    call.restype = ctypes.c_void_p
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    if call(address, nbytes, nbytes, _MREMAP_MAYMOVE_FIXED, target) != target:
        error = ctypes.get_errno()
        unmap_memory(address, nbytes)
        raise OSError(error, f"cannot move {nbytes} bytes into place: {os.strerror(error)}")


def populate_memory(address: int, nbytes: int) -> None:
    """Gives untouched memory its pages in one call. Page faults, one for each page, take a third more time in all.

    Nothing happens to memory that has pages already, judged by its first page, or before Linux 5.14. Several threads
    populate different ranges at once.

    Args:
        address: The first byte. It must be writable.
        nbytes: The length. Only whole pages within the range are meant.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _LIBC is None or start >= end:
        return
    is_present = ctypes.c_ubyte(1)
    ask = _LIBC.mincore
    ask.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    # Of memory that has pages, each would be looked up once more: a quarter of the time of a read.
    if ask(start, mmap.PAGESIZE, ctypes.addressof(is_present)) == 0 and not is_present.value & 1:
        advise(start, end - start, Advice.POPULATE_WRITE)


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
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
