"""Through Lightning: what our plugin saves resumes everywhere, and its edges are those of Lightning's own."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from tests.lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from tests.lightning.pytorch.callbacks import ModelCheckpoint
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO, async_plugin

import tests.lightning as L
from lightning_memload import CheckpointWriteError, MemoryEfficientRestore, StreamingCheckpointIO, open_checkpoint
from lightning_memload.formats import load_mapped
from tests.plugins.harness import TRUSTED, TinyModule, adamw, assert_same, make_trainer

CLONES = hasattr(async_plugin, "_clone_tensor")


def train(folder: Path, plugins: list[Any], **options: Any) -> L.Trainer:
    torch.manual_seed(7)
    trainer = make_trainer(folder, plugins=plugins, max_epochs=1, **options)
    trainer.fit(TinyModule(adamw))
    return trainer


def resume(path: Path, callbacks: list[Any], plugins: list[Any]) -> list[float]:
    torch.manual_seed(8)
    trainer = make_trainer(path.parent, callbacks, plugins=plugins, max_epochs=2)
    module = TinyModule(adamw)
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    return [loss.item() for loss in module.losses]


def test_our_checkpoint_resumes_stock_and_theirs_with_ours(tmp_path: Path) -> None:
    for name, plugins in (("ours.ckpt", [StreamingCheckpointIO()]), ("stock.ckpt", [])):
        train(tmp_path, plugins).save_checkpoint(tmp_path / name)
    ours, stock = (torch.load(tmp_path / name, weights_only=False) for name in ("ours.ckpt", "stock.ckpt"))
    ours.pop("loops"), stock.pop("loops")  # they hold times
    assert_same(stock, ours, "checkpoint")
    losses = resume(tmp_path / "ours.ckpt", [], [])
    assert losses
    assert losses == resume(tmp_path / "stock.ckpt", [], [])
    assert losses == resume(tmp_path / "ours.ckpt", [MemoryEfficientRestore()], [])


@pytest.mark.parametrize("save_last", [True, "link"])
def test_model_checkpoint_keeps_last_and_best(tmp_path: Path, save_last: Any) -> None:
    for _ in range(2):
        saver = ModelCheckpoint(tmp_path / "run", save_last=save_last, every_n_train_steps=1, save_top_k=1)
        trainer = make_trainer(
            tmp_path, [saver], plugins=[StreamingCheckpointIO()], max_epochs=1, enable_checkpointing=True
        )
        trainer.fit(TinyModule(adamw))
    names = os.listdir(tmp_path / "run")
    assert "last.ckpt" in names
    assert (tmp_path / "run" / "last.ckpt").is_symlink() is (save_last == "link")
    assert all(name.endswith(".ckpt") for name in names)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=False)["global_step"] == trainer.global_step


class SaveOften(L.Callback):
    """Saves after every batch, and keeps what was to be saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(self.states)}.ckpt")
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def test_asynchronous_saves_are_complete(tmp_path: Path) -> None:
    saver = SaveOften(tmp_path)
    train(tmp_path, [AsyncCheckpointIO(StreamingCheckpointIO())], callbacks=[saver])
    assert len(saver.states) > 5
    for number, expected in enumerate(saver.states):
        state = torch.load(tmp_path / f"{number}.ckpt", weights_only=False)["state_dict"]
        # Lightning 2.5 does not copy what is saved in the background while training goes on.
        if CLONES:
            assert_same(expected, dict(state), "state_dict")
        assert list(state) == list(expected)


def test_an_asynchronous_failure_surfaces(tmp_path: Path) -> None:
    io = AsyncCheckpointIO(StreamingCheckpointIO())
    (tmp_path / "folder.ckpt").mkdir()

    def save() -> None:
        io.save_checkpoint({"a": torch.ones(1)}, tmp_path / "folder.ckpt")
        io.teardown()

    with pytest.raises(CheckpointWriteError, match=r"folder\.ckpt could not be saved: Is a directory"):
        save()


def test_missing_directories_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = StreamingCheckpointIO()
    io.save_checkpoint({"a": 1}, tmp_path / "x" / "y" / "file.ckpt")
    assert torch.load(tmp_path / "x" / "y" / "file.ckpt") == {"a": 1}
    monkeypatch.chdir(tmp_path)
    io.save_checkpoint({"a": 2}, "file.ckpt")
    io.save_checkpoint({"a": 3}, f"file://{tmp_path}/url.ckpt")
    assert (torch.load(tmp_path / "file.ckpt"), torch.load(tmp_path / "url.ckpt")) == ({"a": 2}, {"a": 3})
    assert io.last_save is not None
    assert io.last_save.path == str(tmp_path / "url.ckpt")
    io.remove_checkpoint(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("make", [StreamingCheckpointIO, TorchCheckpointIO])
def test_storage_options_are_refused_as_lightning_does(make: type[TorchCheckpointIO], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"storage_options.*is not supported for `{make.__name__}`"):
        make().save_checkpoint({}, tmp_path / "file.ckpt", storage_options={"a": 1})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("asynchronous", [False, True, "until_step"])
def test_a_file_that_may_not_be_replaced_is_overwritten_as_lightning_does(
    asynchronous: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is mounted by itself, or in a directory in which only others may replace files."""
    path = tmp_path / "mounted.ckpt"
    path.write_bytes(b"old")
    inode = path.stat().st_ino

    def refusing(call: Any) -> Any:
        def rename(source: Any, target: Any, **kwargs: Any) -> None:
            if os.fspath(target) == str(path):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), target)
            call(source, target, **kwargs)

        return rename

    monkeypatch.setattr(os, "replace", refusing(os.replace))
    monkeypatch.setattr(os, "rename", refusing(os.rename))
    state = {"global_step": 3, "state_dict": {"weight": torch.arange(5.0)}}
    io = StreamingCheckpointIO(asynchronous=asynchronous)
    with pytest.warns(UserWarning, match=r"mounted\.ckpt could not be saved: .* Lightning overwrites it in place"):
        io.save_checkpoint(state, path)
    io.teardown()
    assert path.stat().st_ino == inode
    assert_same(state, torch.load(path), "state")
    assert os.listdir(tmp_path) == ["mounted.ckpt"]
    TorchCheckpointIO().save_checkpoint(state, path)
    assert_same(state, torch.load(path), "state")


def test_a_file_that_may_not_be_written_either_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"old")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointWriteError, match=r"Permission denied.*untouched"):
        StreamingCheckpointIO().save_checkpoint({"weight": torch.ones(1)}, path)
    assert path.read_bytes() == b"old"


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="host_budget_mib must be at least 1, got 0"):
        StreamingCheckpointIO(host_budget_mib=0)


class WithUnpicklable(TinyModule):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["callable"] = lambda: None


def test_what_cannot_be_pickled_raises_as_in_lightning(tmp_path: Path) -> None:
    raised = []
    for plugins in ([], [StreamingCheckpointIO()]):
        trainer = make_trainer(tmp_path, plugins=plugins, max_epochs=1)
        trainer.fit(WithUnpicklable(adamw))
        with pytest.raises(Exception, match=r"pickle|local object") as caught:
            trainer.save_checkpoint(tmp_path / "file.ckpt")
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]
    assert not list(tmp_path.glob("*.ckpt"))


# Remote -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote() -> Iterator[str]:
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    MemoryFileSystem.store.clear()


def test_a_remote_checkpoint_is_lightnings(remote: str) -> None:
    io = StreamingCheckpointIO()
    state = {"state_dict": {"weight": torch.randn(700_000), "tied": torch.arange(5)}}
    io.save_checkpoint(state, f"{remote}/folder/file.ckpt")
    assert_same(state, TorchCheckpointIO().load_checkpoint(f"{remote}/folder/file.ckpt"), "checkpoint")
    assert io.last_save is not None
    assert (io.last_save.path, io.last_save.num_threads) == (f"{remote}/folder/file.ckpt", 1)


def test_a_remote_checkpoint_that_fails_leaves_the_old_one(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    io = StreamingCheckpointIO()
    io.save_checkpoint({"old": 1}, f"{remote}/file.ckpt")
    filesystem = fsspec.filesystem("memory")
    opened = filesystem.open

    def failing(path: str, mode: str = "rb", **options: Any) -> Any:
        file = opened(path, mode, **options)
        if "w" in mode:
            file.write = lambda data: (_ for _ in ()).throw(OSError("the network is gone"))
        return file

    monkeypatch.setattr(filesystem, "open", failing)
    with pytest.raises(OSError, match="the network is gone"):
        io.save_checkpoint({"new": torch.ones(3)}, f"{remote}/file.ckpt")
    monkeypatch.undo()
    assert TorchCheckpointIO().load_checkpoint(f"{remote}/file.ckpt") == {"old": 1}


class FrozenBody(TinyModule):
    """Only the second layer is trained."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.first.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return adamw(self.second.parameters())


def body_files(checkpoint: Path) -> list[int]:
    index = open_checkpoint(checkpoint)
    return [
        os.stat(index.place(index[name].storage.offset)[0]).st_ino
        for name in ("state_dict.first.weight", "state_dict.first.bias")
    ]


@pytest.mark.parametrize("asynchronous_save", [False, True])
def test_a_frozen_body_is_written_once_in_a_run_and_its_resume(tmp_path: Path, asynchronous_save: bool) -> None:
    def fit(max_epochs: int, ckpt_path: Path | None = None) -> FrozenBody:
        saver = ModelCheckpoint(tmp_path / "run", filename="{epoch}", save_top_k=-1, save_last=True)
        restore = MemoryEfficientRestore(save_format="directory", asynchronous_save=asynchronous_save)
        trainer = make_trainer(tmp_path, [restore, saver], max_epochs=max_epochs, enable_checkpointing=True)
        module = FrozenBody()
        trainer.fit(module, ckpt_path=ckpt_path, **TRUSTED)
        return module

    torch.manual_seed(7)
    fit(2)
    module = fit(3, tmp_path / "run" / "last.ckpt")
    checkpoints = [tmp_path / "run" / name for name in ("epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt")]
    assert len({tuple(body_files(checkpoint)) for checkpoint in checkpoints}) == 1
    weights = [load_mapped(checkpoint, weights_only=False)[0]["state_dict"] for checkpoint in checkpoints]
    assert not torch.equal(weights[0]["second.weight"], weights[1]["second.weight"])
    assert_same(dict(weights[2]), dict(module.state_dict()), "last weights")
    for checkpoint in checkpoints[:-1]:
        shutil.rmtree(checkpoint)
    resumed = fit(3, checkpoints[-1])
    assert_same(dict(resumed.state_dict()), dict(module.state_dict()), "resumed")
