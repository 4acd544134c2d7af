"""Sinks write all bytes at their offsets, even if the system takes only a part of them in one call."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_memload.bytes import RecordPart
from lightning_memload.transfer.sinks import LocalSink, SplitWriter, StreamSink


def write(path: Path, buffers: Sequence[bytes | memoryview], offset: int, **options: Any) -> bytes:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        LocalSink(descriptor, **options).write(buffers, offset)
    finally:
        os.close(descriptor)
    return path.read_bytes()


class TestLocalSink:
    @pytest.mark.parametrize("start_writeback", [False, True])
    def test_writes_at_the_offset(self, start_writeback: bool, path: Path) -> None:
        path.write_bytes(b"." * 8)
        data = write(path, [b"ab", memoryview(b""), b"c"], 3, start_writeback=start_writeback)
        assert data == b"...abc.."

    @pytest.mark.parametrize("most", [1, 2, 3, 4, 7])
    def test_goes_on_where_the_system_stopped(self, most: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = os.pwritev

        def short(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
            return whole(descriptor, [b"".join(map(bytes, buffers))[:most]], offset)

        monkeypatch.setattr(os, "pwritev", short)
        assert write(path, [b"abc", b"", b"defg", memoryview(b"h")], 0) == b"abcdefgh"

    def test_an_error_of_the_system_is_passed_on(self, path: Path) -> None:
        path.touch()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                LocalSink(descriptor).write([b"a"], 0)
        finally:
            os.close(descriptor)


class TestStreamSink:
    def test_writes_one_after_the_other(self) -> None:
        file = io.BytesIO()
        sink = StreamSink(file)
        sink.write([b"ab", b""], 0)
        sink.write([memoryview(b"cd"), b"e"], 2)
        assert file.getvalue() == b"abcde"

    def test_a_gap_is_our_own_mistake(self) -> None:
        with pytest.raises(AssertionError):
            StreamSink(io.BytesIO()).write([b"a"], 1)


class Noting:
    def __init__(self) -> None:
        self.written: list[tuple[RecordPart, bytes, int | None]] = []

    def write(self, pieces: Sequence[RecordPart], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        self.written += [(piece, bytes(view), crc) for piece, view, crc in zip(pieces, data, crc32s, strict=True)]


class TestSplit:
    def test_each_record_goes_to_its_target_under_its_number_there(self) -> None:
        first, none, second = Noting(), Noting(), Noting()
        split = SplitWriter((2, first), (0, none), (3, second))
        pieces = [RecordPart(1, 4, 1), RecordPart(2, 0, 1), RecordPart(4, 0, 2)]
        split.write(pieces, [memoryview(b"a"), memoryview(b"b"), memoryview(b"cd")], [7, None, 9])
        assert first.written == [(RecordPart(1, 4, 1), b"a", 7)]
        assert none.written == []
        assert second.written == [(RecordPart(0, 0, 1), b"b", None), (RecordPart(2, 0, 2), b"cd", 9)]

    def test_a_write_of_one_target_leaves_the_others_alone(self) -> None:
        first, second = Noting(), Noting()
        SplitWriter((1, first), (1, second)).write([RecordPart(1, 0, 1)], [memoryview(b"a")], [None])
        assert (first.written, len(second.written)) == ([], 1)
