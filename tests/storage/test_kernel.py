"""The kernel's own calls for memory: addresses that are reserved, and pages that are moved over them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from lightning_memload.storage.kernel import map_file, map_memory, move_memory, reserve_addresses, unmap_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the calls are those of Linux")

PAGE = mmap.PAGESIZE


def test_reserved_addresses_take_no_memory() -> None:
    """It succeeds on a machine with less memory."""
    nbytes = 1 << 38
    address = reserve_addresses(nbytes)
    unmap_memory(address, nbytes)


def test_a_readable_reservation_reads_as_zeros() -> None:
    address = reserve_addresses(2 * PAGE, readable=True)
    assert ctypes.string_at(address, 2 * PAGE) == bytes(2 * PAGE)
    unmap_memory(address, 2 * PAGE)


def test_a_file_is_mapped_at_the_address_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE)
    address = reserve_addresses(2 * PAGE)
    with path.open("rb") as file:
        map_file(file.fileno(), PAGE, address)
    ctypes.memset(address, ord("y"), 3)
    assert ctypes.string_at(address, 5) == b"yyyxx"
    assert path.read_bytes() == b"x" * PAGE
    reserve_addresses(PAGE, at=address, readable=True)
    assert ctypes.string_at(address, 5) == bytes(5)
    unmap_memory(address, 2 * PAGE)


def test_pages_are_moved_over_others() -> None:
    target, source = reserve_addresses(2 * PAGE), map_memory(PAGE)
    ctypes.memset(source, ord("z"), PAGE)
    move_memory(source, PAGE, target + PAGE)
    assert ctypes.string_at(target + PAGE, 3) == b"zzz"
    unmap_memory(target, 2 * PAGE)


def test_refusals_name_the_size() -> None:
    with pytest.raises(OSError, match="cannot map 4611686018427387904 bytes"):
        map_memory(1 << 62)
    page = map_memory(PAGE)
    with pytest.raises(OSError, match=f"cannot move {PAGE} bytes into place"):
        move_memory(page, PAGE, page + 1)  # not at a page
