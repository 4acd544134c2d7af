"""Saves that training does not wait for, within a Trainer, and the figures of saves in its loggers."""

from __future__ import annotations

import copy
import os
import pickle
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
from tests.lightning.pytorch.loggers import Logger
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO

import tests.lightning as L
from lightning_memload import CheckpointWriteError, MemoryEfficientRestore, StreamingCheckpointIO
from lightning_memload.save import BackgroundSave
from lightning_memload.transfer import sinks, writing
from tests.plugins.harness import TRUSTED, adamw, assert_same, make_trainer
from tests.plugins.late_saves import NOT_LATE, Keep, Look, Normalised, SaveOften, every_step, listing, train

BLOCK_BYTES = 128


def until_step(**options: Any) -> MemoryEfficientRestore:
    return MemoryEfficientRestore(asynchronous_save="until_step", **options)


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes what may be written late only when the thread that trains waits for it."""
    waited_for = threading.Event()
    original_write, original_init = sinks.LocalSink.write, BackgroundSave.__init__
    original_waits = {name: getattr(BackgroundSave, name) for name in ("wait_until_written", "wait")}
    monkeypatch.setattr(writing, "_DIRECT_BLOCK_BYTES", BLOCK_BYTES)

    def begin(save: BackgroundSave, plan: Any, late: Any = (), **options: Any) -> None:
        late = list(late)
        (waited_for.clear if late else waited_for.set)()
        original_init(save, plan, late, **options)

    def write(sink: Any, buffers: Sequence[Any], offset: int) -> None:
        # The weights of the layers and their states; no buffer is that large.
        if any(len(buffer) == BLOCK_BYTES for buffer in buffers) and offset > 4096:
            assert waited_for.wait(10)
        original_write(sink, buffers, offset)

    monkeypatch.setattr(BackgroundSave, "__init__", begin)
    monkeypatch.setattr(sinks.LocalSink, "write", write)
    for name, original in original_waits.items():

        def waiting(save: BackgroundSave, original: Any = original) -> None:
            waited_for.set()
            original(save)

        monkeypatch.setattr(BackgroundSave, name, waiting)
    yield waited_for
    waited_for.set()


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


@pytest.mark.parametrize("asynchronous_save", [True, "until_step"])
@pytest.mark.parametrize("make_optimizer", [adamw, DataSGD])
@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward", "on_before_optimizer_step"])
def test_a_save_within_a_step_is_of_the_state_before_it(
    tmp_path: Path, hook: str, make_optimizer: Any, asynchronous_save: Any
) -> None:
    saver = SaveWithin(hook, tmp_path)
    restore = MemoryEfficientRestore(asynchronous_save=asynchronous_save)
    train(tmp_path, [restore, saver], Normalised(make_optimizer), max_epochs=1)
    assert len(saver.states) == 2
    for number, weights in enumerate(saver.states, start=1):
        saved = torch.load(tmp_path / f"{number}.ckpt", **TRUSTED)
        assert_same(weights, dict(saved["state_dict"]), "state_dict")


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_files_hold_the_state_of_the_call_and_training_is_the_same(tmp_path: Path, options: Any) -> None:
    stock = train(tmp_path, [], **options)
    keep = Keep()
    ours = train(tmp_path, [until_step(), keep, every_step(tmp_path / "run")], **options)
    assert_same(stock.losses, ours.losses, "losses")
    assert_same(dict(stock.state_dict()), dict(ours.state_dict()), "state_dict")
    steps = range(1, ours.trainer.global_step + 1)
    keep.check(tmp_path / "run", steps)
    assert len(steps) == 16 // options.get("accumulate_grad_batches", 1)
    # Forward ran while the save was going on, every time but for the first save and after the last.
    assert sum(ours.outstanding) >= len(steps) - 2


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.usefixtures("lazy")
def test_two_optimizers_of_a_manual_module(tmp_path: Path) -> None:
    class Manual(Normalised):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                loss = super().training_step(batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.layers[0].parameters(), 0.1), adamw(self.layers[2].parameters())]

    keep = Keep()
    module = train(tmp_path, [until_step(), keep, every_step(tmp_path / "run")], Manual(), max_epochs=1)
    assert any(module.outstanding)
    keep.check(tmp_path / "run", range(2, 17, 2))


def test_without_the_callback_all_is_written_at_once(tmp_path: Path) -> None:
    keep, plugins = Keep(), [StreamingCheckpointIO(asynchronous="until_step")]
    module = train(tmp_path, [keep, every_step(tmp_path / "run")], plugins=plugins, max_epochs=1)
    assert not any(module.outstanding)
    keep.check(tmp_path / "run", range(1, 9))


@pytest.mark.parametrize("why", NOT_LATE)
def test_what_others_may_look_at_is_written_at_once(tmp_path: Path, why: str) -> None:
    options = NOT_LATE[why](tmp_path / "run")
    (tmp_path / "run").mkdir()
    module = Normalised(options.pop("make_optimizer", adamw))
    saver = options.pop("saver", None) or every_step(tmp_path / "run")
    callbacks = [*options.pop("callbacks", []), until_step(), saver]
    train(tmp_path, callbacks, module, **options)
    assert not any(module.outstanding)
    assert len(list((tmp_path / "run").iterdir())) >= 16
    if why == "logger":
        assert options["logger"].found == list(range(1, 17))


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


@pytest.mark.parametrize("save_format", ["torch", "directory", "safetensors+state"])
@pytest.mark.parametrize("asynchronous_save", [True, "until_step"])
def test_names_and_contents_are_those_of_stock_after_every_batch(
    tmp_path: Path, asynchronous_save: Any, save_format: Any
) -> None:
    """Two ModelCheckpoints with one directory and one pattern, links, and removals: Lightning asks what is there."""

    def run(name: str, *callbacks: Any) -> Any:
        look = Look(tmp_path / name)
        (tmp_path / name).mkdir()
        best = every_step(tmp_path / name, monitor="step", mode="max", save_top_k=1, save_last="link")
        every = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        module = train(tmp_path, [*callbacks, look, best, every], max_epochs=1)
        paths = [Path(path).name for path in (best.best_model_path, every.best_model_path, best.last_model_path)]
        return look.seen, paths, listing(tmp_path / name), module

    seen, paths, files, _ = run("stock")
    restore = MemoryEfficientRestore(asynchronous_save=asynchronous_save, save_format=save_format)
    our_seen, our_paths, our_files, _ = run("ours", restore)
    assert our_paths == paths
    assert our_files.keys() == files.keys()
    for name, (link, stock) in files.items():
        assert our_files[name][0] == link
        assert_same(dict(stock["state_dict"]), dict(our_files[name][1]["state_dict"]), name)
    assert [ours.keys() for ours in our_seen] == [stocks.keys() for stocks in seen]
    if asynchronous_save is True:
        assert our_seen == seen
        return
    for ours, stocks in zip(our_seen, seen, strict=True):
        for name, (link, number) in stocks.items():
            assert ours[name][0] == link
            assert ours[name][1] in (number, number - 1)  # one save older at most


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
    class Reload(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            assert pickle.loads(pickle.dumps(pl_module.layers)) is not None
            zeros = {name: torch.zeros_like(value) for name, value in pl_module.state_dict().items()}
            pl_module.load_state_dict(zeros)

    keep = Keep()
    train(tmp_path, [until_step(), Reload(), keep, every_step(tmp_path / "run")], max_steps=4)
    keep.check(tmp_path / "run", range(1, 5))


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


def test_an_error_surfaces_at_the_next_save_which_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_disk(monkeypatch, 1)
    threads = threading.active_count()
    saver = SaveOften(tmp_path)
    with pytest.raises(CheckpointWriteError, match=r"0\.ckpt could not be saved: No space left on device.*is in place"):
        train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True), saver])
    assert len(saver.states) == 1
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["0.ckpt", "1.ckpt"]
    assert torch.load(tmp_path / "1.ckpt", weights_only=False)["global_step"] == 2
    assert threading.active_count() <= threads  # a thread of an earlier test may end meanwhile


def test_an_error_surfaces_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_disk(monkeypatch, 1)
    saver = SaveOften(tmp_path)
    with pytest.raises(CheckpointWriteError, match=r"0\.ckpt could not be saved: No space left on device"):
        train(tmp_path, [MemoryEfficientRestore(asynchronous_save=True), saver], max_steps=1)
    assert os.listdir(tmp_path) == ["0.ckpt"]


@pytest.mark.filterwarnings("ignore:.*ckpt_path")  # of Lightning, where there is an OnExceptionCheckpoint
def test_the_users_own_error_comes_first_and_the_emergency_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(Normalised):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 1:
                raise KeyError("the user's own")
            return super().training_step(batch, batch_idx)

    failing_disk(monkeypatch, 1)
    callbacks = [MemoryEfficientRestore(asynchronous_save=True), OnExceptionCheckpoint(tmp_path, "emergency")]
    with (
        pytest.warns(UserWarning, match=r"step=1\.ckpt could not be saved: No space left on device"),
        pytest.raises(KeyError, match="the user's own"),
    ):
        train(tmp_path, [*callbacks, every_step(tmp_path / "run")], Fails())
    assert torch.load(tmp_path / "emergency.ckpt", weights_only=False)["global_step"] == 1


class Clips(L.Callback):
    """Changes weights against the promise, after a ModelCheckpoint has saved them."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.clamp_(-0.1, 0.1)


@pytest.mark.usefixtures("lazy")
def test_a_broken_promise_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    keep = Keep()
    with pytest.warns(UserWarning, match=r"step=2\.ckpt could not be saved: 6 parameters") as caught:
        module = train(tmp_path, [until_step(), Clips(), keep, every_step(tmp_path / "run")], max_epochs=1)
    (told,) = (str(warning.message) for warning in caught if "could not be saved" in str(warning.message))
    assert f"step=2.ckpt holds the same as {tmp_path}/run/step=1.ckpt" in told
    assert "use asynchronous_save=True" in told
    assert module.trainer.global_step == 8
    assert torch.load(tmp_path / "run" / "step=2.ckpt", weights_only=False)["global_step"] == 1
    keep.check(tmp_path / "run", [1, *range(3, 9)])
    assert sum(module.outstanding) == 1


def test_weights_may_change_at_any_time_by_default(tmp_path: Path) -> None:
    keep = Keep()
    callbacks = [MemoryEfficientRestore(asynchronous_save=True), Clips(), keep, every_step(tmp_path / "run")]
    train(tmp_path, callbacks, max_epochs=1)
    keep.check(tmp_path / "run", range(1, 9))


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("asynchronous_save", [True, "until_step"])
def test_a_signal_handler_that_saves_finds_all_in_place(tmp_path: Path, asynchronous_save: Any) -> None:
    """A signal may interrupt a forward pass during a save, a wait for the save, or the save itself."""
    seen: list[Any] = []

    class Signals(Normalised):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            signal.raise_signal(signal.SIGUSR2)
            return super().forward(inputs)

    def handler(*_: Any) -> None:
        path = tmp_path / f"{len(seen)}.ckpt"
        module.trainer.save_checkpoint(path)
        seen.append((path, module.trainer.global_step))
        newest = tmp_path / "run" / f"step={module.trainer.global_step}.ckpt"
        if module.trainer.global_step:
            assert torch.load(newest, weights_only=False)["global_step"] == module.trainer.global_step

    module = Signals()
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        restore = MemoryEfficientRestore(asynchronous_save=asynchronous_save)
        train(tmp_path, [restore, every_step(tmp_path / "run")], module, max_steps=4)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert [torch.load(path, weights_only=False)["global_step"] for path, _ in seen] == [step for _, step in seen]


def test_the_launchers_file_is_told_to_nobody(tmp_path: Path) -> None:
    told: list[Any] = []
    for format in ("torch", "directory"):
        io = StreamingCheckpointIO(asynchronous=True, format=format)
        io.observe_saves(told.append)
        io.save_checkpoint({"weights": torch.ones(3)}, tmp_path / ".temp.ckpt")
        assert torch.equal(torch.load(tmp_path / ".temp.ckpt")["weights"], torch.ones(3))
        assert io.last_save is None
    assert told == []


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
    assert not (tmp_path / "a.ckpt").exists()
    assert io.load_checkpoint(tmp_path / "c.ckpt") == {"a": 3}
    assert sorted(os.listdir(tmp_path)) == ["b.ckpt", "c.ckpt"]


@pytest.mark.parametrize("plugins", [[StreamingCheckpointIO()], [AsyncCheckpointIO()]])
def test_an_option_that_is_left_out_warns(tmp_path: Path, plugins: list[Any]) -> None:
    with pytest.warns(UserWarning, match=r"asynchronous_save=True\) is ignored"):
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


WAYS: dict[str, Any] = {
    "callback": {},
    "asynchronous": {"asynchronous_save": True},
    "late": {"asynchronous_save": "until_step"},
    "Lightning's": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_save_is_logged_once_at_its_step(tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    logger, saver = Memory(), SaveOften(tmp_path)
    plugins = [AsyncCheckpointIO()] if way == "Lightning's" else []
    callbacks = [MemoryEfficientRestore(**WAYS[way]), saver]
    with caplog.at_level("INFO", logger=f"{L.PYTORCH}.utilities.rank_zero"):
        train(tmp_path, callbacks, max_epochs=1, logger=logger, plugins=plugins)
    assert len(logger.saves) == 8
    for number, (step, figures) in enumerate(logger.saves):
        # As Lightning counts for loggers, which begins at 0; of a save that ends later, one more at most.
        assert step in (number, number + 1)
        # How long training waited for a thread of Lightning's is not ours to know.
        blocked = figures.pop("memload/save_blocked_seconds", None)
        assert (blocked is None) is (way == "Lightning's")
        assert blocked is None or 0 < blocked <= figures["memload/save_seconds"]
        assert figures.keys() == {
            "memload/save_seconds",
            "memload/save_gib",
            "memload/save_host_anonymous_above_start_gib",
        }
        assert figures["memload/save_gib"] * 2**30 == (tmp_path / f"{number}.ckpt").stat().st_size
    lines = [record.message for record in caplog.records if record.message.startswith("Saved ")]
    told = sum(figures["memload/save_seconds"] > 1 for _, figures in logger.saves[1:])
    assert len(lines) >= 1 + told  # The rest is up to how slow the disk is, see test_saves.
    assert re.match(rf"Saved {tmp_path}/0.ckpt: 0\.000 GiB in 0\.\d\d s, [\d.]+ GiB/s", lines[0])
    assert ("training waited" in lines[0]) is (way in ("asynchronous", "late"))


def test_a_save_after_fit_is_told_and_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = Memory()
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()], max_epochs=1, logger=logger)
    trainer.fit(Normalised())
    with caplog.at_level("INFO", logger=f"{L.PYTORCH}.utilities.rank_zero"):
        trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert re.search(r"end.ckpt: 0\.000 GiB", caplog.text)
    assert not logger.saves


@pytest.mark.parametrize("arguments", [{"log": "all"}, {"log": False, "log_saves": "all"}], ids=["log", "log_saves"])
def test_all_figures_of_saves_are_logged_if_asked_for(tmp_path: Path, arguments: dict[str, Any]) -> None:
    logger = Memory()
    train(tmp_path, [MemoryEfficientRestore(**arguments), SaveOften(tmp_path)], max_epochs=1, logger=logger)
    assert len(logger.saves) == 8
    assert all("memload/save_gib_per_second" in figures for _, figures in logger.saves)


@pytest.mark.parametrize("arguments", [{"log": False}, {"log_saves": False}], ids=["log", "log_saves"])
def test_without_log_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    from lightning_memload.memory import MemoryMonitor

    started: list[Any] = []
    monkeypatch.setattr(MemoryMonitor, "start", lambda monitor: started.append(monitor))
    logger = Memory()
    train(tmp_path, [MemoryEfficientRestore(**arguments), SaveOften(tmp_path)], max_epochs=1, logger=logger)
    assert (logger.saves, started) == ([], [])


def test_a_save_that_fails_stops_measuring(tmp_path: Path) -> None:
    for asynchronous in (False, True):
        io = StreamingCheckpointIO(asynchronous=asynchronous)
        io.observe_saves(lambda report: None)
        (tmp_path / "folder").mkdir(exist_ok=True)
        threads = threading.active_count()
        with pytest.raises(CheckpointWriteError, match="Is a directory"):
            io.save_checkpoint({"a": 1}, tmp_path / "folder")
        assert threading.active_count() <= threads  # a thread of an earlier test may end meanwhile
        with pytest.raises(Exception, match=r"pickle|local object"):
            io.save_checkpoint({"a": lambda: None}, tmp_path / "file.ckpt")
        assert threading.active_count() <= threads  # a thread of an earlier test may end meanwhile


def test_the_budget_of_the_callback_is_that_of_saves(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore(host_budget_mib=3)], max_epochs=1)
    trainer.fit(Normalised())
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, StreamingCheckpointIO)
    assert io._host_budget_bytes == 3 << 20
