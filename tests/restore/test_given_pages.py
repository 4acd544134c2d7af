"""Tensors on the pages of a file: which are given, and how long they last."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import pytest
import torch

from lightning_memload.restore.given_pages import GivenPages
from lightning_memload.storage import FileSet

BYTES = bytes(range(256)) * 64


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(BYTES)
    return path


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def wanted(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def test_a_tensor_has_the_bytes_of_its_place(file: Path) -> None:
    pages = GivenPages(FileSet([file]))
    given = pages.give(wanted(100), 64)
    assert given is not None
    assert bytes(given.tolist()) == BYTES[64:164]
    given.zero_()
    assert file.read_bytes() == BYTES


def test_strides_are_those_of_the_tensor(file: Path) -> None:
    given = GivenPages(FileSet([file])).give(torch.empty((3, 4), dtype=torch.int16).t(), 128)
    assert given is not None
    expected = torch.frombuffer(bytearray(BYTES[128:152]), dtype=torch.int16).view(3, 4).t()
    assert given.stride() == expected.stride()
    assert torch.equal(given, expected)


@pytest.mark.parametrize(
    ("start", "nbytes", "is_free"),
    [(100, 50, True), (0, 100, True), (150, 50, False), (140, 20, False), (199, 1, False), (200, 1, True)],
)
def test_no_byte_is_given_twice(start: int, nbytes: int, is_free: bool, file: Path) -> None:
    pages = GivenPages(FileSet([file]))
    assert pages.give(wanted(50), 150) is not None
    assert pages.give(wanted(1), 400) is not None
    assert (pages.give(wanted(nbytes), start) is not None) == is_free


def test_tensors_outlive_the_restore(file: Path) -> None:
    source = FileSet([file])
    pages = GivenPages(source)
    given = pages.give(wanted(100), 0)
    assert given is not None
    pages.end()
    pages.end()
    source.close()
    assert pages.give(wanted(100), 200) is None
    assert bytes(given.tolist()) == BYTES[:100]
    assert is_mapped(file)
    del given
    gc.collect()
    assert not is_mapped(file)


def test_more_files_than_the_kernel_maps(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "as asked")

    monkeypatch.setattr("lightning_memload.restore.given_pages.FileMapping", refuse)
    number = errno.ENOMEM
    assert GivenPages(FileSet([file])).give(wanted(1), 0) is None
    number = errno.EACCES
    with pytest.raises(PermissionError):
        GivenPages(FileSet([file])).give(wanted(1), 0)
