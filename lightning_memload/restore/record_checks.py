"""Finds the records of a checkpoint under its tensors, and compares them with their checksums."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_memload.bytes import Record
from lightning_memload.checkpoint import Checkpoint, MappedCheckpoint
from lightning_memload.errors import ChecksumError
from lightning_memload.transfer import TransferStats, compare_records

__all__ = ["Checks", "RecordChecks"]


class Checks(NamedTuple):
    """The checksums of one :meth:`RestoreSession.move`.

    Attributes:
        records: The records. All their bytes are read.
        on_checksum: Called with each record without a checksum, and with its CRC-32, from any thread.
    """

    records: Sequence[Record]
    on_checksum: Callable[[Record, int], None] | None = None


class RecordChecks:
    """The records of a checkpoint whose checksums are known.

    Args:
        checkpoint: The checkpoint.
        enabled: ``False``: no record is known, so nothing is compared.
        num_threads: Number of threads that read.
        on_progress: Called with the number of bytes after every read, from any thread, one call at a time.
    """

    def __init__(
        self,
        checkpoint: MappedCheckpoint,
        *,
        enabled: bool,
        num_threads: int,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._enabled = enabled
        self._num_threads = num_threads
        self._on_progress = on_progress
        self._compared: set[int] = set()

    @functools.cached_property
    def _records(self) -> list[Record]:
        return _records_of(self._checkpoint.index) if self._enabled else []

    @functools.cached_property
    def _offsets(self) -> list[int]:
        return [record.offset for record in self._records]

    def at(self, offsets: Sequence[int]) -> list[Record]:
        """The records that contain the tensors at these offsets, without a search through all records.

        A record that ends before a tensor begins may be among them.
        """
        if not self._records:
            return []
        numbers = {bisect_right(self._offsets, offset) - 1 for offset in offsets}
        return [self._records[number] for number in sorted(numbers) if number >= 0]

    def compare(self, offsets: Sequence[int]) -> TransferStats:
        """Compares the records at some offsets. A record is compared once in the life of this object.

        Raises:
            CheckpointReadError: Reading failed.
            ChecksumError: The file is damaged.
        """
        records = [record for record in self.at(offsets) if record.offset not in self._compared]
        self._compared.update(record.offset for record in records)
        return compare_records(
            self._checkpoint.source, records, num_threads=self._num_threads, on_progress=self._on_progress
        )

    def find_damage(self, records: Sequence[Record]) -> tuple[dict[int, ChecksumError], TransferStats]:
        """Compares records, and leaves them in the page cache for torch to copy from there.

        Returns:
            The errors, by the offset of the record, and the counters.

        Raises:
            CheckpointReadError: Reading failed.
        """
        errors: dict[int, ChecksumError] = {}
        drops, self._checkpoint.source.drop_behind = self._checkpoint.source.drop_behind, False
        stats = compare_records(
            self._checkpoint.source,
            list({record.offset: record for record in records}.values()),
            num_threads=self._num_threads,
            on_progress=self._on_progress,
            on_damage=lambda record, error: errors.update({record.offset: error}),
        )
        self._checkpoint.source.drop_behind = drops
        return errors, stats


def _records_of(index: Checkpoint) -> list[Record]:
    """The storages whose checksum the file records, in the order of the file. A tensor in each gives its name."""
    checked = [storage for storage in index.storages if storage.crc32 is not None]
    names: dict[str, str] = {}
    for tensor in index if checked else ():
        for storage in tensor.storages:
            names.setdefault(storage.key, tensor.name)
    checked.sort(key=lambda storage: storage.offset)
    return [Record(names.get(s.key, s.key), s.offset, s.nbytes, s.crc32) for s in checked if s.crc32 is not None]
