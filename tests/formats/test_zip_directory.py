"""The directory of an archive of torch is read with few reads; all other archives are left to the standard library."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload.errors import MemloadError
from lightning_memload.formats.torch_zip import records as torch_records
from lightning_memload.formats.torch_zip.directory import read_regular_directory
from lightning_memload.formats.torch_zip.records import read_records
from lightning_memload.storage import LocalFile
from tests.formats.files import write_headers, write_zip


class CountedFile(LocalFile):
    """Counts its reads."""

    reads = 0

    def pread(self, nbytes: int, offset: int) -> bytes:
        self.reads += 1
        return super().pread(nbytes, offset)


def by_zipfile(file: LocalFile) -> Any:
    """What the standard library's way gives: the records, or the error."""
    try:
        return torch_records._read_directory(file)
    except MemloadError as error:
        return type(error)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 200])
def test_it_gives_what_zipfile_gives(tmp_path: Path, count: int) -> None:
    path = tmp_path / "w.pt"
    torch.save([torch.ones(number * 10 % 5000) for number in range(count)], path)
    with LocalFile(path) as file:
        records = read_regular_directory(file)
        assert records is not None
        assert records == by_zipfile(file)
        assert list(records) == list(by_zipfile(file))


def test_small_records_are_read_together(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save([torch.ones(3) for _ in range(2000)], path)
    with CountedFile(path) as file:
        read_records(file)
        assert file.reads < 20  # zipfile's way needs one for each record


def test_large_records_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save([torch.ones(20_000) for _ in range(50)], path)
    sizes: list[int] = []

    class Watched(LocalFile):
        def pread(self, nbytes: int, offset: int) -> bytes:
            sizes.append(nbytes)
            return super().pread(nbytes, offset)

    with Watched(path) as file:
        assert read_regular_directory(file) is not None
    assert sum(sizes) < 20_000


@pytest.mark.parametrize("start", [0, 5 << 30], ids=["small", "beyond 4 GiB"])
@pytest.mark.parametrize("nbytes", [16, 6 << 30], ids=["few bytes", "6 GiB"])
def test_sizes_and_positions_of_64_bits(tmp_path: Path, start: int, nbytes: int) -> None:
    """A sparse file, with the directory that torch writes for large records."""
    sizes = [("a/first", start), ("a/data.pkl", 3), ("a/data/0", nbytes), ("a/data/1", nbytes), ("a/data/2", 5)]
    path = tmp_path / "large.pt"
    write_headers(sizes, path, crc32=7)
    with LocalFile(path) as file:
        records = read_regular_directory(file)
        assert records is not None
        assert records == by_zipfile(file)
        assert records["data/1"].nbytes == nbytes


def repacked(path: Path, how: Callable[[zipfile.ZipFile], None]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        how(archive)


def twice(archive: zipfile.ZipFile) -> None:
    for _ in range(2):
        archive.writestr("a/data/0", b"0")


def prefixed(path: Path) -> None:
    repacked(path, lambda _: None)
    path.write_bytes(b"PK\x03\x04" + path.read_bytes())


def without_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/version", b"3")


OTHERS: dict[str, Callable[[Path], object]] = {
    "compressed": lambda path: repacked(path, lambda z: z.writestr("a/data/0", b"0" * 99, zipfile.ZIP_DEFLATED)),
    "twice": lambda path: repacked(path, twice),
    "folder": lambda path: repacked(path, lambda z: z.writestr("a/data/", b"")),
    "outside": lambda path: repacked(path, lambda z: z.writestr("b/data/0", b"0")),
    "umlaut": lambda path: repacked(path, lambda z: z.writestr("a/\u00e4", b"0")),
    "comment": lambda path: repacked(path, lambda z: setattr(z, "comment", b"hello")),
    "script": lambda path: repacked(path, lambda z: z.writestr("a/constants.pkl", b"")),
    "prefix": prefixed,
    "no pickle": without_pickle,
    "empty": lambda path: path.write_bytes(b""),
    "end alone": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", OTHERS)
def test_all_others_are_left_to_zipfile(name: str, tmp_path: Path) -> None:
    path = tmp_path / "other.zip"
    OTHERS[name](path)
    with LocalFile(path) as file:
        assert read_regular_directory(file) is None


@pytest.mark.slow
def test_with_any_damage_it_says_what_zipfile_says_or_nothing(tmp_path: Path) -> None:
    """Each byte of the headers, the directory and the end records, changed in several ways; and all lengths."""
    path = tmp_path / "w.pt"
    write_zip(path, b"\x80\x02N.", {"0": b"0123", "1": b"", "2": bytes(70)})
    sound = path.read_bytes()
    draw = random.Random(0)
    damaged = [sound[:length] for length in range(len(sound))]
    for position in range(len(sound)):
        for value in {sound[position] ^ 1, 0xFF, draw.randrange(256)} - {sound[position]}:
            damaged.append(sound[:position] + bytes((value,)) + sound[position + 1 :])
    answers = 0
    for content in damaged:
        path.write_bytes(content)
        with LocalFile(path) as file:
            records = read_regular_directory(file)
            if records is not None:
                assert records == by_zipfile(file)
                answers += 1
    assert 0 < answers < len(damaged)
