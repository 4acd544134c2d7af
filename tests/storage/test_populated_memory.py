"""Memory by the kernel's own calls."""

from __future__ import annotations

import ctypes
import mmap
import platform
import resource
from collections.abc import Iterator

import pytest

from lightning_memload.storage.kernel import map_memory, populate_memory, unmap_memory

# Less than a huge page, which a system may give by itself.
PAGES = 256
KERNEL = tuple(int(number) for number in platform.release().split("-")[0].split(".")[:2])


@pytest.fixture
def address() -> Iterator[int]:
    address = map_memory(PAGES * mmap.PAGESIZE)
    yield address
    unmap_memory(address, PAGES * mmap.PAGESIZE)


def faults_of_writing(address: int) -> int:
    """How many page faults it takes to write a byte to every page."""
    pages = range(address, address + PAGES * mmap.PAGESIZE, mmap.PAGESIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for page in pages:
        ctypes.c_char.from_address(page).value = b"x"
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(KERNEL < (5, 14), reason="needs Linux 5.14")
def test_memory_gets_its_pages_at_once(address: int) -> None:
    populate_memory(address, PAGES * mmap.PAGESIZE)
    assert faults_of_writing(address) <= 4


def test_without_it_each_page_takes_a_fault(address: int) -> None:
    ctypes.c_char.from_address(address).value = b"y"
    # Its first page is there, so the others are taken to be there.
    populate_memory(address, PAGES * mmap.PAGESIZE)
    assert faults_of_writing(address) > 4


def test_values_stay(address: int) -> None:
    """Also those beside the range, and in a range whose first page has none."""
    half = PAGES * mmap.PAGESIZE // 2
    for position in (0, half - 1, half + 5000, 2 * half - 1):
        ctypes.c_char.from_address(address + position).value = b"y"
    populate_memory(address + 10_000, 2 * half - 10_000)
    content = ctypes.string_at(address, 2 * half)
    assert [position for position, byte in enumerate(content) if byte] == [0, half - 1, half + 5000, 2 * half - 1]


@pytest.mark.parametrize(("start", "nbytes"), [(0, 0), (1, mmap.PAGESIZE), (100, 100)])
def test_less_than_a_page(address: int, start: int, nbytes: int) -> None:
    populate_memory(address + start, nbytes)
    assert faults_of_writing(address) > 4
