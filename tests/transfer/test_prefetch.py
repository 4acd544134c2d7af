"""Prefetching: every byte of every file is in the page cache afterwards, and is not read twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_memload import prefetch_checkpoint
from lightning_memload.errors import MemloadError

SIZE = (5 << 20) + 17


def write_cold(path: Path, nbytes: int = SIZE) -> Path:
    """A file that is on the disk and not in the page cache."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(nbytes))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def knows_cold(path: Path) -> bool:
    """Whether the file system tells cold pages from cached ones."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], SIZE // 2, os.RWF_NOWAIT) == 0
        except BlockingIOError:
            return True
        except OSError:
            return False


def test_a_cold_file_is_read_once(tmp_path: Path) -> None:
    path = write_cold(tmp_path / "last.ckpt")
    if not knows_cold(path):
        pytest.skip("the file system does not tell what is cached")
    write_cold(path)
    stats = prefetch_checkpoint(path)
    assert stats.bytes_read + stats.bytes_cached == SIZE
    assert stats.bytes_read > 0.9 * SIZE
    assert (stats.path, stats.num_files) == (str(path), 1)
    again = prefetch_checkpoint(path)
    # A busy kernel takes some pages back.
    assert again.bytes_cached > 0.6 * SIZE
    assert again.bytes_read + again.bytes_cached == SIZE


def test_a_directory(tmp_path: Path) -> None:
    write_cold(tmp_path / "a")
    write_cold(tmp_path / "folder" / "b", 9)
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "b")
    (tmp_path / "broken").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    seen: list[tuple[int, int]] = []
    stats = prefetch_checkpoint(tmp_path, num_threads=3, progress=lambda done, total: seen.append((done, total)))
    assert stats.num_files == 4
    assert stats.bytes_read + stats.bytes_cached == SIZE + 18
    assert seen[-1] == (SIZE + 18, SIZE + 18)
    assert sorted(seen) == seen


def test_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_memload.transfer.prefetch._MAX_OPEN_FILES", 2)
    for number in range(5):
        (tmp_path / str(number)).write_bytes(bytes(100))
    stats = prefetch_checkpoint(tmp_path)
    assert (stats.num_files, stats.bytes_read + stats.bytes_cached) == (5, 500)


def test_where_the_kernel_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    monkeypatch.setattr(os, "RWF_NOWAIT", 0, raising=False)
    assert prefetch_checkpoint(tmp_path / "file").bytes_read == SIZE


def test_what_cannot_be_prefetched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prefetch_checkpoint(tmp_path / "absent")
    with pytest.raises((MemloadError, FileNotFoundError)):
        prefetch_checkpoint("s3://bucket/last.ckpt")
    with pytest.raises(ValueError, match="num_threads must be at least 1"):
        prefetch_checkpoint(tmp_path, num_threads=0)
