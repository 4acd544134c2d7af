"""The content of a record that is read from the source files, part by part, when the record is written."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_memload.bytes import Record
from lightning_memload.checkpoint.elements import ElementReader
from lightning_memload.storage import FileSet, checksum_error
from lightning_memload.transfer.checksums import PartialChecksums
from lightning_memload.transfer.contents import GatheredBytes

__all__ = ["FileBytes", "WholeRecord"]


class WholeRecord:
    """Compares the checksum of a record that is read completely, in parts.

    Args:
        source: The files.
        record: The record. It has a checksum.
    """

    def __init__(self, source: FileSet, record: Record) -> None:
        self._source = source
        self._record = record
        self._checksums = PartialChecksums([record.nbytes])

    def update(self, start: int, data: memoryview) -> None:
        """Adds bytes of the record. Every byte must be added exactly once.

        Raises:
            ChecksumError: The record is complete and does not have its checksum.
        """
        actual = self._checksums.update(0, start, [data])
        if actual is not None and actual != self._record.crc32:
            raise checksum_error(self._source, self._record, actual)


class FileBytes(GatheredBytes):
    """A run of the elements of a tensor in the files, in their own dtype or converted to another one.

    Args:
        reader: The tensor.
        dtype: The dtype of the elements that are written.
        start: The first element of the run.
        nbytes: Bytes of the run, in ``dtype``.
        storage: A storage that stands for it. It needs no memory.
        on_read: Called after every read with the bytes that were produced, from any thread.
        whole: Compares the bytes that are read. ``None``: they are not compared here.
    """

    def __init__(
        self,
        reader: ElementReader,
        dtype: torch.dtype,
        start: int,
        nbytes: int,
        storage: torch.UntypedStorage,
        on_read: Callable[[int], None],
        whole: WholeRecord | None,
    ) -> None:
        self.storage = storage
        self.nbytes = nbytes
        self._reader = reader
        self._dtype = dtype
        self._start = start
        self._on_read = on_read
        self._whole = whole

    def gather(self, start: int, nbytes: int) -> torch.Tensor:
        """Reads and converts ``nbytes`` bytes from byte ``start``, see :meth:`GatheredBytes.gather`.

        Raises:
            CheckpointReadError: Reading failed.
            ChecksumError: The source is damaged.
        """
        itemsize = self._dtype.itemsize
        values = self._reader.read(self._start + start // itemsize, nbytes // itemsize)
        if self._whole is not None:
            first = start // itemsize * self._reader.dtype.itemsize
            self._whole.update(first, values.view(torch.uint8).numpy().data)
        self._on_read(nbytes)
        return values.to(self._dtype).view(torch.uint8)
