"""What a restore cost, for people and for loggers."""

from lightning_memload.report.report import MEMORY_FIGURES, PhaseReport, RankMaximum, RestoreReport

__all__ = ["MEMORY_FIGURES", "PhaseReport", "RankMaximum", "RestoreReport"]
