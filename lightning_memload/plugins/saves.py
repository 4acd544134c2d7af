"""The figures of saves, on their way from the thread that saved to the loggers of the one that trains."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_memload.report import SaveReport

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["SaveLog"]


class SaveLog:
    """Tells people of a save at once, and the loggers of a Trainer in the thread that made this object.

    Args:
        trainer: Whose loggers get ``memload/save_...``.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer: pl.Trainer | None = trainer
        self._thread = threading.get_ident()
        self._reports: deque[SaveReport] = deque()

    def add(self, report: SaveReport) -> None:
        """Takes the figures of a save, in any thread."""
        rank_zero_info(report.line())
        if self._trainer is None:
            return
        self._reports.append(report)
        if threading.get_ident() == self._thread:
            self.flush()

    def flush(self) -> None:
        """Logs what has come. Loggers know nothing of threads, so only the one that made this object may call it."""
        while self._trainer is not None and self._reports:
            report = self._reports.popleft()
            for logger in self._trainer.loggers:
                logger.log_metrics(report.scalars(), step=report.global_step)

    def close(self) -> None:
        """Logs what has come, and no more: the loggers are about to end. People are still told."""
        self.flush()
        self._trainer = None
