"""The sources of bytes: the protocol of a source, an open file, and a place of files.

A source fills buffers from an offset and names the file at an offset. Several threads use a source at once, so it has
no position. A read may be short; :func:`read_fully` reads all bytes or raises.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from lightning_memload.bytes import Record, after
from lightning_memload.errors import CheckpointReadError, ChecksumError

__all__ = ["ByteSource", "FileView", "Place", "StoredFile", "checksum_error", "describe_mismatch", "read_fully"]

# The kernel takes at most 1024 buffers in one preadv (IOV_MAX).
_MAX_BUFFERS_PER_READ = 1024

_Self = TypeVar("_Self", bound="StoredFile")


class ByteSource(Protocol):
    """Anything that bytes are read from: one file, or several as one run of bytes."""

    @property
    def is_remote(self) -> bool:
        """Whether a read may be a request over a network, so that few and large reads are best."""
        ...

    def place(self, offset: int) -> tuple[str, int]:
        """The file at ``offset``, by its name for messages, and the position in it."""
        ...

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills ``buffers`` one after the other with the bytes that start at ``offset``.

        Args:
            buffers: Writable byte views.
            offset: Position of the first byte.

        Returns:
            Number of bytes read, at least 1 unless the end is reached. A short read is not an error.

        Raises:
            OSError: The read failed.
        """
        ...


def read_fully(
    source: ByteSource, buffers: Sequence[memoryview], offset: int, *, name_at: Callable[[int], str | None]
) -> None:
    """Fills all buffers with the bytes that start at an offset, with as many reads as needed.

    Args:
        source: The source of the bytes.
        buffers: Writable byte views. None of them is empty.
        offset: Position of the first byte.
        name_at: Returns the name of the tensor at an offset. Called only if reading fails there.

    Raises:
        CheckpointReadError: A read failed or reached the end of the file.
    """
    while buffers:
        batch = buffers[:_MAX_BUFFERS_PER_READ]
        try:
            count = source.readv(batch, offset)
        except OSError as error:
            name = name_at(offset)
            path, position = source.place(offset)
            raise CheckpointReadError(
                f"Reading {name or 'a tensor'} from {path} failed at byte {position}: {error}. The file is untouched; "
                "check the disk or the mount and start again.",
                path=path,
                key=name,
                offset=position,
                errno=error.errno,
            ) from error
        if count <= 0:
            name = name_at(offset)
            missing = sum(len(buffer) for buffer in buffers)
            path, position = source.place(offset)
            raise CheckpointReadError(
                f"{path} ends at byte {position}, but {name or 'a tensor'} needs {missing} bytes more: the file was "
                "truncated while it was read.",
                path=path,
                key=name,
                offset=position,
            )
        offset += count
        buffers = after(buffers, count)


def checksum_error(source: ByteSource, record: Record, actual: int) -> ChecksumError:
    """Makes the error for a record whose bytes do not have the CRC-32 that the checkpoint records.

    Args:
        source: The source of the bytes.
        record: The record. An empty name stands for a tensor without a known name: the error then has no key.
        actual: The CRC-32 of the bytes that were read.
    """
    path, position = source.place(record.offset)
    assert record.crc32 is not None  # Only records with a checksum are compared.
    return ChecksumError(
        f"{describe_mismatch(path, position, record, actual)} Resume from another checkpoint.",
        path=path,
        key=record.name or None,
        offset=position,
        expected=record.crc32,
        actual=actual,
    )


def describe_mismatch(path: str, position: int, record: Record, actual: int) -> str:
    """The sentence for a record, at a position of a file, whose bytes do not have the recorded CRC-32."""
    return (
        f"{path} is damaged: the {record.nbytes} bytes of {record.name or 'a tensor'} at byte {position} have CRC-32 "
        f"{actual:#010x}, but the file records {record.crc32:#010x}."
    )


class StoredFile(ABC):
    """One open file of a :class:`Place`. A subclass needs :meth:`readv` and the two attributes.

    It holds for all files:

    - Several threads read at once. The file keeps no position.
    - A read may be short. It returns at least one byte, unless the end is reached.
    - The file tries again by itself where that is useful. An ``OSError`` that it raises is final. Its message names
      what failed, for example the request and its range. The caller adds the name of the file and the position.
    - The bytes are those of one version. If the file was replaced since it was opened, it still reads the old version,
      or raises.

    Attributes:
        name: The path of the file, as it was given to :meth:`Place.open`.
        size_bytes: The size of the file.
        drop_behind: Whether to drop what is read from a cache. Only a local file does this. Others ignore it.
        is_remote: Whether each read is a request over a network, so that few and large reads are best.
    """

    name: str
    size_bytes: int
    drop_behind: bool = False
    is_remote: bool = False

    @abstractmethod
    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an offset, see :class:`ByteSource`."""

    def place(self, offset: int) -> tuple[str, int]:
        """The path and the offset, see :class:`ByteSource`."""
        return self.name, offset

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Reads exactly ``nbytes`` at ``offset``; fewer only at the end of the file.

        Raises:
            OSError: The read failed.
        """
        data = bytearray(max(0, min(nbytes, self.size_bytes - offset)))
        done = 0
        while done < len(data):
            count = self.readv([memoryview(data)[done:]], offset + done)
            if not count:
                break
            done += count
        return bytes(data[:done])

    def is_changed(self) -> bool:
        """Whether the file was changed in place since it was opened. ``False`` where this cannot happen."""
        return False

    def close(self) -> None:
        """Closes the file. Reading fails from then on. A second call does nothing."""
        return

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Place(ABC):
    """One kind of place, such as the buckets of one service. Several threads use it at once.

    A path is a whole URL, as the user gave it, or with names appended after a ``/``. An ``OSError`` names the path and
    the request that failed. A method tries again by itself where that is useful.
    """

    @abstractmethod
    def open(self, path: str, *, keep_open: bool = True) -> StoredFile:
        """Opens a file for reading. Reads no content that it does not need.

        Args:
            path: The file.
            keep_open: ``False``: many files are open at once. Hold no connection between two reads.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: It cannot be opened.
        """

    @abstractmethod
    def is_file(self, path: str) -> bool:
        """Whether there is a file at the path. Reads no content."""

    @abstractmethod
    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder. Without real folders: whether paths of files begin with it and a ``/``."""

    @abstractmethod
    def names_in(self, folder: str) -> list[str]:
        """The names of the files and folders directly in a folder, in any order.

        Raises:
            OSError: It cannot be listed.
        """

    @abstractmethod
    def identity(self, path: str) -> object:
        """A value that is equal as long as the same content is at the path, such as the version of an object.

        Raises:
            FileNotFoundError: Nothing is at the path.
        """

    def size_of(self, path: str, *, follow_links: bool = True) -> int | None:
        """The size of a file in bytes. ``None`` for anything else, such as a folder.

        Args:
            path: The path.
            follow_links: Has no effect where there are no links.

        Raises:
            FileNotFoundError: Nothing is at the path.
        """
        if self.is_folder(path):
            return None
        with self.open(path) as file:
            return file.size_bytes

    def is_link(self, path: str) -> bool:
        """Whether the path is a link to another one. ``False`` where there are no links."""
        return False

    @contextlib.contextmanager
    def held(self, path: str) -> Iterator[Callable[[], bool | None]]:
        """A context in which a replacement of a file or folder is noticed.

        Yields:
            A function that tells whether the same content is still at the path. It returns ``None`` if nothing is.

        Raises:
            FileNotFoundError: Nothing is at the path.
        """
        before = self.identity(path)

        def is_same() -> bool | None:
            try:
                return self.identity(path) == before
            except FileNotFoundError:
                return None

        yield is_same


class FileView:
    """A part of a file that is read like a separate file.

    The constructor reads its first and last bytes: formats keep their headers there, and parse them with a dozen small
    reads.

    Args:
        file: The file. It must stay open.
        name: The name of the part in messages.
        start: Position of its first byte in the file.
        nbytes: Its length. The whole part must be within the file.
    """

    # The zip headers around one tensor in torch's layout take less than this.
    _EDGE_BYTES = 1024

    def __init__(self, file: StoredFile, name: str, start: int, nbytes: int) -> None:
        self.name = name
        self.start = start
        self.size_bytes = nbytes
        self.is_remote = file.is_remote
        self._file = file
        if nbytes <= 2 * self._EDGE_BYTES:
            self._head = self._tail = file.pread(nbytes, start)
        else:
            self._head = file.pread(self._EDGE_BYTES, start)
            self._tail = file.pread(self._EDGE_BYTES, start + nbytes - self._EDGE_BYTES)
        self._tail_start = nbytes - len(self._tail)

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Reads exactly ``nbytes`` at ``offset`` within the part; fewer only at its end."""
        end = min(offset + nbytes, self.size_bytes)
        if end <= len(self._head):
            return self._head[offset:end]
        if offset >= self._tail_start:
            return self._tail[offset - self._tail_start : end - self._tail_start]
        return self._file.pread(end - offset, self.start + offset)
