"""Files one after the other in one run of bytes."""

from __future__ import annotations

import mmap

import pytest

from lightning_memload.bytes import FileSpan, after, lay_out, place_in

PAGE = mmap.PAGESIZE


def test_each_file_begins_on_a_page_of_its_own() -> None:
    files = lay_out([("a", 1), ("empty", 0), ("b", PAGE), ("c", PAGE + 1), ("d", 5)])
    assert files == (
        FileSpan("a", 0, 1),
        FileSpan("empty", PAGE, 0),
        FileSpan("b", 2 * PAGE, PAGE),
        FileSpan("c", 3 * PAGE, PAGE + 1),
        FileSpan("d", 5 * PAGE, 5),
    )
    assert lay_out([]) == ()


@pytest.mark.parametrize(
    ("offset", "place"),
    [
        (0, ("a", 0)),
        (9, ("a", 9)),
        (PAGE, ("b", 0)),
        (2 * PAGE - 1, ("b", PAGE - 1)),
        (2 * PAGE, ("c", 0)),
        (9 * PAGE, ("c", 7 * PAGE)),
    ],
)
def test_an_offset_has_its_file_and_position(offset: int, place: tuple[str, int]) -> None:
    assert place_in(lay_out([("a", 10), ("b", PAGE), ("c", 8 * PAGE)]), offset) == place


def test_every_byte_of_every_file_is_found() -> None:
    files = lay_out([("a", 3), ("b", PAGE + 2), ("c", 1)])
    for file in files:
        for position in (0, file.nbytes - 1):
            assert place_in(files, file.start + position) == (file.path, position)


@pytest.mark.parametrize("count", range(8))
def test_buffers_after_some_bytes(count: int) -> None:
    buffers = [memoryview(b"abc"), b"", memoryview(b"de"), b"fg", b""]
    left = after(buffers, count)
    assert b"".join(left) == b"abcdefg"[count:]
    assert all(left[:1])  # A write of empty buffers would never end.
