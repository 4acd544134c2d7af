"""The CRC-32 of a record whose parts arrive in any order, from any thread."""

from __future__ import annotations

import itertools
import random
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_memload.transfer.checksums import PartialChecksums

DATA = random.Random(0).randbytes(1000)


def parts_of(data: bytes, cuts: list[int]) -> list[tuple[int, memoryview]]:
    edges = [0, *cuts, len(data)]
    return [(start, memoryview(data)[start:end]) for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_the_order_of_the_parts_does_not_matter(order: tuple[int, ...]) -> None:
    checksums = PartialChecksums([len(DATA)])
    parts = parts_of(DATA, [1, 500, 999])
    *first, last = [checksums.update(0, parts[number][0], [parts[number][1]]) for number in order]
    assert first == [None] * 3
    assert last == zlib.crc32(DATA)


def test_a_record_in_one_part() -> None:
    assert PartialChecksums([len(DATA)]).update(0, 0, [memoryview(DATA)]) == zlib.crc32(DATA)


def test_one_part_may_lie_in_several_buffers() -> None:
    """A read that goes around the end of the ring has two."""
    view = memoryview(DATA)
    assert PartialChecksums([len(DATA)]).update(0, 0, [view[:10], view[10:10], view[10:]]) == zlib.crc32(DATA)


def test_records_do_not_mix() -> None:
    checksums = PartialChecksums([6, 4])
    assert checksums.update(0, 0, [memoryview(DATA)[0:3]]) is None
    assert checksums.update(1, 0, [memoryview(DATA)[6:8]]) is None
    assert checksums.update(0, 3, [memoryview(DATA)[3:6]]) == zlib.crc32(DATA[:6])
    assert checksums.update(1, 2, [memoryview(DATA)[8:10]]) == zlib.crc32(DATA[6:10])


def test_a_wrong_byte_changes_the_checksum() -> None:
    damaged = bytearray(DATA)
    damaged[500] ^= 1
    checksums = PartialChecksums([len(DATA)])
    assert checksums.update(0, 0, [memoryview(DATA)[:300]]) is None
    assert checksums.update(0, 300, [memoryview(damaged)[300:]]) == zlib.crc32(damaged) != zlib.crc32(DATA)


def test_threads_complete_each_record_once() -> None:
    count = 40
    checksums = PartialChecksums([len(DATA)] * count)
    work = [(record, *part) for record in range(count) for part in parts_of(DATA, [100, 400, 777])]
    random.Random(1).shuffle(work)
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda item: (item[0], checksums.update(item[0], item[1], [item[2]])), work))
    complete = [(record, crc) for record, crc in told if crc is not None]
    assert sorted(complete) == [(record, zlib.crc32(DATA)) for record in range(count)]


def test_checksums_that_are_known_already_are_combined() -> None:
    """A writer computes the checksum of a part while it writes it."""
    data = bytes(range(200))
    checksums = PartialChecksums([200])
    assert checksums.add(0, 120, 80, zlib.crc32(data[120:])) is None
    assert checksums.add(0, 0, 120, zlib.crc32(data[:120])) == zlib.crc32(data)
