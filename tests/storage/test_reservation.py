"""Addresses that stand for files that cannot be mapped: memory comes range by range."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_memload.storage import FileMapping, FileSet, Reservation, map_or_reserve
from lightning_memload.storage.reservation import _without

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="addresses are reserved as on Linux")

PAGE = mmap.PAGESIZE
CONTENT = os.urandom(10 * PAGE + 100)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[FileSet]:
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    source = FileSet([path])
    yield source
    source.close()


def tensor_at(reservation: Reservation, offset: int, nbytes: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(reservation.storage(offset, nbytes), 0, (nbytes,), (1,))


def test_a_range_has_its_bytes_when_it_is_filled(source: FileSet) -> None:
    reservation = Reservation(source)
    first, last = tensor_at(reservation, 64, 100), tensor_at(reservation, 10 * PAGE, 100)
    assert not reservation.is_filled(64, 100)
    reservation.fill([(64, 100), (10 * PAGE, 100)])
    assert reservation.is_filled(0, PAGE)
    assert not reservation.is_filled(PAGE, 1)
    assert bytes(first.tolist()) == CONTENT[64:164]
    assert bytes(last.tolist()) == CONTENT[10 * PAGE :]


def test_filling_again_keeps_what_was_written(source: FileSet) -> None:
    reservation = Reservation(source)
    tensor = tensor_at(reservation, 0, 3 * PAGE)
    reservation.fill([(PAGE, PAGE)])
    tensor[PAGE] = tensor[PAGE] ^ 1
    reservation.fill([(0, 3 * PAGE)])
    assert bytes(tensor[:PAGE].tolist()) == CONTENT[:PAGE]
    assert int(tensor[PAGE]) == CONTENT[PAGE] ^ 1
    assert bytes(tensor[PAGE + 1 :].tolist()) == CONTENT[PAGE + 1 : 3 * PAGE]


def test_after_a_failed_load_all_addresses_can_be_read(source: FileSet) -> None:
    reservation = Reservation(source)
    tensor = tensor_at(reservation, 0, 3 * PAGE)
    reservation.fill([(PAGE, PAGE)])
    reservation.abandon()
    assert int(tensor[:PAGE].sum()) == int(tensor[2 * PAGE :].sum()) == 0
    assert bytes(tensor[PAGE : 2 * PAGE].tolist()) == CONTENT[PAGE : 2 * PAGE]


def test_living_storages_are_known(source: FileSet) -> None:
    reservation = Reservation(source)
    first = tensor_at(reservation, 64, 100)
    second = tensor_at(reservation, 8 * PAGE, 10)
    del first
    assert reservation.live_ranges() == [(8 * PAGE, 10)]
    del second


def test_local_files_are_mapped(source: FileSet) -> None:
    mapping = map_or_reserve(source)
    assert type(mapping) is FileMapping


@pytest.mark.parametrize(
    ("ranges", "taken", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 7)], [(0, 2), (4, 6), (7, 10)]),
        ([(2, 4), (6, 9)], [(0, 3), (8, 20)], [(3, 4), (6, 8)]),
        ([(5, 6)], [(0, 20)], []),
        ([(0, 5), (5, 8)], [(5, 5)], [(0, 5), (5, 8)]),
    ],
)
def test_the_parts_outside_of_other_ranges(
    ranges: list[tuple[int, int]], taken: list[tuple[int, int]], left: list[tuple[int, int]]
) -> None:
    assert _without(ranges, taken) == left
