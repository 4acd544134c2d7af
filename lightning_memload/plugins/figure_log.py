"""Gives the picture of a restore to the loggers of a Trainer that take figures, images or files.

A logger is asked for what it can do, and not for its class. Nothing here can end a run: a logger that fails, or a
picture that cannot be drawn, is a warning.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import os
import tempfile
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.report import Detail, RestoreReport, restore_figure
from lightning_memload.report.picture_style import styled

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["PICTURE", "log_picture"]

# Its name in the loggers.
PICTURE = "memload/restore"
# Drawing takes 0.1 to 0.3 seconds. A restore that is shorter than this would become noticeably longer.
_SHORTEST_SECONDS = 1.0


def log_picture(trainer: pl.Trainer, report: RestoreReport, detail: Detail, step: int | None) -> None:
    """Log memory over time of a restore as a picture, once, on rank 0, if matplotlib is installed.

    Args:
        trainer: Its loggers get the picture.
        report: The restore.
        detail: ``"all"``: of every restore. ``"summary"``: of a restore that took at least a second.
        step: The step of the figures.
    """
    is_short = detail != "all" and report.total.seconds < _SHORTEST_SECONDS
    # The logger of fast_dev_run accepts every call and does nothing.
    if is_short or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return
    takers = [logger for logger in trainer.loggers if _way(logger) is not None]
    if not takers or importlib.util.find_spec("matplotlib") is None:
        return
    failures = []
    for logger in takers:
        try:
            # In the style, since some parts are only made while a logger draws. A figure for each: it may change it.
            with styled("light"):
                _give(logger, restore_figure(report), step)
        except Exception as error:
            failures.append(f"{type(logger).__name__}: {type(error).__name__}: {error}")
    if failures:
        rank_zero_warn(
            f"The picture of the restore could not be logged ({'; '.join(failures)}). The run is not affected. "
            "MemoryEfficientRestore(log=False) logs none."
        )


def _way(logger: Any) -> str | None:
    """The name of the method that takes a picture, ``None`` if there is none."""
    owners = ((logger, "log_image"), (_experiment(logger), "add_figure"), (_experiment(logger), "log_figure"))
    files = ((logger, "log_artifact"), (_experiment(logger), "log_artifact"))
    for owner, name in (*owners, *files):
        if callable(getattr(owner, name, None)):
            return name
    return None


def _experiment(logger: Any) -> Any:
    try:
        return logger.experiment
    except Exception:
        return None  # A logger without such an object, or whose service does not answer.


def _give(logger: Any, figure: Any, step: int | None) -> None:
    way, experiment = _way(logger), _experiment(logger)
    if way == "log_image":
        from PIL import Image

        logger.log_image(key=PICTURE, images=[Image.open(io.BytesIO(_png(figure)))], step=step)
    elif way == "add_figure":
        experiment.add_figure(PICTURE, figure, global_step=step)
    elif way == "log_figure":
        if "run_id" in inspect.signature(experiment.log_figure).parameters:
            experiment.log_figure(logger.run_id, figure, f"{PICTURE}.png")
        else:
            experiment.log_figure(figure_name=PICTURE, figure=figure, step=step)
    elif way is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, f"{PICTURE.replace('/', '-')}.png")
            with open(path, "wb") as file:
                file.write(_png(figure))
            method = getattr(logger, way, None) or getattr(experiment, way)
            method(*([logger.run_id] if "run_id" in inspect.signature(method).parameters else []), path)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()
