"""Memory that parameters share with one another, with buffers, with attributes, and with what hooks hold."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, meta_init
from tests.plugins.harness import FEATURES, TRUSTED, Recorded, assert_same, make_trainer

WIDTH = 700  # more than one block of a transfer


class Two(Recorded):
    """Two square layers. Sub-classes let them share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, bias=False)
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([inputs, inputs.new_zeros(len(inputs), WIDTH - FEATURES)], 1)
        return self.b(self.a(wide))[:, :FEATURES]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(self.loss(*batch).detach().clone())


class SameMemory(Two):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = nn.Parameter(self.a.weight.data)


class PartlySameMemory(Two):
    def __init__(self) -> None:
        super().__init__()
        flat = torch.zeros(WIDTH * WIDTH + 100)
        self.a.weight = nn.Parameter(flat[:-100].view(WIDTH, WIDTH))
        self.b.weight = nn.Parameter(flat[100:].view(WIDTH, WIDTH))


class BufferView(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("view", self.a.weight.data[:FEATURES, :FEATURES], persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + inputs @ self.view


class AttributeView(Two):
    def __init__(self) -> None:
        super().__init__()
        self.rows = self.a.weight.data[:FEATURES, :FEATURES]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + inputs @ self.rows


def save(module: L.LightningModule, folder: Path) -> Path:
    trainer = make_trainer(folder, max_steps=2)
    trainer.fit(module)
    trainer.save_checkpoint(folder / "shared.ckpt")
    return folder / "shared.ckpt"


def run(stage: str, module: Any, path: Path, folder: Path, *callbacks: L.Callback) -> Any:
    trainer = make_trainer(folder, callbacks, max_steps=4)
    data = module.train_dataloader()
    getattr(trainer, stage)(module, data, ckpt_path=str(path), **TRUSTED)
    return module


# Options change how bytes are moved, the stage whether optimizers are restored: each with every kind.
@pytest.mark.axes("stage", "options")
@pytest.mark.parametrize("kind", [SameMemory, PartlySameMemory, BufferView, AttributeView])
@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("options", [{}, {"verify": False, "num_threads": 8}, {"mode": "copy"}], ids=str)
def test_like_stock(kind: type[Two], stage: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = save(Two(), tmp_path)  # two different values, of which the last one wins
    torch.manual_seed(5)
    stock = run(stage, kind(), path, tmp_path)
    torch.manual_seed(5)
    ours = run(stage, kind(), path, tmp_path, MemoryEfficientRestore(**options))
    assert_same(stock.losses, ours.losses, "losses")
    assert_same(dict(stock.state_dict()), dict(ours.state_dict()), "state")


@pytest.mark.parametrize("kind", [SameMemory, BufferView])
def test_assigning_leaves_shared_memory_alone(kind: type[Two], tmp_path: Path) -> None:
    path = save(Two(), tmp_path)
    stock = run("validate", kind(), path, tmp_path)
    restore = MemoryEfficientRestore(mode="assign")
    ours = run("validate", kind(), path, tmp_path, restore)
    assert_same(stock.losses, ours.losses, "losses")
    assert restore.report is not None
    assert restore.report.bytes_assigned == (0 if kind is SameMemory else WIDTH * WIDTH * 4)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("mode", ["auto", "assign"])
def test_a_model_keeps_its_strides(mode: Any, meta: bool, tmp_path: Path) -> None:
    path = save(Two(), tmp_path)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state_dict"]["a.weight"] = checkpoint["state_dict"]["a.weight"].t().contiguous().t()
    torch.save(checkpoint, path)
    with meta_init(meta):
        module = Two()
    run("validate", module, path, tmp_path, MemoryEfficientRestore(mode=mode))
    assert module.a.weight.is_contiguous()
    assert torch.equal(module.a.weight, checkpoint["state_dict"]["a.weight"])


class TestHooksUnderAssign:
    """A hook that changes the checkpoint does not change the module, and the other way round."""

    class LoadsItself(Two):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.load_state_dict(checkpoint["state_dict"])
            self.a.weight.data.mul_(5)

    class Edits(L.Callback):
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            for value in checkpoint["state_dict"].values():
                value.zero_()

    class EditsFirst(Two):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["a.weight"].mul_(2)

    @pytest.mark.parametrize("kind", [LoadsItself, EditsFirst, Two])
    @pytest.mark.parametrize("meta", [False, True])
    def test_like_stock(self, kind: type[Two], meta: bool, tmp_path: Path) -> None:
        path = save(Two(), tmp_path)
        stock = run("validate", kind(), path, tmp_path, self.Edits())
        with meta_init(meta):
            module = kind()
        restore = MemoryEfficientRestore(mode="assign")
        ours = run("validate", module, path, tmp_path, self.Edits(), restore)
        assert_same(dict(stock.state_dict()), dict(ours.state_dict()), "state")
        assert_same(stock.losses, ours.losses, "losses")
        assert restore.report is not None
        assert (restore.report.bytes_assigned > 0) == (kind is not self.EditsFirst)  # whose bytes are not the file's

    def test_an_assigned_parameter_is_saved_alone(self, tmp_path: Path) -> None:
        path = save(Two(), tmp_path)
        checkpoint = torch.load(path, weights_only=False)
        flat = torch.cat([checkpoint["state_dict"][f"{name}.weight"].flatten() for name in "ab"])
        for number, name in enumerate("ab"):
            part = flat[number * WIDTH**2 : (number + 1) * WIDTH**2]
            checkpoint["state_dict"][f"{name}.weight"] = part.view(WIDTH, WIDTH)
        torch.save(checkpoint, path)
        with meta_init():
            module = Two()
        run("validate", module, path, tmp_path, MemoryEfficientRestore(mode="assign"))
        for layer in (module.a, module.b):
            assert layer.weight.untyped_storage().nbytes() == WIDTH * WIDTH * 4


def test_a_submodule_can_be_pickled_during_the_restore(tmp_path: Path) -> None:
    class Pickles(Two):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            buffer = io.BytesIO()
            torch.save(self.a, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
            other.load_state_dict(copy.deepcopy(self.a).state_dict())
            assert torch.equal(other.weight, self.a.weight)

    path = save(Two(), tmp_path)
    run("fit", Pickles(), path, tmp_path, MemoryEfficientRestore())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_script_module_inside(tmp_path: Path) -> None:
    class Scripted(Two):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.jit.script(nn.Linear(WIDTH, WIDTH, bias=False))  # type: ignore[assignment]

    path = save(Scripted(), tmp_path)
    stock = run("fit", Scripted(), path, tmp_path)
    ours = run("fit", Scripted(), path, tmp_path, MemoryEfficientRestore())
    assert_same(stock.losses, ours.losses, "losses")


class TestFallback:
    @pytest.mark.filterwarnings("ignore:.*It is loaded the ordinary way")
    @pytest.mark.parametrize("stage", ["fit", "validate"])
    def test_a_meta_built_model_from_a_file_that_cannot_be_mapped(self, stage: str, tmp_path: Path) -> None:
        path = save(Two(), tmp_path)
        checkpoint = torch.load(path, weights_only=False)
        torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
        stock = run(stage, Two(), path, tmp_path)
        with meta_init():
            module = Two()
        restore = MemoryEfficientRestore()
        ours = run(stage, module, path, tmp_path, restore)
        assert_same(stock.losses, ours.losses, "losses")
        assert restore.report is not None
        assert restore.report.mode == "default"

    @pytest.mark.filterwarnings("ignore:.*It is loaded the ordinary way")
    def test_whatever_torch_is_told_about_mapping(self, tmp_path: Path) -> None:
        settings = pytest.importorskip("torch.utils.serialization")
        path = save(Two(), tmp_path)
        torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
        with settings.config.patch("load.mmap", True):
            run("fit", Two(), path, tmp_path, MemoryEfficientRestore())
            assert settings.config.load.mmap is True


class TestWhoseIO:
    class Reads(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            assert trainer.strategy.checkpoint_io is not None  # Lightning fills in its own

    def test_somebody_read_the_property_first(self, tmp_path: Path) -> None:
        path = save(Two(), tmp_path)
        restore = MemoryEfficientRestore()
        run("fit", Two(), path, tmp_path, self.Reads(), restore)
        assert restore.report is not None
        assert restore.report.mode == "copy"

    def test_lightnings_own_given_on_purpose(self, tmp_path: Path) -> None:
        from tests.lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

        path = save(Two(), tmp_path)
        module, restore = Two(), MemoryEfficientRestore()
        trainer = make_trainer(tmp_path, [restore], max_steps=4, plugins=[TorchCheckpointIO()])
        with pytest.warns(UserWarning, match="was given TorchCheckpointIO through plugins="):
            trainer.fit(module, DataLoader(module.train_dataloader().dataset), ckpt_path=str(path), **TRUSTED)


def test_a_copy_made_during_the_restore_does_not_keep_the_module(tmp_path: Path) -> None:
    class Copies(Two):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            copies.append(copy.deepcopy(self.a))

    copies: list[nn.Module] = []
    path = save(Two(), tmp_path)
    module = weakref.ref(run("fit", Copies(), path, tmp_path, MemoryEfficientRestore()))
    gc.collect()
    assert copies
    assert module() is None
