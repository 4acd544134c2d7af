"""Measures saves, and logs their figures in the training thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_memload.memory import MemoryMonitor
from lightning_memload.report import Detail, SaveReport
from lightning_memload.save import SaveStats

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["MeasuredSave", "SaveLog", "SaveObserver", "register", "step_of_loggers"]

SaveObserver = Callable[[SaveReport], object]


class MeasuredSave:
    """Measures one save from now on, if there are observers.

    Args:
        checkpoint: The checkpoint that is saved.
        observers: Functions that receive the figures.
        blocks: Whether training waits for the calling thread.
    """

    def __init__(self, checkpoint: Any, observers: tuple[SaveObserver, ...], *, blocks: bool) -> None:
        step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
        self._global_step = step if isinstance(step, int) else None
        self._observers = observers
        self._blocks = blocks
        self._monitor = MemoryMonitor()
        if observers:
            self._monitor.start()

    def report(self, stats: SaveStats, blocked_seconds: float) -> None:
        """Ends the measurement and calls the observers."""
        self.stop()
        for observer in self._observers:
            observer(
                SaveReport(stats, self._monitor.peaks, blocked_seconds if self._blocks else None, self._global_step)
            )

    def stop(self) -> None:
        """Ends the measurement, for example of a save that failed. A second call does nothing."""
        if self._monitor.is_running:
            self._monitor.stop()


# A save that takes longer gets a line each time.
_LONG_SECONDS = 1.0
# Below this, a factor of two is the noise of a disk.
_NOISE_SECONDS = 0.1


class SaveLog:
    """Prints a line about a save immediately, and logs it to the loggers of a Trainer in the thread of this object.

    The first save gets a line. After that, a save gets a line if it takes more than a second, or twice as long as the
    last one with a line, or if snapshots begin or end with it. Every save is logged to the loggers. The thread of this
    object is the one that created it.

    Args:
        trainer: Its loggers get ``memload/save_...``.
        detail: How many of these figures.
    """

    def __init__(self, trainer: pl.Trainer, detail: Detail = "summary") -> None:
        self._trainer: pl.Trainer | None = trainer
        self._detail: Detail = detail
        self._thread = threading.get_ident()
        self._reports: deque[SaveReport] = deque()
        self._told_seconds: float | None = None
        self._has_snapshots = False

    def add(self, report: SaveReport) -> None:
        """Adds the figures of a save. Any thread may call it."""
        seconds = report.stats.seconds
        is_other_way, self._has_snapshots = self._has_snapshots != (has := report.stats.snapshot_bytes > 0), has
        is_slow = seconds > min(_LONG_SECONDS, max(2 * (self._told_seconds or 0), _NOISE_SECONDS))
        if self._told_seconds is None or is_slow or is_other_way:
            self._told_seconds = seconds
            rank_zero_info(report.line())
        if self._trainer is None:
            return
        self._reports.append(report)
        if threading.get_ident() == self._thread:
            self.flush()

    def flush(self) -> None:
        """Logs the added figures. Only the thread of this object may call it: loggers are not thread-safe."""
        while (trainer := self._trainer) is not None:
            try:
                report = self._reports.popleft()
            except IndexError:
                return  # A signal handler that saves may have taken the last one.
            step = step_of_loggers(trainer, report.global_step)
            for logger in trainer.loggers:
                logger.log_metrics(report.scalars(self._detail), step=step)

    def close(self) -> None:
        """Logs the added figures. Later saves get lines only, since the loggers are about to end."""
        self.flush()
        self._trainer = None


def step_of_loggers(trainer: pl.Trainer, step: int | None) -> int | None:
    """Return the step at which a figure of a training is logged. It is never greater than the step of the next log.

    Lightning (2.5, 2.6) and its callbacks log at the number of batches after which an optimizer stepped, without the
    current batch. ``global_step`` is greater by one, and by much more with several optimizers. A logger that requires
    increasing steps would then drop the next figures of the module.

    Args:
        trainer: The Trainer of the loggers.
        step: The ``global_step`` of the figure.
    """
    num_batches = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return step if step is None or num_batches is None else min(step, num_batches)


def register(observers: list[Any], observer: Any) -> Callable[[], None]:
    """Adds an observer. Returns a function that removes it, whose second call does nothing."""
    observers.append(observer)

    def remove() -> None:
        if observer in observers:
            observers.remove(observer)

    return remove
