"""The figures of one measurement: levels at its start and end, and the peaks between them.

``None`` means that the platform does not report a figure. It never means zero.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

__all__ = ["MemoryPeaks", "rise", "total"]


@dataclass(frozen=True, slots=True)
class MemoryPeaks:
    """The figures between the start and the end of one measurement. ``None`` means unknown, never zero.

    All memory is in bytes and of the whole process. "Start" and "end" are the levels at these moments. "Peak" is the
    highest level from start to end, including both.

    Attributes:
        seconds: Wall time.
        anonymous_start_bytes: Anonymous memory (RssAnon): the memory that the machine must have.
        anonymous_end_bytes: The same at the end.
        anonymous_peak_bytes: The main figure: the highest sample. A spike shorter than ``longest_gap_seconds`` can lie
            between two samples, but it cannot exceed ``anonymous_upper_bound_bytes``.
        anonymous_upper_bound_bytes: RSS peak minus the lowest sampled number of file and shmem pages. The true peak is
            never above it. It is far above the sampled peak if the measured code maps files.
        rss_start_bytes: Resident memory of every kind.
        rss_peak_bytes: Its peak. It includes mapped file pages, which the kernel takes back under pressure.
        rss_peak_is_exact: ``True``: the peak is the kernel's own mark. ``False``: the peak is the highest sample,
            since the mark could not be reset and an earlier peak hides this one.
        file_backed_peak_bytes: Resident pages of mapped files (RssFile).
        shmem_start_bytes: Resident shared memory (RssShmem). It includes the pinned memory of some drivers.
        shmem_peak_bytes: Its peak.
        page_table_bytes: The kernel's page tables for this process (VmPTE), at their largest.
        pinned_peak_bytes: Page-locked host memory: the larger of the memory that torch's allocator owns (rounded up to
            a power of two, and kept after a free) and the values passed to ``tick``. It is a part of the memory
            above or, with some drivers, additional to it. ``None`` when neither is known.
        required_bytes: An estimate of the smallest memory limit that suffices: anonymous peak + shmem peak + page
            tables + file pages at the start. At exactly this limit the process is slow, since the kernel drops file
            pages that are needed again. 128 MiB more restore the full speed.
        cuda_allocated_start_bytes: Memory of live tensors on the monitored CUDA device. 0 if CUDA was initialised after
            the start.
        cuda_allocated_peak_bytes: Its peak.
        cuda_allocated_end_bytes: The same at the end.
        cuda_reserved_start_bytes: Held by torch's caching allocator on that device, live tensors included.
        cuda_reserved_peak_bytes: Its peak.
        cuda_reserved_end_bytes: The same at the end.
        storage_read_bytes: Bytes that this process fetched from storage, by reads and page faults. 0 when everything
            was in the page cache.
        major_faults: Page faults that waited for storage. Many of them are slow, and usually mean too little memory.
        cgroup_limit_bytes: The tightest memory limit of the control groups of the process.
        cgroup_peak_bytes: The highest usage of the group with that limit (without a limit: its own group). Includes
            the page cache, other processes, and the time before the start.
        num_samples: The number of samples.
        longest_gap_seconds: The longest time between two samples.
        file_backed_start_bytes: Resident pages of mapped files at the start.
    """

    seconds: float
    anonymous_start_bytes: int | None
    anonymous_end_bytes: int | None
    anonymous_peak_bytes: int | None
    anonymous_upper_bound_bytes: int | None
    rss_start_bytes: int
    rss_peak_bytes: int
    rss_peak_is_exact: bool
    file_backed_peak_bytes: int | None
    shmem_start_bytes: int | None
    shmem_peak_bytes: int | None
    page_table_bytes: int | None
    pinned_peak_bytes: int | None
    required_bytes: int | None
    cuda_allocated_start_bytes: int | None
    cuda_allocated_peak_bytes: int | None
    cuda_allocated_end_bytes: int | None
    cuda_reserved_start_bytes: int | None
    cuda_reserved_peak_bytes: int | None
    cuda_reserved_end_bytes: int | None
    storage_read_bytes: int | None
    major_faults: int | None
    cgroup_limit_bytes: int | None
    cgroup_peak_bytes: int | None
    num_samples: int
    longest_gap_seconds: float
    file_backed_start_bytes: int | None = None

    @property
    def anonymous_above_start_bytes(self) -> int | None:
        """The rise of anonymous memory above its level at the start, in bytes."""
        return rise(self.anonymous_start_bytes, self.anonymous_peak_bytes)

    @property
    def file_backed_above_start_bytes(self) -> int | None:
        """The rise of the pages of mapped files above their number at the start, in bytes."""
        return rise(self.file_backed_start_bytes, self.file_backed_peak_bytes)

    @property
    def host_above_start_bytes(self) -> int | None:
        """The sum of the rises of anonymous memory and shmem, each above its own start, in bytes."""
        return total(self.anonymous_above_start_bytes, rise(self.shmem_start_bytes, self.shmem_peak_bytes))

    def as_dict(self) -> dict[str, int | float | bool | None]:
        """Return every field by its name, ready for JSON. ``MemoryPeaks(**peaks.as_dict())`` restores the object."""
        return dataclasses.asdict(self)


def rise(start: int | None, later: int | None) -> int | None:
    """Return the rise of a figure above its start, ``None`` if one of the two is unknown."""
    return None if start is None or later is None else later - start


def total(*parts: int | None) -> int | None:
    """Return the sum of all parts, ``None`` if one of them is unknown."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
