"""A transfer that several ranks make together: each rank reads a part of the file, and gets the rest from the others.

All ranks plan the same reads. They are cut into rounds of one stripe for each rank (``distributed/stripes.py``). While
the ranks exchange one round and copy it to its destinations, their threads read the next one. The stripes are on the
device of the destinations. For the CPU, threads read directly into the stripe; for a GPU, through the staging ring.

A rank whose read fails keeps sending stripes, with a flag in each. All ranks see the flag after the same round, and
stop there. So no rank waits for another one in vain.
"""

from __future__ import annotations

import ctypes
import queue
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from lightning_memload.bytes import Record
from lightning_memload.distributed import PartChecksum
from lightning_memload.distributed.exchange import Exchange
from lightning_memload.distributed.stripes import ALIGNMENT_BYTES, cut_stripes, digest_plan
from lightning_memload.storage import ByteSource
from lightning_memload.transfer.buffer import Buffer
from lightning_memload.transfer.copies import TensorCopy, TransferStats
from lightning_memload.transfer.cuda_context import on_stream
from lightning_memload.transfer.engine import Job, Transfer
from lightning_memload.transfer.staging import StagingRing
from lightning_memload.transfer.threads import run_threads

__all__ = ["StripedTransfer"]

_NO_VIEW = memoryview(b"")


class _Task(NamedTuple):
    """One read of this rank, and its place in the stripe."""

    job: Job
    place: torch.Tensor
    view: memoryview


class StripedTransfer(Transfer):
    """A transfer by all ranks. Every rank must make it with the same reads, which :attr:`digest` tells.

    Args:
        source: The source of the bytes.
        copies: The tensors, all on one device, and none of them empty. See :func:`transfer`.
        ring: Returns the staging ring.
        exchange: The other ranks.
        num_threads: Number of threads that read on this rank.
        block_bytes: Maximum length of one read, at most a quarter of a stripe.
        stripe_bytes: Maximum length of a stripe.
        records: Checksums to compare.
        on_progress: Called with the number of bytes that have arrived, from the calling thread.

    Attributes:
        digest: Equal on all ranks that plan the same reads.
        error: The error of this rank, ``None`` if it has none. The transfer has then ended early on all ranks.

    Peak memory: on the device of the destinations, two rounds of stripes. For a GPU, also the ring on the host.

    Raises:
        RuntimeError: There is no memory for the stripes.
    """

    def __init__(
        self,
        source: ByteSource,
        copies: list[TensorCopy],
        ring: Callable[[], StagingRing],
        exchange: Exchange,
        *,
        num_threads: int,
        block_bytes: int,
        stripe_bytes: int,
        records: Sequence[Record],
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._planned: list[Job] = []
        super().__init__(source, copies, ring, num_threads, block_bytes, records, on_progress)
        self._exchange = exchange
        reads = [job.read for job in self._planned]
        self.digest = digest_plan(((read.offset, read.nbytes) for read in reads), stripe_bytes)
        self.error: Exception | None = None
        self._rounds = cut_stripes([read.nbytes for read in reads], exchange.num_ranks, stripe_bytes)
        round_bytes = exchange.num_ranks * max((r.nbytes + ALIGNMENT_BYTES for r in self._rounds), default=0)
        device = copies[0].destination.device
        with torch.inference_mode(False):
            self._memory = [
                torch.empty(round_bytes, dtype=torch.uint8, device=device) for _ in range(min(2, len(self._rounds)))
            ]
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        # The reads that have ended, with the buffer of the ring that holds the bytes for a GPU.
        self._ended: queue.SimpleQueue[tuple[_Task, Buffer | None]] = queue.SimpleQueue()
        self._under_way: deque[Buffer] = deque()
        self._missing = 0
        self._is_alone = False
        self._bytes_received = 0

    @property
    def bytes_read(self) -> int:
        """Bytes that this rank has read."""
        return self._bytes_read

    @property
    def scratch_bytes(self) -> int:
        """Memory for the stripes on the device of the destinations."""
        return sum(memory.numel() for memory in self._memory)

    def incomplete_records(self) -> dict[int, list[PartChecksum]]:
        """The checksums of the parts that this rank has read of records that it has not read alone, by file offset."""
        return {self._records[number].offset: parts for number, parts in self._checksums.incomplete().items()}

    def run(self) -> TransferStats:
        """Carries out the transfer. An error of this rank is not raised, but kept in :attr:`error`.

        Raises:
            LostCompanion: Another rank has left or is dead.
        """
        stats = super().run()
        staging = stats.staging_bytes if self._device is not None else self.scratch_bytes
        self._memory.clear()
        return TransferStats(
            stats.bytes_read, stats.bytes_verified, stats.seconds, stats.num_threads, staging, self._bytes_received
        )

    def _plan(self, block_bytes: int) -> list[Job]:
        self._planned = super()._plan(block_bytes)
        return self._planned

    def _carry_out(self) -> None:
        run_threads(
            self._read_stripes, self._num_threads, self._stop, meanwhile=self._exchange_all, alone=self._exchange_alone
        )

    def _stop(self) -> None:
        super()._stop()
        for _ in range(self._num_threads):
            self._tasks.put(None)

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_read += nbytes  # Progress is what has arrived from all ranks.

    # In the threads -------------------------------------------------------------------------------------------------

    def _read_stripes(self) -> None:
        with torch.inference_mode(self._inference_mode), torch.no_grad():
            while (task := self._tasks.get()) is not None and not self._stopped:
                self._fill(task)

    def _fill(self, task: _Task) -> None:
        """Reads into a stripe, or into a buffer of the ring. After an error of this rank, nothing more is read."""
        buffer: Buffer | None = None
        nbytes = task.job.read.nbytes
        try:
            if self.error is None:
                view = task.view
                if self._device is not None:
                    buffer = self._empty.get()
                    if buffer is None:
                        return
                    view = buffer.view[:nbytes]
                self._read(task.job, [(0, view)])
                self._advance(nbytes)
        except Exception as error:
            self._fail(error)
        self._ended.put((task, buffer))

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self.error = self.error or error

    # In the calling thread, which alone uses the process group and the device ---------------------------------------

    def _exchange_alone(self) -> None:
        self._is_alone = True
        self._exchange_all(0)

    def _exchange_all(self, _: int) -> None:
        with torch.no_grad(), on_stream(self._stream):
            if self._rounds:
                self._begin_stripe(0)
            for number, of_round in enumerate(self._rounds):
                while self._missing:
                    self._take_ended(wait=True)
                stripes = self._stripes_of(number)
                flags = stripes[:, of_round.nbytes]
                flags[self._exchange.rank] = self.error is not None
                works = self._exchange.start(stripes)
                if number + 1 < len(self._rounds):
                    self._begin_stripe(number + 1)
                self._exchange.finish(works, self._take_ended)
                if bool(flags.any()):
                    break
                try:
                    self._scatter(number, stripes)
                except Exception as error:
                    self._fail(error)
            self._stop()  # After an error, what the threads still read is of no use.

    def _stripes_of(self, number: int) -> torch.Tensor:
        """The memory of a round, with shape ``(ranks, bytes)``. The flag is the byte after each stripe."""
        row_bytes = self._rounds[number].nbytes + ALIGNMENT_BYTES
        num_ranks = self._exchange.num_ranks
        return self._memory[number % 2][: num_ranks * row_bytes].view(num_ranks, row_bytes)

    def _begin_stripe(self, number: int) -> None:
        """Lets the threads read this rank's stripe of a round."""
        rank = self._exchange.rank
        stripe, row = self._rounds[number].stripes[rank], self._stripes_of(number)[rank]
        self._missing = len(stripe.places)
        view = _NO_VIEW
        if self._device is None:
            view = memoryview((ctypes.c_char * row.numel()).from_address(row.data_ptr())).cast("B")
        for job, place in zip(self._planned[stripe.first : stripe.last], stripe.places, strict=True):
            end = place + job.read.nbytes
            task = _Task(job, row[place:end], view[place:end])
            if self._is_alone:
                self._fill(task)
                self._take_ended(wait=True)
            else:
                self._tasks.put(task)

    def _take_ended(self, *, wait: bool = False) -> None:
        """Takes the reads that have ended, and copies their bytes into the stripe if it is on a GPU.

        Args:
            wait: Wait for a read or a copy that ends.
        """
        while True:
            while self._under_way and self._under_way[0].is_free():
                self._empty.put(self._under_way.popleft())
            if self._ended.empty():
                if not wait:
                    return
                if self._under_way:
                    self._under_way[0].wait()  # A thread may be waiting for this buffer.
                    continue
            task, buffer = self._ended.get()
            wait = False
            self._missing -= 1
            if buffer is not None:
                task.place.copy_(buffer.tensor[: task.place.numel()], non_blocking=self._stream is not None)
                buffer.mark()
                self._under_way.append(buffer)

    def _scatter(self, number: int, stripes: torch.Tensor) -> None:
        """Copies the bytes of all ranks to their destinations."""
        arrived = own = 0
        for rank, stripe in enumerate(self._rounds[number].stripes):
            row = stripes[rank]
            before = arrived
            for job, place in zip(self._planned[stripe.first : stripe.last], stripe.places, strict=True):
                self._copy(job, Buffer(_NO_VIEW, row[place : place + job.read.nbytes], self._stream))
                arrived += job.read.nbytes
            if rank == self._exchange.rank:
                own = arrived - before
        self._bytes_received += arrived - own
        if self._on_progress is not None:
            self._on_progress(arrived)
