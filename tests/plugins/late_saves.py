"""Trainings whose checkpoints may be written late, and what looks at these checkpoints."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from tests.lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from tests.lightning.pytorch.loggers import Logger
from torch import nn

import tests.lightning as L
from lightning_memload import StreamingCheckpointIO
from lightning_memload.formats import load_mapped
from tests.plugins.harness import FEATURES, Recorded, adamw, assert_same, make_trainer

__all__ = [
    "NOT_LATE",
    "Keep",
    "Look",
    "Normalised",
    "SaveOften",
    "Uploading",
    "Wrapper",
    "every_step",
    "listing",
    "train",
]


class Normalised(Recorded):
    """Parameters that steps change, and buffers that each forward changes; notes what is written when forward runs."""

    def __init__(self, make_optimizer: Any = adamw) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.layers = nn.Sequential(nn.Linear(FEATURES, 20), nn.BatchNorm1d(20), nn.Linear(20, FEATURES))
        self.outstanding: list[bool] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        pending = getattr(self.trainer.strategy.checkpoint_io, "_pending", None)
        self.outstanding.append(any(not p.save._published.is_set() for p in pending._pending) if pending else False)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class SaveOften(L.Callback):
    """Saves after every batch, and keeps a copy of what was saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(self.states)}.ckpt")
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.states.append(copy.deepcopy((dict(pl_module.state_dict()), optimizers)))


class Keep(L.Callback):
    """Keeps a copy of the state after every batch; a ModelCheckpoint saves after that."""

    def __init__(self) -> None:
        self.states: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.states:
            return  # gradients are accumulated, and nothing is saved
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.states[trainer.global_step] = copy.deepcopy((dict(pl_module.state_dict()), optimizers))

    def check(self, folder: Path, steps: Any) -> None:
        """Compares the file of each step with the state of that step."""
        for number in steps:
            saved = torch.load(folder / f"step={number}.ckpt", weights_only=False)
            weights, optimizers = self.states[number]
            assert_same(weights, dict(saved["state_dict"]), f"state_dict of {number}")
            assert_same(optimizers, saved["optimizer_states"], f"optimizer_states of {number}")


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, **{"save_top_k": -1, **options})


def train(folder: Path, callbacks: list[Any], module: Any = None, **options: Any) -> Any:
    torch.manual_seed(5)
    module = Normalised() if module is None else module
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_epochs": 2, "enable_checkpointing": checkpoints, **options}
    trainer = make_trainer(folder, callbacks, **options)
    trainer.fit(module)
    return module


class Uploading(Logger):
    """Looks at checkpoints as soon as they are saved."""

    name = version = "uploading"

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        path = checkpoint_callback.best_model_path
        self.found.append(torch.load(path, weights_only=False)["global_step"])


class Wrapper(torch.optim.Optimizer):
    """Skips the constructor of its base, as some wrappers do."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, {}

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self.inner.zero_grad()

    def state_dict(self) -> Any:
        return self.inner.state_dict()


class OfSomebody(ModelCheckpoint):
    """May do anything with what it has saved."""


NOT_LATE: dict[str, Any] = {
    "averages": lambda folder: {"callbacks": [StochasticWeightAveraging(0.01, swa_epoch_start=1)]},
    "logger": lambda folder: {"logger": Uploading()},
    "subclass": lambda folder: {"saver": OfSomebody(folder, every_n_train_steps=1, save_top_k=-1)},
    "wrapper": lambda folder: {"make_optimizer": lambda parameters: Wrapper(adamw(parameters))},
    "own call": lambda folder: {"saver": SaveOften(folder)},
    "plugin": lambda folder: {"plugins": [type("Own", (StreamingCheckpointIO,), SAVING)(asynchronous="until_step")]},
}
SAVING: dict[str, Any] = {
    "save_checkpoint": lambda io, *args, **options: StreamingCheckpointIO.save_checkpoint(io, *args, **options)
}


def listing(folder: Path) -> dict[str, Any]:
    """Every name in a folder, and the step of what it holds. Where links point to is part of it."""
    return {
        path.name: (os.readlink(path) if path.is_symlink() else "", load_mapped(path, weights_only=False)[0])
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".memload-")
    }


class Look(L.Callback):
    """Notes after each batch which checkpoints are there: the links, and their steps. All callbacks saved before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[Any] = []

    def on_train_batch_start(self, *args: Any) -> None:
        found = listing(self.folder).items()
        self.seen.append({name: (link, held["global_step"]) for name, (link, held) in found})
