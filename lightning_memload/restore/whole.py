"""Small checkpoints of many tensors are read into memory as a whole.

To find and move one tensor costs about 20 us, torch copies a small one in 2 us. So a small checkpoint of many tensors
is read at once, its checksums are compared at once, and torch copies its tensors as it copies any others. Nothing
depends on the file after that.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from zlib_ng import zlib_ng

from lightning_memload.bytes import Record
from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.storage import checksum_error
from lightning_memload.transfer import TransferStats

__all__ = ["WholeCheckpoint", "is_worth_reading"]

# From this number of storages on, the time for each tensor counts.
_MANY = 1000
# The whole checkpoint takes memory until the restore ends. Above this size, its tensors are moved one by one.
_WHOLE_BYTES = 64 << 20


def is_worth_reading(checkpoint: MappedCheckpoint, budget_bytes: int) -> bool:
    """Whether a checkpoint has many tensors and is small.

    Args:
        checkpoint: The checkpoint.
        budget_bytes: The most host memory that it may take.
    """
    index = checkpoint.index
    if checkpoint.mapping is None or checkpoint.is_chunked or len(index.storages) < _MANY:
        return False
    return checkpoint.source.nbytes <= min(_WHOLE_BYTES, budget_bytes)


@dataclass(frozen=True, slots=True)
class WholeCheckpoint:
    """A mapped checkpoint whose bytes are all in ordinary memory.

    Attributes:
        checkpoint: The checkpoint.
        stats: What was read and verified.
        damaged: The CRC-32 in memory of each storage that differs from the recorded one, by its offset.
    """

    checkpoint: MappedCheckpoint
    stats: TransferStats
    damaged: Mapping[int, int]

    @classmethod
    def read(cls, checkpoint: MappedCheckpoint, *, verify: bool) -> WholeCheckpoint | None:
        """Reads a checkpoint into memory, at the addresses that its tensors have.

        Args:
            checkpoint: The checkpoint. It must have a mapping.
            verify: Compute the checksum of each storage that is unchanged in memory.

        Returns:
            ``None`` if the checkpoint has released its files already.

        Raises:
            CheckpointReadError: Reading failed.

        Peak memory: the size of the files, plus at most 32 MiB.
        """
        assert checkpoint.mapping is not None
        started = time.perf_counter()
        storages = [s for s in checkpoint.index.storages if s.crc32 is not None and s.nbytes] if verify else []
        if storages and not all(checkpoint.mapping.are_pristine([(0, checkpoint.source.nbytes)])):
            pristine = checkpoint.mapping.are_pristine([(s.offset, s.offset + s.nbytes) for s in storages])
            storages = [storage for storage, unchanged in zip(storages, pristine, strict=True) if unchanged]
        memory = checkpoint.mapping.read_in()
        if memory is None:
            return None
        damaged = {}
        nbytes = 0
        for storage in storages:
            nbytes += storage.nbytes
            actual = zlib_ng.crc32(memory[storage.offset : storage.offset + storage.nbytes])
            if actual != storage.crc32:
                damaged[storage.offset] = int(actual)
        stats = TransferStats(checkpoint.index.file_size, nbytes, time.perf_counter() - started, 1)
        return cls(checkpoint, stats, damaged)

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copies values to their destinations.

        Args:
            pairs: The values and the destinations, of the same shapes.

        Raises:
            ChecksumError: The storage under a value is damaged. No destination has changed.
        """
        pairs = list(pairs)
        if self.damaged:
            for value, _ in pairs:
                self._require_sound(value)
        with torch.no_grad():
            for value, destination in pairs:
                destination.copy_(value)

    def _require_sound(self, value: torch.Tensor) -> None:
        mapping = self.checkpoint.mapping
        offset = mapping.offset_of(value) if mapping is not None else None
        if offset is None:
            return
        for info in self.checkpoint.index:
            start = info.storage.offset
            if start in self.damaged and start <= offset < start + info.storage.nbytes:
                assert info.storage.crc32 is not None
                record = Record(info.name, start, info.storage.nbytes, info.storage.crc32)
                raise checksum_error(self.checkpoint.source, record, self.damaged[start])
