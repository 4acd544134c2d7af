"""The programs of the ranks of ``test_striped``: each function runs in every rank, and returns what JSON can hold."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_memload.bytes import Record
from lightning_memload.distributed import companions
from lightning_memload.memory.host import read_status
from lightning_memload.restore import Striping, striping
from lightning_memload.transfer import LazyRing, TensorCopy, TransferStats, choose_layout, transfer
from tests.distributed.gloo import met_companions

KIB, MIB = 1 << 10, 1 << 20


class Memory:
    """A byte source in memory. ``damage``: called with each buffer after it was filled, and its offset."""

    is_remote = False

    def __init__(self, data: bytes, damage: Callable[[memoryview, int], object] | None = None) -> None:
        self.data, self.damage, self.bytes_read = data, damage, 0

    def place(self, offset: int) -> tuple[str, int]:
        return "memory.ckpt", offset

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        total = 0
        for buffer in buffers:
            part = self.data[offset + total : offset + total + len(buffer)]
            buffer[: len(part)] = part
            if self.damage is not None:
                self.damage(buffer, offset + total)
            total += len(part)
        self.bytes_read += total
        return total


def checkpoint(num_tensors: int, largest: int, seed: int = 1) -> tuple[bytes, list[Record], Callable[[], list[Any]]]:
    """Bytes with records, and a function that makes copies out of them, into new tensors.

    Tensors of several dtypes, sizes from nothing to ``largest``, views, ties, strides and conversions.
    """
    rng = random.Random(seed)
    data, records, places = bytearray(), [], []
    for number in range(num_tensors):
        data += bytes(-len(data) % 64 + rng.choice((0, 64, 8192)))
        nbytes = rng.choice((0, 1, 7, 64, 1000, 4096 + 3, largest, largest // 3))
        raw = rng.randbytes(nbytes)
        if nbytes:
            records.append(Record(f"tensor{number}", len(data), nbytes, zlib.crc32(raw)))
        places.append((number, len(data), nbytes))
        data += raw

    def copies() -> list[TensorCopy]:
        made = []
        for number, offset, nbytes in places:
            name, kind = f"tensor{number}", number % 6
            if kind == 0 or nbytes < 4096:
                made.append(TensorCopy(name, offset, torch.uint8, (1,), torch.zeros(nbytes, dtype=torch.uint8)))
            elif kind == 1:  # a part, so the rest of the record is read for its checksum only
                made.append(
                    TensorCopy(name, offset + 64, torch.int32, (1,), torch.zeros(nbytes // 8, dtype=torch.int32))
                )
            elif kind == 2:  # a conversion
                made.append(TensorCopy(name, offset, torch.int16, (1,), torch.zeros(nbytes // 2, dtype=torch.int64)))
            elif kind == 3:  # a transposed one
                rows = nbytes // 8 // 16
                made.append(TensorCopy(name, offset, torch.int64, (1, rows), torch.zeros(rows, 16, dtype=torch.int64)))
            elif kind == 4:  # ties, and a view of a part
                for start, count in ((0, nbytes), (0, nbytes), (128, 1000)):
                    tensor = torch.zeros(count, dtype=torch.uint8)
                    made.append(TensorCopy(name, offset + start, torch.uint8, (1,), tensor))
            else:  # every second element
                made.append(TensorCopy(name, offset, torch.int16, (2,), torch.zeros(nbytes // 4, dtype=torch.int32)))
        return made

    return bytes(data), records, copies


class Shared:
    """The sharing of one rank, with a budget."""

    def __init__(self, budget_bytes: int = MIB, num_threads: int = 2) -> None:
        vars(striping)["_WORTH_BYTES"] = 0
        self.companions = met_companions()
        self.striping = Striping(self.companions, torch.device("cpu"), budget_bytes, "memory.ckpt")
        self.ring = LazyRing(choose_layout(max(budget_bytes, 512 * KIB), num_threads), pinned=False)

    def move(self, source: Memory, copies: list[TensorCopy], records: list[Record], **options: Any) -> TransferStats:
        layout = self.ring.layout
        return self.striping.transfer(
            source,
            copies,
            self.ring.get,
            num_threads=layout.num_threads,
            block_bytes=layout.block_bytes,
            records=records,
            **options,
        )

    def attempt(self, source: Memory, copies: list[TensorCopy], records: list[Record]) -> dict[str, Any]:
        """One phase with one transfer. What it read, or its error."""
        started = time.monotonic()
        try:
            with self.striping.phase():
                stats = self.move(source, copies, records)
        except Exception as error:
            return {
                "error": str(error),
                "type": type(error).__name__,
                "key": getattr(error, "key", None),
                "seconds": time.monotonic() - started,
            }
        return {"read": stats.bytes_read, "received": stats.bytes_received, "verified": stats.bytes_verified}

    def close(self) -> None:
        self.companions.leave()
        self.ring.close()


def raw(copies: list[TensorCopy]) -> bytes:
    return b"".join(bytes(c.destination.contiguous().view(-1).view(torch.uint8).numpy()) for c in copies)


def same(num_tensors: int, largest: int, budget_bytes: int, seed: int) -> dict[str, Any]:
    """Whether the shared bytes are those of a transfer by one rank, and what was read."""
    data, records, make = checkpoint(num_tensors, largest, seed)
    alone, ours = make(), make()
    arrived: list[int] = []
    shared = Shared(budget_bytes)
    layout = shared.ring.layout
    stats = transfer(
        Memory(data),
        alone,
        shared.ring.get,
        num_threads=layout.num_threads,
        block_bytes=layout.block_bytes,
        records=records,
    )
    source = Memory(data)
    with shared.striping.phase():
        own = shared.move(source, ours, records, on_progress=arrived.append)
        empty = shared.move(source, ours[:0], records)
    shared.close()
    return {
        "same": raw(alone) == raw(ours),
        "all": stats.bytes_read,
        "verified_alone": stats.bytes_verified,
        "read": own.bytes_read,
        "really": source.bytes_read,
        "received": own.bytes_received,
        "verified": own.bytes_verified,
        "staging": own.staging_bytes,
        "arrived": sum(arrived),
        "ended": shared.striping.ended,
        "by_rank": {str(rank): nbytes for rank, nbytes in shared.striping.bytes_read.items()},
        "empty": empty.bytes_read,
    }


def many_same(cases: list[dict[str, int]]) -> list[dict[str, Any]]:
    return [same(**case) for case in cases]


def failures() -> dict[str, dict[str, Any]]:
    """Failures of rank 1 alone, each in a sharing of its own."""
    bad = dist.get_rank() == 1
    data, records, make = checkpoint(60, 200_000)
    large = next(record for record in records if record.nbytes == 200_000 and record.offset > len(data) // 3)

    def flip(buffer: memoryview, offset: int) -> None:
        at = large.offset + 100_000
        if bad and offset <= at < offset + len(buffer):
            buffer[at - offset] ^= 1

    def flip_any(buffer: memoryview, offset: int) -> None:
        if bad and offset > len(data) // 2:
            buffer[0] ^= 1

    def fail(buffer: memoryview, offset: int) -> None:
        if bad and offset > len(data) // 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def exhaust(buffer: memoryview, offset: int) -> None:
        if bad and offset > len(data) // 3:
            raise MemoryError("no space is left for a page")

    results = {}
    for name, damage in {"flip": flip_any, "fail": fail, "exhaust": exhaust, "maybe": flip, "none": None}.items():
        shared = Shared(512 * KIB)
        results[name] = shared.attempt(Memory(data, damage), make(), records)
        shared.close()
        dist.barrier()
    # A record that both ranks read in part: no rank alone sees the damage.
    whole = random.Random(5).randbytes(900_000)
    record = Record("large", 0, len(whole), zlib.crc32(whole))

    def flip_late(buffer: memoryview, offset: int) -> None:
        if bad:
            buffer[0] ^= 1

    target = torch.zeros(len(whole), dtype=torch.uint8)
    shared = Shared(512 * KIB)
    copies = [TensorCopy("large", 0, torch.uint8, (1,), target)]
    results["split"] = shared.attempt(Memory(whole, flip_late), copies, [record])
    shared.close()
    dist.barrier()
    return results


def disagreements() -> dict[str, Any]:
    """Ranks that do not load the same. All read by themselves from then on, and none waits."""
    rank = dist.get_rank()
    data, records, make = checkpoint(30, 100_000)
    results: dict[str, Any] = {}
    for name, count in {"plan": len(make()) - rank, "nothing": 0 if rank == 1 else len(make())}.items():
        shared = Shared()
        copies = make()[:count]
        results[name] = {**shared.attempt(Memory(data), copies, records), "ended": shared.striping.ended}
        expected = make()[:count]
        transfer(Memory(data), expected, shared.ring.get, num_threads=1, block_bytes=4096)
        results[name]["same"] = raw(copies) == raw(expected)
        results[name]["again"] = shared.attempt(Memory(data), make(), records)
        shared.close()
        dist.barrier()
    shared = Shared(64 * KIB)
    results["budget"] = {**shared.attempt(Memory(data), make(), records), "ended": shared.striping.ended}
    shared.close()
    dist.barrier()
    shared = Shared()
    if rank == 1:
        shared.companions.leave("ValueError: boom")
        results["left"] = None
    else:
        results["left"] = shared.attempt(Memory(data), make(), records)
    shared.close()
    dist.barrier()
    shared = Shared()
    if rank == 1:
        shared.companions.leave()
    results["gone"] = (
        {**shared.attempt(Memory(data), make(), records), "ended": shared.striping.ended} if rank == 0 else {}
    )
    dist.barrier()
    shared.close()
    return results


def failures_and_disagreements() -> dict[str, Any]:
    """Both in one process group: to start the ranks takes most of the time."""
    return {"failures": failures(), "disagreements": disagreements()}


def killed(rank: int, *, suspended: bool = False) -> dict[str, Any]:
    """The error of the other ranks when one is killed in the middle of a transfer, and when they got it."""
    if suspended:
        vars(companions)["_DEAD_SECONDS"] = 3.0
    data, records, make = checkpoint(60, 200_000)

    def die(buffer: memoryview, offset: int) -> None:
        if dist.get_rank() == rank and offset > len(data) // 2:
            os.kill(os.getpid(), signal.SIGSTOP if suspended else signal.SIGKILL)

    shared = Shared(512 * KIB)
    result = shared.attempt(Memory(data, die), make(), records)
    shared.companions.leave(f"{result['type']}: {result['error']}")
    return result


def peaks(nbytes: int, budget_bytes: int) -> dict[str, Any]:
    """Anonymous memory above the start, while a large tensor is filled."""
    path = f"/proc/self/fd/{os.memfd_create('checkpoint')}"
    with open(path, "wb") as file:
        file.truncate(nbytes)

    class File(Memory):
        def __init__(self) -> None:
            super().__init__(b"")
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115

        def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
            return os.preadv(self.file.fileno(), buffers, offset)

    target = torch.ones(nbytes, dtype=torch.uint8)
    shared = Shared(budget_bytes)
    small = [TensorCopy("small", 0, torch.uint8, (1,), target[: 4 * MIB])]
    with shared.striping.phase():
        shared.move(File(), small, [])  # gloo's own buffers and threads
    start, most = read_status().anonymous_bytes or 0, [0]

    def look(_: int) -> None:
        most[0] = max(most[0], read_status().anonymous_bytes or 0)

    with shared.striping.phase():
        stats = shared.move(File(), [TensorCopy("large", 0, torch.uint8, (1,), target)], [], on_progress=look)
    shared.close()
    return {"above": most[0] - start, "read": stats.bytes_read, "zero": not bool(target.any())}
