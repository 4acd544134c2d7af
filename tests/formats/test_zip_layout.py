"""The arithmetic of the archive: the same places and the same bytes as torch's own writer, for every size."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memload.bytes import RecordPart
from lightning_memload.formats.torch_zip.layout import (
    ALIGNMENT_BYTES,
    ZipEntry,
    data_descriptor,
    directory,
    directory_bytes,
    lay_out,
    local_header,
)
from lightning_memload.transfer.write_plan import plan_writes
from tests.formats.files import save_sparse

GIB = 1 << 30
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=200)
sizes = st.one_of(st.integers(0, 3), st.integers(0, 5000), st.integers(0xFFFFFFFF - 2, 0xFFFFFFFF + 2))


def archive(records: Sequence[tuple[str, bytes]]) -> bytes:
    """A whole archive, put together in memory as the writer does it in a file."""
    entries = lay_out((name, len(data)) for name, data in records)
    crc32s = [zlib.crc32(data) for _, data in records]
    stream = io.BytesIO()
    for entry, crc32, (_, data) in zip(entries, crc32s, records, strict=True):
        assert stream.tell() == entry.header_offset
        stream.write(local_header(entry))
        assert stream.tell() == entry.data_offset
        stream.write(data)
        stream.write(data_descriptor(entry, crc32))
        assert stream.tell() == entry.end
    stream.write(directory(entries, crc32s))
    return stream.getvalue()


def assert_bytes_are_torchs(path: Path) -> list[ZipEntry]:
    """Compares everything in a file of torch that is not data."""
    with zipfile.ZipFile(path) as opened:
        infos = opened.infolist()
    entries = lay_out((info.filename, info.file_size) for info in infos)
    with open(path, "rb") as file:
        for entry, info in zip(entries, infos, strict=True):
            assert entry.header_offset == info.header_offset
            for offset, expected in (
                (entry.header_offset, local_header(entry)),
                (entry.data_end, data_descriptor(entry, info.CRC)),
            ):
                file.seek(offset)
                assert file.read(len(expected)) == expected, entry
        file.seek(entries[-1].end)
        assert file.read() == directory(entries, [info.CRC for info in infos])
    return entries


@given(st.lists(st.tuples(names, sizes), max_size=20), st.integers(0, 6 * GIB))
def test_records_follow_one_another_and_data_is_aligned(records: list[tuple[str, int]], start: int) -> None:
    entries = lay_out(records, start=start)
    assert [(entry.name, entry.nbytes) for entry in entries] == records
    position = start
    for entry in entries:
        assert entry.header_offset == position
        assert entry.data_offset % ALIGNMENT_BYTES == 0
        assert len(local_header(entry)) == entry.data_offset - entry.header_offset
        assert len(data_descriptor(entry, 1)) == entry.end - entry.data_end
        position = entry.end


@given(st.lists(st.tuples(names, sizes), min_size=1, max_size=20), st.integers(0, 5 * GIB))
def test_size_of_the_directory_is_known_before_the_checksums(records: list[tuple[str, int]], start: int) -> None:
    entries = lay_out(records, start=start)
    assert directory_bytes(entries) == len(directory(entries, [0] * len(entries)))


@given(st.dictionaries(names.filter(lambda name: "/" not in name), st.binary(max_size=300), max_size=12))
def test_archive_is_a_sound_zip(records: dict[str, bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(archive(list(records.items())))) as opened:
        assert opened.testzip() is None
        assert {info.filename: opened.read(info) for info in opened.infolist()} == records


@settings(max_examples=25, deadline=None)
@given(numels=st.lists(st.integers(0, 200), max_size=12))
def test_bytes_are_torchs(numels: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("layout") / "file.pt"
    torch.save([torch.ones(numel) for numel in numels], path)
    assert_bytes_are_torchs(path)


def test_bytes_are_torchs_beyond_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "sparse.pt"
    numels = [3, 0xFFFFFFFE, 0xFFFFFFFF, 0, 5 * GIB, 7]
    save_sparse(path, {str(number): numel for number, numel in enumerate(numels)})
    entries = assert_bytes_are_torchs(path)
    assert any(entry.nbytes > 4 * GIB for entry in entries)
    assert entries[-1].header_offset > 12 * GIB


def test_more_records_than_16_bits_count() -> None:
    data = archive([(f"archive/data/{number}", b"") for number in range(70_000)])
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        assert len(opened.infolist()) == 70_000


@pytest.mark.parametrize("record", [("a", -1), ("a" * 70_000, 1)])
def test_impossible_records_are_refused(record: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        lay_out([record])


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 60), st.integers(1, 5))
def test_writes_cover_every_byte_once_in_order(nbytes: list[int], block_bytes: int, max_parts: int) -> None:
    writes = plan_writes(nbytes, block_bytes=block_bytes, max_parts=max_parts)
    covered = [0] * len(nbytes)
    seen = []
    for write in writes:
        assert sum(part.nbytes for part in write) <= block_bytes
        assert 1 <= len(write) <= max_parts
        for part in write:
            assert part.start == covered[part.record]
            covered[part.record] += part.nbytes
            seen.append((part.record, part.start))
            assert len(write) == 1 or part.nbytes == nbytes[part.record]
    assert covered == nbytes
    assert seen == sorted(seen)
    assert {record for record, _ in seen} == set(range(len(nbytes)))


def test_small_records_share_a_write_and_large_ones_are_cut() -> None:
    assert plan_writes([2, 0, 3, 12, 4], block_bytes=5, max_parts=9) == [
        (RecordPart(0, 0, 2), RecordPart(1, 0, 0), RecordPart(2, 0, 3)),
        (RecordPart(3, 0, 5),),
        (RecordPart(3, 5, 5),),
        (RecordPart(3, 10, 2),),
        (RecordPart(4, 0, 4),),
    ]


@pytest.mark.parametrize(("block_bytes", "max_parts"), [(0, 1), (1, 0)])
def test_limits_must_be_positive(block_bytes: int, max_parts: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        plan_writes([1], block_bytes=block_bytes, max_parts=max_parts)
