"""Snapshots within a Trainer: which saves take one, what the file holds, and what an error leaves."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging

import tests.lightning as L
from lightning_memload import CheckpointWriteError, MemoryEfficientRestore, StreamingCheckpointIO
from lightning_memload.plugins import pending
from lightning_memload.save import BackgroundSave
from lightning_memload.transfer import sinks
from tests.fresh_process import run_fresh
from tests.plugins.harness import TRUSTED, assert_same
from tests.plugins.late_saves import (
    NOT_LATE,
    Keep,
    Look,
    Normalised,
    Uploading,
    Wrapper,
    every_step,
    listing,
    train,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="snapshots on Linux only")


def snapshots(asynchronous_save: Any = True, **options: Any) -> MemoryEfficientRestore:
    options = {"save_snapshot": "auto", **options}
    return MemoryEfficientRestore(asynchronous_save=asynchronous_save, **options)


class Refusals(L.Callback):
    """Notes after each save that has ended why it had no snapshot."""

    def __init__(self) -> None:
        self.found: list[str | None] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        io: Any = trainer.strategy.checkpoint_io
        io.observe_saves(lambda report: self.found.append(report.stats.snapshot_refusal))


def setting_first(event: threading.Event, method: Any) -> Any:
    """A method that sets an event before all else."""

    def call(*args: Any) -> Any:
        event.set()
        return method(*args)

    return call


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes what a snapshot holds only when something waits for the save."""
    waited_for = threading.Event()
    original_write, original_init = sinks.LocalSink.write, BackgroundSave.__init__

    def begin(save: BackgroundSave, plan: Any, *args: Any, **options: Any) -> None:
        (waited_for.clear if plan.is_copied else waited_for.set)()
        original_init(save, plan, *args, **options)

    def write(sink: Any, buffers: Any, offset: int) -> None:
        assert waited_for.wait(30)
        original_write(sink, buffers, offset)

    monkeypatch.setattr(BackgroundSave, "__init__", begin)
    monkeypatch.setattr(sinks.LocalSink, "write", write)
    for name in ("wait_until_written", "wait"):
        monkeypatch.setattr(BackgroundSave, name, setting_first(waited_for, getattr(BackgroundSave, name)))
    yield waited_for
    waited_for.set()


class Changes(L.Callback):
    """Changes weights and states right after a save, in every way that there is, and gives them back before a step."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        for optimizer in trainer.optimizers:
            tensors += [value for state in optimizer.state.values() for value in state.values()]
        self.before = [tensor.detach().clone() for tensor in tensors]
        with torch.no_grad():
            for number, tensor in enumerate(tensors):
                if number % 3 == 0:
                    tensor.fill_(7)
                elif number % 3 == 1:
                    tensor.data.fill_(7)
                else:
                    tensor.detach().numpy()[...] = 7
            # As callbacks do that swap in averaged weights for a moment.
            for tensor, value in zip(tensors, self.before, strict=True):
                tensor.data = value


FORMATS = ["torch", "directory", "safetensors+state"]


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("save_format", FORMATS)
@pytest.mark.parametrize("asynchronous_save", [True, "until_step"])
def test_files_hold_the_state_of_the_call_and_training_is_the_same(
    tmp_path: Path, asynchronous_save: Any, save_format: Any
) -> None:
    stock = train(tmp_path, [], max_epochs=1)
    refusals = Refusals()
    restore = snapshots(asynchronous_save, save_format=save_format)
    ours = train(tmp_path, [restore, refusals, Changes(), every_step(tmp_path / "run")], max_epochs=1)
    keep = Keep()
    train(tmp_path, [keep, every_step(tmp_path / "stock")], max_epochs=1)
    assert_same(stock.losses, ours.losses, "losses")
    assert_same(dict(stock.state_dict()), dict(ours.state_dict()), "state_dict")
    for name, (_, found) in listing(tmp_path / "run").items():
        weights, optimizers = keep.states[found["global_step"]]
        assert name == f"step={found['global_step']}.ckpt"
        assert_same(weights, dict(found["state_dict"]), name)
        assert_same(optimizers, found["optimizer_states"], name)
    assert refusals.found == ["the run has no earlier checkpoint that the name could stand for", *[None] * 7]
    assert sum(ours.outstanding) == 7 - 1  # the last save has no next step


@pytest.mark.usefixtures("slow")
def test_averaged_weights_are_saved_as_by_stock(tmp_path: Path) -> None:
    """With SWA, which swaps weights in ways that torch does not count; "until_step" alone writes these at once."""

    def run(name: str, *callbacks: Any) -> Any:
        averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
        saver = every_step(tmp_path / name)
        train(tmp_path, [*callbacks, averaging, saver], max_epochs=3)
        return listing(tmp_path / name)

    stock, ours = run("stock"), run("ours", snapshots("until_step"))
    assert stock.keys() == ours.keys()
    for name, (_, expected) in stock.items():
        assert_same(dict(expected["state_dict"]), dict(ours[name][1]["state_dict"]), name)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("save_format", FORMATS)
def test_names_and_contents_are_at_most_one_save_older_than_those_of_stock(tmp_path: Path, save_format: Any) -> None:
    """Several saves in one step, links and removals. At the end all is as with stock."""

    def run(name: str, *callbacks: Any) -> Any:
        look = Look(tmp_path / name)
        (tmp_path / name).mkdir()
        best = every_step(tmp_path / name, monitor="step", mode="max", save_top_k=1, save_last=True)
        every = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        linked = ModelCheckpoint(tmp_path / name, filename="3-{step}", every_n_train_steps=3, save_last="link")
        linked.CHECKPOINT_NAME_LAST = "newest"
        train(tmp_path, [*callbacks, look, best, every, linked], max_epochs=1)
        return look.seen, listing(tmp_path / name)

    seen, files = run("stock")
    our_seen, our_files = run("ours", snapshots(save_format=save_format))
    assert our_files.keys() == files.keys()
    for name, (link, stock) in files.items():
        assert our_files[name][0] == link
        assert_same(dict(stock["state_dict"]), dict(our_files[name][1]["state_dict"]), name)
    for ours, stocks in zip(our_seen, seen, strict=True):
        assert ours.keys() == stocks.keys()
        for name, (link, number) in stocks.items():
            assert ours[name][0] == link
            assert ours[name][1] in (number, number - 1), (name, ours, stocks)


def test_saves_of_one_step_do_not_wait_for_one_another(tmp_path: Path, slow: threading.Event) -> None:
    held: list[int] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            io: Any = trainer.strategy.checkpoint_io
            held.append(sum(entry.save.held_bytes for entry in io._pending._pending))

    last = every_step(tmp_path / "run", save_last=True)
    train(tmp_path, [snapshots(), Look(), last], max_epochs=1)
    one = held[1]
    assert one > 0  # of last.ckpt: the first checkpoint of the run was written at once
    assert all(2 * one <= both < 2 * one + 1000 for both in held[2:])
    assert torch.load(tmp_path / "run" / "last.ckpt", **TRUSTED)["global_step"] == 8


NOT_WITHOUT_COPIES: dict[str, Any] = {
    "averages": NOT_LATE["averages"],
    "wrapper": lambda folder: {"make_optimizer": lambda parameters: Wrapper(torch.optim.AdamW(parameters))},
}


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("why", NOT_WITHOUT_COPIES)
def test_what_others_may_change_is_written_late(tmp_path: Path, why: str) -> None:
    options = NOT_WITHOUT_COPIES[why](tmp_path)
    module = Normalised(options.pop("make_optimizer", torch.optim.AdamW))
    train(tmp_path, [*options.pop("callbacks", []), snapshots(), every_step(tmp_path / "run")], module, **options)
    assert any(module.outstanding)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("why", ["logger", "subclass", "own call", "plugin"])
def test_what_others_may_read_is_written_at_once(tmp_path: Path, why: str) -> None:
    options = NOT_LATE[why](tmp_path / "run")
    (tmp_path / "run").mkdir()
    module, refusals = Normalised(), Refusals()
    saver = options.pop("saver", None) or every_step(tmp_path / "run")
    if "plugins" in options:
        kind = type(options["plugins"][0])
        options["plugins"] = [kind(asynchronous=True, snapshot="auto")]
    train(tmp_path, [snapshots(), refusals, saver], module, **options)
    assert not any(module.outstanding)
    assert {*refusals.found} == {"other code could read the checkpoint at once"}
    if why == "logger":
        assert isinstance(options["logger"], Uploading)
        assert options["logger"].found == list(range(1, 17))


@pytest.mark.parametrize("asynchronous_save", [True, "until_step"])
def test_what_does_not_fit_is_saved_as_without_and_the_line_says_why(
    tmp_path: Path, asynchronous_save: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pending, "available_host_bytes", lambda: 2000)
    refusals, keep = Refusals(), Keep()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        callbacks = [snapshots(asynchronous_save), refusals, keep, every_step(tmp_path / "run")]
        train(tmp_path, callbacks, max_epochs=1)
    keep.check(tmp_path / "run", range(1, 9))
    assert len(refusals.found) == 8
    for reason in refusals.found[1:]:
        assert re.fullmatch(r"\d\.\d\d KiB needed and 512\.00 MiB to spare, 1\.95 KiB free", str(reason))
    lines = [record.message for record in caplog.records if record.message.startswith("Saved ")]
    assert ", no snapshot (the run has no earlier checkpoint that the name could stand for)" in lines[0]


def test_a_size_limits_all_snapshots_together(tmp_path: Path, slow: threading.Event) -> None:
    """Two saves in each step, and room for one: the second one waits for the first and then has a snapshot too."""
    refusals, keep = Refusals(), Keep()
    callbacks = [snapshots(save_snapshot="9KiB"), refusals, keep, every_step(tmp_path / "run", save_last=True)]
    train(tmp_path, callbacks, max_epochs=1)
    keep.check(tmp_path / "run", range(1, 9))
    assert len(refusals.found) == 16
    assert refusals.found[1:] == [None] * 15
    refusals = Refusals()
    train(tmp_path, [snapshots(save_snapshot=1000), refusals, every_step(tmp_path / "small")], max_epochs=1)
    assert re.fullmatch(r"\d\.\d\d KiB needed, 1000 bytes allowed", str(refusals.found[1]))


def test_an_error_while_writing_reaches_the_user(
    tmp_path: Path, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next save, which is made. The name stands for the checkpoint before."""
    original = sinks.LocalSink.write
    fails = threading.Event()

    class Begin(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            (fails.set if trainer.global_step == 3 else fails.clear)()

    def write(sink: Any, buffers: Any, offset: int) -> None:
        assert slow.wait(30)
        if fails.is_set():
            raise OSError(28, "No space left on device")
        original(sink, buffers, offset)

    class Clear(L.Callback):
        """Before the next save begins, and behind the wait for the one before."""

        def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Any) -> None:
            trainer.strategy.checkpoint_io._pending.finish()
            fails.clear()

    monkeypatch.setattr(sinks.LocalSink, "write", write)
    with (
        pytest.warns(UserWarning, match=r"step=3\.ckpt holds the same as .*step=2\.ckpt"),
        pytest.raises(CheckpointWriteError, match=r"step=3\.ckpt could not be saved: No space left on device"),
    ):
        train(tmp_path, [snapshots(), Begin(), Clear(), every_step(tmp_path / "run")], max_epochs=1)
    found = {name: held["global_step"] for name, (_, held) in listing(tmp_path / "run").items()}
    assert found == {"step=1.ckpt": 1, "step=2.ckpt": 2, "step=3.ckpt": 2, "step=4.ckpt": 4}


def test_validation_does_not_wait_and_its_end_is_saved(tmp_path: Path, slow: threading.Event) -> None:
    waiting: list[bool] = []

    class Validated(Normalised):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            waiting.append(not slow.is_set())

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    keep = Keep()
    train(
        tmp_path,
        [snapshots(), keep, every_step(tmp_path / "run")],
        Validated(),
        max_epochs=1,
        val_check_interval=2,
        limit_val_batches=1,
    )
    assert waiting == [True] * 4
    keep.check(tmp_path / "run", range(1, 9))


def test_a_removal_waits_for_a_save_of_the_same_name(tmp_path: Path, slow: threading.Event) -> None:
    """Otherwise the save would bring back what Lightning has removed."""
    io = StreamingCheckpointIO(asynchronous=True, snapshot="auto")
    io.begin_steps(lambda: True)
    io.save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")
    for name in ("b", "c"):
        io.save_checkpoint({"global_step": 2, "weight": torch.ones(5)}, tmp_path / f"{name}.ckpt")
    assert len(io._pending._pending) == 2
    io.remove_checkpoint(tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()
    io.end_steps()
    io.teardown()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "c.ckpt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_snapshot": "auto"}, "save_snapshot='auto' needs asynchronous_save=True or 'until_step'"),
        ({"save_snapshot": "lots", "asynchronous_save": True}, "save_snapshot must be 'auto', False or a size such as"),
        ({"save_snapshot": True, "asynchronous_save": True}, "save_snapshot must be 'auto', False or .* got True"),
        ({"save_snapshot": -1, "asynchronous_save": True}, "save_snapshot must be 'auto', False or .* got -1"),
        ({"save_snapshot": 1.5, "asynchronous_save": True}, "save_snapshot must be 'auto', False or .* got 1.5"),
    ],
    ids=range(5),
)
def test_values_that_are_not_possible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryEfficientRestore(**options)
    with pytest.raises(ValueError, match=r"snapshot='auto' needs asynchronous=True or 'until_step'"):
        StreamingCheckpointIO(snapshot="auto")


def test_an_option_that_is_ignored_warns(tmp_path: Path) -> None:
    plugins = [StreamingCheckpointIO(asynchronous=True)]
    with pytest.warns(UserWarning, match=r"MemoryEfficientRestore\(save_snapshot='auto'\) is ignored"):
        train(tmp_path, [snapshots()], plugins=plugins, max_epochs=1)


UNDER_A_LIMIT = """
import pathlib, warnings, logging
import torch
import tests.lightning as L
from tests.lightning.pytorch.callbacks import ModelCheckpoint
from tests.plugins.harness import make_trainer
from lightning_memload import MemoryEfficientRestore
warnings.simplefilter("ignore")
torch.set_num_threads(1)
class Large(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.zeros(4 << 20) for _ in range(16)])
    def training_step(self, batch, batch_idx):
        return -self.weights[batch_idx].sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)
RESULT = []
class Note(L.Callback):
    def on_fit_start(self, trainer, module):
        trainer.strategy.checkpoint_io.observe_saves(lambda report: RESULT.append(report.stats.snapshot_refusal))
folder = pathlib.Path(ARGS["folder"])
saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
restore = MemoryEfficientRestore(asynchronous_save=True, save_snapshot="auto")
data = torch.utils.data.DataLoader(torch.zeros(4, 1))
make_trainer(folder, [restore, Note(), saver], max_epochs=1, enable_checkpointing=True).fit(Large(), data)
for number in range(1, 5):
    state = torch.load(folder / f"step={number}.ckpt", mmap=True)["state_dict"]
    assert [int(weight[-1]) for weight in state.values()] == [int(key < number) for key in range(16)], number
"""


@pytest.mark.cgroup
@pytest.mark.parametrize(("limit_mib", "has_snapshots"), [(1000, False), (2600, True)])
@pytest.mark.first("limit_mib")
@pytest.mark.lightning_only
def test_a_tight_limit_of_a_control_group_is_not_exceeded(tmp_path: Path, limit_mib: int, has_snapshots: bool) -> None:
    """A state of 256 MiB and a process of several hundred. Neither limit may kill it."""
    result = run_fresh(UNDER_A_LIMIT, folder=tmp_path, memory_limit_bytes=limit_mib << 20)
    assert not result.killed
    assert len(result.result) == 4
    if has_snapshots:
        assert result.result[1:] == [None] * 3
    else:
        assert all("256.00 MiB needed and 512.00 MiB to spare" in reason for reason in result.result[1:])
