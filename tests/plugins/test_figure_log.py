"""Loggers that take pictures get one of each restore, by what they can do; none of them can end a run."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from tests.lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tests.lightning.pytorch.loggers.logger import Logger

from lightning_memload import MemoryEfficientRestore, RestoreReport
from lightning_memload.plugins import figure_log
from tests.plugins.harness import TRUSTED, Case, TinyModule, make_trainer, write_checkpoint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


class Taking(Logger):
    """Keeps what it is given. Its other methods come from the tests."""

    name = version = "taking"

    def __init__(self, experiment: Any = None) -> None:
        super().__init__()
        self.given: list[Any] = []
        self._experiment = experiment

    @property
    def experiment(self) -> Any:
        return self._experiment

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "memload/seconds" in metrics:
            self.given.append(("metrics", step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Images(Taking):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.given.append((key, images[0].size, step))


class Artifacts(Taking):
    def log_artifact(self, path: str) -> None:
        self.given.append((os.path.basename(path), Path(path).read_bytes()[:4]))


class Failing(Taking):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        raise OSError("no connection")


class Without(Taking):
    @property
    def experiment(self) -> Any:
        raise AttributeError("none")


class Runs:
    """An experiment whose methods want a run, as a tracking server's."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
        self.given.append((run_id, type(figure).__name__, artifact_file))


class Figures:
    def __init__(self) -> None:
        self.given: list[Any] = []

    def log_figure(self, figure_name: str | None = None, figure: Any = None, step: int | None = None) -> None:
        self.given.append((figure_name, type(figure).__name__, step))


class RunFiles:
    def __init__(self) -> None:
        self.given: list[Any] = []

    def log_artifact(self, run_id: str, local_path: str) -> None:
        self.given.append((run_id, Path(local_path).read_bytes()[:4]))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(Case(TinyModule), tmp_path_factory.mktemp("checkpoint"))


def resume(path: Path, folder: Path, loggers: Any, **arguments: Any) -> RestoreReport:
    restore = MemoryEfficientRestore(**arguments)
    trainer = make_trainer(folder, [restore], max_epochs=5, logger=loggers)
    trainer.fit(TinyModule(), ckpt_path=path, **TRUSTED)
    assert restore.report is not None
    return restore.report


def test_each_logger_gets_what_it_takes(path: Path, tmp_path: Path) -> None:
    runs, figures, files = Runs(), Figures(), RunFiles()
    loggers = [Images(), Artifacts(), Taking(runs), Taking(figures), Taking(files), Taking(), Without()]
    for logger in loggers[2:5]:
        logger.run_id = "r1"
    resume(path, tmp_path, [*loggers, CSVLogger(tmp_path)], log="all")
    (_, step) = loggers[0].given[0]
    ((key, size, of_image),) = loggers[0].given[1:]
    assert (key, of_image) == ("memload/restore", step)
    assert size[0] > 800
    assert loggers[1].given[1:] == [("memload-restore.png", b"\x89PNG")]
    assert runs.given == [("r1", "Figure", "memload/restore.png")]
    assert figures.given == [("memload/restore", "Figure", step)]
    assert files.given == [("r1", b"\x89PNG")]
    assert [len(logger.given) for logger in loggers[2:]] == [1] * 5


def test_tensorboard_gets_an_image(path: Path, tmp_path: Path) -> None:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    resume(path, tmp_path, logger, log="all")
    events = accumulator.EventAccumulator(str(logger.log_dir)).Reload()
    assert events.Tags()["images"] == ["memload/restore"]
    (image,) = events.Images("memload/restore")
    (scalar,) = events.Scalars("memload/seconds")
    assert image.step == scalar.step


def test_a_logger_that_fails_is_one_warning(path: Path, tmp_path: Path) -> None:
    loggers = [Failing(), Images(), Failing()]
    with pytest.warns(UserWarning, match="picture of the restore could not be logged") as caught:
        resume(path, tmp_path, loggers, log="all")
    texts = [str(warning.message) for warning in caught if "picture" in str(warning.message)]
    assert len(texts) == 1
    assert texts[0].count("Failing: OSError: no connection") == 2
    assert len(loggers[1].given) == 2


@pytest.mark.parametrize("arguments", [{}, {"log": "summary"}, {"log": False}], ids=str)
def test_a_short_restore_has_none(path: Path, tmp_path: Path, arguments: Any) -> None:
    """Drawing takes longer than the restore. With False there is none at all."""
    logger = Images()
    report = resume(path, tmp_path, logger, **arguments)
    assert report.total.seconds < 1
    assert len(logger.given) == (arguments.get("log", True) is not False)


def test_a_longer_restore_has_one(path: Path, tmp_path: Path) -> None:
    logger = Images()
    trainer = make_trainer(tmp_path, [], logger=logger)
    report = resume(path, tmp_path, False, log=False)
    long = dataclasses.replace(report, total=dataclasses.replace(report.total, seconds=1.5))
    figure_log.log_picture(trainer, long, "summary", 7)
    assert [given[::2] for given in logger.given] == [("memload/restore", 7)]
    figure_log.log_picture(trainer, report, "summary", 7)
    assert len(logger.given) == 1


def test_only_rank_zero_draws(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Images()
    trainer = make_trainer(tmp_path, [], logger=logger)
    report = resume(path, tmp_path, False, log=False)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    figure_log.log_picture(trainer, report, "all", 7)
    assert logger.given == []


def test_without_matplotlib_there_is_none(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Images()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    resume(path, tmp_path, logger, log="all")
    assert len(logger.given) == 1


def test_fast_dev_run_draws_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figure_log, "restore_figure", drawn.append)
    restore = MemoryEfficientRestore(log="all")
    trainer = make_trainer(tmp_path, [restore], logger=Images(), fast_dev_run=True)
    trainer.fit(TinyModule(), ckpt_path=path, **TRUSTED)
    assert restore.report is not None
    assert drawn == []
