"""LocalFile: reads like preadv, and leaves the page cache as it found it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_memload.storage import ByteSource, FileView, LocalFile

PAGE = mmap.PAGESIZE
SIZE = 24 << 20
# The share of pages that must still be there: under load the kernel takes some back.
KEPT = 0.67


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    with open(path, "wb") as file:
        file.write(os.urandom(SIZE))
        os.fsync(file.fileno())
    return path


def make_cold(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path: Path, first: int = 0, last: int = SIZE // PAGE) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    with open(path, "rb") as file:
        address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    pages = (ctypes.c_ubyte * (SIZE // PAGE))()
    assert libc.mincore(address, SIZE, pages) == 0
    libc.munmap(address, SIZE)
    return sum(page & 1 for page in pages[first:last])


def read_all(source: ByteSource, block_bytes: int) -> bytes:
    data = bytearray(SIZE)
    view, offset = memoryview(data), 0
    while offset < SIZE:
        count = source.readv([view[offset : offset + block_bytes]], offset)
        assert count > 0
        offset += count
    return bytes(data)


@pytest.fixture
def cold(path: Path) -> Path:
    make_cold(path)
    if cached_pages(path):
        pytest.skip("this file system keeps its pages (tmpfs, for one)")
    with LocalFile(path, drop_behind=True) as source:
        source.readv([memoryview(bytearray(PAGE))], 0)
        if not source.drop_behind:
            pytest.skip("this file system does not tell cold from warm")
    make_cold(path)
    return path


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs RWF_NOWAIT")
class TestDropBehind:
    @pytest.mark.parametrize("block_bytes", [256 << 10, 1 << 20, 8 << 20])
    def test_cold_pages_are_given_back(self, cold: Path, block_bytes: int) -> None:
        with LocalFile(cold, drop_behind=True) as source:
            assert read_all(source, block_bytes) == cold.read_bytes()
        make_cold(cold)
        with LocalFile(cold, drop_behind=True) as source:
            read_all(source, block_bytes)
        # Single blocks may arrive while they are asked for and then look warm.
        assert cached_pages(cold) <= SIZE // PAGE // 3

    def test_without_it_they_stay(self, cold: Path) -> None:
        with LocalFile(cold) as source:
            read_all(source, 1 << 20)
        assert cached_pages(cold) >= KEPT * (SIZE // PAGE)

    def test_warm_pages_are_kept(self, cold: Path) -> None:
        cold.read_bytes()
        with LocalFile(cold, drop_behind=True) as source:
            read_all(source, 1 << 20)
        assert cached_pages(cold) >= KEPT * (SIZE // PAGE)

    def test_a_file_that_is_half_warm(self, cold: Path) -> None:
        with open(cold, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(file.fileno(), SIZE // 2, 0)
        half = SIZE // PAGE // 2
        assert cached_pages(cold, 0, half) >= KEPT * half
        with LocalFile(cold, drop_behind=True) as source:
            read_all(source, 1 << 20)
        assert cached_pages(cold, 0, half) >= KEPT * half
        assert cached_pages(cold, half) <= half // 3

    def test_where_nobody_can_tell_the_cache_is_left_alone(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = os.preadv

        def refuse(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
            if flags:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return original(fd, buffers, offset)

        dropped: list[Any] = []
        monkeypatch.setattr(os, "preadv", refuse)
        monkeypatch.setattr(os, "posix_fadvise", lambda *args: dropped.append(args[3]))
        with LocalFile(path, drop_behind=True) as source:
            assert read_all(source, 1 << 20) == path.read_bytes()
            assert not source.drop_behind
        assert os.POSIX_FADV_DONTNEED not in dropped

    def test_a_platform_without_the_flag(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LocalFile, "_NOWAIT", 0)
        monkeypatch.setattr(os, "posix_fadvise", None)
        with LocalFile(path, drop_behind=True) as source:
            assert read_all(source, 1 << 20) == path.read_bytes()


class TestReading:
    def test_several_buffers_and_the_end(self, path: Path) -> None:
        expected = path.read_bytes()
        source: ByteSource
        with LocalFile(path) as source:
            first, second = bytearray(10), bytearray(100)
            assert source.readv([memoryview(first), memoryview(second)], 5) == 110
            assert bytes(first + second) == expected[5:115]
            assert source.readv([memoryview(second)], SIZE - 30) == 30
            assert source.readv([memoryview(second)], SIZE) == 0
            assert source.name == str(path)

    def test_pread(self, path: Path) -> None:
        with LocalFile(path) as source:
            assert source.size_bytes == SIZE
            assert source.pread(1000, 77) == path.read_bytes()[77:1077]
            assert source.pread(1000, SIZE - 10) == path.read_bytes()[-10:]
            assert source.pread(10, SIZE + 5) == b""

    @pytest.mark.parametrize("nbytes", [0, 5, 1024, 2048, 2049, 100_000])
    def test_part(self, nbytes: int, path: Path) -> None:
        expected = path.read_bytes()[777 : 777 + nbytes]
        with LocalFile(path) as file:
            part = FileView(file, "part", 777, nbytes)
            assert (part.name, part.size_bytes) == ("part", nbytes)
            for start in (0, 3, 1023, 1024, nbytes // 2, max(0, nbytes - 1024), nbytes, nbytes + 9):
                for length in (0, 1, 1000, 1025, 1 << 62):
                    assert part.pread(length, start) == expected[start : start + length]

    def test_pread_of_a_file_that_is_not_kept_open(self, path: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        file = LocalFile(path, keep_open=False)
        assert file.pread(100, 50) == path.read_bytes()[50:150]
        assert len(os.listdir("/proc/self/fd")) == before
        path.write_bytes(b"another")
        with pytest.raises(OSError, match="changed or replaced"):
            file.pread(1, 0)

    def test_closing_twice_and_forgetting_to(self, path: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        source = LocalFile(path)
        source.close()
        source.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            source.readv([memoryview(bytearray(1))], 0)
        LocalFile(path)
        assert len(os.listdir("/proc/self/fd")) == before


def test_pread_of_a_file_that_is_opened_anew(path: Path) -> None:
    whole = path.read_bytes()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    file = LocalFile(path, keep_open=False)
    assert file.pread(1000, 5) == whole[5:1005]
    assert file.pread(1000, SIZE - 10) == whole[-10:]
    path.rename(path.with_suffix(".old"))
    path.write_bytes(bytes(SIZE))
    with pytest.raises(OSError, match="changed or replaced"):
        file.pread(1, 0)
    assert before is None or len(os.listdir("/proc/self/fd")) == before
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.pread(1, 0)
