"""Measures the time and the memory of a restore: of its phases, one after another, and of the whole."""

from __future__ import annotations

import time

import torch

from lightning_memload.memory import MemoryMonitor, MemorySeries, SeriesRecorder
from lightning_memload.report import PhaseReport
from lightning_memload.transfer import TransferStats

__all__ = ["PhaseMeter"]


class PhaseMeter:
    """Measures the phases of one restore. The figures of the streaming come from the caller.

    Args:
        device: The device to measure next to the host.

    Attributes:
        total: The monitor of the whole restore.
        reports: The reports of the phases that have ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = MemoryMonitor(device)
        self.reports: list[PhaseReport] = []
        self._device = device
        self._phase: tuple[str, float, MemoryMonitor] | None = None
        self._beside: tuple[float, MemoryMonitor] | None = None
        self._started = time.perf_counter()
        self._counted = TransferStats()

    def start(self) -> None:
        """Starts the measurement of the whole. If it is running, it starts again, without the phases so far."""
        self.stop(self._counted)
        self.reports.clear()
        self._started = time.perf_counter()
        self.total.start()

    def begin(self, name: str, stats: TransferStats) -> None:
        """Ends the current phase and begins the next one.

        Args:
            name: The name of the next phase.
            stats: The figures of the streaming since the beginning of the restore.
        """
        self._end(stats)
        monitor = MemoryMonitor(self._device)
        seconds = time.perf_counter() - self._started
        monitor.start()
        self._phase = (name, seconds, monitor)

    def begin_beside(self, name: str, stats: TransferStats) -> None:
        """Ends the measurement of the whole, and begins a phase beside the training, which :meth:`stop` ends.

        Args:
            name: The name of the phase.
            stats: The figures of the streaming since the beginning of the restore.
        """
        self.stop(stats)
        self.begin(name, stats)
        if self._phase is not None:
            self._beside = self._phase[1:]

    def stop(self, stats: TransferStats) -> None:
        """Ends the current phase and the measurement of the whole. A second call does nothing."""
        self._end(stats)
        if self.total.is_running:
            self.total.stop()

    def series(self) -> MemorySeries:
        """Return the memory over time of the whole, followed by that of the phase beside the training."""
        if self._beside is None:
            return self.total.series
        recorder = SeriesRecorder(self.total.interval_seconds)
        for start, monitor in ((0.0, self.total), self._beside):
            for seconds, levels in monitor.series:
                recorder.add(start + seconds, levels)
        return recorder.series()

    def _end(self, stats: TransferStats) -> None:
        if self._phase is None:
            return
        name, start_seconds, monitor = self._phase
        self._phase = None
        monitor.stop()
        self.reports.append(
            PhaseReport(
                name,
                monitor.peaks.seconds,
                stats.bytes_read - self._counted.bytes_read,
                stats.seconds - self._counted.seconds,
                monitor.peaks,
                start_seconds,
            )
        )
        self._counted = stats
