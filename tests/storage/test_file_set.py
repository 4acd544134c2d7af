"""Several files as one run of bytes: each begins on a page of its own, and the padding between two reads as zeros."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from lightning_memload.storage import FileSet
from lightning_memload.storage.file_set import _MAX_OPEN_FILES

PAGE = mmap.PAGESIZE


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    contents = [b"first" * 3, b"", b"x" * (PAGE + 1), b"last"]
    found = [tmp_path / f"{number}.bin" for number in range(len(contents))]
    for path, content in zip(found, contents, strict=True):
        path.write_bytes(content)
    return found


def read(source: FileSet, nbytes: int, offset: int) -> bytes:
    buffer = bytearray(nbytes)
    count = source.readv([memoryview(buffer)], offset)
    return bytes(buffer[:count])


def test_each_file_begins_on_a_page(paths: list[Path]) -> None:
    source = FileSet(paths)
    assert [span.start for span in source.spans] == [0, PAGE, 2 * PAGE, 4 * PAGE]
    assert source.nbytes == 4 * PAGE + 4
    assert FileSet([]).nbytes == 0
    source.close()


def test_an_offset_names_a_file_and_a_position(paths: list[Path]) -> None:
    source = FileSet(paths)
    assert source.place(3) == (str(paths[0]), 3)
    assert source.place(2 * PAGE + 7) == (str(paths[2]), 7)
    assert source.place(4 * PAGE) == (str(paths[3]), 0)
    source.close()


def test_one_call_reads_from_one_file(paths: list[Path]) -> None:
    source = FileSet(paths)
    assert read(source, 2 * PAGE, 0) == b"first" * 3
    assert read(source, 9, 4 * PAGE) == b"last"
    assert read(source, 9, 4 * PAGE + 4) == b""
    source.close()


def test_padding_reads_as_zeros(paths: list[Path]) -> None:
    source = FileSet(paths)
    assert read(source, 10, 15) == bytes(10)
    assert read(source, 2 * PAGE, 15) == bytes(PAGE - 15)
    assert read(source, 10, PAGE) == bytes(10)
    source.close()


def test_many_files_are_not_kept_open(tmp_path: Path) -> None:
    """A process may have some thousand open files."""
    paths = [tmp_path / str(number) for number in range(_MAX_OPEN_FILES + 1)]
    for path in paths:
        path.write_bytes(path.name.encode())
    few, many = FileSet(paths[:-1]), FileSet(paths)
    assert all(file.is_open for file in few.mappable)
    assert not any(file.is_open for file in many.mappable)
    assert read(many, 9, _MAX_OPEN_FILES * PAGE) == str(_MAX_OPEN_FILES).encode()
    few.close()
    many.close()


def test_the_files_can_be_opened_a_second_time(paths: list[Path]) -> None:
    source = FileSet(paths)
    again = source.reopened()
    source.close()
    assert read(again, 4, 4 * PAGE) == b"last"
    again.close()


def test_files_that_were_changed_in_place_are_named(paths: list[Path]) -> None:
    source = FileSet(paths)
    assert source.changed_files() == []
    with paths[2].open("ab") as file:
        file.write(b"more")
    assert source.changed_files() == [str(paths[2])]
    source.close()
