"""A file of any place as a file object of Python, for programs that know nothing of places."""

from __future__ import annotations

import io
import os
from typing import Any

from lightning_memload.storage.places import is_local, open_file
from lightning_memload.storage.source import FileView, StoredFile

__all__ = ["FilePosition", "path_or_stream"]

# One request of a few MiB costs a remote place little more than one of a few bytes.
_BUFFER_BYTES = 4 << 20


class FilePosition:
    """The position in a file, for programs that read one part after the other. Does not close the file.

    Args:
        file: The file. It must stay open.
    """

    def __init__(self, file: StoredFile | FileView) -> None:
        super().__init__()
        self._size_bytes = file.size_bytes
        self._position = 0

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position, as ``io.IOBase.seek`` does.

        Raises:
            ValueError: The new position is before the start.
        """
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"byte {start + offset} is before the start")
        self._position = start + offset
        return self._position


class _StoredStream(FilePosition, io.RawIOBase):
    def __init__(self, file: StoredFile) -> None:
        super().__init__(file)
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._size_bytes - self._position
        if left <= 0 or not len(buffer):
            return 0
        count = self._file.readv([memoryview(buffer).cast("B")[:left]], self._position)
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def path_or_stream(path: str) -> str | io.BufferedReader:
    """Returns the argument of ``torch.load`` for a path: the path itself if it is local, else an open file object.

    Raises:
        OSError: The file cannot be opened.
    """
    return path if is_local(path) else io.BufferedReader(_StoredStream(open_file(path)), _BUFFER_BYTES)
