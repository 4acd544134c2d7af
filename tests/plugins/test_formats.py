"""A resume through Lightning from every format that is no file of torch, against the ordinary way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.lightning as L
from lightning_memload import (
    MemoryEfficientRestore,
    StreamingCheckpointIO,
    load_from_checkpoint,
    load_weights,
    meta_init,
    open_checkpoint,
    save_directory,
)
from lightning_memload.errors import UnmappableCheckpointError
from tests.formats.files import save_dcp
from tests.plugins.harness import (
    TRUSTED,
    Case,
    TinyModule,
    adamw,
    assert_same,
    make_trainer,
    resume,
    write_checkpoint,
)


def test_what_a_directory_cannot_do_is_said(tmp_path: Path) -> None:
    save_directory({"state_dict": {}}, tmp_path / "directory")
    with pytest.raises(UnmappableCheckpointError, match="map_location='meta' moves the tensors"):
        StreamingCheckpointIO().load_checkpoint(tmp_path / "directory", map_location="meta")


def test_directory_of_tensors(tmp_path: Path) -> None:
    case = Case(lambda: TinyModule(adamw))
    path = write_checkpoint(case, tmp_path)
    save_directory(torch.load(path, weights_only=False), tmp_path / "directory")
    stock_module, stock = resume(case, path, tmp_path, None)
    restore = MemoryEfficientRestore(mode="copy")
    module, ours = resume(case, tmp_path / "directory", tmp_path, restore)
    assert_same(stock.restored, ours.restored, "restored")
    assert_same(stock_module.losses, module.losses, "losses")
    assert_same(stock.ended, ours.ended, "ended")
    report = restore.report
    assert report is not None
    # The weights and the optimizer's states, all of them streamed and verified.
    assert report.total.bytes_read >= report.bytes_verified == open_checkpoint(tmp_path / "directory").nbytes
    assert report.bytes_copied_ordinarily == 0


def in_torch_file(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(weights, folder / "weights.pth")
    return folder / "weights.pth"


def in_legacy_file(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(weights, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder / "legacy.pth"


def in_safetensors(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(weights, folder / "weights")  # no suffix: the content tells
    return folder / "weights"


def in_shards(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    names = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(weights)}
    for shard in set(names.values()):
        save_file({name: value for name, value in weights.items() if names[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def in_directory(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    save_directory({"state_dict": weights}, folder / "directory")
    return folder / "directory"


def in_dcp(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    save_dcp({"model": weights}, folder / "dcp")
    return folder / "dcp"


class Evaluated(TinyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(*batch)


class AtStart(L.Callback):
    """Keeps the weights that training starts with."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*It is loaded the ordinary way")
# Whether a module waits for its values matters where they are moved, after the format: each of both in every way.
@pytest.mark.axes("write", "meta")
@pytest.mark.parametrize("write", [in_torch_file, in_legacy_file, in_safetensors, in_shards, in_directory, in_dcp])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("way", ["fit", "validate", "weights_from", "load_weights", "load_from_checkpoint"])
def test_weights_from_every_format(way: str, meta: bool, write: Any, tmp_path: Path) -> None:
    """The README's table, row by row."""
    torch.manual_seed(6)
    weights = dict(TinyModule().state_dict())
    path = write(weights, tmp_path)
    with meta_init(meta):
        module = Evaluated()
    start = AtStart()
    if way == "fit":
        trainer = make_trainer(tmp_path, [MemoryEfficientRestore(restore=["weights"]), start], max_steps=1)
        trainer.fit(module, ckpt_path=path, **TRUSTED)
    elif way == "validate":
        trainer = make_trainer(tmp_path, [MemoryEfficientRestore()])
        trainer.validate(module, module.train_dataloader(), ckpt_path=path, verbose=False, **TRUSTED)
    elif way == "weights_from":
        make_trainer(tmp_path, [MemoryEfficientRestore(weights_from=path), start], max_steps=1).fit(module)
    elif way == "load_weights":
        load_weights(module, path)
    else:
        module = load_from_checkpoint(Evaluated, path)
    got = start.weights if hasattr(start, "weights") else dict(module.state_dict())
    assert_same(weights, got, "weights")


@pytest.mark.parametrize("asynchronous_save", [False, True])
@pytest.mark.parametrize("save_format", ["directory", "safetensors+state"])
def test_a_run_that_saves_directories_resumes_from_them(
    tmp_path: Path, asynchronous_save: bool, save_format: Any
) -> None:
    case = Case(lambda: TinyModule(adamw))
    file = write_checkpoint(case, tmp_path)
    options = {"save_format": save_format, "asynchronous_save": asynchronous_save}
    directory = write_checkpoint(replace(case, callbacks=lambda: [MemoryEfficientRestore(**options)]), tmp_path / "run")
    assert directory.is_dir()
    stock_module, stock = resume(case, file, tmp_path, None)
    module, ours = resume(case, directory, tmp_path, MemoryEfficientRestore(mode="copy"))
    assert_same(stock.restored, ours.restored, "restored")
    assert_same(stock_module.losses, module.losses, "losses")
    if save_format == "safetensors+state":
        trained = torch.load(file, weights_only=False)["state_dict"]
        assert_same(dict(trained), load_file(directory / "model.safetensors"), "weights")
    io = StreamingCheckpointIO(format=save_format)
    io.save_checkpoint({"a": 1}, directory)
    assert io.load_checkpoint(directory) == {"a": 1}
    io.remove_checkpoint(directory)
    assert not directory.exists()


def test_directories_are_local(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format='directory'\) saves to local disks .* memory://folder/x"):
        StreamingCheckpointIO(format="directory").save_checkpoint({}, "memory://folder/x")
    for make in (lambda: StreamingCheckpointIO(format="zip"), lambda: MemoryEfficientRestore(save_format="zip")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"format must be one of .*'torch', 'directory'.*, got 'zip'"):
            make()


def test_a_format_that_is_left_out_warns(tmp_path: Path) -> None:
    case = Case(
        lambda: TinyModule(adamw),
        plugins=lambda: [StreamingCheckpointIO()],
        callbacks=lambda: [MemoryEfficientRestore(save_format="directory")],
    )
    with pytest.warns(UserWarning, match=r"save_format='directory'\) is ignored"):
        assert write_checkpoint(case, tmp_path).is_file()
