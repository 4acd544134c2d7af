"""A restore that fails leaves a usable module, no hook, no mapping, no descriptor, and an error that helps."""

from __future__ import annotations

import gc
import os
import threading
import traceback
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.lightning as L
from lightning_memload import (
    CheckpointFormatError,
    ChecksumError,
    IncompatibleWeightsError,
    MemoryEfficientRestore,
    MetaTensorError,
    StreamingCheckpointIO,
    meta_init,
)
from lightning_memload.transfer import LazyRing
from tests.plugins.harness import FEATURES, TRUSTED, Case, TinyModule, adamw, make_trainer, write_checkpoint
from tests.plugins.modules import WithBuffer
from tests.plugins.restored import assert_clean, flip_byte, held


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path)


def fit(module: L.LightningModule, path: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    trainer = make_trainer(path.parent, callbacks, max_epochs=1)
    trainer.fit(module, ckpt_path=path, **{**TRUSTED, **kwargs})
    return trainer


def failure(module: L.LightningModule, path: Path, *callbacks: L.Callback, **kwargs: Any) -> BaseException:
    """The error of a fit, without its traceback; checks that it came before training and what it left behind."""
    trainer = make_trainer(path.parent, callbacks, max_epochs=1)
    error: BaseException | None = None
    try:
        trainer.fit(module, ckpt_path=path, **{**TRUSTED, **kwargs})
    except Exception as caught:
        error = caught
    assert error is not None, "nothing failed"
    assert not getattr(module, "losses", [])
    assert_clean(trainer, module)
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error


# Damage -------------------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def _garbage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-200:] = os.urandom(200)
    path.write_bytes(data)


def _flip_weight(path: Path) -> None:
    flip_byte(path, "state_dict.second.weight")


def _flip_state(path: Path) -> None:
    flip_byte(path, "optimizer_states[0].state[3].exp_avg_sq")


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (_truncate, CheckpointFormatError),
        (_garbage, CheckpointFormatError),
        (_flip_weight, ChecksumError),
        (_flip_state, ChecksumError),
    ],
)
@pytest.mark.parametrize("meta", [False, True])
def test_damaged_file(damage: Callable[[Path], None], kind: type[Exception], meta: bool, path: Path) -> None:
    sound = path.with_name("sound.ckpt")
    sound.write_bytes(path.read_bytes())
    damage(path)
    with meta_init(enabled=meta):
        module = TinyModule(adamw)
    error = failure(module, path, MemoryEfficientRestore())
    assert isinstance(error, kind)
    assert str(path) in str(error)
    del error
    gc.collect()
    assert held(path) == []
    # The same module still restores a sound file.
    fit(module, sound, MemoryEfficientRestore())
    assert module.losses


def test_missing_file_is_the_stock_error(tmp_path: Path) -> None:
    missing = tmp_path / "nothing.ckpt"
    stock = failure(TinyModule(adamw), missing)
    ours = failure(TinyModule(adamw), missing, MemoryEfficientRestore())
    assert type(ours) is type(stock) is FileNotFoundError
    assert str(ours) == str(stock)


# Errors of users and of torch -----------------------------------------------------------------------------------------


class Raising(TinyModule):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise KeyError("a user's mistake")


class Wider(TinyModule):
    def __init__(self) -> None:
        super().__init__(adamw)
        self.second = nn.Linear(10, FEATURES + 1)


class More(TinyModule):
    def __init__(self) -> None:
        super().__init__(adamw)
        self.third = nn.Linear(2, 2)
        del self.first
        self.first = nn.Linear(FEATURES, 10, bias=False)


@pytest.mark.parametrize("make", [Raising, Wider, More])
@pytest.mark.parametrize("mode", ["copy", "assign"])
def test_error_is_the_stock_one_or_a_kind_of_it(make: Callable[[], L.LightningModule], mode: Any, path: Path) -> None:
    stock = failure(make(), path)
    module = make()
    ours = failure(module, path, MemoryEfficientRestore(mode=mode))
    if make is Raising:
        assert (type(ours), str(ours)) == (type(stock), str(stock))
    else:  # a short message, which is caught where torch's is
        assert isinstance(ours, IncompatibleWeightsError)
        assert isinstance(ours, type(stock))
    assert not [parameter for parameter in module.parameters() if parameter.is_meta]
    module(torch.ones(1, FEATURES))
    del ours, stock
    if mode == "copy":
        gc.collect()
        assert held(path) == []


def test_optimizer_that_does_not_match_is_the_stock_error(path: Path) -> None:
    class Grouped(TinyModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([self.first.weight], lr=0.01)

    assert str(failure(Grouped(), path, MemoryEfficientRestore())) == str(failure(Grouped(), path))


@pytest.mark.parametrize("meta", [False, True])
def test_error_on_the_way_of_a_module_on_meta_is_not_hidden(meta: bool, path: Path) -> None:
    """Lightning's teardown moves the module, which torch refuses for meta tensors, in the place of the real error."""
    with meta_init(enabled=meta):
        module = Raising(adamw)
    error = failure(module, path, MemoryEfficientRestore())
    assert isinstance(error, KeyError)


class Custom:
    """Nothing that ``weights_only`` allows."""

    value = 3


@pytest.mark.skipif(not TRUSTED, reason="Lightning 2.5 has no such argument")
@pytest.mark.parametrize("weights_only", [True, False, None])
@pytest.mark.parametrize("meta", [False, True])
def test_weights_only_is_passed_on(weights_only: bool | None, meta: bool, path: Path) -> None:
    class Saving(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
            checkpoint["custom"] = Custom()

    if meta:
        path = write_checkpoint(Case(lambda: TinyModule(adamw), callbacks=lambda: [Saving()]), path.parent)
    outcomes: list[tuple[type[BaseException] | None, str]] = []
    for callbacks in ([], [MemoryEfficientRestore()]):
        try:
            fit(TinyModule(adamw), path, *callbacks, weights_only=weights_only)
        except Exception as error:
            outcomes.append((type(error), str(error)))
        else:
            outcomes.append((None, ""))
    (stock, words), (ours, more_words) = outcomes
    assert (stock is None) == (weights_only is False or not meta)
    if stock is None:
        assert (ours, more_words) == (None, "")
    else:
        # Still torch's error, but with the places of what is refused.
        assert ours is not None
        assert issubclass(ours, stock)
        assert "test_failures.Custom, at custom" in more_words
        assert "test_failures.Custom" in words


# Meta -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_module_on_meta_without_checkpoint(stage: str, tmp_path: Path) -> None:
    class Validated(TinyModule):
        def validation_step(self, *_: Any) -> None: ...

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    with meta_init():
        module = Validated(adamw)
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()])
    with pytest.raises(MetaTensorError, match=r"no checkpoint is restored\. Pass ckpt_path") as caught:
        getattr(trainer, stage)(module)
    assert caught.value.names == ("first.weight", "first.bias", "second.weight", "second.bias")
    assert_clean(trainer, module)


def test_data_on_meta_without_checkpoint(tmp_path: Path) -> None:
    """Weights that a constructor loaded stay. Only parameters without values are named."""

    class Pretrained(TinyModule):
        def __init__(self, *, whole: bool) -> None:
            super().__init__(adamw)
            torch.save(TinyModule(adamw).state_dict(), tmp_path / "pretrained.pt")
            values = torch.load(tmp_path / "pretrained.pt", weights_only=True)
            self.load_state_dict({name: v for name, v in values.items() if whole or "first" in name}, strict=False)

    with meta_init():
        module = Pretrained(whole=False)
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()])
    with pytest.raises(MetaTensorError, match=r"no checkpoint is restored\. Pass ckpt_path") as caught:
        trainer.fit(module)
    assert caught.value.names == ("second.weight", "second.bias")
    with meta_init():
        module = Pretrained(whole=True)
    make_trainer(tmp_path, [MemoryEfficientRestore()], max_steps=0).fit(module)
    expected = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_buffer_on_meta_that_no_file_holds(tmp_path: Path) -> None:
    path = write_checkpoint(Case(WithBuffer), tmp_path)
    with torch.device("meta"):
        module = WithBuffer()
    error = failure(module, path, MemoryEfficientRestore())
    assert isinstance(error, MetaTensorError)
    assert error.names == ("secret",)
    assert "lightning_memload.meta_init()" in str(error)


def test_parameter_on_meta_that_the_file_lacks(path: Path) -> None:
    def make() -> L.LightningModule:
        module = TinyModule()
        module.head = nn.Linear(4, 4)
        return module

    stock = failure(make(), path)
    with meta_init():
        module = make()
    ours = failure(module, path, MemoryEfficientRestore())
    assert isinstance(ours, type(stock))
    assert isinstance(ours, IncompatibleWeightsError)
    assert ours.missing_keys == ("head.weight", "head.bias")
    with meta_init():
        module = make()
    module.strict_loading = False
    # The optimizer knows two parameters more than the file: only evaluation can go on.
    trainer = make_trainer(path.parent, [MemoryEfficientRestore(mode="copy")])
    trainer.predict(module, module.train_dataloader(), ckpt_path=path, **TRUSTED)
    on_disk = torch.load(path, weights_only=False)["state_dict"]
    for name, value in module.state_dict().items():
        assert value.device.type == "cpu"
        if name in on_disk:
            assert torch.equal(value, on_disk[name])
    head = module.head
    assert isinstance(head, nn.Linear)
    # reset_parameters: uniform within 1 / sqrt(inputs).
    assert 0 < head.weight.abs().max() <= 0.5
    assert_clean(trainer, module)


def test_module_on_meta_in_full_precision_keeps_every_bit(tmp_path: Path) -> None:
    """The ordinary way rounds a 64-bit checkpoint to the module's own 32 bits; here is no such step."""
    case = Case(lambda: TinyModule(adamw), trainer={"precision": "64-true"})
    path = write_checkpoint(case, tmp_path)
    with meta_init():
        module = TinyModule(adamw)
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore(mode="copy")], precision="64-true")
    trainer.predict(module, module.train_dataloader(), ckpt_path=path, **TRUSTED)
    for name, value in torch.load(path, weights_only=False)["state_dict"].items():
        assert value.dtype == torch.float64
        assert torch.equal(module.state_dict()[name], value)


# What stays -----------------------------------------------------------------------------------------------------------


class KeepsAll(L.Callback):
    """Keeps all objects that it gets."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.held: list[str] | None = None
        self.path = Path()

    def state_dict(self) -> dict[str, Any]:
        return {"large": torch.arange(500_000.0), "small": torch.tensor(7)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        self.kept = checkpoint["callbacks"]["KeepsAll"]
        self.view = checkpoint["state_dict"]["first.weight"][2:4, 1]
        self.array = checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].numpy()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.held = held(self.path)


@pytest.mark.parametrize("meta", [False, True])
def test_copy_keeps_nothing_of_the_file(meta: bool, tmp_path: Path) -> None:
    path = write_checkpoint(Case(lambda: TinyModule(adamw), callbacks=lambda: [KeepsAll()]), tmp_path)
    keeping = KeepsAll()
    keeping.path = path
    with meta_init(enabled=meta):
        module = TinyModule(adamw)
    restore = MemoryEfficientRestore()
    trainer = fit(module, path, restore, keeping)
    assert keeping.held == []
    assert restore.report is not None
    assert restore.report.bytes_kept >= 2_000_000
    on_disk = torch.load(path, weights_only=False)
    path.unlink()
    assert torch.equal(keeping.kept["large"], torch.arange(500_000.0))
    assert keeping.kept["small"] == 7
    assert torch.equal(keeping.view, on_disk["state_dict"]["first.weight"][2:4, 1])
    assert torch.equal(torch.from_numpy(keeping.array), on_disk["optimizer_states"][0]["state"][0]["exp_avg"])
    keeping.kept["large"] += 1
    step = trainer.optimizers[0].state[module.first.weight]["step"]
    assert step == on_disk["optimizer_states"][0]["state"][0]["step"] + 8 - 5


def test_steps_are_not_in_the_file(path: Path) -> None:
    class Looking(L.Callback):
        inside = True

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            maps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
                    if line.endswith(str(path))]  # fmt: skip
            assert maps == []
            self.inside = False

    looking = Looking()
    fit(TinyModule(adamw), path, MemoryEfficientRestore(), looking)
    assert not looking.inside


def test_module_and_file_are_let_go_after_the_run(path: Path) -> None:
    module = TinyModule(adamw)
    restore = MemoryEfficientRestore()
    fit(module, path, restore)
    gone = weakref.ref(module.first)
    restore.__dict__.pop("log", None), restore.__dict__.pop("log_dict", None)  # Lightning's own references
    del module
    gc.collect()
    assert gone() is None


# Plugins --------------------------------------------------------------------------------------------------------------


def _legacy(path: Path) -> None:
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)


def _compress(path: Path) -> None:
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries.items():
            target.writestr(name, data)


@pytest.mark.parametrize("change", [_legacy, _compress])
def test_file_that_cannot_be_mapped_is_loaded_the_ordinary_way(change: Callable[[Path], None], path: Path) -> None:
    expected = torch.load(path, weights_only=False)["state_dict"]
    change(path)
    restore = MemoryEfficientRestore()
    module = TinyModule(adamw)
    trainer = make_trainer(path.parent, [restore])
    with pytest.warns(UserWarning, match="the whole checkpoint in host memory, on every rank") as caught:
        trainer.predict(module, module.train_dataloader(), ckpt_path=path, **TRUSTED)
    assert len([w for w in caught if "whole checkpoint" in str(w.message)]) == 1
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name])
    assert restore.report is not None
    assert restore.report.mode == "default"
    assert restore.report.total.seconds > 0


def test_io_alone_maps(path: Path) -> None:
    module, stock = TinyModule(adamw), TinyModule(adamw)
    for one, plugins in ((module, [StreamingCheckpointIO()]), (stock, [])):
        torch.manual_seed(4)
        trainer = make_trainer(path.parent, plugins=plugins, max_epochs=1)
        trainer.fit(one, ckpt_path=path, **TRUSTED)
    assert [a.item() for a in module.losses] == [b.item() for b in stock.losses]
    checkpoint = StreamingCheckpointIO().load_checkpoint(path, weights_only=False)
    assert held(path)
    assert torch.equal(
        checkpoint["state_dict"]["first.weight"], torch.load(path, weights_only=False)["state_dict"]["first.weight"]
    )


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_while_it_ends(path: Path, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    close = LazyRing.close

    def interrupted(self: LazyRing) -> None:
        close(self)
        closed.append(1)
        if len(closed) <= times:
            raise KeyboardInterrupt

    monkeypatch.setattr(LazyRing, "close", interrupted)
    module = TinyModule(adamw)
    trainer = make_trainer(path.parent, [MemoryEfficientRestore()], max_epochs=1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, ckpt_path=path, **TRUSTED)
    assert len(closed) > times
    assert_clean(trainer, module)
    assert not [thread.name for thread in threading.enumerate() if "memload" in thread.name]
    fit(TinyModule(adamw), path, MemoryEfficientRestore())
