"""A place of bytes that is written for the tests alone: a bucket whose objects are read by ranges over a poor network.

Its objects are files in a folder, but nothing except this class knows where: a path of the bucket is no path of a disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_memload.storage import Place, StoredFile

SCHEME = "toy"


class ToyFile(StoredFile):
    """An object. One read gives a part of what is asked for, and only of the version that was opened."""

    def __init__(self, bucket: ToyBucket, path: str) -> None:
        self.name = path
        self.size_bytes = os.path.getsize(bucket.file(path))
        self._bucket = bucket
        self._version = bucket.identity(path)

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._bucket.requests.append((self.name, offset, sum(map(len, buffers))))
        if self._bucket.fails_at is not None and self._bucket.fails_at(self.name, offset):
            raise OSError(5, f"GET bytes={offset}- failed")
        if self._bucket.identity(self.name) != self._version:
            raise OSError(116, "GET If-Match: another version of the object")
        done = 0
        with open(self._bucket.file(self.name), "rb") as file:
            file.seek(offset)
            for buffer in buffers:
                count = file.readinto(buffer[: max(1, len(buffer) * 2 // 3)])
                done += count
                if count < len(buffer):
                    break
        return done


class ToyBucket(Place):
    """Objects under ``toy://bucket/``.

    Attributes:
        requests: Path, offset and length of every read.
        fails_at: Tells which reads fail, by path and offset.
    """

    def __init__(self, folder: Path) -> None:
        self.requests: list[tuple[str, int, int]] = []
        self.fails_at: Callable[[str, int], bool] | None = None
        self._folder = folder

    def url(self, file: str | os.PathLike[str]) -> str:
        """The path of the object that a file is."""
        return f"{SCHEME}://bucket/{os.path.relpath(file, self._folder)}"

    def file(self, path: str) -> Path:
        """The file that an object is."""
        prefix = f"{SCHEME}://bucket/"
        assert path.startswith(prefix), path
        return self._folder / path.removeprefix(prefix)

    def open(self, path: str, *, keep_open: bool = True) -> ToyFile:
        return ToyFile(self, path)

    def is_file(self, path: str) -> bool:
        return self.file(path).is_file()

    def is_folder(self, path: str) -> bool:
        return self.file(path).is_dir()

    def names_in(self, folder: str) -> list[str]:
        return os.listdir(self.file(folder))

    def identity(self, path: str) -> object:
        status = self.file(path).stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
