"""One training script, run the stock way and with the callback, and everything a resume restores, side by side."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.lightning.pytorch.plugins.io import async_plugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, meta_init

# Our own checkpoints hold more than weights. Lightning 2.5 has no such argument and always loads so.
TRUSTED: dict[str, Any] = (
    {"weights_only": False} if "weights_only" in inspect.signature(L.Trainer.fit).parameters else {}
)

# Lightning 2.5's AsyncCheckpointIO cannot be used again after its teardown, and does not copy what it saves while
# training goes on.
WRAPS: bool = hasattr(async_plugin, "_clone_tensor")

__all__ = [
    "FEATURES",
    "TRUSTED",
    "WRAPS",
    "Case",
    "ManualModule",
    "Probe",
    "Recorded",
    "StockResume",
    "TinyModule",
    "adamw",
    "assert_same",
    "callbacks_of",
    "contents",
    "make_trainer",
    "resume",
    "same_resume",
    "sgd",
    "stock_resume",
    "write_checkpoint",
]

FEATURES = 6
NUM_BATCHES = 8
NEXT_LOSSES = 5


class Recorded(L.LightningModule):
    """A module on fixed data that keeps the loss of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self(inputs).float(), targets.float())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(*batch)
        self.losses.append(loss.detach().clone())
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(NUM_BATCHES * 4, FEATURES, generator=generator)
        targets = torch.randn(NUM_BATCHES * 4, FEATURES, generator=generator)
        return DataLoader(TensorDataset(inputs, targets), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Module-level, so that a module that holds it can be pickled."""
    return torch.optim.SGD(parameters, lr=0.01)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Likewise, with states."""
    return torch.optim.AdamW(parameters, lr=0.01)


class TinyModule(Recorded):
    """Two linear layers, dropout, and any optimizer.

    Args:
        make_optimizer: From parameters to an optimizer, or what ``configure_optimizers`` may return.
    """

    def __init__(self, make_optimizer: Callable[[Any], Any] = sgd) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.first = nn.Linear(FEATURES, 10)
        self.drop = nn.Dropout(0.1)
        self.second = nn.Linear(10, FEATURES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(torch.tanh(self.first(inputs))))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class ManualModule(TinyModule):
    """Manual optimization with two optimizers: AdamW, and SGD with momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [adamw(self.first.parameters()), torch.optim.SGD(self.second.parameters(), lr=0.01, momentum=0.9)]


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    Attributes:
        build: Makes the module.
        rebuild: Makes the module that resumes, ``None`` for the same.
        trainer: Further arguments of the Trainer.
        plugins: Makes the Trainer's ``plugins``.
        callbacks: Makes further callbacks.
        save_after: Batches before the checkpoint is written; not a whole epoch, so loops are in the middle.
        edit: Changes the checkpoint on disk before it is resumed.
        trains: Whether training goes on after the restore. ``False``: only what was restored is compared.
        meta: Whether the module can be built under ``meta_init`` too.
    """

    build: Callable[[], L.LightningModule]
    rebuild: Callable[[], L.LightningModule] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    plugins: Callable[[], list[Any]] = list
    callbacks: Callable[[], list[L.Callback]] = list
    save_after: int = 5
    edit: Callable[[dict[str, Any]], None] | None = None
    trains: bool = True
    meta: bool = True


class _Stop(Exception):
    """Ends a run whose restore is all that matters."""


class SaveAfter(L.Callback):
    """Writes one checkpoint after so many batches, then stops."""

    def __init__(self, path: Path, num_batches: int) -> None:
        self._path = path
        self._left = num_batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            trainer.save_checkpoint(self._path)
            raise _Stop


class Probe(L.Callback):
    """Takes down everything when training starts, and the parameter objects before and after.

    Args:
        trains: Whether to go on training; ``False`` stops the run right after the restore.
    """

    def __init__(self, *, trains: bool = True) -> None:
        self._trains = trains
        self.num_batches = 0
        self.before: dict[str, nn.Parameter] = {}
        self.restored: dict[str, Any] = {}
        self.ended: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = dict(pl_module.named_parameters(remove_duplicate=False))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restored = contents(trainer, pl_module)
        if not self._trains:
            raise _Stop

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.num_batches += 1
        if self.num_batches == NEXT_LOSSES:
            self.ended = contents(trainer, pl_module)
            raise _Stop


def make_trainer(folder: Path, callbacks: Sequence[L.Callback] = (), **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return L.Trainer(**{**options, **kwargs})


def write_checkpoint(case: Case, folder: Path) -> Path:
    """Trains a little and leaves the checkpoint of it."""
    path = folder / "case.ckpt"
    torch.manual_seed(10)
    module = case.build()
    trainer = make_trainer(
        folder, [*case.callbacks(), SaveAfter(path, case.save_after)], plugins=case.plugins(), **case.trainer
    )
    with _stopping():
        trainer.fit(module)
    if case.edit is not None:
        checkpoint = torch.load(path, weights_only=False)
        case.edit(checkpoint)
        torch.save(checkpoint, path)
    return path


def resume(
    case: Case,
    path: Path,
    folder: Path,
    restore: MemoryEfficientRestore | None,
    *,
    meta: bool = False,
    last: bool = False,
    trusted: Mapping[str, Any] = TRUSTED,
) -> tuple[L.LightningModule, Probe]:
    """Resumes the checkpoint and trains the next batches.

    Args:
        case: The case.
        path: Its checkpoint.
        folder: The folder for all files of the Trainer.
        restore: The callback, ``None`` for the stock way.
        meta: Build under ``meta_init``.
        last: Put the callback last instead of first.
        trusted: The arguments for ``weights_only``.
    """
    torch.manual_seed(20)
    with meta_init(enabled=meta):
        module = (case.rebuild or case.build)()
    objects = dict(module.named_parameters(remove_duplicate=False))
    probe = Probe(trains=case.trains)
    ours = [restore] if restore is not None else []
    others = case.callbacks()
    callbacks = [*others, *ours, probe] if last else [*ours, *others, probe]
    trainer = make_trainer(folder, callbacks, plugins=case.plugins(), **case.trainer)
    torch.manual_seed(30)
    with _stopping():
        trainer.fit(module, ckpt_path=path, **trusted)
    assert probe.restored, "training did not start"
    for name, parameter in objects.items():
        assert probe.before[name] is parameter, f"{name} is another object after the restore"
    return module, probe


@dataclass(frozen=True)
class StockResume:
    """A checkpoint, and what stock Lightning makes of it.

    Attributes:
        path: The checkpoint.
        losses: The losses of the next batches.
        probe: What was restored, and what it was in the end.
    """

    path: Path
    losses: list[torch.Tensor]
    probe: Probe


def stock_resume(case: Case, folder: Path) -> StockResume:
    """Trains a little, saves, and resumes as stock does, which never sees meta: it could not resume such a module."""
    path = write_checkpoint(case, folder)
    module, probe = resume(case, path, folder, None)
    return StockResume(path, module.losses, probe)


def same_resume(
    case: Case,
    folder: Path,
    *,
    expected: StockResume | None = None,
    mode: Any = "copy",
    meta: bool = False,
    last: bool = False,
) -> MemoryEfficientRestore:
    """Asserts that a resume with the callback is bit for bit the stock one; returns the callback.

    Args:
        case: The case.
        folder: The folder for all files of the Trainers.
        expected: The result of stock Lightning. ``None``: it is computed first.
        mode: As in the callback.
        meta: Build under ``meta_init``.
        last: Put the callback last instead of first.
    """
    known = expected or stock_resume(case, folder)
    stock = known.probe
    restore = MemoryEfficientRestore(mode=mode)
    module, ours = resume(case, known.path, folder, restore, meta=meta, last=last)
    assert_same(stock.restored, ours.restored, "restored")
    assert_same(known.losses, module.losses, "losses")
    assert ours.num_batches == stock.num_batches == (NEXT_LOSSES if case.trains else 0)
    assert_same(stock.ended, ours.ended, "ended")
    assert restore.report is not None
    return restore


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a Trainer, which declares no such attribute."""
    return trainer.callbacks


def contents(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """Copies of everything that a resume restores."""
    named = dict(module.named_parameters(remove_duplicate=False))
    named_buffers = dict(module.named_buffers(remove_duplicate=False))
    order = {id(parameter): name for name, parameter in reversed(named.items())}
    return {
        "parameters": _copied({n: p.detach() for n, p in named.items()}),
        "requires_grad": {n: p.requires_grad for n, p in named.items()},
        "attributes": {n: _copied(p.__dict__) for n, p in named.items()},
        "buffers": _copied(named_buffers),
        "state_dict": _copied(dict(module.state_dict())),
        "ties": _groups({n: id(p) for n, p in named.items()}),
        "shared memory": _groups({n: t.data_ptr() for n, t in (named | named_buffers).items() if t.numel()}),
        "optimizers": [_copied(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "optimizer classes": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "optimized": [
            [[order.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ],
        "shared states": [_shared_states(optimizer) for optimizer in trainer.optimizers],
        "schedulers": [_copied(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "fit loop": _copied(trainer.fit_loop.state_dict()),
        "steps": (trainer.global_step, trainer.current_epoch),
        "callbacks": {
            type(callback).__name__: _copied(callback.state_dict())
            for callback in callbacks_of(trainer)
            if not isinstance(callback, MemoryEfficientRestore)
        },
        "averages": [
            _copied(dict(callback._average_model.state_dict()))
            for callback in callbacks_of(trainer)
            if getattr(callback, "_average_model", None) is not None  # WeightAveraging, from Lightning 2.6 on
        ],
        "precision": _copied(trainer.precision_plugin.state_dict()),
        "further": _copied(getattr(module, "further", dict)()),
    }


def assert_same(expected: Any, actual: Any, where: str) -> None:
    """Asserts equality to the bit, with type, device, shape and strides of every tensor."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), where
        for attribute in ("dtype", "device", "shape", "requires_grad"):
            assert getattr(actual, attribute) == getattr(expected, attribute), f"{where}: {attribute}"
        if expected.numel():
            assert actual.stride() == expected.stride(), f"{where}: strides {actual.stride()} {expected.stride()}"
        assert _raw(actual) == _raw(expected), f"{where}: {actual} instead of {expected}"
        return
    assert type(actual) is type(expected), f"{where}: {type(actual)} instead of {type(expected)}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected), f"{where}: {list(actual)} instead of {list(expected)}"
        for key, value in expected.items():
            assert_same(value, actual[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for number, (one, other) in enumerate(zip(expected, actual, strict=True)):
            assert_same(one, other, f"{where}.{number}")
    elif expected != expected:
        assert actual != actual, where
    else:
        assert actual == expected, f"{where}: {actual!r} instead of {expected!r}"


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _groups(identities: Mapping[Any, int]) -> list[list[Any]]:
    groups: dict[int, list[Any]] = {}
    for name, identity in identities.items():
        groups.setdefault(identity, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _shared_states(optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    """The states of an optimizer that are one tensor."""
    found = {}
    for number, state in optimizer.state_dict().get("state", {}).items():  # wrappers may have none
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, torch.Tensor) and value.numel():
                found[number, key] = id(value)
    return _groups(found)


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    with contextlib.suppress(_Stop):
        yield
