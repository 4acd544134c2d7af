"""Which saves people are told of: a run of thousands of small ones prints one line. At which steps loggers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.loggers.logger import Logger

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore
from lightning_memload.memory import MemoryMonitor
from lightning_memload.plugins.save_log import SaveLog
from lightning_memload.report import SaveReport
from lightning_memload.save import SaveStats
from tests.plugins.harness import TRUSTED, make_trainer


def told(seconds: list[float], folder: Path, caplog: pytest.LogCaptureFixture) -> list[float]:
    """The seconds of the saves that have a line, of saves that take so long."""
    with MemoryMonitor() as monitor:
        pass
    log = SaveLog(make_trainer(folder))
    lines = []
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        for number, value in enumerate(seconds):
            caplog.clear()
            stats = SaveStats(f"{number}.ckpt", 5 << 20, 0, 5 << 20, 1, value, 0.0, value, 0.0, 1, 0, True)
            log.add(SaveReport(stats, monitor.peaks, value, number))
            lines += [value] * len(caplog.records)
    return lines


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        ([0.3] * 50, [0.3]),
        ([0.01, 0.09, 0.02, 0.09], [0.01]),  # twice of nothing
        ([0.3, 0.5, 0.7, 0.7, 1.5, 0.3], [0.3, 0.7, 1.5]),
        ([3.0, 2.0, 0.9, 2.0], [3.0, 2.0, 2.0]),
    ],
)
def test_the_first_and_the_slow_ones(
    seconds: list[float], lines: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert told(seconds, tmp_path, caplog) == lines


class Growing(Logger):
    """Keeps the steps of what it is given, in their order."""

    name = version = "growing"

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, bool]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.given.append((step, "loss" in metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class TwoOptimizers(L.LightningModule):
    """Two steps in each batch, both of which ``global_step`` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.second(self.first(torch.ones(1, 3))).square().sum()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(4, 1))  # type: ignore[arg-type]


class SaveEach(L.Callback):
    """Saves after every batch, before Lightning logs what the batch gave."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("asynchronous_save", [False, True])
def test_no_figure_is_ahead_of_what_the_module_logs_next(tmp_path: Path, asynchronous_save: bool) -> None:
    path = tmp_path / "a.ckpt"
    for max_epochs, ckpt_path in ((2, None), (4, path)):
        logger = Growing()
        callbacks = [MemoryEfficientRestore(asynchronous_save=asynchronous_save), SaveEach(path)]
        trainer = make_trainer(tmp_path, callbacks, max_epochs=max_epochs, logger=logger, log_every_n_steps=1)
        trainer.fit(TwoOptimizers(), ckpt_path=ckpt_path, **TRUSTED)
        assert trainer.global_step == max_epochs * 8
        losses = [step for step, is_loss in logger.given if is_loss]
        assert losses == list(range(max_epochs * 4 - 8, max_epochs * 4))
        for number, (step, is_loss) in enumerate(logger.given):
            if is_loss:
                assert step >= max(step for step, _ in logger.given[: number + 1])
        assert len(logger.given) == 16 + (ckpt_path is not None)
