"""Comparing checksums of records without loading them."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_memload import CheckpointReadError, ChecksumError
from lightning_memload.bytes import Record
from lightning_memload.storage import LocalFile
from lightning_memload.transfer import compare_records


def write(path: Path, sizes: Sequence[int], gap: int = 7) -> list[Record]:
    """A file of records of such sizes, with a gap before each."""
    records, data = [], bytearray()
    for number, size in enumerate(sizes):
        data += b"-" * gap
        content = bytes((number + position * 31) % 256 for position in range(256)) * (size // 256 + 1)
        records.append(Record(f"w{number}", len(data), size, zlib.crc32(content[:size])))
        data += content[:size]
    path.write_bytes(data)
    return records


SIZES = [0, 1, 5, 70_000, 3 << 20, 12, 1 << 20, (1 << 20) + 1, *[16] * 500]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_every_record_is_compared(tmp_path: Path, num_threads: int) -> None:
    records = write(tmp_path / "file", SIZES)
    seen: list[int] = []
    with LocalFile(tmp_path / "file") as file:
        stats = compare_records(file, records, num_threads=num_threads, on_progress=seen.append)
    assert stats.bytes_verified == sum(SIZES)
    assert sum(SIZES) <= stats.bytes_read == sum(seen) < sum(SIZES) + 7 * len(SIZES)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_flipped_bit_in_any_record(tmp_path: Path, number: int, num_threads: int) -> None:
    path = tmp_path / "file"
    records = write(path, SIZES)
    data = bytearray(path.read_bytes())
    data[records[number].offset + records[number].nbytes - 1] ^= 1
    path.write_bytes(data)
    with LocalFile(path) as file, pytest.raises(ChecksumError, match=f"bytes of w{number} at byte") as caught:
        compare_records(file, records, num_threads=num_threads)
    assert (caught.value.key, caught.value.expected) == (f"w{number}", records[number].crc32)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    records = write(tmp_path / "file", [100, 200])
    with LocalFile(tmp_path / "file") as file:
        (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-50])
        with pytest.raises(CheckpointReadError, match="w1 needs"):
            compare_records(file, records, num_threads=2)


def test_memory_is_a_block_for_each_thread(tmp_path: Path) -> None:
    records = write(tmp_path / "file", [8 << 20, 8 << 20])
    with LocalFile(tmp_path / "file") as file:
        tracemalloc.start()
        try:
            compare_records(file, records, num_threads=2)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert 1 << 20 <= peak_bytes < (2 << 20) + (1 << 19)
