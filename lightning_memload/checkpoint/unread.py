"""Storages whose bytes stay in files that cannot be mapped, and the tensors on them.

All tensors of a storage share it, as in torch: the first use of one of them reads the whole storage, and a write to one
is seen by the others.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from zlib_ng import zlib_ng

from lightning_memload.bytes import Record
from lightning_memload.checkpoint.chunked import FileChunk
from lightning_memload.storage import FileSet, checksum_error, read_fully

__all__ = ["UnreadStorage", "UnreadView"]


class UnreadStorage:
    """The bytes of one storage: in the files, or in memory.

    Args:
        source: The files.
        offset: Position of its first byte in the run of all files.
        nbytes: Its length.
        crc32: CRC-32 of its bytes as the checkpoint records it, ``None`` if it records none.
        name: The name of a tensor on it, for messages.

    Attributes:
        memory: The storage in memory, ``None`` until it is read.
    """

    __slots__ = ("__weakref__", "_crc32", "_lock", "_name", "memory", "nbytes", "offset", "source")

    def __init__(self, source: FileSet, offset: int, nbytes: int, crc32: int | None, name: str | None) -> None:
        self.source = source
        self.offset = offset
        self.nbytes = nbytes
        self.memory: torch.UntypedStorage | None = None
        self._crc32 = crc32
        self._name = name
        self._lock = threading.Lock()

    def read(self) -> torch.UntypedStorage:
        """The storage in memory. The first call reads it from the files. Later calls return the same storage.

        Raises:
            CheckpointReadError: Reading failed.
            ChecksumError: The bytes do not have the CRC-32 that the checkpoint records.
        """
        # Two threads that read twice would each write to a storage of their own.
        with self._lock:
            if self.memory is None:
                storage = torch.UntypedStorage(self.nbytes)
                data = memoryview((ctypes.c_char * self.nbytes).from_address(storage.data_ptr())).cast("B")
                read_fully(self.source, [data], self.offset, name_at=lambda _: self._name)
                self._compare(data)
                self.memory = storage
            return self.memory

    def _compare(self, data: memoryview) -> None:
        if self._crc32 is None or (actual := zlib_ng.crc32(data)) == self._crc32:
            return
        raise checksum_error(self.source, Record(self._name or "", self.offset, self.nbytes, self._crc32), actual)


class UnreadView:
    """The values of one tensor on an :class:`UnreadStorage`, see :class:`ValuesInFiles`.

    Args:
        storage: The storage.
        like: A tensor with the same dtype, shape, strides and storage offset.
    """

    __slots__ = ("_memory", "chunks", "dtype", "layout", "shape", "storage")

    def __init__(self, storage: UnreadStorage, like: torch.Tensor) -> None:
        self.storage = storage
        self.dtype = like.dtype
        self.shape = like.shape
        start, shape = int(like.storage_offset()), tuple(like.shape)
        self.layout: tuple[tuple[int, ...], int] | None = (like.stride(), start)
        self._memory: torch.Tensor | None = None
        offset = storage.offset + start * like.dtype.itemsize
        self.chunks = (FileChunk(offset, like.stride(), (0,) * len(shape), shape),) if like.numel() else ()

    @property
    def source(self) -> FileSet:
        """The files."""
        return self.storage.source

    @property
    def memory(self) -> torch.Tensor | None:
        """The values. ``None`` until a tensor on the same storage is read."""
        return None if self.storage.memory is None else self.read()

    def read(self) -> torch.Tensor:
        """The values as an ordinary tensor, see :meth:`ChunkedTensor.read`."""
        storage = self.storage.read()
        if self._memory is None:
            assert self.layout is not None
            # An ordinary tensor in any context: one of inference mode could not be written to later.
            with torch.inference_mode(False), torch.no_grad():
                empty = torch.empty(0, dtype=self.dtype, device="cpu")
                self._memory = empty.set_(storage, self.layout[1], self.shape, self.layout[0])
        return self._memory
