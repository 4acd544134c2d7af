"""Every error about tensors on meta tells what to do. Here it is done, and helps."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, MetaTensorError, load_weights, meta_init
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, make_trainer, write_checkpoint
from tests.plugins.modules import WithBuffer

pytestmark = pytest.mark.filterwarnings("ignore")


class WithParameter(TinyModule):
    """Has a parameter beside its layers, and no ``reset_parameters``."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.scale = nn.Parameter(torch.full((3,), 2.0))


class Copying(nn.Linear):
    """Loads by copying into its parameters, and does not ask whether they have memory."""

    def load_state_dict(self, state_dict: Any, *_: Any, **__: Any) -> Any:
        for name, parameter in self.named_parameters():
            parameter.data.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        self.load_state_dict({name.removeprefix(prefix): value for name, value in state_dict.items()})


class WithCopying(TinyModule):
    def __init__(self) -> None:
        super().__init__(adamw)
        self.second = Copying(10, self.second.out_features)


def on_meta(build: Callable[[], L.LightningModule]) -> L.LightningModule:
    with torch.device("meta"):
        return build()


def under_meta_init(build: Callable[[], L.LightningModule]) -> L.LightningModule:
    with meta_init():
        return build()


def checkpoint_of(build: Callable[[], L.LightningModule], folder: Path) -> Path:
    return write_checkpoint(Case(build), folder)


def fit(module: L.LightningModule, path: Path | None, *callbacks: L.Callback) -> dict[str, torch.Tensor]:
    """Restores, trains no step; returns the weights and buffers."""
    trainer = make_trainer(path.parent if path else Path(), callbacks, max_steps=0 if path is None else 5)
    trainer.fit(module, ckpt_path=path, **TRUSTED)
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_no_checkpoint(tmp_path: Path) -> None:
    """ "Pass ckpt_path=..., or build the module without meta_init() or torch.device('meta')." """
    path = checkpoint_of(WithParameter, tmp_path)
    with pytest.raises(MetaTensorError, match=r"Pass ckpt_path=.*, or build the module without meta_init"):
        fit(on_meta(WithParameter), None, MemoryEfficientRestore())
    expected = fit(WithParameter(), path)
    assert_equal(fit(on_meta(WithParameter), path, MemoryEfficientRestore()), expected)
    fit(WithParameter(), None, MemoryEfficientRestore())


def test_a_buffer_that_no_file_holds(tmp_path: Path) -> None:
    """ "Build the module under lightning_memload.meta_init() ... instead of torch.device('meta')." """
    path = checkpoint_of(WithBuffer, tmp_path)
    with pytest.raises(MetaTensorError, match=r"Build the module under lightning_memload\.meta_init\(\)"):
        fit(on_meta(WithBuffer), path, MemoryEfficientRestore())
    assert_equal(fit(under_meta_init(WithBuffer), path, MemoryEfficientRestore()), fit(WithBuffer(), path))


def test_modules_that_copy_into_what_has_no_memory(tmp_path: Path) -> None:
    """ "Build these modules on a real device, or let torch report missing keys with strict loading." """
    path = checkpoint_of(WithCopying, tmp_path)
    expected = fit(WithCopying(), path)

    class Inside(TinyModule):
        def __init__(self) -> None:
            super().__init__(adamw)
            with torch.device("cpu"):
                self.second = Copying(10, self.second.out_features)

    with pytest.raises(MetaTensorError, match="Build these modules on a real device"):
        fit(on_meta(WithCopying), path, MemoryEfficientRestore())
    assert_equal(fit(on_meta(Inside), path, MemoryEfficientRestore()), expected)
    # meta_init knows such parameters.
    assert_equal(fit(under_meta_init(WithCopying), path, MemoryEfficientRestore()), expected)


def test_a_parameter_that_the_file_lacks(tmp_path: Path) -> None:
    """ "Build this module outside meta_init, or give it reset_parameters()." """
    path = tmp_path / "weights.pt"
    torch.save(TinyModule(adamw).state_dict(), path)

    class WithReset(WithParameter):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.scale, 2.0)

    with pytest.raises(MetaTensorError, match=r"lacks scale, .*Build this module outside meta_init, or give it reset"):
        load_weights(on_meta(WithParameter), path, exclude=["scale"])
    expected = WithParameter()
    load_weights(expected, path, exclude=["scale"])
    for module in (on_meta(WithReset), under_meta_init(WithParameter)):
        load_weights(module, path, exclude=["scale"])
        assert_equal(dict(module.named_parameters()), dict(expected.named_parameters()))


def test_a_buffer_without_values(tmp_path: Path) -> None:
    """ "Build the module under meta_init(), ... or give these tensors values before loading." """
    path = tmp_path / "weights.pt"
    expected = WithBuffer()
    torch.save(expected.state_dict(), path)
    with pytest.raises(MetaTensorError, match=r"Build the module under meta_init\(\), .* or give these tensors values"):
        load_weights(on_meta(WithBuffer), path)
    given = on_meta(WithBuffer)
    given.register_buffer("secret", torch.ones(3), persistent=False)
    for module in (under_meta_init(WithBuffer), given):
        load_weights(module, path)
        assert_equal(dict(module.named_parameters()), dict(expected.named_parameters()))
        assert torch.equal(module.secret, expected.secret)


def test_a_parameter_that_is_watched(tmp_path: Path) -> None:
    """ "Build it on a real device instead of on meta." """
    path = tmp_path / "weights.pt"
    expected = nn.Linear(2, 2)
    torch.save(expected.state_dict(), path)
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    watching = weakref.ref(module.weight)
    with pytest.raises(MetaTensorError, match=r"Build it on a real device instead of on meta"):
        load_weights(module, path)
    module = nn.Linear(2, 2)
    watching = weakref.ref(module.weight)
    load_weights(module, path)
    assert watching() is module.weight
    assert torch.equal(module.weight, expected.weight)


@pytest.mark.parametrize("advice", ["build again", "without mmap", "replace"])
def test_a_file_that_was_written_to_in_place(advice: str, tmp_path: Path) -> None:
    """ "Build the module again, load that file without mmap=True, or replace it by a new file instead." """
    encoder, path = tmp_path / "encoder.pt", tmp_path / "weights.pt"
    first, second = nn.Linear(200, 200), nn.Linear(200, 200)
    torch.save(first.state_dict(), encoder)
    os.utime(encoder, (1, 1))
    torch.save({"head.weight": torch.ones(1, 3), "head.bias": torch.ones(1)}, path)

    class Net(nn.Module):
        def __init__(self, *, mmap: bool = True) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(200, 200), nn.Linear(3, 1)
            self.encoder.load_state_dict(torch.load(encoder, weights_only=True, mmap=mmap))

    def load(module: nn.Module) -> nn.Linear:
        load_weights(module, path, exclude=["encoder"])
        return module.encoder  # type: ignore[return-value]

    def rewrite() -> None:
        torch.save(second.state_dict(), tmp_path / "new.pt")
        data = (tmp_path / "new.pt").read_bytes()
        with encoder.open("r+b") as file:
            file.write(data)

    with meta_init():
        module = Net(mmap=advice != "without mmap")
    expected = first
    if advice == "replace":
        torch.save(second.state_dict(), tmp_path / "new.pt")
        (tmp_path / "new.pt").replace(encoder)
    else:
        rewrite()
    if advice == "build again":
        with pytest.raises(MetaTensorError, match=r"Build the module again, load that file without mmap=True, or"):
            load(module)
        with meta_init():
            module = Net()
        expected = second
    assert torch.equal(load(module).weight, expected.weight)
