"""Verifies a checkpoint: reads every byte once, compares every checksum, and reports all damage together.

Nothing is loaded and no code from the file is run, so the file need not be trusted. Bytes without a checksum are read
too, because a disk may fail to read them. They are counted separately and never reported as verified. Structures
without a checksum of their own (the headers of a zip, the manifest of a directory) are compared with the other contents
of the file. Bytes that no reader uses, such as padding, are not compared.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_memload.bytes import Record
from lightning_memload.checkpoint import Damage, Inventory
from lightning_memload.collector import paused_collector
from lightning_memload.errors import MemloadError
from lightning_memload.formats import find_format
from lightning_memload.storage import FileSet, describe_mismatch
from lightning_memload.storage.options import use_storage_options
from lightning_memload.storage.places import held, is_local, path_of
from lightning_memload.transfer.checksums import PartialChecksums
from lightning_memload.transfer.plan import MAX_GAP_BYTES
from lightning_memload.transfer.threads import MAX_THREADS_REMOTE, available_cpus, check_num_threads, run_threads
from lightning_memload.units import counted, format_bytes

__all__ = ["VerifyReport", "verify_checkpoint"]

# Each thread has one buffer of this size. It is small enough to be in the core's cache for the checksum.
_BLOCK_BYTES = 1 << 20
_MAX_THREADS = 8
_MAX_LISTED = 20
_MAX_TRIES = 5


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of a verification.

    Attributes:
        path: Path of the checkpoint.
        format: Name of its format.
        damage: All damage, in the order of the files. Empty if no damage was found.
        bytes_verified: Bytes that have the checksum that the checkpoint records for them.
        bytes_without_checksum: Bytes that could be read, but not verified: the checkpoint records no checksum for them.
        num_verified: Number of records whose checksum was compared and is correct.
        seconds: Wall time in seconds.
        num_threads: Number of threads that read.
    """

    path: str
    format: str
    damage: tuple[Damage, ...]
    bytes_verified: int
    bytes_without_checksum: int
    num_verified: int
    seconds: float
    num_threads: int

    @property
    def is_damaged(self) -> bool:
        """Whether damage was found."""
        return bool(self.damage)

    @property
    def is_verified(self) -> bool:
        """Whether no damage was found and every byte has a checksum.

        If this and ``is_damaged`` are both false, the bytes without a checksum may be damaged or intact.
        """
        return not self.damage and self.bytes_without_checksum == 0

    def __str__(self) -> str:
        done = f"{format_bytes(self.bytes_verified)} in {counted(self.num_verified, 'record')} verified"
        if self.bytes_without_checksum:
            done += f", {format_bytes(self.bytes_without_checksum)} without a checksum could be read but not verified"
        speed = f"{self.seconds:.2f} s, {counted(self.num_threads, 'thread')}"
        if not self.damage:
            verdict = "verified" if self.is_verified else "nothing wrong was found, but not all of it can be verified"
            return f"{self.path} ({self.format}): {verdict}. {done}; {speed}."
        lines = [f"{self.path} ({self.format}): damaged, {counted(len(self.damage), 'problem')}. {done}; {speed}."]
        # The first line names the file already.
        known = f"{self.path} is damaged: "
        lines += [f"  {problem.problem.removeprefix(known)}" for problem in self.damage[:_MAX_LISTED]]
        if len(self.damage) > _MAX_LISTED:
            lines.append(f"  and {len(self.damage) - _MAX_LISTED} more")
        return "\n".join(lines)


def verify_checkpoint(
    path: str | os.PathLike[str],
    *,
    num_threads: int | None = None,
    progress: bool | Callable[[int, int], None] = False,
    storage_options: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Reads a whole checkpoint and compares every checksum in it.

    Args:
        path: A checkpoint of any known format, as for ``open_checkpoint``.
        num_threads: Number of threads that read. ``None`` means one per CPU, at most 8.
        progress: ``True`` shows a progress bar. A function is called after every read with the bytes read so far and
            the total bytes, from any thread, one call at a time. An exception that it raises ends the verification.
            The bar and the counts start again if another checkpoint has replaced this one.
        storage_options: See ``open_checkpoint``.

    Returns:
        The report. Damage raises no exception: the report lists all of it. A file or directory that is replaced during
        the verification does not count as damaged: the report describes either the old or the new one.

    Raises:
        ValueError: ``num_threads`` is not positive.
        TypeError: ``path`` is not a path.
        FileNotFoundError: Nothing exists at this path.
        CheckpointFormatError: The path is not a checkpoint of a known format.
        UnmappableCheckpointError: The checkpoint is compressed, so its bytes cannot be verified in place.
        OSError: The directory of the file could not be read. Later errors count as damage.

    Peak memory: 1 MiB per thread, plus the index (about 2 KiB for every tensor), a few hundred bytes for every MiB of
    the records that are being read, and the pickled objects beside the tensors.
    """
    check_num_threads(num_threads)
    with use_storage_options(storage_options):
        return _verify_unchanged(path_of(path), num_threads, progress)


def _verify_unchanged(name: str, num_threads: int | None, progress: bool | Callable[[int, int], None]) -> VerifyReport:
    started = time.perf_counter()
    for _ in range(_MAX_TRIES):
        with held(name) as is_same, paused_collector():
            try:
                run = _verify(name, num_threads, progress)
            except (MemloadError, OSError):
                if is_same() is not False:
                    raise
                continue
            # Otherwise the inventory may be of one checkpoint and the bytes of another.
            if not run.damage or is_same() is not False:
                break
    else:
        run = _verify(name, num_threads, progress)
    return VerifyReport(
        path=name,
        format=run.format,
        damage=tuple(sorted(run.damage, key=lambda item: (item.path, -1 if item.offset is None else item.offset))),
        bytes_verified=run.bytes_verified,
        bytes_without_checksum=run.bytes_without_checksum,
        num_verified=run.num_verified,
        seconds=time.perf_counter() - started,
        num_threads=run.num_threads,
    )


def _verify(name: str, num_threads: int | None, progress: bool | Callable[[int, int], None]) -> _Verification:
    inventory = find_format(name).take_inventory(name)
    default = min(_MAX_THREADS, available_cpus()) if is_local(name) else MAX_THREADS_REMOTE
    run = _Verification(inventory, num_threads or default)
    if callable(progress):
        run.read_all(progress)
    elif progress:
        from tqdm.auto import tqdm

        with tqdm(total=run.total_bytes, desc="Verifying", unit="B", unit_scale=True, unit_divisor=1024) as bar:
            run.read_all(lambda done, _: bar.update(done - bar.n))
    else:
        run.read_all(None)
    return run


class _Verification:
    """Reads and counts the bytes of one verification."""

    def __init__(self, inventory: Inventory, num_threads: int) -> None:
        self.format = inventory.format
        self.damage = list(inventory.damage)
        self._inventory = inventory
        self._records = self._apart(inventory.records)
        self.total_bytes = sum(record.nbytes for record in self._records)
        self.num_threads = max(1, min(num_threads, -(-self.total_bytes // _BLOCK_BYTES)))
        self.bytes_verified = self.bytes_without_checksum = self.num_verified = 0
        self._done_bytes = 0
        self._unreadable: set[int] = set()
        self._checksums = PartialChecksums([record.nbytes for record in self._records])
        self._lock = threading.Lock()
        self._stopped = False
        self._reads = _cut_into_reads(self._records)
        self._progress: Callable[[int, int], None] | None = None

    def _apart(self, records: Sequence[Record]) -> list[Record]:
        """Returns the records in file order, without those that overlap an earlier one: no byte is read twice."""
        kept: list[Record] = []
        end = 0
        for record in sorted(records, key=lambda record: (record.offset, record.nbytes)):
            if record.nbytes == 0:
                continue
            if record.offset < end:
                path, position = self._inventory.place(record.offset)
                problem = f"{path} is damaged: {record.name} begins at byte {position}, within {kept[-1].name}."
                self.damage.append(Damage(path, problem, key=record.name, offset=position))
                continue
            kept.append(record)
            end = record.offset + record.nbytes
        return kept

    def read_all(self, progress: Callable[[int, int], None] | None) -> None:
        """Reads every record."""
        self._progress = progress
        source = FileSet([span.path for span in self._inventory.files])
        try:
            if source.spans != self._inventory.files:
                problem = f"{self._inventory.path} changed while it was read. Verify it again."
                self.damage.append(Damage(self._inventory.path, problem))
                return
            if self.num_threads == 1:
                self._work(source)
                return
            run_threads(lambda: self._work(source), self.num_threads, self._stop)
        finally:
            source.close()

    def _stop(self) -> None:
        self._stopped = True

    def _work(self, source: FileSet) -> None:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while not self._stopped:
            with self._lock:
                parts = next(self._reads, None)
            if parts is None:
                return
            start = parts[0].offset
            data = buffer[: parts[-1].offset + parts[-1].nbytes - start]
            error = _fill(source, data, start)
            for part in parts:
                self._take(part, data[part.offset - start :][: part.nbytes], error)
            with self._lock:
                self._done_bytes += sum(part.nbytes for part in parts)
                if self._progress is not None:
                    self._progress(self._done_bytes, self.total_bytes)

    def _take(self, part: _Part, data: memoryview, error: str | None) -> None:
        record = self._records[part.record]
        if error is not None:
            with self._lock:
                if part.record in self._unreadable:
                    return
                self._unreadable.add(part.record)
                path, position = self._inventory.place(part.offset)
                problem = f"{path} cannot be read at byte {position}, within {record.name}: {error}."
                self.damage.append(Damage(path, problem, key=record.name, offset=position))
            return
        if record.crc32 is None:
            with self._lock:
                self.bytes_without_checksum += part.nbytes
            return
        actual = self._checksums.update(part.record, part.start, [data])
        if actual is None:
            return
        with self._lock:
            if actual == record.crc32:
                self.bytes_verified += record.nbytes
                self.num_verified += 1
                return
            path, position = self._inventory.place(record.offset)
            problem = describe_mismatch(path, position, record, actual)
            self.damage.append(
                Damage(path, problem, key=record.name, offset=position, expected=record.crc32, actual=actual)
            )


@dataclass(frozen=True, slots=True)
class _Part:
    """Part of one record: ``nbytes`` from ``start`` on, at ``offset`` in the run of all files."""

    record: int
    start: int
    offset: int
    nbytes: int


def _cut_into_reads(records: Sequence[Record]) -> Iterator[list[_Part]]:
    """Divides records, in file order, into reads of at most one block.

    Small adjacent records share a read. A large record is split. The reads are generated one at a time, so that the
    plan of a large checkpoint takes no memory.
    """
    together: list[_Part] = []
    for number, record in enumerate(records):
        for start in range(0, record.nbytes, _BLOCK_BYTES):
            part = _Part(number, start, record.offset + start, min(_BLOCK_BYTES, record.nbytes - start))
            if together:
                end = together[-1].offset + together[-1].nbytes
                if part.offset - end > MAX_GAP_BYTES or part.offset + part.nbytes - together[0].offset > _BLOCK_BYTES:
                    yield together
                    together = []
            together.append(part)
    if together:
        yield together


def _fill(source: FileSet, buffer: memoryview, offset: int) -> str | None:
    """Fills a buffer. Returns a description of the error, or ``None``."""
    while buffer:
        try:
            count = source.readv([buffer], offset)
        except OSError as error:
            return str(error)
        if count <= 0:
            return "the file was cut short while it was read"
        buffer, offset = buffer[count:], offset + count
    return None
