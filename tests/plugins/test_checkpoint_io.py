"""The CheckpointIO that loads: that of this package, that of the user, and one within the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, make_trainer, write_checkpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path)


class Own(TorchCheckpointIO):
    """A user's."""


class Derived(StreamingCheckpointIO):
    """A user's that derives ours, and counts."""

    saved = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.saved += 1
        super().save_checkpoint(checkpoint, path, storage_options)


def run(path: Path, plugins: list[Any]) -> tuple[MemoryEfficientRestore, TinyModule, Any]:
    restore = MemoryEfficientRestore(mode="copy")
    module = TinyModule(adamw)
    torch.manual_seed(3)
    trainer = make_trainer(path.parent, [restore], plugins=plugins, max_epochs=1)
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    trainer.save_checkpoint(path.parent / "again.ckpt")
    trainer.strategy.checkpoint_io.teardown()
    assert (path.parent / "again.ckpt").exists()
    return restore, module, trainer


def test_ours_is_installed(path: Path) -> None:
    restore, _, trainer = run(path, [])
    assert type(trainer.strategy.checkpoint_io) is StreamingCheckpointIO
    assert restore.report is not None
    assert restore.report.mode == "copy"


@pytest.mark.parametrize("make", [StreamingCheckpointIO, Derived])
def test_given_one_is_used(make: type[StreamingCheckpointIO], path: Path) -> None:
    io = make()
    restore, _, trainer = run(path, [io])
    assert trainer.strategy.checkpoint_io is io
    assert restore.report is not None
    assert restore.report.mode == "copy"
    if isinstance(io, Derived):
        assert io.saved == 1


needs_reusable_async = pytest.mark.skipif(
    not TRUSTED, reason="the AsyncCheckpointIO of Lightning 2.5 saves nothing more after its first teardown"
)


@needs_reusable_async
@pytest.mark.parametrize("inner", [None, StreamingCheckpointIO])
def test_wrapping_one_keeps_wrapping(inner: Any, path: Path) -> None:
    given = inner() if inner else None
    wrapper = AsyncCheckpointIO(given) if given else AsyncCheckpointIO()
    restore, module, trainer = run(path, [wrapper])
    _, stock_like, _ = run(path, [])
    assert trainer.strategy.checkpoint_io is wrapper
    assert isinstance(wrapper.checkpoint_io, StreamingCheckpointIO)
    assert given is None or wrapper.checkpoint_io is given
    assert restore.report is not None
    assert restore.report.mode == "copy"
    assert [loss.item() for loss in module.losses] == [loss.item() for loss in stock_like.losses]


@pytest.mark.parametrize("wrapped", [False, pytest.param(True, marks=needs_reusable_async)])
@pytest.mark.parametrize("make", [Own, TorchCheckpointIO])
def test_another_one_is_respected_with_a_warning(make: type[TorchCheckpointIO], wrapped: bool, path: Path) -> None:
    io = make()
    with pytest.warns(UserWarning, match=f"The Trainer was given {make.__name__} through plugins=") as caught:
        restore, _, trainer = run(path, [AsyncCheckpointIO(io) if wrapped else io])
    assert len([w for w in caught if "MemoryEfficientRestore" in str(w.message)]) == 1
    used = trainer.strategy.checkpoint_io
    assert (used.checkpoint_io if wrapped else used) is io
    report = restore.report
    assert report is not None
    assert (report.mode, report.path, report.global_step) == ("default", str(path), 5)
    assert report.total.seconds > 0


def test_passes_any_dict_through(tmp_path: Path) -> None:
    """Lightning's fork and spawn launchers save and load a bare state dict."""
    io = StreamingCheckpointIO()
    bare = TinyModule().state_dict()
    io.save_checkpoint(bare, tmp_path / "bare.ckpt")
    for weights_only in (True, False):
        loaded = io.load_checkpoint(tmp_path / "bare.ckpt", weights_only=weights_only)
        assert loaded.keys() == bare.keys()
        assert all(torch.equal(loaded[name], value) for name, value in bare.items())
    io.save_checkpoint({"nothing": 1}, tmp_path / "none.ckpt")
    assert io.load_checkpoint(tmp_path / "none.ckpt", weights_only=True) == {"nothing": 1}


def test_loads_to_a_device_the_ordinary_way(path: Path) -> None:
    io = StreamingCheckpointIO()
    with pytest.warns(UserWarning, match="map_location='meta' moves the tensors"):
        loaded = io.load_checkpoint(path, map_location="meta", weights_only=False)
    assert loaded["state_dict"]["first.weight"].is_meta
    assert not io.load_checkpoint(path, map_location="cpu", weights_only=False)["state_dict"]["first.weight"].is_meta


def test_default_of_weights_only_is_the_stock_one(path: Path) -> None:
    ours = StreamingCheckpointIO().load_checkpoint(path)
    stock = TorchCheckpointIO().load_checkpoint(path)
    assert ours.keys() == stock.keys()


def test_observer_is_removed_once(path: Path) -> None:
    calls: list[str] = []

    class Observer:
        def on_load_start(self, path: str) -> str:
            calls.append("start")
            return path

        def on_load_end(self, path: str, checkpoint: Any, mapped: Any) -> None:
            assert mapped is not None
            calls.append("end")

    io = StreamingCheckpointIO()
    remove = io.observe(Observer())
    io.load_checkpoint(path, weights_only=False)
    remove()
    remove()
    io.load_checkpoint(path, weights_only=False)
    assert calls == ["start", "end"]
