"""Reports the time and the memory of a restore or a save, for people and for loggers."""

from lightning_memload.report.plot import compare_figure, compare_plots, restore_figure
from lightning_memload.report.restore_report import MEMORY_FIGURES, Detail, PhaseReport, RankMaximum, RestoreReport
from lightning_memload.report.save_report import SaveReport

__all__ = [
    "MEMORY_FIGURES",
    "Detail",
    "PhaseReport",
    "RankMaximum",
    "RestoreReport",
    "SaveReport",
    "compare_figure",
    "compare_plots",
    "restore_figure",
]
