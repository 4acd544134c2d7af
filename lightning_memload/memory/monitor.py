"""Measures the memory peaks of host and device while a part of a program runs.

The idea: the kernel keeps an exact and resettable peak for RSS only, and RSS includes mapped files. Anonymous memory,
the main figure, has no such mark. It is sampled every few milliseconds and where the measured code calls
:meth:`MemoryMonitor.tick`. An upper bound from the exact RSS peak limits the error of sampling. Peaks belong to the
process, not to a thread: memory of other threads is included. Child processes and swapped-out pages are not included.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_memload.memory.device import reset_cuda_peaks
from lightning_memload.memory.host import HostMeter, HostSample, read_status, reset_peak_rss
from lightning_memload.memory.peaks import MemoryPeaks
from lightning_memload.memory.series import MemorySeries
from lightning_memload.memory.window import Window

if TYPE_CHECKING:
    from types import TracebackType

    import torch

__all__ = ["MemoryMonitor"]

# Splitting "shared" into files and shmem takes five times as long as a sample. So the split is read again only when the
# memory has changed by this much, and the error of a file or shmem peak is at most this much.
_SPLIT_STEP_BYTES = 1 << 20

# A measurement takes some milliseconds. A thread that holds the lock for longer is interrupted by a signal handler.
_LONGEST_TURN_SECONDS = 5.0


class MemoryMonitor:
    """Measures the memory of this process while a ``with`` block runs, or between ``start`` and ``stop``.

        with MemoryMonitor("cuda:0") as monitor:
            restore()
        print(monitor.peaks.anonymous_above_start_bytes)

    Monitors may be nested and may run in several threads at once. Each one reports the exact figures of its own window.
    One monitor can measure many windows one after another. All running monitors share one sampling thread, which ends
    with the last of them. A monitor that is never stopped keeps the thread running until the process ends.

    A start resets two marks that the whole process can read: the kernel's VmHWM and, where ``device`` is a CUDA
    device, torch's peak statistics of it (``torch.cuda.max_memory_allocated`` and similar functions count from then
    on). Monitors that are already running keep the peaks reached before the reset. If other code resets these marks
    inside a window, the RSS or CUDA peak of that window no longer covers the time before the reset.

    In a forked child, a monitor that was running in the parent is stopped and has no thread: ``tick`` and ``stop`` do
    nothing, and ``peaks`` are the figures up to the fork. The monitor can be started again.

    Args:
        device: The device to measure next to the host. Only CUDA devices have figures. ``None`` measures the host
            alone. Measuring never initialises CUDA. ``"cuda"`` means the current device of the thread that starts the
            monitor or, if CUDA is not initialised at that time, of the thread that stops it.
        interval_seconds: The time between two samples. A sample takes some microseconds. When several monitors run,
            the shortest interval applies to all.

    Raises:
        ValueError: The interval is not positive.
    """

    def __init__(self, device: torch.device | str | None = None, *, interval_seconds: float = 0.005) -> None:
        if not interval_seconds > 0:
            raise ValueError(f"interval_seconds must be positive, got {interval_seconds!r}.")
        self.device = device
        self.interval_seconds = interval_seconds
        self._window: Window | None = None

    def start(self) -> None:
        """Begin a new window and drop the peaks of the previous one.

        Raises:
            RuntimeError: The monitor is already running.
        """
        if self.is_running:
            raise RuntimeError(
                "This MemoryMonitor is already running. Nested and concurrent windows need a MemoryMonitor each."
            )
        window = Window(self.device, self.interval_seconds)
        _PROCESS.start(window)
        self._window = window

    def stop(self) -> MemoryPeaks:
        """End the window and return its peaks. A monitor that is stopped returns them again.

        Raises:
            RuntimeError: The monitor was never started.
        """
        window = self._started_window()
        _PROCESS.stop(window)
        return _PROCESS.figures(window)

    def tick(self, pinned_bytes: int = 0) -> None:
        """Take a sample for every running monitor, in microseconds. Does nothing when this monitor is not running.

        Call it where memory is known to be at a maximum, so that the maximum cannot lie between two samples. Any
        thread may call it.

        Args:
            pinned_bytes: Memory that the caller has page-locked itself at this moment, outside torch's allocator.
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
        """The figures of the window: up to this moment while it runs, final once it has ended.

        Raises:
            RuntimeError: The monitor was never started.
        """
        return _PROCESS.figures(self._started_window())

    @property
    def series(self) -> MemorySeries:
        """Memory over time since the start, in at most 2,000 points for any duration.

        Raises:
            RuntimeError: The monitor was never started.
        """
        return _PROCESS.series(self._started_window())

    def __enter__(self) -> MemoryMonitor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _started_window(self) -> Window:
        if self._window is None:
            raise RuntimeError("This MemoryMonitor was never started: use it in a `with` statement or call start().")
        return self._window


class _Sampler(threading.Thread):
    """The sampling thread: takes a sample at each interval until :meth:`end`."""

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
    """The process-wide meter that all monitors share. Its only instance is ``_PROCESS``.

    VmHWM and the CUDA peaks are marks of the whole process, so a reset for a new window affects the other windows.
    Before each reset, every running window records the value of the mark. One lock covers reading and recording: a
    sample taken before the start of a window must not enter that window.
    """

    def __init__(self) -> None:
        # Reentrant: a signal handler or a finaliser may use a monitor while this thread holds the lock.
        self._lock = threading.RLock()
        self._meter = HostMeter()
        self._windows: list[Window] = []
        self._sampler: _Sampler | None = None
        self._split_at: HostSample | None = None

    def start(self, window: Window) -> None:
        with self._lock:
            # In the 0.3 ms between this reading and the reset, the outer windows have only their samples.
            self._measure(self._windows)
            try:
                rss_mark_was_reset = reset_peak_rss()
                if window.device is not None:
                    reset_cuda_peaks(window.device)
                host, status = self._meter.read(), read_status()
                window.begin(time.perf_counter(), host, status, rss_mark_was_reset=rss_mark_was_reset)
                self._windows.append(window)
                self._adjust_sampler()
            except BaseException:  # For example, there is no such CUDA device. No window may stay registered.
                self._remove(window)
                raise

    def stop(self, window: Window) -> None:
        with self._turn() as has_lock:
            if not window.is_active:
                return
            try:
                if has_lock:
                    self._measure([window])
            finally:
                ended = self._remove(window)
        # A window that has begun in the meantime has a new thread.
        if ended is not None and ended is not threading.current_thread():
            ended.join()

    def sample(self) -> None:
        """Take a sample unless another thread holds the lock.

        That thread takes a measurement, or a signal handler has interrupted it. The handler may wait for the sampling
        thread, which calls this method, so this method must not wait for the lock.
        """
        if self._lock.acquire(blocking=False):
            try:
                self.tick()
            finally:
                self._lock.release()

    def tick(self, pinned_bytes: int = 0) -> None:
        with self._lock:
            if not self._windows:
                return
            host, now = self._meter.read(), time.perf_counter()
            for window in self._windows:
                window.take_sample(now, host)
                if pinned_bytes > 0:
                    window.take_pinned(pinned_bytes)
            if self._has_moved(host):
                self._take_status(host)
            for window in self._windows:
                window.record(now)

    def series(self, window: Window) -> MemorySeries:
        with self._turn():
            return window.recorder.series()

    def figures(self, window: Window) -> MemoryPeaks:
        with self._turn() as has_lock:
            if has_lock and window.is_active:
                self._measure([window])
            return window.figures()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[bool]:
        """Wait for the lock for a limited time. Yields whether the lock was acquired.

        The thread that holds the lock may be interrupted by a signal handler that waits for this thread, namely for
        the end of a save in the background. The figures of that save are then those of its last sample.
        """
        has_lock = self._lock.acquire(timeout=_LONGEST_TURN_SECONDS)
        try:
            yield has_lock
        finally:
            if has_lock:
                self._lock.release()

    def abandon(self) -> None:
        """End all windows without the lock: in a forked child the thread that holds it may not exist."""
        for window in self._windows:
            window.is_active = False
        # Right after the fork the descriptor is still the one that was opened. Later its number may be reused.
        self._meter.close()

    def _measure(self, windows: list[Window]) -> None:
        """Update every figure of the given windows, and the sampled figures of all running windows."""
        if not windows:
            return
        self.tick()
        self._take_status(self._meter.read())
        for window in windows:
            window.take_slow_figures()
            window.record(window.last_seconds)

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

    def _remove(self, window: Window) -> _Sampler | None:
        """Remove a window. Returns the sampling thread if it ends with this window."""
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
            # Set before the thread runs: a signal handler that interrupts here must not start another one.
            self._sampler = sampler
            try:
                sampler.start()
            except RuntimeError:
                # No thread can be started, for example while the interpreter shuts down. The kernel's marks and the
                # samples at both ends of each window remain.
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
