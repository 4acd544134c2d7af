"""``weights_only`` through the Trainer: what it refuses, what a user allows, and who can do without."""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import decimal
import importlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import torch
from tests.lightning.pytorch.plugins.io import TorchCheckpointIO

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, UnsafeGlobalsError, WeightsSource, load_from_checkpoint
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, assert_same, make_trainer, resume, write_checkpoint

pytestmark = pytest.mark.skipif(not TRUSTED, reason="Lightning 2.5 always loads with weights_only=False")

SAFE: dict[str, Any] = {"weights_only": True}


class Configured(TinyModule):
    """Has something in its checkpoints that torch refuses."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(adamw)
        self.save_hyperparameters()


def config() -> argparse.Namespace:
    return argparse.Namespace(layers=2, more=argparse.Namespace(betas=[0.9]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(Case(lambda: Configured(config())), tmp_path)


def evaluate(path: Path, folder: Path, module: L.LightningModule, *callbacks: L.Callback) -> list[Any]:
    trainer = make_trainer(folder, callbacks=[MemoryEfficientRestore(), *callbacks])
    return list(trainer.predict(module, module.train_dataloader(), ckpt_path=str(path), **SAFE) or [])


def test_a_resume_names_what_is_refused(path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[MemoryEfficientRestore()])
    with pytest.raises(UnsafeGlobalsError) as error:
        trainer.fit(Configured(), ckpt_path=str(path), **SAFE)
    assert error.value.places == {"argparse.Namespace": "hyper_parameters.config"}
    assert "torch.serialization.add_safe_globals([argparse.Namespace])" in str(error.value)
    assert "safe_globals=['argparse.Namespace']" in str(error.value)


@pytest.mark.parametrize("allowed", [[argparse.Namespace], ["argparse.Namespace"]])
def test_a_resume_with_what_is_allowed_is_stocks(path: Path, tmp_path: Path, allowed: Any) -> None:
    case = Case(Configured)
    stock_module, stock = resume(case, path, tmp_path, None)
    restore = MemoryEfficientRestore(safe_globals=allowed)
    trainer = make_trainer(tmp_path, callbacks=[restore])
    module = Configured()
    trainer.fit(module, ckpt_path=str(path), **SAFE)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    module, ours = resume(case, path, tmp_path, MemoryEfficientRestore(safe_globals=allowed))
    assert_same(stock.restored, ours.restored, "restored")
    assert_same(stock_module.losses, module.losses, "losses")


@dataclasses.dataclass
class Settings:
    """A user's own, as hyperparameters."""

    layers: int = 2
    names: tuple[str, ...] = ("a",)


class Vocabulary:
    """Likewise, with a state of its own."""

    def __init__(self) -> None:
        self.words = {"a": 1}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.words == self.words

    __hash__ = object.__hash__


CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "namespace": config,
    "numpy": lambda: {"mean": np.float64(0.5), "table": np.arange(3.0), "kind": np.dtype("int8")},
    "dataclass": Settings,
    "class": Vocabulary,
    "enum and path": lambda: [Path("data"), decimal.Decimal("0.1")],
    "omegaconf": lambda: omegaconf.OmegaConf.create(
        {"model": {"layers": 2}, "betas": [0.9, 0.99], "lr": "${model.layers}"}
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_following_the_words_of_the_error(name: str, tmp_path: Path) -> None:
    """First what it says to pass, then what it says to call: both resume as stock does with ``weights_only=False``."""
    make = CONFIGURATIONS[name]
    path = write_checkpoint(Case(lambda: Configured(make())), tmp_path)
    case = Case(Configured)
    stock_module, stock = resume(case, path, tmp_path, None)
    trainer = make_trainer(tmp_path, callbacks=[MemoryEfficientRestore()])
    with pytest.raises(UnsafeGlobalsError) as error:
        trainer.fit(Configured(), ckpt_path=str(path), **SAFE)
    words = str(error.value)
    argument = re.search(r"safe_globals=(\[.*?\])", words)
    call = re.search(r"torch\.serialization\.add_safe_globals\((\[.*\])\)", words)
    assert argument, words
    assert call, words
    before = torch.serialization.get_safe_globals()
    names = {module: importlib.import_module(module) for module in {n.partition(".")[0] for n in error.value.places}}
    try:
        for allowed, called in ((ast.literal_eval(argument[1]), []), ([], eval(call[1], names))):
            torch.serialization.add_safe_globals(called)
            module, ours = resume(case, path, tmp_path, MemoryEfficientRestore(safe_globals=allowed), trusted=SAFE)
            assert_same(stock.restored, ours.restored, "restored")
            assert_same(stock_module.losses, module.losses, "losses")
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_evaluation_needs_only_weights(path: Path, tmp_path: Path) -> None:
    stock = make_trainer(tmp_path, callbacks=[])
    with pytest.raises(pickle.UnpicklingError):
        stock.predict(Configured(), Configured().train_dataloader(), ckpt_path=str(path), **SAFE)
    expected = make_trainer(tmp_path, callbacks=[]).predict(
        Configured(), Configured().train_dataloader(), ckpt_path=str(path), **TRUSTED
    )
    assert_same(expected, evaluate(path, tmp_path, Configured()), "predictions")


def test_no_hook_of_a_user_sees_what_is_not_there(path: Path, tmp_path: Path) -> None:
    class Hooked(Configured):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            raise AssertionError("was called")

    class Hook(L.Callback):
        def on_load_checkpoint(self, *_: Any) -> None:
            raise AssertionError("was called")

    for module, callbacks in ((Hooked(), []), (Configured(), [Hook()])):
        with pytest.raises(UnsafeGlobalsError):
            evaluate(path, tmp_path, module, *callbacks)


class Keeps(L.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"counts": collections.defaultdict(int, a=1)}


def test_refused_states_of_callbacks_are_needed(tmp_path: Path) -> None:
    path = write_checkpoint(Case(lambda: TinyModule(adamw), callbacks=lambda: [Keeps()]), tmp_path)
    with pytest.raises(UnsafeGlobalsError, match=r"collections\.defaultdict, at callbacks\.Keeps\.counts"):
        evaluate(path, tmp_path, TinyModule(adamw), Keeps())


def test_restoring_weights_alone(path: Path, tmp_path: Path) -> None:
    module = Configured()
    trainer = make_trainer(tmp_path, callbacks=[MemoryEfficientRestore(restore=["weights"])])
    trainer.fit(module, ckpt_path=str(path), **SAFE)


def test_weights_from(path: Path, tmp_path: Path) -> None:
    for source in (path, WeightsSource(path), WeightsSource(path, safe_globals=["argparse.Namespace"])):
        module = Configured()
        weights: list[torch.Tensor] = []

        class Look(L.Callback):
            def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                weights.extend(p.detach().clone() for p in pl_module.parameters())  # noqa: B023

        make_trainer(tmp_path, callbacks=[MemoryEfficientRestore(weights_from=source), Look()]).fit(module)
        saved = torch.load(path, weights_only=False)["state_dict"]
        assert_same(list(saved.values()), weights, "weights")


class TestLoadFromCheckpoint:
    def test_hyperparameters_are_needed(self, path: Path) -> None:
        with pytest.raises(UnsafeGlobalsError, match=r"argparse\.Namespace, at hyper_parameters\.config"):
            load_from_checkpoint(Configured, path, weights_only=True)
        module = load_from_checkpoint(Configured, path, weights_only=True, safe_globals=[argparse.Namespace])
        assert module.hparams["config"] == config()

    def test_what_building_does_not_need_is_left_out(self, tmp_path: Path) -> None:
        path = write_checkpoint(Case(lambda: TinyModule(adamw), callbacks=lambda: [Keeps()]), tmp_path)

        class Hooked(TinyModule):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                raise AssertionError("was called")

        module = load_from_checkpoint(TinyModule, path, weights_only=True, make_optimizer=adamw)
        saved = torch.load(path, weights_only=False)["state_dict"]
        assert_same(dict(saved), dict(module.state_dict()), "weights")
        with pytest.raises(UnsafeGlobalsError):
            load_from_checkpoint(Hooked, path, weights_only=True, make_optimizer=adamw)


def test_another_plugin_ignores_what_is_allowed(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    trainer = make_trainer(
        tmp_path, callbacks=[MemoryEfficientRestore(safe_globals=["argparse.Namespace"])], plugins=Own()
    )
    with pytest.warns(UserWarning, match=r"safe_globals=\.\.\.\) is ignored"), pytest.warns(UserWarning, match="Own"):
        trainer.fit(TinyModule(adamw))
