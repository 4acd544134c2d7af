"""The course of memory: bounded, without the loss of a peak, and the same figures as the peaks of its monitor."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch

from lightning_memload.memory import MemoryMonitor, MemorySeries, SeriesRecorder, device, window
from lightning_memload.memory.device import DeviceSample

GIB = 2**30


def recorded(samples: list[tuple[float, int | None]], width_seconds: float = 0.5, max_points: int = 4) -> MemorySeries:
    recorder = SeriesRecorder(width_seconds, max_points)
    for seconds, level in samples:
        recorder.add(seconds, (level, None, None, None, None))
    return recorder.series()


def test_samples_close_together_are_one_point_with_the_largest() -> None:
    series = recorded([(0.0, 1), (0.1, 7), (0.4, 3), (0.5, 2), (1.9, 4)])
    assert (series.seconds, series.host_bytes) == ((0.0, 0.5, 1.9), (7, 2, 4))


def test_full_points_become_half_as_many() -> None:
    series = recorded([(0.0, 1), (0.5, 9), (1.0, 3), (1.5, 2), (2.0, 5)])
    assert (series.seconds, series.host_bytes) == ((0.0, 1.0, 2.0), (9, 3, 5))


def test_a_figure_is_unknown_until_it_is_known() -> None:
    series = recorded([(0.0, None), (0.5, None), (0.6, 0), (1.0, 3)])
    assert series.host_bytes == (None, 0, 3)
    assert set(series.file_backed_bytes) == {None}


@pytest.mark.parametrize("seconds", [1.0, 3_600.0, 1e7])
def test_a_series_is_bounded_and_keeps_every_peak(seconds: float) -> None:
    drawn = random.Random(0)
    samples = sorted((drawn.uniform(0, seconds), drawn.randrange(GIB)) for _ in range(20_000))
    recorder = SeriesRecorder(0.005)
    for now, level in samples:
        recorder.add(now, (level, 1, None, level // 2, None))
    series = recorder.series()
    # Each doubling of the width leaves at least half of the points.
    assert min(1000, seconds / 0.005 - 1) <= len(series) <= 2000
    assert max(level or 0 for level in series.host_bytes) == max(level for _, level in samples)
    assert list(series.seconds) == sorted(series.seconds)
    # No sample is above the point that it is a part of.
    points = list(zip(series.seconds, series.host_bytes, strict=True))
    number = 0
    for now, level in samples:
        while number + 1 < len(points) and points[number + 1][0] <= now:
            number += 1
        assert level <= (points[number][1] or 0)


def test_a_series_is_json_and_has_a_short_repr() -> None:
    series = recorded([(0.0, 1), (2.0, 2)])
    assert MemorySeries(**{k: tuple(v) for k, v in json.loads(json.dumps(series.as_dict())).items()}) == series
    assert repr(series) == "MemorySeries(2 points in 2.00 s)"
    assert repr(MemorySeries()) == "MemorySeries(0 points in 0.00 s)"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_monitor_has_the_course_of_its_figures() -> None:
    with MemoryMonitor(interval_seconds=10) as monitor:
        kept = torch.ones(8 << 20)
        monitor.tick(pinned_bytes=5)
        del kept
    series, peaks = monitor.series, monitor.peaks
    assert peaks.anonymous_peak_bytes is not None
    assert peaks.shmem_peak_bytes is not None
    assert max(level or 0 for level in series.host_bytes) == peaks.anonymous_peak_bytes + peaks.shmem_peak_bytes
    assert series.seconds[0] == 0.0
    assert series.pinned_bytes[-1] == 5
    assert set(series.cuda_allocated_bytes) == {None}


def test_the_device_is_read_every_20_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def levels(asked: torch.device) -> tuple[DeviceSample, int]:
        reads.append(asked)
        return DeviceSample(len(reads), 2 * len(reads)), 3

    monkeypatch.setattr(window, "cuda_levels", levels)
    monitor = MemoryMonitor(torch.device("cuda", 0), interval_seconds=10)
    monitor.start()
    inner = monitor._window
    assert inner is not None
    for milliseconds in (21, 31, 42, 52, 63, 73, 84, 94, 105):
        inner.record(inner.start_seconds + milliseconds / 1000)
    monitor.stop()
    assert len(reads) == 5
    assert max(level or 0 for level in monitor.series.cuda_reserved_bytes) == 10


def test_levels_do_not_choose_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampling thread has a current device of its own."""
    monkeypatch.setattr(device, "_cuda_is_initialized", lambda: True)
    figures = {"allocated_bytes": {"all": {"current": 7}}, "reserved_bytes": {"all": {"current": 9}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: figures)
    monkeypatch.setattr(device, "pinned_bytes", lambda: 11)
    assert device.cuda_levels("cuda") is None
    assert device.cuda_levels("cpu") is None
    assert device.cuda_levels("cuda:1") == (DeviceSample(7, 9), 11)


def test_levels_before_cuda_are_unknown() -> None:
    if not torch.cuda.is_initialized():
        assert device.cuda_levels("cuda:0") is None
