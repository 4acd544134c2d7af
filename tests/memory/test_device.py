"""Device figures, against an allocator that keeps books like torch's; and that measuring never starts CUDA."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from lightning_memload.memory import MemoryMonitor, available_host_bytes, device, free_device_bytes
from lightning_memload.memory.device import (
    DeviceSample,
    cuda_memory,
    cuda_peaks,
    pinned_bytes,
    reset_cuda_peaks,
    resolve_cuda_device,
)
from tests.fresh_process import run_fresh

MIB = 1 << 20


@dataclass
class FakeCuda:
    """One torch caching allocator per device, reduced to what is reported: freed memory stays reserved."""

    initialized: bool = True
    allocated: dict[int, int] = field(default_factory=dict)
    reserved: dict[int, int] = field(default_factory=dict)
    allocated_peak: dict[int, int] = field(default_factory=dict)
    reserved_peak: dict[int, int] = field(default_factory=dict)
    pinned: int = 0
    current: int = 0

    def change(self, num_bytes: int, index: int = 0) -> None:
        self.initialized = True
        self.allocated[index] = self.allocated.get(index, 0) + num_bytes
        self.reserved[index] = max(self.reserved.get(index, 0), self.allocated[index])
        self.allocated_peak[index] = max(self.allocated_peak.get(index, 0), self.allocated[index])
        self.reserved_peak[index] = max(self.reserved_peak.get(index, 0), self.reserved[index])

    def empty_cache(self, index: int = 0) -> None:
        self.reserved[index] = self.allocated[index]

    def memory_stats(self, where: torch.device) -> dict[str, int]:
        index = where.index
        if index not in self.allocated:
            return {}
        return {
            "allocated_bytes.all.current": self.allocated[index],
            "allocated_bytes.all.peak": self.allocated_peak[index],
            "reserved_bytes.all.current": self.reserved[index],
            "reserved_bytes.all.peak": self.reserved_peak[index],
        }

    def reset_peak_memory_stats(self, where: torch.device) -> None:
        if where.index in self.allocated:
            self.allocated_peak[where.index] = self.allocated[where.index]
            self.reserved_peak[where.index] = self.reserved[where.index]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: fake.initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "memory_stats", fake.memory_stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", fake.reset_peak_memory_stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (1000 * MIB, 8000 * MIB))
    monkeypatch.setattr(
        torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.current": fake.pinned}, raising=False
    )
    return fake


class TestFigures:
    def test_now_and_peaks(self, cuda: FakeCuda) -> None:
        cuda.change(30 * MIB)
        cuda.change(-20 * MIB)
        assert cuda_memory("cuda:0") == DeviceSample(allocated_bytes=10 * MIB, reserved_bytes=30 * MIB)
        assert cuda_peaks("cuda:0") == DeviceSample(allocated_bytes=30 * MIB, reserved_bytes=30 * MIB)
        assert reset_cuda_peaks("cuda:0")
        assert cuda_peaks("cuda:0") == DeviceSample(allocated_bytes=10 * MIB, reserved_bytes=30 * MIB)

    def test_a_device_that_was_not_used_yet_holds_nothing(self, cuda: FakeCuda) -> None:
        assert cuda_memory("cuda:0") == DeviceSample(0, 0)

    def test_no_index_is_the_current_device(self, cuda: FakeCuda) -> None:
        cuda.change(1 * MIB, index=0)
        cuda.change(2 * MIB, index=3)
        cuda.current = 3
        assert resolve_cuda_device("cuda") == torch.device("cuda", 3)
        assert cuda_memory("cuda") == DeviceSample(2 * MIB, 2 * MIB)
        assert cuda_memory(torch.device("cuda", 0)) == DeviceSample(1 * MIB, 1 * MIB)

    def test_free_counts_the_allocators_cache(self, cuda: FakeCuda) -> None:
        cuda.change(30 * MIB)
        cuda.change(-20 * MIB)
        assert free_device_bytes("cuda:0") == 1020 * MIB

    def test_free_on_the_cpu_is_free_host_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(device, "available_host_bytes", lambda: 4711)
        assert free_device_bytes("cpu") == 4711
        assert free_device_bytes(torch.device("cpu")) == 4711

    @pytest.mark.parametrize("where", ["cpu", "meta", "mps"])
    def test_other_devices_have_none(self, cuda: FakeCuda, where: str) -> None:
        assert cuda_memory(where) is None
        assert cuda_peaks(where) is None
        assert reset_cuda_peaks(where) is False
        assert where == "cpu" or free_device_bytes(where) is None

    def test_pinned_bytes_of_both_vocabularies(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda.pinned = 5 * MIB
        assert pinned_bytes() == 5 * MIB
        # Torch 2.7: owned is "reserved", in use is "allocated".
        stats = {"reserved_bytes.current": 8 * MIB, "allocated_bytes.current": 1 * MIB}
        monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: stats)
        assert pinned_bytes() == 8 * MIB
        monkeypatch.delattr(torch.cuda, "host_memory_stats")
        assert pinned_bytes() is None


class TestCudaIsLeftAlone:
    def test_nothing_is_asked_before_cuda_is_initialized(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda.initialized = False

        def forbidden(*args: object) -> None:
            raise AssertionError("this call would initialise CUDA or load the driver")

        for name in (
            "is_available",
            "current_device",
            "memory_stats",
            "reset_peak_memory_stats",
            "mem_get_info",
            "host_memory_stats",
        ):
            monkeypatch.setattr(torch.cuda, name, forbidden)
        assert cuda_memory("cuda") is None
        assert cuda_peaks("cuda:1") is None
        assert reset_cuda_peaks("cuda") is False
        assert free_device_bytes("cuda") is None
        assert pinned_bytes() is None
        with MemoryMonitor("cuda") as monitor:
            monitor.tick()
        assert monitor.peaks.cuda_allocated_peak_bytes is None

    def test_measuring_does_not_import_torch(self) -> None:
        code = """
import sys
import lightning_memload
before = "torch" in sys.modules
from lightning_memload.memory import MemoryMonitor, available_host_bytes
with MemoryMonitor("cuda:0") as monitor:
    monitor.tick()
assert ("torch" in sys.modules) == before
"""
        run_fresh(code)


class TestMonitor:
    def test_start_peak_end(self, cuda: FakeCuda) -> None:
        cuda.change(100 * MIB)
        cuda.change(-90 * MIB)
        cuda.empty_cache()
        with MemoryMonitor("cuda:0") as monitor:
            cuda.change(50 * MIB)
            cuda.change(-45 * MIB)
        cuda.change(500 * MIB)
        peaks = monitor.peaks
        assert peaks.cuda_allocated_start_bytes == 10 * MIB
        assert peaks.cuda_allocated_peak_bytes == 60 * MIB
        assert peaks.cuda_allocated_end_bytes == 15 * MIB
        assert peaks.cuda_reserved_start_bytes == 10 * MIB
        assert peaks.cuda_reserved_peak_bytes == 60 * MIB
        assert peaks.cuda_reserved_end_bytes == 60 * MIB

    def test_nested_windows_each_have_their_own_peak(self, cuda: FakeCuda) -> None:
        with MemoryMonitor("cuda:0") as outer:
            cuda.change(80 * MIB)
            cuda.change(-70 * MIB)
            with MemoryMonitor("cuda:0") as inner:
                cuda.change(20 * MIB)
                cuda.change(-20 * MIB)
        assert inner.peaks.cuda_allocated_start_bytes == 10 * MIB
        assert inner.peaks.cuda_allocated_peak_bytes == 30 * MIB
        assert outer.peaks.cuda_allocated_start_bytes == 0
        assert outer.peaks.cuda_allocated_peak_bytes == 80 * MIB

    def test_cuda_begun_inside_the_window_starts_at_zero(self, cuda: FakeCuda) -> None:
        cuda.initialized = False
        with MemoryMonitor("cuda") as monitor:
            assert monitor.peaks.cuda_allocated_start_bytes is None
            cuda.change(40 * MIB)
            cuda.change(-10 * MIB)
        assert monitor.peaks.cuda_allocated_start_bytes == 0
        assert monitor.peaks.cuda_reserved_start_bytes == 0
        assert monitor.peaks.cuda_allocated_peak_bytes == 40 * MIB
        assert monitor.peaks.cuda_allocated_end_bytes == 30 * MIB

    def test_the_device_without_index_is_fixed_at_the_start(self, cuda: FakeCuda) -> None:
        cuda.change(1 * MIB, index=0)
        with MemoryMonitor("cuda") as monitor:
            cuda.current = 1
            cuda.change(9 * MIB, index=1)
        assert monitor.peaks.cuda_allocated_peak_bytes == 1 * MIB

    def test_a_start_that_fails_leaves_nothing_running(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_such_device(where: torch.device) -> None:
            raise AssertionError("Invalid device id")

        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", no_such_device)
        monitor = MemoryMonitor("cuda:9")
        with pytest.raises(AssertionError, match="Invalid device id"):
            monitor.start()
        assert not monitor.is_running
        with pytest.raises(RuntimeError, match="never started"):
            _ = monitor.peaks

    def test_pinned_is_the_larger_of_torchs_and_the_told(self, cuda: FakeCuda) -> None:
        cuda.pinned = 64 * MIB
        with MemoryMonitor() as monitor:
            monitor.tick(pinned_bytes=16 * MIB)
            assert monitor.peaks.pinned_peak_bytes == 64 * MIB
            monitor.tick(pinned_bytes=128 * MIB)
            monitor.tick()
        assert monitor.peaks.pinned_peak_bytes == 128 * MIB

    def test_without_a_device_there_are_no_cuda_figures(self, cuda: FakeCuda) -> None:
        cuda.change(7 * MIB)
        with MemoryMonitor() as monitor:
            pass
        assert monitor.peaks.cuda_allocated_peak_bytes is None
        assert cuda.allocated_peak[0] == 7 * MIB


def test_available_host_bytes_is_plausible() -> None:
    available = available_host_bytes()
    assert available is not None
    assert available > 64 * MIB
