"""What a stretch of this process costs in memory: peaks of host and device, with every doubt next to its figure.

The idea: the kernel keeps an exact and resettable peak only for RSS, which calls a mapped file "RAM". Anonymous memory,
the honest figure, has no such mark: it is sampled every few milliseconds, plus at the maxima that the measured code
itself knows (:meth:`MemoryMonitor.tick`), and an upper bound from the exact RSS peak says how much could be missed.
Peaks belong to the process, not to a thread: what other threads allocate meanwhile is counted too. Not promised: memory
of child processes, and pages that were swapped out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_memload.memory.cgroup import CgroupMemory
from lightning_memload.memory.device import (
    DeviceSample,
    cuda_memory,
    cuda_peaks,
    pinned_bytes,
    reset_cuda_peaks,
    resolve_cuda_device,
)
from lightning_memload.memory.host import (
    HostMeter,
    HostSample,
    HostStatus,
    major_faults,
    read_io_bytes,
    read_status,
    reset_peak_rss,
)

if TYPE_CHECKING:
    from types import TracebackType

    import torch

__all__ = ["MemoryMonitor", "MemoryPeaks"]

# The split of "shared" into files and shmem costs five times the sample itself, so it is read again only when the
# memory has moved by this much: no file or shmem peak is off by more.
_SPLIT_STEP_BYTES = 1 << 20

# Whoever measures takes some milliseconds, so a thread that has the lock for longer is interrupted.
_LONGEST_TURN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class MemoryPeaks:
    """What happened between the start and the end of one measurement. ``None``: not known here, never "nothing".

    All memory is in bytes and of the whole process. "Start" and "end" are levels at those moments, "peak" is the
    highest level between them, the level at the start included.

    Attributes:
        seconds: Wall time.
        anonymous_start_bytes: Anonymous memory (RssAnon): what the machine must really have.
        anonymous_end_bytes: The same at the end.
        anonymous_peak_bytes: The headline: the highest sample. A spike shorter than ``longest_gap_seconds`` can hide
            between two samples, but not above ``anonymous_upper_bound_bytes``.
        anonymous_upper_bound_bytes: RSS peak minus the fewest file and shmem pages seen. Far above the sampled peak
            where files are mapped, equal to it (but for spikes) where none are.
        rss_start_bytes: Resident memory of every kind.
        rss_peak_bytes: Its peak. It counts mapped file pages, which the kernel takes back under pressure.
        rss_peak_is_exact: The peak is the kernel's own mark. ``False``: the highest sample; the mark could not be
            reset, and an earlier peak hides what happened here.
        file_backed_peak_bytes: Resident pages of mapped files (RssFile).
        shmem_start_bytes: Resident shared memory (RssShmem); some drivers' pinned memory shows up here.
        shmem_peak_bytes: Its peak.
        page_table_bytes: The kernel's page tables for this process (VmPTE), at their largest.
        pinned_peak_bytes: Page-locked host memory: what torch's allocator owns (from a power of two to the next, and
            still there after a free) or what was told to ``tick``, whichever is larger. A part of the memory above or,
            with some drivers, beside it. ``None`` when neither says anything.
        required_bytes: An estimate of the smallest memory limit this stretch survives: anonymous peak + shmem peak +
            page tables + file pages at the start. Surviving is not fast: at the very limit the kernel throws file
            pages out that are needed again, and 128 MiB more bring the full speed back.
        cuda_allocated_start_bytes: In live tensors on the monitored CUDA device. 0 if CUDA began only after the start.
        cuda_allocated_peak_bytes: Its peak.
        cuda_allocated_end_bytes: The same at the end.
        cuda_reserved_start_bytes: Held by torch's caching allocator on that device, live tensors included.
        cuda_reserved_peak_bytes: Its peak.
        cuda_reserved_end_bytes: The same at the end.
        storage_read_bytes: Fetched from storage by this process, through reads and page faults; 0 when everything
            came from a warm page cache.
        major_faults: Page faults that waited for storage. Many of them: slow, and usually too little memory.
        cgroup_limit_bytes: The tightest memory limit of the control groups the process is in.
        cgroup_peak_bytes: The highest usage of the group with that limit (without a limit: its own group). Includes
            the page cache, other processes, and the time before the start.
        num_samples: How many samples the peaks come from.
        longest_gap_seconds: The longest time between two of them.
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

    @property
    def anonymous_above_start_bytes(self) -> int | None:
        """How far anonymous memory rose above its level at the start, in bytes."""
        return _rise(self.anonymous_start_bytes, self.anonymous_peak_bytes)

    @property
    def host_above_start_bytes(self) -> int | None:
        """How far anonymous memory and shmem rose, each above its own start, added up, in bytes."""
        return _total(self.anonymous_above_start_bytes, _rise(self.shmem_start_bytes, self.shmem_peak_bytes))

    def as_dict(self) -> dict[str, int | float | bool | None]:
        """Return every field by its name, ready for JSON; ``MemoryPeaks(**peaks.as_dict())`` gives the peaks back."""
        return dataclasses.asdict(self)


class MemoryMonitor:
    """Measures the memory of this process while a ``with`` block runs, or between ``start`` and ``stop``.

        with MemoryMonitor("cuda:0") as monitor:
            restore()
        print(monitor.peaks.anonymous_above_start_bytes)

    Monitors may be nested and may run in several threads at once; each gives the exact figures of its own window. One
    monitor can measure many windows one after another. All running monitors share one sampling thread, which lives as
    long as any of them; a monitor that is never stopped keeps it alive to the end of the process.

    Starting resets two marks that the whole process can see: the kernel's VmHWM, and, where ``device`` is a CUDA
    device, torch's peak statistics of it (``torch.cuda.max_memory_allocated`` and its kin count from here on). What was
    reached so far is first kept for the monitors already running. Code that resets these marks itself inside a window
    takes the time before out of that window's RSS or CUDA peak.

    In a forked child a running monitor of the parent has stopped, without a thread: ``tick`` and ``stop`` do nothing
    and ``peaks`` are those up to the fork; it can be started again.

    Args:
        device: The device to measure next to the host. Only CUDA devices have figures; ``None`` measures the host
            alone. Measuring never initialises CUDA. ``"cuda"`` means the current device of the thread that starts the
            monitor, or, if CUDA is not initialised then, of the one that ends it.
        interval_seconds: The time between two samples, each of which costs some microseconds. When several monitors
            run, the shortest interval serves all.

    Raises:
        ValueError: The interval is not positive.
    """

    def __init__(self, device: torch.device | str | None = None, *, interval_seconds: float = 0.005) -> None:
        if not interval_seconds > 0:
            raise ValueError(f"interval_seconds must be positive, got {interval_seconds!r}.")
        self.device = device
        self.interval_seconds = interval_seconds
        self._window: _Window | None = None

    def start(self) -> None:
        """Begin a new window; the peaks of the one before are gone.

        Raises:
            RuntimeError: The monitor is already running.
        """
        if self.is_running:
            raise RuntimeError(
                "This MemoryMonitor is already running. Nested and concurrent windows need a MemoryMonitor each."
            )
        window = _Window(self.device, self.interval_seconds)
        _PROCESS.start(window)
        self._window = window

    def stop(self) -> MemoryPeaks:
        """End the window and return its peaks; on a stopped monitor, return them again.

        Raises:
            RuntimeError: The monitor was never started.
        """
        window = self._started_window()
        _PROCESS.stop(window)
        return _PROCESS.figures(window)

    def tick(self, pinned_bytes: int = 0) -> None:
        """Take a sample now, for every running monitor, in microseconds; do nothing when this one is not running.

        Call it where memory is known to be at its highest: such a maximum cannot fall between two samples. Any
        thread may call it.

        Args:
            pinned_bytes: How much the caller has page-locked by itself at this moment, outside torch's allocator.
        """
        window = self._window
        if window is not None and window.is_active:
            _PROCESS.tick(pinned_bytes)

    @property
    def is_running(self) -> bool:
        """Whether a window is open in this process."""
        return self._window is not None and self._window.is_active

    @property
    def peaks(self) -> MemoryPeaks:
        """The figures of the window: up to this moment while it runs, final after it.

        Raises:
            RuntimeError: The monitor was never started.
        """
        return _PROCESS.figures(self._started_window())

    def __enter__(self) -> MemoryMonitor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _started_window(self) -> _Window:
        if self._window is None:
            raise RuntimeError("This MemoryMonitor was never started: use it in a `with` statement or call start().")
        return self._window


class _Window:
    """What one monitor has seen between its start and now. Plain data: only :class:`_Process` touches a live one."""

    def __init__(self, device: torch.device | str | None, interval_seconds: float) -> None:
        self.device = device
        self.interval_seconds = interval_seconds
        self.is_active = False

    def begin(self, now: float, host: HostSample, status: HostStatus, *, rss_mark_was_reset: bool) -> None:
        """Take the levels at the start; the marks have just been reset."""
        self.start_seconds = self.last_seconds = now
        self.num_samples, self.longest_gap_seconds = 0, 0.0
        self.start_host, self.start_status = host, status
        self.host, self.status = host, status
        self.anonymous_peak_bytes = host.anonymous_bytes
        self.file_and_shmem_least_bytes = host.file_backed_bytes
        self.file_peak_bytes, self.shmem_peak_bytes = status.file_bytes, status.shmem_bytes
        self.page_table_bytes = status.page_table_bytes
        self.sampled_rss_peak_bytes = host.rss_bytes
        # A mark that could not be reset still tells the truth once it has risen: the new peak happened in here.
        self.rss_mark_floor_bytes = None if rss_mark_was_reset else status.peak_rss_bytes
        self.rss_mark_peak_bytes: int | None = None
        self.pinned_peak_bytes: int | None = None
        self.cuda_start: DeviceSample | None = None
        self.cuda_end: DeviceSample | None = None
        self.cuda_allocated_peak_bytes = self.cuda_reserved_peak_bytes = 0
        self.start_io, self.start_major_faults = read_io_bytes(), major_faults()
        self.cgroup = CgroupMemory.of_this_process()
        self.take_sample(now, host)
        self.take_status(status)
        self.take_slow_figures()
        self.cuda_start = self.cuda_end
        self.is_active = True

    def take_sample(self, now: float, host: HostSample) -> None:
        """Count one cheap sample; the only thing done at every tick."""
        self.num_samples += 1
        self.longest_gap_seconds = max(self.longest_gap_seconds, now - self.last_seconds)
        self.last_seconds = now
        self.host = host
        self.sampled_rss_peak_bytes = max(self.sampled_rss_peak_bytes, host.rss_bytes)
        self.anonymous_peak_bytes = _larger(self.anonymous_peak_bytes, host.anonymous_bytes)
        if self.file_and_shmem_least_bytes is not None and host.file_backed_bytes is not None:
            self.file_and_shmem_least_bytes = min(self.file_and_shmem_least_bytes, host.file_backed_bytes)

    def take_status(self, status: HostStatus) -> None:
        """Count the finer figures, VmHWM among them: what is lost when the mark is reset is kept here."""
        self.status = status
        self.file_peak_bytes = _larger(self.file_peak_bytes, status.file_bytes)
        self.shmem_peak_bytes = _larger(self.shmem_peak_bytes, status.shmem_bytes)
        self.page_table_bytes = _larger(self.page_table_bytes, status.page_table_bytes)
        self.rss_mark_peak_bytes = _larger(self.rss_mark_peak_bytes, status.peak_rss_bytes)

    def take_slow_figures(self) -> None:
        """Read what costs too much for a tick, or needs no sampling because its owner keeps a peak or a total."""
        self.pinned_peak_bytes = _larger(self.pinned_peak_bytes, pinned_bytes())
        if self.device is not None:
            self.device = resolve_cuda_device(self.device) or self.device
            now, peaks = cuda_memory(self.device), cuda_peaks(self.device)
            if now is not None and peaks is not None:
                self.cuda_end = now
                self.cuda_allocated_peak_bytes = max(self.cuda_allocated_peak_bytes, peaks.allocated_bytes)
                self.cuda_reserved_peak_bytes = max(self.cuda_reserved_peak_bytes, peaks.reserved_bytes)
        self.end_io, self.end_major_faults = read_io_bytes(), major_faults()
        self.cgroup_limit_bytes = self.cgroup.limit_bytes() if self.cgroup is not None else None
        self.cgroup_peak_bytes = self.cgroup.peak_bytes() if self.cgroup is not None else None

    def figures(self) -> MemoryPeaks:
        mark_bytes, floor_bytes = self.rss_mark_peak_bytes, self.rss_mark_floor_bytes
        rss_peak_is_exact = mark_bytes is not None and (floor_bytes is None or mark_bytes > floor_bytes)
        rss_peak_bytes = self.sampled_rss_peak_bytes
        if rss_peak_is_exact and mark_bytes is not None:
            # The kernel moves the mark lazily and from slack counters; it must not fall below what was seen.
            rss_peak_bytes = max(rss_peak_bytes, mark_bytes)
        upper_bound_bytes = None
        if mark_bytes is not None and self.file_and_shmem_least_bytes is not None:
            upper_bound_bytes = max(mark_bytes, rss_peak_bytes) - self.file_and_shmem_least_bytes
        cuda_start = self.cuda_start
        if cuda_start is None and self.cuda_end is not None:
            cuda_start = DeviceSample(0, 0)  # CUDA was initialised inside the window: nothing was held before.
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
            required_bytes=_total(
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
            major_faults=_rise(self.start_major_faults, self.end_major_faults),
            cgroup_limit_bytes=self.cgroup_limit_bytes,
            cgroup_peak_bytes=self.cgroup_peak_bytes,
            num_samples=self.num_samples,
            longest_gap_seconds=self.longest_gap_seconds,
        )


class _Sampler(threading.Thread):
    """The sampling thread: takes a sample at each interval until it is told to end."""

    def __init__(self, process: _Process, interval_seconds: float) -> None:
        super().__init__(name="lightning_memload-memory-sampler", daemon=True)
        self.interval_seconds = interval_seconds
        self._process = process
        self._wake = threading.Event()
        self._is_ending = False

    def set_interval(self, seconds: float) -> None:
        self.interval_seconds = seconds
        self._wake.set()

    def end(self) -> None:
        self._is_ending = True
        self._wake.set()

    def run(self) -> None:
        while not self._is_ending:
            if self._wake.wait(self.interval_seconds):
                self._wake.clear()
            else:
                self._process.sample()


class _Process:
    """The measuring that a process can do only once, shared by all its monitors: one instance, ``_PROCESS``.

    It is process-wide because what it owns is: VmHWM and the CUDA peaks are marks of the process, and resetting one
    for a new window would take it from the others. So before each reset every running window takes the mark's value
    into its own peak. One lock covers reading and counting: a sample taken before a window began must not get into it.
    """

    def __init__(self) -> None:
        # Reentrant: a signal handler or a finaliser that runs inside may use a monitor as well.
        self._lock = threading.RLock()
        self._meter = HostMeter()
        self._windows: list[_Window] = []
        self._sampler: _Sampler | None = None
        self._split_at: HostSample | None = None

    def start(self, window: _Window) -> None:
        with self._lock:
            # Between this reading and the reset lie some 0.3 ms, in which only the samples guard the outer windows.
            self._measure(self._windows)
            try:
                rss_mark_was_reset = reset_peak_rss()
                if window.device is not None:
                    reset_cuda_peaks(window.device)
                host, status = self._meter.read(), read_status()
                window.begin(time.perf_counter(), host, status, rss_mark_was_reset=rss_mark_was_reset)
                self._windows.append(window)
                self._adjust_sampler()
            except BaseException:  # No such CUDA device: leave nothing behind.
                self._remove(window)
                raise

    def stop(self, window: _Window) -> None:
        with self._turn() as has_lock:
            if not window.is_active:
                return
            try:
                if has_lock:
                    self._measure([window])
            finally:
                ended = self._remove(window)
        # A window begun meanwhile has a new thread.
        if ended is not None and ended is not threading.current_thread():
            ended.join()

    def sample(self) -> None:
        """Tick, unless a thread has the lock: that one measures by itself, or a signal handler interrupted it.

        The handler may wait for the sampling thread, which calls this, so this must not wait for the lock.
        """
        if self._lock.acquire(blocking=False):
            try:
                self.tick()
            finally:
                self._lock.release()

    def tick(self, told_pinned_bytes: int = 0) -> None:
        with self._lock:
            if not self._windows:
                return
            host, now = self._meter.read(), time.perf_counter()
            for window in self._windows:
                window.take_sample(now, host)
                if told_pinned_bytes > 0:
                    window.pinned_peak_bytes = _larger(window.pinned_peak_bytes, told_pinned_bytes)
            if self._has_moved(host):
                self._take_status(host)

    def figures(self, window: _Window) -> MemoryPeaks:
        with self._turn() as has_lock:
            if has_lock and window.is_active:
                self._measure([window])
            return window.figures()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[bool]:
        """Waits for the lock, but not for ever; tells whether it got it.

        The thread that has the lock may be interrupted by a signal handler that waits for this thread: for the end of
        a save in the background, whose figures are then those of its last sample.
        """
        has_lock = self._lock.acquire(timeout=_LONGEST_TURN_SECONDS)
        try:
            yield has_lock
        finally:
            if has_lock:
                self._lock.release()

    def abandon(self) -> None:
        """End all windows without the lock, which in a forked child may be held by a thread that is gone."""
        for window in self._windows:
            window.is_active = False
        # Right after the fork the descriptor is surely still the one that was opened; later it might not be.
        self._meter.close()

    def _measure(self, windows: list[_Window]) -> None:
        """Bring windows up to date in every figure, the sampled ones for all that are running."""
        if not windows:
            return
        self.tick()
        self._take_status(self._meter.read())
        for window in windows:
            window.take_slow_figures()

    def _take_status(self, host: HostSample) -> None:
        status = read_status()
        self._split_at = host
        for window in self._windows:
            window.take_status(status)

    def _has_moved(self, host: HostSample) -> bool:
        if host.file_backed_bytes is None:
            return False
        last = self._split_at
        return (
            last is None
            or last.file_backed_bytes is None
            or abs(host.rss_bytes - last.rss_bytes) >= _SPLIT_STEP_BYTES
            or abs(host.file_backed_bytes - last.file_backed_bytes) >= _SPLIT_STEP_BYTES
        )

    def _remove(self, window: _Window) -> _Sampler | None:
        """Take a window out; return the sampling thread if it was told to end with it."""
        window.is_active = False
        if window in self._windows:
            self._windows.remove(window)
        if self._windows:
            self._adjust_sampler()
            return None
        self._meter.close()
        self._split_at = None
        ended, self._sampler = self._sampler, None
        if ended is not None:
            ended.end()
        return ended

    def _adjust_sampler(self) -> None:
        interval_seconds = min(window.interval_seconds for window in self._windows)
        if self._sampler is None:
            sampler = _Sampler(self, interval_seconds)
            # Where no thread can be started, as while the interpreter shuts down, the kernel's marks and the samples
            # at the ends of each window remain.
            # Known before it runs: a signal handler that interrupts here must not start another one.
            self._sampler = sampler
            try:
                sampler.start()
            except RuntimeError:
                self._sampler = None
        elif self._sampler.interval_seconds != interval_seconds:
            self._sampler.set_interval(interval_seconds)


_PROCESS = _Process()


def _begin_anew_in_child() -> None:
    global _PROCESS
    _PROCESS.abandon()
    _PROCESS = _Process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew_in_child)


def _larger(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)


def _rise(start: int | None, later: int | None) -> int | None:
    return None if start is None or later is None else later - start


def _total(*parts: int | None) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
