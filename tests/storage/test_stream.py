"""A file of any place as a file object of Python."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import pytest
import torch

from lightning_memload.storage import StoredFile
from lightning_memload.storage.stream import FilePosition, _StoredStream, path_or_stream


class Slow(StoredFile):
    """A file that gives at most seven bytes in one read."""

    def __init__(self, content: bytes) -> None:
        self.name, self.size_bytes, self.content = "model.pt", len(content), content
        self.is_closed = False

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        data = self.content[offset : offset + min(7, len(buffers[0]))]
        buffers[0][: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.is_closed = True


def test_moves_as_a_file_does() -> None:
    position, file = FilePosition(Slow(bytes(20))), io.BytesIO(bytes(20))
    for offset, whence in ((5, os.SEEK_SET), (3, os.SEEK_CUR), (-2, os.SEEK_CUR), (-4, os.SEEK_END), (9, os.SEEK_END)):
        assert position.seek(offset, whence) == file.seek(offset, whence)
        assert position.tell() == file.tell()
    with pytest.raises(ValueError, match="byte -1 is before the start"):
        position.seek(-1)


def test_reads_to_the_end_and_closes_the_file() -> None:
    content = bytes(range(50))
    file = Slow(content)
    with io.BufferedReader(_StoredStream(file), 16) as stream:
        assert stream.read(3) == content[:3]
        assert stream.read() == content[3:]
        assert stream.read(1) == b""
        stream.seek(60)
        assert stream.read(1) == b""
    assert file.is_closed


def test_torch_loads_from_it() -> None:
    saved = io.BytesIO()
    torch.save({"weight": torch.arange(5)}, saved)
    with io.BufferedReader(_StoredStream(Slow(saved.getvalue())), 64) as stream:
        assert torch.load(stream, weights_only=True)["weight"].tolist() == [0, 1, 2, 3, 4]


def test_a_local_path_stays_a_path() -> None:
    assert path_or_stream("model.pt") == "model.pt"
