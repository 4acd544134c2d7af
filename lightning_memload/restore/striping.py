"""Lets the ranks of one restore share what they read: each reads a part of the file and sends it to the others.

The ranks agree on every step, so that none of them waits for another one in vain:

* Values are shared only within a phase, in which every rank calls the same code of Lightning.
* Within a phase, each transfer begins with an agreement on its plan, and the end of the phase is an agreement too. If
  the ranks do not do the same, all of them read by themselves from then on.
* A transfer ends with an agreement on errors and checksums. An error of one rank is raised on all ranks.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_memload.bytes import Record
from lightning_memload.distributed import Companions, LostCompanion, gather_checksums
from lightning_memload.distributed.exchange import Exchange
from lightning_memload.distributed.stripes import choose_read_bytes, choose_stripe_bytes
from lightning_memload.distributed.told_errors import describe_error, rebuild_read_error
from lightning_memload.errors import CheckpointReadError, MemloadError, listed
from lightning_memload.storage import ByteSource, checksum_error
from lightning_memload.transfer import (
    StagingRing,
    StripedTransfer,
    TensorCopy,
    TransferStats,
    compare_records,
    transfer,
)

__all__ = ["Striping"]

# To agree on a transfer takes some milliseconds. A module may be filled in thousands of small ones.
_WORTH_BYTES = 64 << 10
_NO_MEMORY = "no memory for the stripes"


class Striping:
    """The sharing of one restore. All ranks create it, in the same order of their agreements.

    Args:
        companions: The other ranks, which all share what they read.
        device: The device of the training. Only values for this device are shared.
        budget_bytes: Memory for the stripes, on this device.
        path: The checkpoint, for messages.

    Attributes:
        ended: Why each rank reads everything by itself from now on. ``None`` as long as the ranks share.
        bytes_read: The bytes that each rank has read and sent to the others, by rank.
    """

    def __init__(self, companions: Companions, device: torch.device, budget_bytes: int, path: str) -> None:
        self._companions = companions
        self._exchange = Exchange(companions, device)
        self._device = device
        self._path = path
        self._stripe_bytes = choose_stripe_bytes(budget_bytes, companions.world_size)
        self._thread: int | None = None
        self.ended: str | None = None
        if self._stripe_bytes is None:
            self.ended = f"host_budget_mib is too small for the stripes of {companions.world_size} ranks"
        self.bytes_read: dict[int, int] = {}

    @contextlib.contextmanager
    def phase(self) -> Iterator[None]:
        """A context in which this thread shares what it reads. Every rank must enter it equally often.

        Raises:
            MemloadError: Another rank has failed.
        """
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
        self.confirm("the end of a phase")

    def transfer(
        self,
        source: ByteSource,
        copies: Sequence[TensorCopy],
        ring: Callable[[], StagingRing],
        *,
        num_threads: int,
        block_bytes: int,
        records: Sequence[Record] = (),
        on_progress: Callable[[int], None] | None = None,
        on_checksum: Callable[[Record, int], None] | None = None,
    ) -> TransferStats:
        """Does what the function of this name does. Within a phase, the ranks share the bytes.

        With ``on_checksum`` this rank reads for itself alone.

        Raises:
            CheckpointReadError: Reading failed on any rank.
            ChecksumError: The bytes that any rank has read are damaged.
            MemloadError: Another rank has failed.
        """
        alone = functools.partial(
            transfer,
            num_threads=num_threads,
            block_bytes=block_bytes,
            records=records,
            on_progress=on_progress,
            on_checksum=on_checksum,
        )
        shared = [c for c in copies if c.destination.numel() and c.destination.device == self._device]
        is_worth = sum(copy.destination.numel() * copy.dtype.itemsize for copy in shared) >= _WORTH_BYTES
        is_own = on_checksum is not None or self._thread != threading.get_ident()
        if self.ended is not None or is_own or not shared or not is_worth:
            return alone(source, copies, ring)
        # An optimizer's steps on the CPU, beside states on a GPU, are so small that each rank reads them.
        stats = alone(source, [c for c in copies if c.destination.device != self._device], ring)
        striped: StripedTransfer | None = None
        plan = _NO_MEMORY
        assert self._stripe_bytes is not None
        # An error here becomes one of the plan, so that no rank waits for this one.
        with contextlib.suppress(RuntimeError, MemoryError, OSError, ValueError):
            striped = StripedTransfer(
                source,
                shared,
                ring,
                self._exchange,
                num_threads=num_threads,
                block_bytes=choose_read_bytes(self._stripe_bytes, block_bytes),
                stripe_bytes=self._stripe_bytes,
                records=records,
                on_progress=on_progress,
            )
            plan = striped.digest
        if not self._agree_on(plan) or striped is None:
            return stats + alone(source, shared, ring)
        try:
            stats += striped.run()
            return stats + self._end(striped, source, records)
        except LostCompanion as lost:
            raise self._error_of(lost) from lost

    def confirm(self, step: str) -> None:
        """Waits until every rank has come to a step, so that none begins a collective without the others.

        Args:
            step: Its name, equal on all ranks.

        Raises:
            MemloadError: Another rank has failed.
        """
        if self.ended is None:
            self._agree_on(step)

    # --------------------------------------------------------------------------------------------------------------

    def _agree_on(self, step: str) -> bool:
        """Whether all ranks take the same step now. If not, none of them shares any more."""
        try:
            told = self._companions.agree_or_notice(step)
        except LostCompanion as lost:
            if self._companions.failure() is not None:
                raise self._error_of(lost) from lost
            self.ended = str(lost)
            self._companions.leave()  # No rank may wait for this one.
            return False
        poor = [rank for rank, theirs in told.items() if theirs == _NO_MEMORY]
        others = [rank for rank, theirs in told.items() if theirs != told[0]]
        if poor:
            self.ended = f"rank {listed(poor)} has no memory for the stripes"
        elif others:
            self.ended = f"rank {listed(others)} and rank 0 do not load the same parts of the checkpoint together"
        return self.ended is None

    def _end(self, striped: StripedTransfer, source: ByteSource, records: Sequence[Record]) -> TransferStats:
        """Compares the checksums of records that no rank has read alone, and raises the error of any rank."""
        by_offset = {record.offset: record for record in records}
        incomplete = striped.incomplete_records() if striped.error is None else {}

        def agree(parts: Any) -> Mapping[int, Any]:
            error = describe_error(striped.error) if striped.error is not None else None
            told = self._companions.agree_or_notice({"error": error, "parts": parts, "read": striped.bytes_read})
            failed = [rank for rank in sorted(told) if told[rank]["error"] is not None]
            if failed:
                raise self._rebuilt(failed[0], told[failed[0]]["error"], striped.error) from striped.error
            for rank, theirs in told.items():
                self.bytes_read[rank] = self.bytes_read.get(rank, 0) + theirs["read"]
            return {rank: theirs["parts"] for rank, theirs in told.items()}

        sizes = {offset: record.nbytes for offset, record in by_offset.items()}
        for offset, found in gather_checksums(incomplete, sizes, agree).items():
            record = by_offset[offset]
            for crc32, ranks in found:
                if crc32 != record.crc32:
                    raise self._find_damaged(source, record, crc32, ranks)
        return TransferStats(bytes_verified=sum(part.nbytes for parts in incomplete.values() for part in parts))

    def _find_damaged(self, source: ByteSource, record: Record, crc32: int, ranks: Sequence[int]) -> Exception:
        """The error of the rank whose own file is damaged. For this, each rank reads the whole record."""
        own: CheckpointReadError | None = None
        try:
            compare_records(source, [record], num_threads=1)
        except CheckpointReadError as error:
            own = error
        told = self._companions.agree_or_notice(describe_error(own) if own is not None else None)
        for rank, theirs in sorted(told.items()):
            if theirs is not None:
                return self._rebuilt(rank, theirs, own)
        damaged = checksum_error(source, record, crc32)
        damaged.args = (f"{damaged.args[0]} Rank {listed(ranks)} read it together, and read it intact later.",)
        return damaged

    def _rebuilt(self, rank: int, told: dict[str, Any], own: Exception | None) -> Exception:
        """The error of a rank, on every rank."""
        error = rebuild_read_error(told, f"Rank {rank} of {self._companions.world_size} has read it.")
        if error is not None:
            error.rank = rank
            return error
        if own is not None and rank == self._companions.rank:
            return own
        return self._error(rank, f"{told['kind']}: {told['message']}")

    def _error_of(self, lost: LostCompanion) -> MemloadError:
        failure = self._companions.failure()
        if failure is not None:
            return self._error(failure.rank, failure.message)
        return MemloadError(
            f"The ranks restore {self._path} together, and {lost}: its process was killed, or it is suspended. See the "
            f"output of that rank. Each rank reads the whole checkpoint by itself with read='each'."
        )

    def _error(self, rank: int, message: str) -> MemloadError:
        return MemloadError(f"The ranks restore {self._path} together, and rank {rank} failed: {message}")
