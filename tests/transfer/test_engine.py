"""The engine: every value where it belongs, errors that say where, and no thread left behind."""

from __future__ import annotations

import errno
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memload.bytes import Record
from lightning_memload.errors import CheckpointReadError, ChecksumError
from lightning_memload.formats import load_mapped
from lightning_memload.storage import ByteSource
from lightning_memload.transfer import (
    RingLayout,
    StagingRing,
    TensorCopy,
    TransferStats,
    choose_layout,
    engine,
    transfer,
)
from lightning_memload.transfer.buffer import Buffer
from lightning_memload.transfer.engine import Transfer
from tests.formats.files import ALL_DTYPES, as_bytes, layouts, of_dtype
from tests.fresh_process import run_fresh

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")]

KIB = 1 << 10
MIB = 1 << 20


@dataclass
class Memory:
    """A byte source in memory that fails on request.

    Attributes:
        short: The most bytes a call gives.
        fail: Called with the number of the call, from 0, and the offset; may raise.
    """

    data: bytes
    short: int | None = None
    fail: Callable[[int, int], None] | None = None
    calls: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, offset: int) -> tuple[str, int]:
        return "memory.ckpt", offset

    is_remote = False

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        with self.lock:
            number, self.calls = self.calls, self.calls + 1
        if self.fail is not None:
            self.fail(number, offset)
        assert len(buffers) <= 1024
        total = 0
        for buffer in buffers:
            part = self.data[offset + total : offset + total + len(buffer)]
            if self.short is not None:
                part = part[: self.short - total]
            buffer[: len(part)] = part
            total += len(part)
            if len(part) < len(buffer):
                break
        return total


def move(
    source: ByteSource,
    copies: Sequence[TensorCopy],
    *,
    threads: int = 3,
    layout: RingLayout | None = None,
    block: int | None = None,
    records: Sequence[Record] = (),
    **options: Any,
) -> TransferStats:
    """Transfers with a ring of its own, and checks that nothing is left of it."""
    layout = layout or choose_layout(threads * 2 * MIB, threads)
    assert layout.num_threads == threads
    rings: list[StagingRing] = []

    def ring() -> StagingRing:
        rings.append(StagingRing(layout, pinned=False))
        return rings[-1]

    try:
        return transfer(
            source,
            copies,
            ring,
            num_threads=layout.num_threads,
            block_bytes=min(block or layout.block_bytes, layout.block_bytes),
            records=records,
            **options,
        )
    finally:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("memload")]
        assert len(rings) <= 1
        for made in rings:
            made.close()


def many(count: int, numel: int = 5000) -> tuple[bytes, list[TensorCopy], list[Record]]:
    """Records one after the other with gaps, and copies of them into new tensors."""
    generator = torch.Generator().manual_seed(1)
    data = bytearray()
    copies, records = [], []
    for number in range(count):
        data += bytes(-len(data) % 64 + 64)
        raw = bytes(torch.randint(0, 256, (numel * 4,), dtype=torch.uint8, generator=generator).numpy())
        records.append(Record(f"tensor{number}", len(data), len(raw), zlib.crc32(raw)))
        copies.append(
            TensorCopy(f"tensor{number}", len(data), torch.int32, (1,), torch.zeros(numel, dtype=torch.int32))
        )
        data += raw
    return bytes(data), copies, records


def in_doubles(copies: Sequence[TensorCopy]) -> list[TensorCopy]:
    """The same copies, but through the staging ring, since their type changes."""
    return [TensorCopy(c.name, c.offset, c.dtype, c.stride, c.destination.double()) for c in copies]


def converted(count: int) -> tuple[Memory, list[TensorCopy]]:
    """Many copies that go through the staging ring."""
    data, copies, _ = many(count)
    return Memory(data), in_doubles(copies)


PLAN = Transfer._plan


def pretend_a_device(self: Transfer, block_bytes: int) -> Any:
    """As if the destinations were on another device than the CPU."""
    self._device = torch.device("cpu")
    return PLAN(self, block_bytes)


@pytest.fixture
def device_that_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose buffers are never free, so that all threads come to wait for one."""
    monkeypatch.setattr(Transfer, "_plan", pretend_a_device)
    monkeypatch.setattr(Buffer, "is_free", lambda self: False)


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def assert_arrived(data: bytes, copies: Sequence[TensorCopy]) -> None:
    for copy in copies:
        assert as_bytes(copy.destination) == data[copy.offset : copy.offset + copy.destination.nbytes], copy.name


class TestValues:
    def from_file(self, path: Path, make: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> None:
        """All tensors of a file into what ``make`` makes of them, against torch's own ``copy_``."""
        expected = torch.load(path, weights_only=True)
        loaded, mapped = load_mapped(path, weights_only=True)
        copies, wanted = [], []
        for name, value in loaded.items():
            destination = make(expected[name])
            wanted.append(make(expected[name]).copy_(expected[name]))
            (chunk,) = mapped.locate(value) or [None]
            assert (chunk is None) == (value.numel() == 0)
            copies.append(TensorCopy(name, chunk.offset if chunk else 0, value.dtype, value.stride(), destination))
        records = [Record(s.key, s.offset, s.nbytes, s.crc32) for s in mapped.index.storages if s.crc32 is not None]
        move(mapped.source, copies, records=records, **options)
        for copy, want in zip(copies, wanted, strict=True):
            assert as_bytes(copy.destination) == as_bytes(want), copy.name

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "checkpoint.pt"

    @pytest.mark.parametrize("block", [64, 4096, None])
    def test_every_dtype(self, path: Path, block: int | None) -> None:
        torch.save({str(dtype): of_dtype(dtype) for dtype in ALL_DTYPES}, path)
        self.from_file(path, torch.empty_like, block=block)

    @pytest.mark.parametrize("block", [64, None])
    @pytest.mark.parametrize("contiguous", [False, True])
    def test_every_layout(self, path: Path, block: int | None, contiguous: bool) -> None:
        torch.save(layouts(), path)
        self.from_file(
            path,
            lambda t: torch.empty_like(
                t, memory_format=torch.contiguous_format if contiguous else torch.preserve_format
            ),
            block=block,
        )

    @pytest.mark.parametrize(
        "target", [torch.float64, torch.bfloat16, torch.float8_e5m2, torch.int16, torch.complex64], ids=str
    )
    def test_conversions(self, path: Path, target: torch.dtype) -> None:
        sources = [
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
        ]
        torch.save({str(d): torch.linspace(0, 100, 9000).to(d) for d in sources} | {"t": torch.randn(50, 70).t()}, path)
        self.from_file(path, lambda t: torch.empty_like(t, dtype=target))

    def test_destinations_of_any_kind(self, path: Path) -> None:
        def odd(tensor: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 1]

        torch.save(layouts(), path)
        self.from_file(path, odd)
        torch.save({"a": torch.randn(30)}, path)
        self.from_file(path, lambda t: torch.nn.Parameter(torch.zeros_like(t)).detach())
        torch.save({"a": torch.randn(30, dtype=torch.complex64)}, path)
        self.from_file(path, lambda t: torch.zeros_like(t).conj())

    def test_ties_and_views_of_one_record(self) -> None:
        data = bytes(range(256)) * 40
        raw = [(0, 10240), (0, 10240), (100, 5000), (100, 5000), (4096, 1), (10239, 1), (7, 900)]
        for block in (50, 1000, 1 << 20):
            copies = [
                TensorCopy(str(n), start, torch.uint8, (1,), torch.zeros(size, dtype=torch.uint8))
                for n, (start, size) in enumerate(raw)
            ]
            stats = move(Memory(data), copies, block=block, records=[Record("r", 0, len(data), zlib.crc32(data))])
            assert_arrived(data, copies)
            assert (stats.bytes_read, stats.bytes_verified) == (10240, 10240)

    def test_parameters_that_need_gradients(self) -> None:
        parameter = torch.nn.Parameter(torch.zeros(4))
        double = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        data = bytes(torch.arange(4.0).view(torch.uint8).numpy())
        move(
            Memory(data),
            [TensorCopy("a", 0, torch.float32, (1,), parameter), TensorCopy("b", 0, torch.float32, (1,), double)],
        )
        assert parameter.tolist() == double.tolist() == [0, 1, 2, 3]
        assert parameter.requires_grad

    @settings(max_examples=60, deadline=None)
    @given(drawn=st.data(), threads=st.integers(1, 8), spare=st.integers(0, 8), block=st.integers(16, 3000))
    def test_random_layouts(self, drawn: st.DataObject, threads: int, spare: int, block: int) -> None:
        dtypes = [torch.float32, torch.int16, torch.complex64, torch.bool, torch.uint8]
        base = torch.randint(0, 2, (20_000,), dtype=torch.uint8)
        copies, wanted = [], []
        for number in range(drawn.draw(st.integers(1, 6))):
            dtype = drawn.draw(st.sampled_from(dtypes))
            shape = drawn.draw(st.lists(st.integers(0, 6), max_size=3))
            stride = [drawn.draw(st.integers(0, 40)) for _ in shape]
            start = drawn.draw(st.integers(0, 150)) * 8
            value = base[start : start + 8000].view(dtype).as_strided(shape, stride)
            target = drawn.draw(st.sampled_from([dtype, torch.complex64]))
            permutation = drawn.draw(st.permutations(range(len(shape))))
            destination = torch.zeros([shape[d] for d in permutation], dtype=target).permute(
                [permutation.index(d) for d in range(len(shape))]
            )
            copies.append(TensorCopy(str(number), start, dtype, tuple(stride), destination))
            wanted.append(torch.zeros(shape, dtype=target).copy_(value))
        move(
            Memory(bytes(base.numpy())),
            copies,
            threads=threads,
            layout=RingLayout(threads, threads + spare, 3000),
            block=block,
        )
        for copy, want in zip(copies, wanted, strict=True):
            assert as_bytes(copy.destination) == as_bytes(want)

    @pytest.mark.slow
    def test_a_hundred_thousand_small_tensors(self) -> None:
        # All of them in one block: code that searches all others for each one would take minutes.
        count = 50_000
        data = bytes(192 * count)
        crc = zlib.crc32(bytes(4))
        copies = [TensorCopy(str(n), 192 * (n // 2), torch.float32, (1,), torch.ones(1)) for n in range(count)]
        records = [Record(str(n), 192 * n, 4, crc) for n in range(count // 2)]
        stats = move(Memory(data), copies, threads=2, records=records)
        assert stats.bytes_verified == 4 * count // 2
        assert stats.seconds < 20
        assert not any(copy.destination.item() for copy in copies)

    def test_tensors_of_inference_mode(self) -> None:
        data = bytes(torch.arange(4.0).view(torch.uint8).numpy())
        with torch.inference_mode():
            destinations = [torch.zeros(4), torch.zeros(4, dtype=torch.float64), torch.zeros(4, 2)[:, 0]]
            move(Memory(data), [TensorCopy("a", 0, torch.float32, (1,), tensor) for tensor in destinations])
        assert [tensor.tolist() for tensor in destinations] == [[0, 1, 2, 3]] * 3

    def test_new_memory_on_the_cpu_is_populated_block_by_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the threads that read, before they read. Not what is small, or goes through the ring."""
        populated: list[tuple[int, int]] = []
        monkeypatch.setattr(engine, "populate_memory", lambda *range_: populated.append(range_))
        large, small = torch.empty(MIB), torch.empty(1000)
        other = torch.empty(MIB, 2)[:, 0]  # every second element
        placed = [(large, 0), (small, 4 * MIB + 8000), (other, 8 * MIB)]
        copies = [TensorCopy("a", offset, torch.float32, (1,), tensor) for tensor, offset in placed]
        move(Memory(bytes(12 * MIB)), copies)
        assert sorted(populated) == [(large.data_ptr() + start * MIB, MIB) for start in range(4)]

    def test_nothing_to_do(self) -> None:
        assert move(Memory(b""), []) == TransferStats()
        assert move(Memory(b""), [TensorCopy("a", 0, torch.float32, (1,), torch.empty(0))]) == TransferStats()


class TestReading:
    @pytest.mark.parametrize("short", [1, 7, 4096])
    @pytest.mark.parametrize("threads", [1, 4])
    def test_short_reads(self, short: int, threads: int) -> None:
        data, copies, records = many(6, 300)
        move(Memory(data, short=short), copies, threads=threads, block=1000, records=records)
        assert_arrived(data, copies)

    @pytest.mark.parametrize("number", [0, 1, 5, 17])
    @pytest.mark.parametrize("threads", [1, 2, 8])
    @pytest.mark.parametrize("is_converted", [False, True])
    def test_a_failing_disk(
        self, number: int, threads: int, is_converted: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running: list[Transfer] = []
        run = Transfer.run
        monkeypatch.setattr(Transfer, "run", lambda self: running.append(self) or run(self))

        def fail(call: int, offset: int) -> None:
            if call == number:
                raise OSError(errno.EIO, "Input/output error")
            # A read of memory is over before the thread that failed runs again: hold the others' until it has.
            assert call < number or eventually(lambda: running[0]._stopped)

        data, copies, _ = many(20)
        if is_converted:
            copies = in_doubles(copies)
        source = Memory(data, fail=fail)
        with pytest.raises(
            CheckpointReadError, match=r"Reading tensor\d+ from memory\.ckpt failed at byte \d+: .*Input/output"
        ) as caught:
            move(source, copies, threads=threads, block=10_000)
        error = caught.value
        assert (error.path, error.errno) == ("memory.ckpt", errno.EIO)
        copy = next(copy for copy in copies if copy.name == error.key)
        assert copy.offset <= error.offset < copy.offset + 20_000
        assert source.calls <= number + threads  # the others stop after the read they are in

    def test_the_end_in_the_middle(self) -> None:
        data, copies, _ = many(4)
        cut = copies[2].offset + 777
        with pytest.raises(
            CheckpointReadError, match=r"memory\.ckpt ends at byte \d+, but tensor2 needs \d+ bytes more"
        ) as caught:
            move(Memory(data[:cut]), copies, block=4096)
        assert (caught.value.key, caught.value.path) == ("tensor2", "memory.ckpt")
        assert copies[2].offset <= caught.value.offset <= cut

    def test_threads_wait_for_each_other(self) -> None:
        # One thread fails while another is in the middle of a read: the transfer ends only after that one.
        failed, ended = threading.Event(), threading.Event()

        def fail(call: int, offset: int) -> None:
            if call == 0:
                assert failed.wait(20)
                ended.set()
            elif call == 1:
                failed.set()
                raise OSError(errno.EIO, "Input/output error")

        data, copies, _ = many(8)
        with pytest.raises(CheckpointReadError):
            move(Memory(data, fail=fail), copies, threads=2, block=20_000)
        assert ended.is_set()

    def test_progress(self) -> None:
        seen: list[int] = []
        data, copies, _ = many(8)
        stats = move(Memory(data), copies, threads=4, block=9000, on_progress=seen.append)
        assert sum(seen) == stats.bytes_read
        assert stats.num_threads == 4

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
    def test_an_interruption_ends_all_threads(self, kind: type[BaseException]) -> None:
        def interrupt(nbytes: int) -> None:
            raise kind("stop")

        data, copies, _ = many(20)
        source = Memory(data)
        with pytest.raises(kind, match="stop"):
            move(source, copies, threads=3, block=5000, on_progress=interrupt)
        assert source.calls <= 6

    @pytest.mark.usefixtures("device_that_is_busy")
    @pytest.mark.parametrize("failing", ["copy", "wait"])
    def test_a_device_that_fails_ends_threads_that_wait_for_buffers(
        self, failing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: Buffer) -> None:
            raise RuntimeError("CUDA error")

        monkeypatch.setattr(Buffer, "mark" if failing == "copy" else "wait", fail)
        with pytest.raises(RuntimeError, match="CUDA error"):
            move(*converted(40), block=5000)

    @pytest.mark.usefixtures("device_that_is_busy")
    def test_interruptions_one_after_the_other_end_all_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(self: Buffer) -> None:
            raise KeyboardInterrupt

        interruptions: list[int] = []
        stop = Transfer._stop

        def interrupted(self: Transfer) -> None:
            interruptions.append(1)
            if len(interruptions) < 3:
                raise KeyboardInterrupt
            stop(self)

        monkeypatch.setattr(Buffer, "wait", interrupt)
        monkeypatch.setattr(Transfer, "_stop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            move(*converted(40), block=5000)
        assert len(interruptions) == 3

    def test_the_calling_thread_alone_talks_to_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads: set[str] = set()
        rearrange = Buffer.rearrange

        def note(self: Buffer, *arguments: Any) -> None:
            threads.add(threading.current_thread().name.partition("_")[0])
            rearrange(self, *arguments)

        monkeypatch.setattr(Buffer, "rearrange", note)
        source, copies = converted(40)
        move(source, copies, block=5000)
        assert threads == {"memload"}  # for the CPU all of them convert
        threads.clear()
        monkeypatch.setattr(Transfer, "_plan", pretend_a_device)
        source, again = converted(40)
        move(source, again, block=5000)
        assert threads == {threading.current_thread().name}
        for copy, other in zip(copies, again, strict=True):
            assert torch.equal(copy.destination, other.destination)

    @pytest.mark.parametrize("to_device", [False, True])
    @pytest.mark.parametrize("available", [0, 2])
    def test_threads_that_cannot_be_had_are_done_without(
        self, available: int, to_device: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[threading.Thread] = []
        start = threading.Thread.start

        def refuse_some(thread: threading.Thread) -> None:
            asked.append(thread)
            if len(asked) > available:
                raise RuntimeError("can't start new thread")
            start(thread)

        if to_device:
            monkeypatch.setattr(Transfer, "_plan", pretend_a_device)
        source, expected = converted(40)
        move(source, expected, threads=3, block=5000)
        source, copies = converted(40)
        monkeypatch.setattr(threading.Thread, "start", refuse_some)
        move(source, copies, threads=3, block=5000)
        assert len(asked) == available + 1
        for copy, other in zip(expected, copies, strict=True):
            assert torch.equal(copy.destination, other.destination)

    @pytest.mark.parametrize(("threads", "block"), [(1, 1 << 20), (2, 4096)])
    def test_a_ring_that_is_too_small(self, threads: int, block: int) -> None:
        copy = TensorCopy("a", 0, torch.float32, (1,), torch.zeros(1 << 18, dtype=torch.float64))
        with (
            StagingRing(choose_layout(512 * KIB, 1), pinned=False) as ring,
            pytest.raises(ValueError, match="do not fit RingLayout"),
        ):
            transfer(Memory(bytes(1 << 20)), [copy], lambda: ring, num_threads=threads, block_bytes=block)

    def test_a_ring_that_cannot_be_had(self) -> None:
        def refuse() -> StagingRing:
            raise MemoryError("no ring")

        copy = TensorCopy("a", 0, torch.float32, (1,), torch.zeros(2, dtype=torch.float64))
        with pytest.raises(MemoryError, match="no ring"):
            transfer(Memory(bytes(8)), [copy], refuse, num_threads=1, block_bytes=4096)


class TestChecksums:
    @pytest.mark.parametrize("block", [1 << 10, 1 << 18])
    @pytest.mark.parametrize("threads", [1, 4])
    @pytest.mark.parametrize("converted", [False, True])
    def test_a_flipped_byte_anywhere(self, block: int, threads: int, converted: bool) -> None:
        data, copies, records = many(3, 2000)
        if converted:
            copies = in_doubles(copies)
        stats = move(Memory(data), copies, threads=threads, block=block, records=records)
        assert stats.bytes_verified == sum(record.nbytes for record in records)
        for record in records:
            for position in (0, 1, 1023, 1024, 4000, record.nbytes - 1):
                damaged = bytearray(data)
                damaged[record.offset + position] ^= 0x10
                with pytest.raises(ChecksumError, match=rf"{record.name}\b.*") as caught:
                    move(Memory(bytes(damaged)), copies, threads=threads, block=block, records=records)
                error = caught.value
                assert (error.key, error.offset, error.path) == (record.name, record.offset, "memory.ckpt")
                raw = damaged[record.offset : record.offset + record.nbytes]
                assert (error.expected, error.actual) == (record.crc32, zlib.crc32(raw))

    def test_parts_that_come_in_another_order(self) -> None:
        # The first read of the record ends only after a later one.
        later = threading.Event()

        def wait(call: int, offset: int) -> None:
            if offset == copies[0].offset:
                assert later.wait(20)
            elif offset > copies[0].offset + 5000:
                later.set()

        data, copies, records = many(1)
        stats = move(Memory(data, fail=wait), copies, threads=2, block=2000, records=records)
        assert stats.bytes_verified == records[0].nbytes

    def test_only_what_is_read_and_known_is_judged(self) -> None:
        data, copies, records = many(3)
        damaged = bytearray(data)
        damaged[records[1].offset + 5] ^= 1
        damaged[records[1].offset - 3] ^= 1  # a gap
        move(Memory(bytes(damaged)), copies, records=[records[0], records[2]])
        stats = move(Memory(bytes(damaged)), [copies[0], copies[2]], records=records)
        assert stats.bytes_verified == records[0].nbytes + records[2].nbytes
        part = TensorCopy("part", copies[1].offset, torch.int32, (1,), torch.zeros(100, dtype=torch.int32))
        with pytest.raises(ChecksumError):  # A part of a damaged record
            move(Memory(bytes(damaged)), [part], records=records)
        assert move(Memory(bytes(data)), [part], records=records).bytes_verified == records[1].nbytes

    @pytest.mark.parametrize("num_copies", [0, 1, 3])
    def test_checksums_of_parts_are_told_and_their_bytes_are_read(self, num_copies: int) -> None:
        data, copies, records = many(3)
        cut = records[1].offset + 7777
        parts = [
            Record("low", records[1].offset, 7777, None),
            Record("high", cut, records[1].nbytes - 7777, None),
            records[2],
        ]
        found: dict[str, int] = {}
        stats = move(
            Memory(data),
            copies[:num_copies],
            records=parts,
            on_checksum=lambda record, crc32: found.update({record.name: crc32}),
        )
        end = records[1].offset + records[1].nbytes
        assert found == {"low": zlib.crc32(data[records[1].offset : cut]), "high": zlib.crc32(data[cut:end])}
        assert stats.bytes_verified == records[1].nbytes + records[2].nbytes
        damaged = bytearray(data)
        damaged[records[2].offset] ^= 1
        with pytest.raises(ChecksumError):
            move(Memory(bytes(damaged)), copies[:num_copies], records=parts, on_checksum=lambda record, crc32: None)


@pytest.mark.memory
class TestMemory:
    PROGRAM = """
import torch, threading
from lightning_memload.memory import MemoryMonitor
from lightning_memload.memory.host import read_status
from lightning_memload.bytes import Record
from lightning_memload.transfer import *
from lightning_memload.formats import load_mapped
path, mib = ARGS["path"], 1 << 20
def go(make, budget):
    loaded, mapped = load_mapped(path, weights_only=True)
    destinations = {name: make(value) for name, value in loaded.items()}
    for destination in destinations.values():
        destination.fill_(1)
    places = {name: mapped.locate(value)[0].offset for name, value in loaded.items()}
    copies = [TensorCopy(n, places[n], v.dtype, v.stride(), destinations[n]) for n, v in loaded.items()]
    records = [Record(s.key, s.offset, s.nbytes, s.crc32) for s in mapped.index.storages if s.crc32 is not None]
    layout, rings = choose_layout(budget, 4), []
    def ring():
        rings.append(StagingRing(layout, pinned=False))
        return rings[0]
    before = read_status().anonymous_bytes
    with MemoryMonitor(interval_seconds=0.001) as monitor:
        stats = transfer(mapped.source, copies, ring, num_threads=layout.num_threads,
                         block_bytes=layout.block_bytes, records=records)
    peak = monitor.peaks.anonymous_peak_bytes - before
    for made in rings:
        made.close()
    equal = all(torch.equal(destinations[n], v.to(destinations[n].dtype)) for n, v in loaded.items())
    return [peak, read_status().anonymous_bytes - before, equal, stats.staging_bytes]
RESULT = {}
go(torch.empty_like, 8 * mib)
RESULT["raw"] = go(torch.empty_like, 8 * mib)
RESULT["cast"] = go(lambda t: torch.empty(t.shape, dtype=torch.bfloat16), 8 * mib)
RESULT["strided"] = go(lambda t: torch.empty(t.shape[::-1]).t(), 8 * mib)
loaded, _ = load_mapped(path, weights_only=True)
destination = {name: torch.empty_like(value).fill_(1) for name, value in loaded.items()}
before = read_status().anonymous_bytes
with MemoryMonitor() as monitor:
    plain = torch.load(path, weights_only=True)
    for name, value in plain.items():
        destination[name].copy_(value)
RESULT["naive"] = [monitor.peaks.anonymous_peak_bytes - before]
"""

    def test_above_the_destination(self, tmp_path: Path) -> None:
        mib = 1 << 20
        path = tmp_path / "checkpoint.pt"
        torch.save({str(n): torch.full((4096, 4096), float(n)) for n in range(8)}, path)  # 512 MiB
        result = run_fresh(self.PROGRAM, path=path, timeout_seconds=100).result
        assert result["raw"][0] <= 16 * mib
        assert result["raw"][3] == 0
        for way in ("cast", "strided"):
            peak, left, equal, staging = result[way]
            assert peak <= (8 + 16) * mib, way
            assert 0 < staging <= 8 * mib
            assert left <= 4 * mib
            assert equal
        assert result["raw"][2]
        assert result["naive"][0] >= 500 * mib


def test_into_cpu_memory_nothing_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be initialised, which no forked child can do, nor its parent before it forks."""

    def refuse() -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    data, copies, records = many(20)
    move(Memory(data), copies, records=records)
    assert_arrived(data, copies)
