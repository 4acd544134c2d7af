"""Compares the checksums of records without loading them.

It is used for pages that become a module's memory, and for small tensors that torch copies later out of the page cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from lightning_memload.bytes import Record
from lightning_memload.errors import ChecksumError
from lightning_memload.storage import ByteSource, checksum_error, read_fully
from lightning_memload.transfer.checksums import PartialChecksums
from lightning_memload.transfer.copies import TransferStats
from lightning_memload.transfer.plan import REQUEST_BYTES, Read, TargetRange, plan_reads
from lightning_memload.transfer.threads import run_threads

__all__ = ["compare_records"]

# Each thread has one buffer of this size. It is small enough to be in the core's cache for the checksum.
_BLOCK_BYTES = 1 << 20


def compare_records(
    source: ByteSource,
    records: Sequence[Record],
    *,
    num_threads: int,
    on_progress: Callable[[int], None] | None = None,
    on_damage: Callable[[Record, ChecksumError], None] | None = None,
) -> TransferStats:
    """Reads records and compares their checksums.

    Args:
        source: The source of the bytes.
        records: The records. Empty records are skipped.
        num_threads: Maximum number of threads that read.
        on_progress: Called after every read with its length in bytes, from the threads, one call at a time.
        on_damage: Called with a record that does not have its checksum, and with the error, which is then not raised.
            Called from the threads, one call at a time.

    Returns:
        The counters.

    Raises:
        CheckpointReadError: A read failed or reached the end of the file.
        ChecksumError: The bytes of a record do not have the recorded checksum, and ``on_damage`` is ``None``.

    Peak memory: 1 MiB per thread, 8 MiB over a network.
    """
    records = [record for record in records if record.nbytes]
    if not records:
        return TransferStats()
    started = time.perf_counter()
    ranges = [TargetRange(number, record.offset, record.nbytes) for number, record in enumerate(records)]
    reads = plan_reads(ranges, block_bytes=REQUEST_BYTES if source.is_remote else _BLOCK_BYTES)
    comparison = _Comparison(source, records, reads, on_progress, on_damage)
    num_threads = min(num_threads, len(reads))
    if num_threads > 1:
        run_threads(comparison.work, num_threads, comparison.stop)
    else:
        comparison.work()
    return TransferStats(
        bytes_read=sum(read.nbytes for read in reads),
        bytes_verified=sum(record.nbytes for record in records),
        seconds=time.perf_counter() - started,
        num_threads=num_threads,
    )


class _Comparison:
    def __init__(
        self,
        source: ByteSource,
        records: Sequence[Record],
        reads: Sequence[Read],
        on_progress: Callable[[int], None] | None,
        on_damage: Callable[[Record, ChecksumError], None] | None,
    ) -> None:
        self._source = source
        self._records = records
        self._reads = iter(reads)
        self._on_progress = on_progress
        self._on_damage = on_damage
        self._block_bytes = max(read.nbytes for read in reads)
        self._checksums = PartialChecksums([record.nbytes for record in records])
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def work(self) -> None:
        buffer = memoryview(bytearray(self._block_bytes))
        while not self._stopped:
            with self._lock:
                read = next(self._reads, None)
            if read is None:
                return
            data = buffer[: read.nbytes]
            read_fully(self._source, [data], read.offset, name_at=self._name_at)
            for segment in read.segments:
                part = data[segment.start : segment.start + segment.nbytes]
                actual = self._checksums.update(segment.target, segment.target_start, [part])
                record = self._records[segment.target]
                if actual is not None and actual != record.crc32:
                    self._tell_damage(record, checksum_error(self._source, record, actual))
            with self._lock:
                if self._on_progress is not None:
                    self._on_progress(read.nbytes)

    def _tell_damage(self, record: Record, error: ChecksumError) -> None:
        if self._on_damage is None:
            raise error
        with self._lock:
            self._on_damage(record, error)

    def _name_at(self, offset: int) -> str | None:
        return next((r.name for r in self._records if r.offset <= offset < r.offset + r.nbytes), None)
