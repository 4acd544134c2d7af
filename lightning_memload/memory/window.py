"""The window of one monitor: the figures between its start and now.

A window keeps the samples that it is given and reads the figures that need no coordination. The module ``monitor``
resets the marks that all windows of a process share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_memload.memory.cgroup import CgroupMemory
from lightning_memload.memory.device import (
    DeviceSample,
    cuda_levels,
    cuda_memory,
    cuda_peaks,
    pinned_bytes,
    resolve_cuda_device,
)
from lightning_memload.memory.host import HostSample, HostStatus, major_faults, read_io_bytes
from lightning_memload.memory.peaks import MemoryPeaks, rise, total
from lightning_memload.memory.series import SeriesRecorder

if TYPE_CHECKING:
    import torch

__all__ = ["Window", "larger"]

# Reading the allocators takes ten times as long as a sample of the host.
_DEVICE_INTERVAL_SECONDS = 0.020


class Window:
    """The figures of one monitor between its start and now. Only the process-wide meter changes an active window.

    Args:
        device: The device to measure next to the host, ``None`` for the host alone.
        interval_seconds: The longest time between two samples that the window asks for.
    """

    def __init__(self, device: torch.device | str | None, interval_seconds: float) -> None:
        self.device = device
        self.interval_seconds = interval_seconds
        self.is_active = False

    def begin(self, now: float, host: HostSample, status: HostStatus, *, rss_mark_was_reset: bool) -> None:
        """Record the levels at the start. The caller has just reset the marks."""
        self.start_seconds = self.last_seconds = now
        self.num_samples, self.longest_gap_seconds = 0, 0.0
        self.start_host, self.start_status = host, status
        self.host, self.status = host, status
        self.anonymous_peak_bytes = host.anonymous_bytes
        self.file_and_shmem_least_bytes = host.file_backed_bytes
        self.file_peak_bytes, self.shmem_peak_bytes = status.file_bytes, status.shmem_bytes
        self.page_table_bytes = status.page_table_bytes
        self.sampled_rss_peak_bytes = host.rss_bytes
        # A mark that could not be reset is exact once it has risen: the new peak occurred in this window.
        self.rss_mark_floor_bytes = None if rss_mark_was_reset else status.peak_rss_bytes
        self.rss_mark_peak_bytes: int | None = None
        self.pinned_peak_bytes: int | None = None
        self.pinned_bytes: int | None = None
        self.told_pinned_bytes: int | None = None
        self.recorder = SeriesRecorder(self.interval_seconds)
        self.cuda_start: DeviceSample | None = None
        self.cuda_end: DeviceSample | None = None
        self.cuda_now: DeviceSample | None = None
        self.device_seconds = now
        self.cuda_allocated_peak_bytes = self.cuda_reserved_peak_bytes = 0
        self.start_io, self.start_major_faults = read_io_bytes(), major_faults()
        self.cgroup = CgroupMemory.of_this_process()
        self.take_sample(now, host)
        self.take_status(status)
        self.take_slow_figures()
        self.cuda_start = self.cuda_end
        self.record(now)
        self.is_active = True

    def take_sample(self, now: float, host: HostSample) -> None:
        """Record one cheap sample. This is the only work of most ticks."""
        self.num_samples += 1
        self.longest_gap_seconds = max(self.longest_gap_seconds, now - self.last_seconds)
        self.last_seconds = now
        self.host = host
        self.sampled_rss_peak_bytes = max(self.sampled_rss_peak_bytes, host.rss_bytes)
        self.anonymous_peak_bytes = larger(self.anonymous_peak_bytes, host.anonymous_bytes)
        if self.file_and_shmem_least_bytes is not None and host.file_backed_bytes is not None:
            self.file_and_shmem_least_bytes = min(self.file_and_shmem_least_bytes, host.file_backed_bytes)

    def take_status(self, status: HostStatus) -> None:
        """Record the detailed figures. They include VmHWM, whose value the next reset of the mark erases."""
        self.status = status
        self.file_peak_bytes = larger(self.file_peak_bytes, status.file_bytes)
        self.shmem_peak_bytes = larger(self.shmem_peak_bytes, status.shmem_bytes)
        self.page_table_bytes = larger(self.page_table_bytes, status.page_table_bytes)
        self.rss_mark_peak_bytes = larger(self.rss_mark_peak_bytes, status.peak_rss_bytes)

    def take_pinned(self, nbytes: int) -> None:
        """Record page-locked memory that the measured code has told of."""
        self.told_pinned_bytes = nbytes
        self.pinned_peak_bytes = larger(self.pinned_peak_bytes, nbytes)

    def record(self, now: float) -> None:
        """Add the present levels to the series. Those of the device are read at most every 20 ms."""
        if self.device is not None and now - self.device_seconds >= _DEVICE_INTERVAL_SECONDS:
            self.device_seconds = now
            levels = cuda_levels(self.device)
            if levels is not None:
                self.cuda_now, self.pinned_bytes = levels
        file_bytes, shmem_bytes = self.host.file_backed_bytes, self.status.shmem_bytes or 0
        self.recorder.add(
            now - self.start_seconds,
            (
                total(self.host.anonymous_bytes, shmem_bytes),
                None if file_bytes is None else max(file_bytes - shmem_bytes, 0),
                larger(self.pinned_bytes, self.told_pinned_bytes),
                self.cuda_now.allocated_bytes if self.cuda_now else None,
                self.cuda_now.reserved_bytes if self.cuda_now else None,
            ),
        )

    def take_slow_figures(self) -> None:
        """Read the figures that are too slow for a tick, or whose source keeps a peak or a total itself."""
        self.pinned_bytes = pinned_bytes()
        self.pinned_peak_bytes = larger(self.pinned_peak_bytes, self.pinned_bytes)
        if self.device is not None:
            self.device = resolve_cuda_device(self.device) or self.device
            now, peaks = cuda_memory(self.device), cuda_peaks(self.device)
            if now is not None and peaks is not None:
                self.cuda_end = self.cuda_now = now
                self.cuda_allocated_peak_bytes = max(self.cuda_allocated_peak_bytes, peaks.allocated_bytes)
                self.cuda_reserved_peak_bytes = max(self.cuda_reserved_peak_bytes, peaks.reserved_bytes)
        self.end_io, self.end_major_faults = read_io_bytes(), major_faults()
        self.cgroup_limit_bytes = self.cgroup.limit_bytes() if self.cgroup is not None else None
        self.cgroup_peak_bytes = self.cgroup.peak_bytes() if self.cgroup is not None else None

    def figures(self) -> MemoryPeaks:
        """Return the figures up to the last record."""
        mark_bytes, floor_bytes = self.rss_mark_peak_bytes, self.rss_mark_floor_bytes
        rss_peak_is_exact = mark_bytes is not None and (floor_bytes is None or mark_bytes > floor_bytes)
        rss_peak_bytes = self.sampled_rss_peak_bytes
        if rss_peak_is_exact and mark_bytes is not None:
            # The kernel updates the mark late and from inexact counters. The peak must not be below a sample.
            rss_peak_bytes = max(rss_peak_bytes, mark_bytes)
        upper_bound_bytes = None
        if mark_bytes is not None and self.file_and_shmem_least_bytes is not None:
            upper_bound_bytes = max(mark_bytes, rss_peak_bytes) - self.file_and_shmem_least_bytes
        cuda_start = self.cuda_start
        if cuda_start is None and self.cuda_end is not None:
            cuda_start = DeviceSample(0, 0)  # CUDA was initialised inside the window: no memory was held before.
        return MemoryPeaks(
            seconds=self.last_seconds - self.start_seconds,
            anonymous_start_bytes=self.start_host.anonymous_bytes,
            anonymous_end_bytes=self.host.anonymous_bytes,
            anonymous_peak_bytes=self.anonymous_peak_bytes,
            anonymous_upper_bound_bytes=upper_bound_bytes,
            rss_start_bytes=self.start_host.rss_bytes,
            rss_peak_bytes=rss_peak_bytes,
            rss_peak_is_exact=rss_peak_is_exact,
            file_backed_peak_bytes=self.file_peak_bytes,
            shmem_start_bytes=self.start_status.shmem_bytes,
            shmem_peak_bytes=self.shmem_peak_bytes,
            page_table_bytes=self.page_table_bytes,
            pinned_peak_bytes=self.pinned_peak_bytes,
            required_bytes=total(
                self.anonymous_peak_bytes, self.shmem_peak_bytes, self.page_table_bytes, self.start_status.file_bytes
            ),
            cuda_allocated_start_bytes=cuda_start.allocated_bytes if cuda_start else None,
            cuda_allocated_peak_bytes=self.cuda_allocated_peak_bytes if self.cuda_end else None,
            cuda_allocated_end_bytes=self.cuda_end.allocated_bytes if self.cuda_end else None,
            cuda_reserved_start_bytes=cuda_start.reserved_bytes if cuda_start else None,
            cuda_reserved_peak_bytes=self.cuda_reserved_peak_bytes if self.cuda_end else None,
            cuda_reserved_end_bytes=self.cuda_end.reserved_bytes if self.cuda_end else None,
            storage_read_bytes=(
                self.end_io.storage_bytes - self.start_io.storage_bytes if self.start_io and self.end_io else None
            ),
            major_faults=rise(self.start_major_faults, self.end_major_faults),
            cgroup_limit_bytes=self.cgroup_limit_bytes,
            cgroup_peak_bytes=self.cgroup_peak_bytes,
            num_samples=self.num_samples,
            longest_gap_seconds=self.longest_gap_seconds,
            file_backed_start_bytes=self.start_status.file_bytes,
        )


def larger(one: int | None, other: int | None) -> int | None:
    """Return the larger of two figures, or the known one if the other is ``None``."""
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)
