"""Saves in the background within a Trainer, and the figures of saves in its loggers."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from tests.lightning.pytorch.loggers import Logger
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn

import tests.lightning as L
from lightning_memload import CheckpointWriteError, MemoryEfficientRestore, StreamingCheckpointIO
from lightning_memload.save import BackgroundSave, writing
from tests.plugins.harness import FEATURES, TRUSTED, Recorded, adamw, assert_same, make_trainer

BLOCK_BYTES = 128


class Normalised(Recorded):
    """Parameters that steps change, and buffers that each forward changes; notes what is written when forward runs."""

    def __init__(self, make_optimizer: Any = adamw) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.layers = nn.Sequential(nn.Linear(FEATURES, 20), nn.BatchNorm1d(20), nn.Linear(20, FEATURES))
        self.outstanding: list[bool] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        background = getattr(self.trainer.strategy.checkpoint_io, "_background", None)
        self.outstanding.append(bool(background and background._may_wait and not background._written.is_set()))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class SaveOften(L.Callback):
    """Saves after every batch, and keeps a copy of what was saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(self.states)}.ckpt")
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.states.append(copy.deepcopy((dict(pl_module.state_dict()), optimizers)))


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes what may be written late only when somebody waits for it."""
    waited_for = threading.Event()
    original_write, original_init = writing.LocalSink.write, BackgroundSave.__init__
    original_waits = {name: getattr(BackgroundSave, name) for name in ("wait_until_written", "wait")}
    monkeypatch.setattr(writing, "_DIRECT_BLOCK_BYTES", BLOCK_BYTES)

    def begin(save: BackgroundSave, *args: Any, **options: Any) -> None:
        waited_for.clear()
        original_init(save, *args, **options)

    def write(sink: Any, buffers: Sequence[Any], offset: int) -> None:
        # The weights of the layers and their states; no buffer is that large.
        if any(len(buffer) == BLOCK_BYTES for buffer in buffers) and offset > 4096:
            assert waited_for.wait(10)
        original_write(sink, buffers, offset)

    monkeypatch.setattr(BackgroundSave, "__init__", begin)
    monkeypatch.setattr(writing.LocalSink, "write", write)
    for name, original in original_waits.items():

        def waiting(save: BackgroundSave, original: Any = original) -> None:
            waited_for.set()
            original(save)

        monkeypatch.setattr(BackgroundSave, name, waiting)
    yield waited_for
    waited_for.set()


def train(folder: Path, callbacks: list[Any], module: Any = None, **options: Any) -> Any:
    torch.manual_seed(5)
    module = Normalised() if module is None else module
    trainer = make_trainer(folder, callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module)
    return module


class DataSGD(torch.optim.Optimizer):
    """Writes in a way that torch does not count, as many optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)
        return loss


class SaveWithin(L.Callback):
    """Saves within the optimizer's step: Lightning runs these hooks in its closure."""

    def __init__(self, hook: str, folder: Path) -> None:
        self.folder = folder
        self.states: list[Any] = []
        setattr(self, hook, self.save)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        # The next save waits for the one before, and with it for what that missed.
        if len(self.states) < 2:
            self.states.append(copy.deepcopy(dict(pl_module.state_dict())))
            trainer.save_checkpoint(self.folder / f"{len(self.states)}.ckpt")


@pytest.mark.parametrize("make_optimizer", [adamw, DataSGD])
@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward", "on_before_optimizer_step"])
def test_a_save_within_a_step_is_of_the_state_before_it(
    tmp_path: Path, hook: str, make_optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writing.LocalSink.write

    def slowly(sink: Any, buffers: Sequence[Any], offset: int) -> None:
        time.sleep(0.05)
        write(sink, buffers, offset)

    monkeypatch.setattr(writing.LocalSink, "write", slowly)
    monkeypatch.setattr(writing, "_DIRECT_BLOCK_BYTES", 1024)
    saver = SaveWithin(hook, tmp_path)
    train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True), saver], Normalised(make_optimizer), max_epochs=1)
    assert len(saver.states) == 2
    for number, weights in enumerate(saver.states, start=1):
        saved = torch.load(tmp_path / f"{number}.ckpt", **TRUSTED)
        assert_same(weights, dict(saved["state_dict"]), "state_dict")


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_files_hold_the_state_of_the_call_and_training_is_the_same(tmp_path: Path, options: Any) -> None:
    stock = train(tmp_path, [], **options)
    saver = SaveOften(tmp_path)
    ours = train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True), saver], **options)
    assert_same(stock.losses, ours.losses, "losses")
    assert_same(dict(stock.state_dict()), dict(ours.state_dict()), "state_dict")
    assert len(saver.states) == 16
    for number, (weights, optimizers) in enumerate(saver.states):
        saved = torch.load(tmp_path / f"{number}.ckpt", weights_only=False)
        assert_same(weights, dict(saved["state_dict"]), f"state_dict of {number}")
        assert_same(optimizers, saved["optimizer_states"], f"optimizer_states of {number}")
    # Forward ran while the save was going on, every time but the first.
    assert sum(ours.outstanding) == 15


@pytest.mark.usefixtures("lazy")
def test_two_optimizers_of_a_manual_module(tmp_path: Path) -> None:
    class Manual(Normalised):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                loss = super().training_step(batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.layers[0].parameters(), 0.1), adamw(self.layers[2].parameters())]

    saver = SaveOften(tmp_path)
    train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True), saver], Manual(), max_epochs=1)
    for number, (weights, optimizers) in enumerate(saver.states):
        saved = torch.load(tmp_path / f"{number}.ckpt", weights_only=False)
        assert_same(weights, dict(saved["state_dict"]), "state_dict")
        assert_same(optimizers, saved["optimizer_states"], "optimizer_states")


def test_without_the_callback_all_is_written_at_once(tmp_path: Path) -> None:
    saver = SaveOften(tmp_path)
    module = train(tmp_path, [saver], plugins=[StreamingCheckpointIO(asynchronous=True)], max_epochs=1)
    assert not any(module.outstanding)
    for number, (weights, _) in enumerate(saver.states):
        saved = torch.load(tmp_path / f"{number}.ckpt", weights_only=False)
        assert_same(weights, dict(saved["state_dict"]), "state_dict")


def test_with_averaged_weights_all_is_written_at_once(tmp_path: Path) -> None:
    callbacks = [
        StochasticWeightAveraging(0.01, swa_epoch_start=1),
        MemoryEfficientRestore(asynchronous_save=True),
        SaveOften(tmp_path),
    ]
    assert not any(train(tmp_path, callbacks).outstanding)


@pytest.mark.parametrize("averages", [False, True])
def test_a_save_after_training_has_its_place_when_it_returns(
    tmp_path: Path, averages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_background: list[BackgroundSave] = []
    begin = BackgroundSave.__init__

    def counted(save: BackgroundSave, *args: Any, **options: Any) -> None:
        in_background.append(save)
        begin(save, *args, **options)

    monkeypatch.setattr(BackgroundSave, "__init__", counted)
    averaging = [StochasticWeightAveraging(0.01, swa_epoch_start=1)] if averages else []
    saver = SaveOften(tmp_path)
    callbacks = [*averaging, MemoryEfficientRestore(asynchronous_save=True), saver]
    trainer = make_trainer(tmp_path, callbacks, max_epochs=2)
    module = Normalised()
    for epochs in (2, 3):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module)
        assert len(in_background) == len(saver.states)  # and none of those after training
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        assert torch.load(tmp_path / "after.ckpt", weights_only=False)["global_step"] == trainer.global_step


def test_model_checkpoint_keeps_one(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "run", monitor="step", mode="max", every_n_train_steps=1, save_last="link")
    train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True), saver], enable_checkpointing=True)
    best = Path(saver.best_model_path)
    assert sorted(os.listdir(tmp_path / "run")) == sorted([best.name, "last.ckpt"])
    assert (tmp_path / "run" / "last.ckpt").resolve() == best.resolve()
    assert torch.load(best, weights_only=False)["global_step"] == 16


def test_a_resume_waits_for_the_save(tmp_path: Path) -> None:
    saver = SaveOften(tmp_path)
    callbacks = [MemoryEfficientRestore(asynchronous_save=True), saver]
    trainer = make_trainer(tmp_path, callbacks, max_epochs=1)
    module = Normalised()
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    with torch.no_grad():
        module.layers[0].weight.zero_()  # after training everything is written at once
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, ckpt_path=tmp_path / "after.ckpt", **TRUSTED)
    assert_same(saver.states[7][0], dict(torch.load(tmp_path / "after.ckpt", weights_only=False)["state_dict"]), "")
    assert trainer.global_step == 16


@pytest.mark.usefixtures("lazy")
def test_load_state_dict_waits(tmp_path: Path) -> None:
    class Reload(SaveOften):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            assert pickle.loads(pickle.dumps(pl_module.layers)) is not None
            zeros = {name: torch.zeros_like(value) for name, value in pl_module.state_dict().items()}
            pl_module.load_state_dict(zeros)

    saver = Reload(tmp_path)
    train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True), saver], max_steps=2)
    saved = torch.load(tmp_path / "0.ckpt", weights_only=False)
    assert_same(saver.states[0][0], dict(saved["state_dict"]), "state_dict")


# What goes wrong ----------------------------------------------------------------------------------------------------


def failing_disk(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """The disk fails so many times, each time when the call that saves has returned."""
    original, save, left = os.fsync, StreamingCheckpointIO.save_checkpoint, [failures]
    returned = threading.Event()

    def fsync(descriptor: int) -> None:
        if left[0]:
            left[0] -= 1
            assert returned.wait(60)
            raise OSError(28, "No space left on device")
        original(descriptor)

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        returned.set()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(StreamingCheckpointIO, "save_checkpoint", save_checkpoint)


def test_an_error_surfaces_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_disk(monkeypatch, 1)
    threads = threading.active_count()
    saver = SaveOften(tmp_path)
    with pytest.raises(CheckpointWriteError, match=r"0\.ckpt could not be saved: No space left on device"):
        train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True), saver])
    assert len(saver.states) == 1
    assert not list(tmp_path.glob("*.ckpt"))
    assert threading.active_count() == threads


def test_an_error_surfaces_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_disk(monkeypatch, 1)
    saver = SaveOften(tmp_path)
    with pytest.raises(CheckpointWriteError, match=r"0\.ckpt could not be saved: No space left on device"):
        train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True), saver], max_steps=1)
    assert os.listdir(tmp_path) == []


def test_a_failed_save_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = StreamingCheckpointIO(asynchronous=True)
    io.save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    io.wait()
    failing_disk(monkeypatch, 1)
    io.save_checkpoint({"a": 2}, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointWriteError, match=r"b\.ckpt could not be saved"):  # noqa: PT012
        io.remove_checkpoint(tmp_path / "a.ckpt")
        io.teardown()
    assert torch.load(tmp_path / "a.ckpt") == {"a": 1}
    io.save_checkpoint({"a": 3}, tmp_path / "c.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert io.load_checkpoint(tmp_path / "c.ckpt") == {"a": 3}
    assert os.listdir(tmp_path) == ["c.ckpt"]


@pytest.mark.parametrize("plugins", [[StreamingCheckpointIO()], [AsyncCheckpointIO()]])
def test_an_option_that_is_left_out_warns(tmp_path: Path, plugins: list[Any]) -> None:
    with pytest.warns(UserWarning, match=r"asynchronous_save=True\) is left out"):
        train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True)], plugins=plugins, max_epochs=1)


# Figures ------------------------------------------------------------------------------------------------------------


class Memory(Logger):
    """Keeps what it is given, and whether the thread that trains gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.saves: list[tuple[int, dict[str, float]]] = []
        self.finalized = False

    name = version = "memory"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(key.startswith("memload/save_") for key in metrics):
            assert threading.current_thread() is threading.main_thread()
            assert not self.finalized
            assert step is not None
            self.saves.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def finalize(self, status: str) -> None:
        self.finalized = True


WAYS = {"callback": {}, "asynchronous": {"asynchronous_save": True}, "Lightning's": {}}


@pytest.mark.parametrize("way", WAYS)
def test_every_save_is_logged_once_at_its_step(tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    logger, saver = Memory(), SaveOften(tmp_path)
    plugins = [AsyncCheckpointIO()] if way == "Lightning's" else []
    callbacks = [MemoryEfficientRestore(**WAYS[way]), saver]
    with caplog.at_level("INFO", logger=f"{L.PYTORCH}.utilities.rank_zero"):
        train(tmp_path, callbacks, max_epochs=1, logger=logger, plugins=plugins)
    assert [step for step, _ in logger.saves] == list(range(1, 9))
    for number, (_, figures) in enumerate(logger.saves):
        # How long training waited for a thread of Lightning's is not ours to know.
        blocked = figures.pop("memload/save_blocked_seconds", None)
        assert (blocked is None) is (way == "Lightning's")
        assert blocked is None or 0 < blocked <= figures["memload/save_seconds"]
        assert figures.keys() == {
            "memload/save_seconds",
            "memload/save_gib",
            "memload/save_gib_per_second",
            "memload/save_host_anonymous_above_start_gib",
        }
        assert figures["memload/save_gib"] * 2**30 == (tmp_path / f"{number}.ckpt").stat().st_size
    lines = [record.message for record in caplog.records if record.message.startswith("Saved ")]
    assert len(lines) == 8
    assert f"Saved {tmp_path}/0.ckpt: 0.00 GiB in 0." in lines[0]
    assert ("training waited" in lines[0]) is (way == "asynchronous")


def test_a_save_after_fit_is_told_and_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = Memory()
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()], max_epochs=1, logger=logger)
    trainer.fit(Normalised())
    with caplog.at_level("INFO", logger=f"{L.PYTORCH}.utilities.rank_zero"):
        trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert "end.ckpt: 0.00 GiB" in caplog.text
    assert not logger.saves


def test_without_log_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_memload.memory import MemoryMonitor

    started: list[Any] = []
    monkeypatch.setattr(MemoryMonitor, "start", lambda monitor: started.append(monitor))
    logger = Memory()
    train(tmp_path, [MemoryEfficientRestore(log=False), SaveOften(tmp_path)], max_epochs=1, logger=logger)
    assert (logger.saves, started) == ([], [])


def test_a_save_that_fails_stops_measuring(tmp_path: Path) -> None:
    for asynchronous in (False, True):
        io = StreamingCheckpointIO(asynchronous=asynchronous)
        io.observe_saves(lambda report: None)
        (tmp_path / "folder").mkdir(exist_ok=True)
        threads = threading.active_count()
        with pytest.raises(CheckpointWriteError, match="Is a directory"):
            io.save_checkpoint({"a": 1}, tmp_path / "folder")
        assert threading.active_count() == threads
        with pytest.raises(Exception, match=r"pickle|local object"):
            io.save_checkpoint({"a": lambda: None}, tmp_path / "file.ckpt")
        assert threading.active_count() == threads


def test_the_budget_of_the_callback_is_that_of_saves(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore(host_budget_mib=3)], max_epochs=1)
    trainer.fit(Normalised())
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, StreamingCheckpointIO)
    assert io._host_budget_bytes == 3 << 20
