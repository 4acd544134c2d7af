"""The figures of saves: measured where they are wanted, and brought to the loggers of the thread that trains."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_memload.memory import MemoryMonitor
from lightning_memload.report import SaveReport
from lightning_memload.save import SaveStats

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["MeasuredSave", "SaveLog", "SaveObserver", "register", "step_of_loggers"]

SaveObserver = Callable[[SaveReport], object]


class MeasuredSave:
    """Measures one save from now on, if there are observers.

    Args:
        checkpoint: What is saved.
        observers: Who is told.
        blocks: Whether training waits for what the calling thread does.
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
        """Tells the observers."""
        self.stop()
        for observer in self._observers:
            observer(
                SaveReport(stats, self._monitor.peaks, blocked_seconds if self._blocks else None, self._global_step)
            )

    def stop(self) -> None:
        """Ends the measurement, of a save that failed say. Twice is fine."""
        if self._monitor.is_running:
            self._monitor.stop()


# A save that takes longer is worth a line each time.
_LONG_SECONDS = 1.0
# Below this, twice as slow is the noise of a disk.
_NOISE_SECONDS = 0.1


class SaveLog:
    """Tells people of a save at once, and the loggers of a Trainer in the thread that made this object.

    People get a line for the first save, and then only for one that takes more than a second, or twice as long as the
    one that they were told of last. Loggers get every save.

    Args:
        trainer: Whose loggers get ``memload/save_...``.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer: pl.Trainer | None = trainer
        self._thread = threading.get_ident()
        self._reports: deque[SaveReport] = deque()
        self._told_seconds: float | None = None

    def add(self, report: SaveReport) -> None:
        """Takes the figures of a save, in any thread."""
        seconds = report.stats.seconds
        if self._told_seconds is None or seconds > min(_LONG_SECONDS, max(2 * self._told_seconds, _NOISE_SECONDS)):
            self._told_seconds = seconds
            rank_zero_info(report.line())
        if self._trainer is None:
            return
        self._reports.append(report)
        if threading.get_ident() == self._thread:
            self.flush()

    def flush(self) -> None:
        """Logs what has come. Loggers know nothing of threads, so only the one that made this object may call it."""
        while (trainer := self._trainer) is not None:
            try:
                report = self._reports.popleft()
            except IndexError:
                return  # a signal handler that saves may have taken the last one
            step = step_of_loggers(trainer, report.global_step)
            for logger in trainer.loggers:
                logger.log_metrics(report.scalars(), step=step)

    def close(self) -> None:
        """Logs what has come, and no more: the loggers are about to end. People are still told."""
        self.flush()
        self._trainer = None


def step_of_loggers(trainer: pl.Trainer, step: int | None) -> int | None:
    """The step at which loggers get a figure of a training: never ahead of what they get next.

    Lightning (2.5, 2.6) logs at the number of batches after which an optimizer stepped, the current one not counted,
    and so do its own callbacks. ``global_step`` is ahead of that by one, and with several optimizers by far: a logger
    that wants steps to grow would drop what the module logs next.

    Args:
        trainer: Whose loggers.
        step: The ``global_step`` to which the figure belongs.
    """
    num_batches = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return step if step is None or num_batches is None else min(step, num_batches)


def register(observers: list[Any], observer: Any) -> Callable[[], None]:
    """Adds an observer; returns a function that removes it again, also when called twice."""
    observers.append(observer)

    def remove() -> None:
        if observer in observers:
            observers.remove(observer)

    return remove
