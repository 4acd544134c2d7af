"""One restore of one checkpoint: what weights and optimizers share while it lasts.

The session moves values from the file to their destinations, counts bytes, and checks that what is needed fits. After
:meth:`RestoreSession.close` nothing of the checkpoint is mapped or open.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple

import torch

from lightning_memload.bytes import Record
from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.errors import ChecksumError
from lightning_memload.restore.free_memory import has_room, require_room
from lightning_memload.restore.freeing import free_in_background
from lightning_memload.restore.given_pages import GivenPages
from lightning_memload.restore.record_checks import Checks, RecordChecks
from lightning_memload.restore.recording import claim
from lightning_memload.restore.striping import Striping
from lightning_memload.restore.whole import WholeCheckpoint, is_worth_reading
from lightning_memload.transfer import LazyRing, StagingRing, TensorCopy, TransferStats, transfer

__all__ = ["Move", "RestoreSession"]

# If tensors of at least this size still lie in the file, a garbage collection comes before they are copied out of it.
_COLLECT_BYTES = 1 << 20
# To stream one tensor takes 100 to 200 us. torch copies one of this size out of the mapping in 20 us.
_SMALL_BYTES = 64 << 10
# The limit for all small tensors together: what torch copies from a mapping counts as file-backed memory meanwhile.
_ALL_SMALL_BYTES = 64 << 20


class Move(NamedTuple):
    """One tensor of the checkpoint, and the tensor that gets its values.

    Attributes:
        name: Its name in messages.
        value: A tensor as the loaded checkpoint holds it.
        destination: A tensor of the same shape, with any device, dtype and strides.
    """

    name: str
    value: torch.Tensor
    destination: torch.Tensor


class RestoreSession:
    """The state of one restore.

    Args:
        checkpoint: The mapping of the loaded checkpoint.
        device: The device of the training.
        ring: The staging ring. Its layout is the budget. The session closes it.
        verify: Compare the CRC-32 of every record with a tensor that is read.
        check_fit: Refuse a restore that cannot fit before the first byte is moved.
        drop_behind: Remove from the page cache what was not in it before the read, see :class:`LocalFile`.
        verify_pages: Also compare the CRC-32 of every record whose pages :meth:`pages_of` gives away. This reads them.
        on_progress: Called with the number of bytes after every read, from any thread, one call at a time.
        on_pinned: Called with the number of page-locked bytes when it changes.

    Attributes:
        checkpoint: The argument.
        device: The argument.
        stats: The counters of all that was read.
        bytes_assigned: Bytes of parameters that became pages of the file. The caller counts them.
        bytes_copied_ordinarily: Bytes that torch copied, since they were no longer in the file unchanged.
        striping: Set if several ranks share what they read, in :meth:`move` and in its phases.
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
        self.striping: Striping | None = None
        self._ring = ring
        self._on_progress = on_progress = _one_at_a_time(on_progress) if on_progress is not None else None
        self._on_pinned = on_pinned
        self._to_free: list[torch.Tensor] = []
        # Set when the checkpoint is read into memory as a whole.
        self._whole: WholeCheckpoint | None = None
        self._verifies = verify
        self._pages = GivenPages(checkpoint.source)
        self._verifies_pages = verify_pages
        # Held by the one transfer that uses the ring.
        self._streaming = threading.Lock()
        self._checks = RecordChecks(
            checkpoint, enabled=verify, num_threads=ring.layout.num_threads, on_progress=on_progress
        )

    @property
    def is_shared(self) -> bool:
        """Whether the ranks share what they read from now on."""
        return self.striping is not None and self.striping.ended is None

    def shared_phase(self) -> AbstractContextManager[None]:
        """A context in which every rank loads the same, see :meth:`Striping.phase`."""
        return self.striping.phase() if self.striping else nullcontext()

    def keep_cached(self) -> None:
        """Leaves what is read from now on in the page cache: the memory of a module is used again."""
        self.checkpoint.source.drop_behind = False

    def move(self, moves: Sequence[Move], checks: Checks | None = None) -> None:
        """Brings values to their destinations. Values that still lie in the file are streamed, torch copies the others.

        Args:
            moves: The moves.
            checks: The checksums to compute or compare. ``None``: those of all records that the values lie in.

        Raises:
            CheckpointReadError: Reading failed. Some destinations have their values, others do not.
            ChecksumError: The file is damaged. Some destinations have their values, others do not.
        """
        # Within meta_init: the recorder does not see the threads that write to this memory.
        claim(item.destination for item in moves)
        if self._whole is not None:
            self._whole.copy((item.value, item.destination) for item in moves)
            return
        engine = self.striping.transfer if self.striping else None
        stats, ordinary = self._stream(moves, self._on_progress, checks, engine)
        self.stats += stats
        with torch.no_grad():
            for item in ordinary:
                item.destination.copy_(item.value)
                self.bytes_copied_ordinarily += item.value.nbytes

    def stream_beside(self, moves: Sequence[Move], on_progress: Callable[[int], None]) -> tuple[TransferStats, bool]:
        """Does what :meth:`move` does, in another thread than that of the restore, for values that lie in the file.

        A :meth:`move` waits meanwhile, since only one transfer uses the ring.

        Args:
            moves: The moves.
            on_progress: Called before the session's function of this name. It may raise.

        Returns:
            The counters, which are not part of the session's, and whether all values lay in the file.

        Raises:
            CheckpointReadError: As :meth:`move`.
            ChecksumError: As :meth:`move`.
        """

        def advance(nbytes: int) -> None:
            on_progress(nbytes)
            if self._on_progress is not None:
                self._on_progress(nbytes)

        stats, ordinary = self._stream(moves, advance)
        return stats, not ordinary

    def _stream(
        self,
        moves: Sequence[Move],
        on_progress: Callable[[int], None] | None,
        checks: Checks | None = None,
        engine: Callable[..., TransferStats] | None = None,
    ) -> tuple[TransferStats, list[Move]]:
        """Streams what lies in the file. Returns the counters and the other moves."""
        copies = []
        ordinary = []
        located = self.checkpoint.locate_all([item.value for item in moves])
        for item, chunks in zip(moves, located, strict=True):
            if chunks is None:
                ordinary.append(item)
                continue
            for chunk in chunks:
                destination = chunk.within(item.destination)
                copies.append(TensorCopy(item.name, chunk.offset, item.value.dtype, chunk.stride, destination))
        if checks is None:
            checks = Checks(self._checks.at([copy.offset for copy in copies]))
        if not copies and not checks.records:
            return TransferStats(), ordinary
        with self._streaming:
            stats = (engine or transfer)(
                self.checkpoint.source,
                copies,
                self._get_ring,
                num_threads=self._ring.layout.num_threads,
                block_bytes=self._ring.layout.block_bytes,
                records=checks.records,
                on_progress=on_progress,
                on_checksum=checks.on_checksum,
            )
        return stats, ordinary

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

    def require(self, needed_bytes: Mapping[torch.device, int]) -> None:
        """Refuses a restore that cannot fit, before anything is allocated. Warns if little memory will be left.

        Args:
            needed_bytes: The bytes that are going to be allocated on each device.

        Raises:
            InsufficientMemoryError: A device, or the host, has less free memory.
        """
        if not self._check_fit:
            return
        needs = dict(needed_bytes)
        if self.device.type != "cpu":
            host = torch.device("cpu")
            needs[host] = needs.get(host, 0) + self._ring.missing_bytes
        require_room(self.checkpoint.index.path, needs)

    @property
    def is_in_memory(self) -> bool:
        """Whether the checkpoint is in memory as a whole, so that nothing is left to stream."""
        return self._whole is not None

    def has_room(self, needed_bytes: Mapping[torch.device, int]) -> bool:
        """Whether memory for something that is not needed yet can be allocated, and some is left for everything else.

        Args:
            needed_bytes: The bytes on each device.
        """
        return has_room(needed_bytes)

    def watch_pages(self) -> str | None:
        """Makes what :meth:`pages_of` gives ordinary memory before another program changes a file in place.

        Call it before :meth:`pages_of`. The watch ends with the last tensor on the pages, or with the session if there
        is none.

        Returns:
            Why that is not possible, ``None`` if it is.
        """
        return self._pages.watch()

    def pages_of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """For each tensor of the checkpoint a new one on the pages of the file, with its values, strides and dtype.

        The pages are mapped once more: writing to a tensor of the checkpoint does not change the new one. The new one
        outlives the session.

        Returns:
            ``None`` where the file has no such range: for a tensor that was written to, that lies in several parts, or
            that shares bytes with a tensor that was given before. For all of them if a watched file is being changed.

        Raises:
            CheckpointReadError: With ``verify_pages``: reading failed.
            ChecksumError: With ``verify_pages``: the file is damaged.
        """
        given: list[torch.Tensor | None] = []
        offsets: list[int] = []
        for tensor, chunks in zip(tensors, self.checkpoint.locate_all(tensors), strict=True):
            is_one = chunks is not None and len(chunks) == 1
            pages = self._pages.give(tensor, chunks[0].offset) if chunks is not None and is_one else None
            given.append(pages)
            if chunks is not None and pages is not None:
                offsets.append(chunks[0].offset)
        if self._verifies_pages:
            self.stats += self._checks.compare(offsets)
        return given

    def leave_small(self, tensors: Sequence[torch.Tensor]) -> dict[int, tuple[torch.Tensor, ChecksumError | None]]:
        """Chooses small tensors of the checkpoint for torch to copy, and compares all their checksums at once.

        Args:
            tensors: Tensors that would otherwise be moved one by one.

        Returns:
            The chosen tensors, by their ``id``, with the error of the checksum. Each is small and in a small record.

        Raises:
            CheckpointReadError: Reading failed.
        """
        chosen: list[tuple[torch.Tensor, int]] = []
        records: dict[int, Record] = {}
        room = _ALL_SMALL_BYTES
        for tensor, chunks in zip(tensors, self.checkpoint.locate_all(tensors), strict=True):
            if chunks is None or len(chunks) > 1 or tensor.nbytes > min(room, _SMALL_BYTES):
                continue
            offset = chunks[0].offset
            for record in self._checks.at([offset]):
                if offset < record.offset + record.nbytes:
                    records[offset] = record
            if offset not in records or records[offset].nbytes <= _SMALL_BYTES:
                chosen.append((tensor, offset))
                room -= tensor.nbytes
        errors, stats = self._checks.find_damage([records[offset] for _, offset in chosen if offset in records])
        self.stats += stats
        return {
            id(tensor): (tensor, errors.get(records[offset].offset) if offset in records else None)
            for tensor, offset in chosen
        }

    def free_at_end(self, tensors: Sequence[torch.Tensor]) -> None:
        """Frees the memory of tensors in the background when the session ends, since it slows down reading.

        Args:
            tensors: Tensors that no other code uses.
        """
        self._to_free.extend(tensors)

    def free_replaced(self) -> None:
        """Frees what :meth:`free_at_end` got, in the background."""
        tensors, self._to_free = self._to_free, []
        free_in_background(tensors)

    def release(self) -> int:
        """Ends the restore after success, see :meth:`close`."""
        if self.checkpoint.referenced_bytes > _COLLECT_BYTES:
            gc.collect()
        return self.close()

    def close(self, *, detach: bool = True) -> int:
        """Ends the restore. Assigned parameters keep their pages, and the watch over them. A second call does nothing.

        Args:
            detach: Release the file: tensors of the loaded checkpoint that are still in use become ordinary memory.
                ``False``: the mapping stays as long as such tensors exist. A later call may still release it.

        Returns:
            Bytes of such tensors that became ordinary memory.
        """
        # If one of these calls is interrupted, the others are still made. They run in reverse order.
        with ExitStack() as stack:
            stack.callback(self._tell_pinned, 0)
            stack.callback(self.free_replaced)
            stack.callback(self._pages.end)
            self._ring.close()
        return self.checkpoint.detach() if detach else 0

    def records_at(self, offsets: Sequence[int]) -> list[Record]:
        """The records to compare that contain the tensors at these offsets, see :class:`RecordChecks`."""
        return self._checks.at(offsets)

    def _get_ring(self) -> StagingRing:
        ring = self._ring.get()
        self._tell_pinned(ring.pinned_bytes)
        return ring

    def _tell_pinned(self, nbytes: int) -> None:
        if self._on_pinned is not None:
            self._on_pinned(nbytes)


def _one_at_a_time(call: Callable[[int], None]) -> Callable[[int], None]:
    """A function that two threads may call at the same time. It calls another one once at a time."""
    lock = threading.Lock()

    def locked(nbytes: int) -> None:
        with lock:
            call(nbytes)

    return locked
