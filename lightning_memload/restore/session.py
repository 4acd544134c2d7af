"""One restore of one checkpoint: what weights and optimizers share while it lasts.

The session owns the staging ring, counts, and answers the two questions that both restorers ask: does this tensor still
lie in the file, and does what is needed fit. It ends with :meth:`close`, after which nothing of the checkpoint is
mapped or open.
"""

from __future__ import annotations

import errno
import functools
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from lightning_memload.checkpoint import Checkpoint, MappedCheckpoint, span_bytes
from lightning_memload.errors import ChecksumError, DetachedError, InsufficientMemoryError
from lightning_memload.memory import free_device_bytes
from lightning_memload.restore.freeing import free_in_background
from lightning_memload.restore.recording import claim
from lightning_memload.restore.whole import WholeCheckpoint, is_worth_reading
from lightning_memload.storage import FileMapping, FileWatch
from lightning_memload.transfer import (
    LazyRing,
    Record,
    StagingRing,
    TensorCopy,
    TransferStats,
    compare_records,
    transfer,
)
from lightning_memload.units import format_bytes

__all__ = ["Move", "RestoreSession"]

# Of the free memory; a restore that needs more than this is announced, since the first step needs memory as well.
_TIGHT_FRACTION = 0.9
# To stream a tensor by itself takes 100 to 200 us. torch copies one of this size out of the mapping in 20.
_SMALL_BYTES = 64 << 10
# Of these together, since what is copied out of a mapping counts as the process's file-backed memory meanwhile.
_ALL_SMALL_BYTES = 64 << 20


class Move(NamedTuple):
    """One tensor of the checkpoint and the tensor that takes its values.

    Attributes:
        name: What to call it in messages.
        value: A tensor as the loaded checkpoint holds it.
        destination: A tensor of the same shape, any device, dtype and strides.
    """

    name: str
    value: torch.Tensor
    destination: torch.Tensor


class RestoreSession:
    """What one restore needs, for as long as it lasts.

    Args:
        checkpoint: The loaded checkpoint's mapping.
        device: Where training happens.
        ring: The staging ring, whose layout is the budget. The session closes it.
        verify: Compare the CRC-32 of every record that is read completely.
        check_fit: Refuse a restore that cannot fit before the first byte is moved.
        drop_behind: Give the page cache of what was cold back to the kernel, see :class:`LocalFile`.
        verify_pages: Also compare the CRC-32 of every record whose pages :meth:`pages_of` gives away, which reads them.
        on_progress: Called with the number of bytes after every read, from any thread, one at a time.
        on_pinned: Called with the number of page-locked bytes whenever that changes.
    """

    def __init__(
        self,
        checkpoint: MappedCheckpoint,
        *,
        device: torch.device,
        ring: LazyRing,
        verify: bool = True,
        check_fit: bool = True,
        drop_behind: bool = False,
        verify_pages: bool = False,
        on_progress: Callable[[int], None] | None = None,
        on_pinned: Callable[[int], None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self._check_fit = check_fit
        checkpoint.source.drop_behind = drop_behind
        self.stats = TransferStats()
        self.bytes_copied_ordinarily = 0
        self.bytes_assigned = 0
        self._ring = ring
        self._on_progress = on_progress
        self._on_pinned = on_pinned
        self._to_free: list[torch.Tensor] = []
        # What pages_of gave away: start and end of each range, in order.
        self._pages: FileMapping | None = None
        self._watch: FileWatch | None = None
        self._has_no_pages = False
        self._given: list[tuple[int, int]] = []
        # Set when the checkpoint is read into memory as a whole.
        self._whole: WholeCheckpoint | None = None
        self._verifies = verify
        self._verifies_pages = verify_pages
        self._compared: set[int] = set()

    def keep_cached(self) -> None:
        """Leaves what is read from now on in the page cache: what becomes a module's memory is used again."""
        self.checkpoint.source.drop_behind = False

    def move(self, moves: Sequence[Move]) -> None:
        """Brings values to their destinations: streamed where they still lie in the file, else copied by torch.

        Raises:
            CheckpointReadError: Reading failed; some destinations are filled, others are not.
            ChecksumError: The file is damaged; likewise.
        """
        # Within meta_init: the threads that read write to memory that its recorder does not see.
        claim(item.destination for item in moves)
        if self._whole is not None:
            self._whole.copy((item.value, item.destination) for item in moves)
            return
        copies = []
        ordinary = []
        located = self.checkpoint.locate_all([item.value for item in moves])
        for item, pieces in zip(moves, located, strict=True):
            if pieces is None:
                ordinary.append(item)
                continue
            for piece in pieces:
                destination = piece.within(item.destination)
                copies.append(TensorCopy(item.name, piece.offset, item.value.dtype, piece.stride, destination))
        self.stats += transfer(
            self.checkpoint.source,
            copies,
            self._get_ring,
            num_threads=self._ring.layout.num_threads,
            block_bytes=self._ring.layout.block_bytes,
            records=self._records_at([copy.offset for copy in copies]),
            on_progress=self._on_progress,
        )
        with torch.no_grad():
            for item in ordinary:
                item.destination.copy_(item.value)
                self.bytes_copied_ordinarily += item.value.nbytes

    def read_whole(self) -> bool:
        """Reads a small checkpoint of many tensors into memory as a whole, so that torch can copy them itself.

        Returns:
            Whether all of the checkpoint is in memory, without damage.

        Raises:
            CheckpointReadError: Reading failed.
        """
        if self._whole is None and is_worth_reading(self.checkpoint, self._ring.layout.nbytes):
            self._whole = WholeCheckpoint.read(self.checkpoint, verify=self._verifies)
            if self._whole is not None:
                self.stats += self._whole.stats
                if self._on_progress is not None:
                    self._on_progress(self._whole.stats.bytes_read)
        return self._whole is not None and not self._whole.damaged

    @functools.cached_property
    def _records(self) -> list[Record]:
        return _records_of(self.checkpoint.index) if self._verifies else []

    @functools.cached_property
    def _record_offsets(self) -> list[int]:
        return [record.offset for record in self._records]

    def _records_at(self, offsets: Sequence[int]) -> list[Record]:
        """The records in which the tensors at some offsets lie. To go through all of them for a few tensors takes long.

        A tensor lies in the record that begins before it, or where it does.
        """
        if not self._records:
            return []
        numbers = {bisect_right(self._record_offsets, offset) - 1 for offset in offsets}
        return [self._records[number] for number in sorted(numbers) if number >= 0]

    def require(self, needed_bytes: Mapping[torch.device, int]) -> None:
        """Stops a restore that cannot fit, before anything was allocated.

        Args:
            needed_bytes: What is going to be allocated on each device.

        Raises:
            InsufficientMemoryError: A device, or the host, has less than that.
        """
        if not self._check_fit:
            return
        needs = dict(needed_bytes)
        if self.device.type != "cpu":
            host = torch.device("cpu")
            needs[host] = needs.get(host, 0) + self._ring.missing_bytes
        for device, needed in needs.items():
            if needed == 0:
                continue
            if device.type == "cuda":
                # Whoever page-locks the ring may still be at it, and nothing is known of a GPU before.
                torch.cuda.init()
            free = free_device_bytes(device)
            if free is None:
                continue
            place = "host memory" if device.type == "cpu" else f"memory on {device}"
            if needed > free:
                raise InsufficientMemoryError(
                    f"Restoring {self.checkpoint.index.path} needs {format_bytes(needed)} of {place}, but only "
                    f"{format_bytes(free)} are free. Nothing was changed. Free memory or restore on a larger machine; "
                    "if you know that the estimate is wrong, pass check_fit=False.",
                    device=str(device),
                    needed_bytes=needed,
                    free_bytes=free,
                )
            if needed > _TIGHT_FRACTION * free:
                warnings.warn(
                    f"Restoring {self.checkpoint.index.path} takes {format_bytes(needed)} of {format_bytes(free)} free "
                    f"{place}: little is left for training.",
                    stacklevel=2,
                )

    def watch_pages(self) -> str | None:
        """Makes what :meth:`pages_of` gives away ordinary memory when somebody is about to change a file in place.

        To be called before it. The session's end ends this if no pages are given away, else the last tensor on them.

        Returns:
            Why that cannot be, ``None`` if it is so.
        """
        watch = FileWatch(self.checkpoint.source)
        refusal = watch.begin()
        if refusal is None:
            self._watch = watch
        return refusal

    def pages_of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """For each tensor of the checkpoint one of its own on the file's pages, with its values, strides and dtype.

        The pages are mapped once more: whoever writes to a tensor of the checkpoint does not write to this one. It
        outlives the session.

        Returns:
            ``None`` where there is no such range of the file: for a tensor that somebody wrote to, that lies in several
            parts, or whose bytes another tensor was given already. For all of them when somebody is changing a file
            that is watched.

        Raises:
            CheckpointReadError: With ``verify_pages``: reading failed.
            ChecksumError: With ``verify_pages``: the file is damaged.
        """
        located = self.checkpoint.locate_all(tensors)
        given = [
            self._give_pages(tensor, pieces[0].offset) if pieces is not None and len(pieces) == 1 else None
            for tensor, pieces in zip(tensors, located, strict=True)
        ]
        if self._verifies_pages:
            self._compare([p[0].offset for p, pages in zip(located, given, strict=True) if p and pages is not None])
        return given

    def leave_small(self, tensors: Sequence[torch.Tensor]) -> dict[int, tuple[torch.Tensor, ChecksumError | None]]:
        """Chooses tensors of the checkpoint that torch shall copy itself, and compares the checksums of all at once.

        Args:
            tensors: Tensors that would else be moved one by one.

        Returns:
            By its ``id``, each tensor that is small, and lies in a small record, with the error of its checksum.

        Raises:
            CheckpointReadError: Reading failed.
        """
        chosen: list[tuple[torch.Tensor, int]] = []
        records: dict[int, Record] = {}
        room = _ALL_SMALL_BYTES
        for tensor, pieces in zip(tensors, self.checkpoint.locate_all(tensors), strict=True):
            if pieces is None or len(pieces) > 1 or tensor.nbytes > min(room, _SMALL_BYTES):
                continue
            offset = pieces[0].offset
            for record in self._records_at([offset]):
                if offset < record.offset + record.nbytes:
                    records[offset] = record
            if offset not in records or records[offset].nbytes <= _SMALL_BYTES:
                chosen.append((tensor, offset))
                room -= tensor.nbytes
        errors = self._compare_all([records[offset] for _, offset in chosen if offset in records])
        return {
            id(tensor): (tensor, errors.get(records[offset].offset) if offset in records else None)
            for tensor, offset in chosen
        }

    def _compare_all(self, records: Sequence[Record]) -> dict[int, ChecksumError]:
        """The errors of records, by their offsets. Leaves them in the page cache, for torch to copy from there."""
        errors: dict[int, ChecksumError] = {}
        source = self.checkpoint.source
        drops, source.drop_behind = source.drop_behind, False
        self.stats += compare_records(
            source,
            list({record.offset: record for record in records}.values()),
            num_threads=self._ring.layout.num_threads,
            on_progress=self._on_progress,
            on_damage=lambda record, error: errors.update({record.offset: error}),
        )
        source.drop_behind = drops
        return errors

    def _compare(self, offsets: Sequence[int]) -> None:
        """Compares the records at some offsets, each once."""
        records = [record for record in self._records_at(offsets) if record.offset not in self._compared]
        self._compared.update(record.offset for record in records)
        self.stats += compare_records(
            self.checkpoint.source,
            records,
            num_threads=self._ring.layout.num_threads,
            on_progress=self._on_progress,
        )

    def _give_pages(self, tensor: torch.Tensor, start: int) -> torch.Tensor | None:
        end = start + span_bytes(tensor)
        position = bisect_left(self._given, (start, end))
        neighbours = self._given[max(0, position - 1) : position + 1]
        if any(other_start < end and start < other_end for other_start, other_end in neighbours):
            return None
        if self._pages is None and not self._has_no_pages:
            self._pages = self._map_pages()
        if self._pages is None:
            return None
        try:
            storage = self._pages.storage(start, end - start)
        except DetachedError:
            return None
        self._given.insert(position, (start, end))
        return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(storage, 0, tensor.shape, tensor.stride())

    def _map_pages(self) -> FileMapping | None:
        try:
            return FileMapping(self.checkpoint.source, self._watch)
        except DetachedError:
            pass
        except OSError as error:
            # A second mapping of tens of thousands of files is more than Linux gives a process: they are copied.
            if error.errno != errno.ENOMEM:
                raise
        self._has_no_pages = True
        return None

    def free_at_end(self, tensors: Sequence[torch.Tensor]) -> None:
        """Frees the memory of tensors that nobody else refers to when the session ends, while the caller goes on.

        Giving 6 GB back to the kernel takes a third of a second, and slows down reading meanwhile.
        """
        self._to_free.extend(tensors)

    def close(self, *, detach: bool = True) -> int:
        """Ends the restore. Closing twice is fine. Assigned parameters keep their pages, and the watch over them.

        Args:
            detach: Turn what somebody still refers to of the loaded checkpoint into ordinary memory and let go of the
                file. ``False`` leaves the mapping to the tensors on top of it.

        Returns:
            Bytes that somebody still referred to.
        """
        self._ring.close()
        if self._pages is not None:
            self._pages.leave_to_storages()
        elif self._watch is not None:
            self._watch.end()
        self._pages = self._watch = None
        tensors, self._to_free = self._to_free, []
        free_in_background(tensors)
        self._tell_pinned(0)
        return self.checkpoint.detach() if detach else 0

    def _get_ring(self) -> StagingRing:
        ring = self._ring.get()
        self._tell_pinned(ring.pinned_bytes)
        return ring

    def _tell_pinned(self, nbytes: int) -> None:
        if self._on_pinned is not None:
            self._on_pinned(nbytes)


def _records_of(index: Checkpoint) -> list[Record]:
    """The storages whose checksum the file records, in the order of the file, by the name of a tensor in each."""
    checked = [storage for storage in index.storages if storage.crc32 is not None]
    names: dict[str, str] = {}
    for tensor in index if checked else ():
        for storage in tensor.storages:
            names.setdefault(storage.key, tensor.name)
    checked.sort(key=lambda storage: storage.offset)
    return [Record(names.get(s.key, s.key), s.offset, s.nbytes, s.crc32) for s in checked if s.crc32 is not None]
