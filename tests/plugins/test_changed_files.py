"""A checkpoint that is replaced or cut short while a Trainer restores it: the old one, to the last bit, or an error."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.lightning as L
from lightning_memload import CheckpointReadError, MemoryEfficientRestore
from lightning_memload.save import save_directory
from lightning_memload.storage import replacement
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, assert_same, make_trainer, write_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings, and names that are exchanged, need Linux")

MOMENTS = ["module loads", "callbacks load", "optimizers are made", "fit starts"]


def write(format: str, folder: Path, steps: int) -> Path:
    folder.mkdir()
    path = write_checkpoint(Case(lambda: TinyModule(adamw), save_after=steps), folder)
    if format == "torch":
        return path
    save_directory(torch.load(path, weights_only=False), folder / "directory.ckpt")
    return folder / "directory.ckpt"


def fit(path: Path, moment: str, action: Callable[[], object]) -> list[Any]:
    """Resumes, with something happening at a moment of the restore; returns the losses and what a callback kept."""
    kept: list[Any] = []

    def at(this: str) -> None:
        if this == moment:
            action()

    class Module(TinyModule):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            kept.append(checkpoint["state_dict"]["first.bias"])
            at("module loads")

        def configure_optimizers(self) -> Any:
            at("optimizers are made")
            return super().configure_optimizers()

    class Callback(L.Callback):
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            at("callbacks load")

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            at("fit starts")

    torch.manual_seed(3)
    module = Module(adamw)
    make_trainer(path.parent, [MemoryEfficientRestore(), Callback()], max_epochs=1).fit(
        module, ckpt_path=path, **TRUSTED
    )
    return [*module.losses, kept[0].clone()]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("format", ["torch", "directory"])
def test_replaced(format: str, moment: str, tmp_path: Path) -> None:
    path, other = (write(format, tmp_path / name, steps) for name, steps in (("run", 3), ("other", 5)))
    expected = fit(path, "never", lambda: None)

    def replace() -> None:
        assert replacement._exchange(str(other), str(path))
        shutil.rmtree(other) if other.is_dir() else other.unlink()

    assert_same(expected, fit(path, moment, replace), "resumed")
    assert not other.exists()


@pytest.mark.parametrize("length", [0, 3000])
@pytest.mark.parametrize("moment", MOMENTS)
def test_cut_short(moment: str, length: int, tmp_path: Path) -> None:
    path = write("torch", tmp_path / "run", 3)
    with pytest.raises(CheckpointReadError, match=r"case\.ckpt ends at byte \d+, .* truncated while it was re"):
        fit(path, moment, lambda: os.truncate(path, length))


def test_cut_short_when_all_is_restored(tmp_path: Path) -> None:
    """But for what a callback kept, which is read from the file when the restore ends, and not from its mapping."""
    path = write("torch", tmp_path / "run", 3)

    class Keeping(TinyModule):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.kept = checkpoint["state_dict"]["first.weight"]

        def configure_optimizers(self) -> Any:
            optimizer = adamw(self.parameters())
            # The last tensors that a restore reads are this optimizer's.
            optimizer.register_load_state_dict_post_hook(lambda _: os.truncate(path, 0))
            return optimizer

    trainer = make_trainer(path.parent, [MemoryEfficientRestore()], max_epochs=1)
    with pytest.raises(
        CheckpointReadError, match=r"case\.ckpt ends at byte \d+, but a tensor of it that is still in use"
    ):
        trainer.fit(Keeping(), ckpt_path=path, **TRUSTED)
