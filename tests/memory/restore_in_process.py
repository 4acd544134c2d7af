"""The program of the fresh processes of ``test_restore_peaks``: one training script, restored and measured.

Each function is called by name in a process of its own and returns what JSON can hold. Order matters in here: levels
"without the model" are taken with everything imported and the Trainer made; the window of a measurement begins right
before ``fit`` or ``validate`` and ends in the first hook that sees everything restored. There the run is stopped, so
neither a batch nor a gradient is part of any figure.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tests.lightning as L
from lightning_memload import ChecksumError, MemoryEfficientRestore, meta_init
from lightning_memload.memory import MemoryMonitor
from lightning_memload.memory.host import read_status
from tests.plugins.harness import make_trainer

__all__ = ["calibrate", "fail", "measure", "repeat", "write"]

_JOIN_SECONDS = 30


class Ones(nn.Linear):
    """A layer whose initialisation touches every page and draws no number, which takes longer than a restore."""

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.ones_(self.bias)


class Layers(L.LightningModule):
    """Linear layers of the given widths, and AdamW.

    Args:
        widths: In and out of each layer in turn.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Ones(i, o) for i, o in itertools.pairwise(widths))
        self.norm = nn.LayerNorm(widths[-1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        # The gradient of each element is the element: states that differ everywhere.
        return 0.5 * torch.stack([p.pow(2).sum() for p in self.parameters()]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Fused: without temporaries of the size of the weights, and only quick.
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(1, 1)))

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


class Allocating(Layers):
    """Holds so much memory for a moment, where a restore would."""

    monitor: MemoryMonitor
    num_bytes = 0

    def on_fit_start(self) -> None:
        memory = torch.ones(self.num_bytes, dtype=torch.uint8)
        seen = self.monitor.peaks.num_samples
        deadline = time.monotonic() + _JOIN_SECONDS
        while self.monitor.peaks.num_samples < seen + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        del memory


class _Restored(Exception):
    """Ends a run whose restore is all that matters."""


class StopWhenRestored(L.Callback):
    """Ends the measurement when everything is restored, looks at what the process holds then, and stops the run."""

    def __init__(self, monitor: MemoryMonitor | None = None, path: str | None = None) -> None:
        self._monitor = monitor
        self._path = path
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop(trainer, pl_module)

    def _stop(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._monitor is not None:
            self.seen["peaks"] = self._monitor.stop().as_dict()
        if self._path is not None:
            self.seen |= self._look(trainer, pl_module, self._path)
        raise _Restored

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, path: str) -> dict[str, Any]:
        holding = held(path)  # before anything below could let go of it
        _join_threads()
        settled_bytes = _known(read_status().anonymous_bytes)
        states = dict(_tensors([optimizer.state_dict()["state"] for optimizer in trainer.optimizers]))
        return {
            "held": holding,
            "settled_bytes": settled_bytes,
            "weight_bytes": sum(p.nbytes for p in pl_module.parameters()),
            "state_bytes": sum(state.nbytes for state in states.values()),
            "digests": {n: _digest(t) for n, t in [*_tensors(dict(pl_module.state_dict())), *states.items()]},
        }


def write(folder: str, widths: list[int], dtypes: dict[str, str]) -> None:
    """Trains one epoch in each dtype, states included, and saves with Lightning's own means.

    Args:
        folder: Where.
        widths: Of the module.
        dtypes: The name of each file and the dtype of its tensors.
    """
    for name, dtype in dtypes.items():
        module = Layers(widths).to(getattr(torch, dtype))
        for parameter in module.parameters():
            nn.init.uniform_(parameter, 1, 2)
        trainer = make_trainer(Path(folder), max_epochs=1, log_every_n_steps=1)
        trainer.fit(module)
        trainer.save_checkpoint(Path(folder, name))


def measure(
    path: str,
    widths: list[int],
    stage: str,
    mode: str | None,
    meta: bool = False,
    host_budget_mib: int = 128,
) -> dict[str, Any]:
    """Restores once.

    Args:
        path: The checkpoint.
        widths: Of the module.
        stage: ``fit`` or ``validate``.
        mode: Of the callback, ``None`` for the stock way.
        meta: Build the module under ``meta_init``.
        host_budget_mib: Of the callback.

    Returns:
        ``peaks`` of the window, ``without_model_bytes`` (anonymous) and ``without_model_required_bytes`` before the
        module was built, ``held`` (mappings and descriptors of the checkpoint), ``settled_bytes`` (anonymous, when what
        was replaced has been freed), ``weight_bytes``, ``state_bytes``, ``digests``, and the callback's ``report``.
    """
    monitor = MemoryMonitor()
    stop = StopWhenRestored(monitor, path)
    restore = None
    if mode is not None:
        restore = MemoryEfficientRestore(mode=mode, host_budget_mib=host_budget_mib)  # type: ignore[arg-type]
    trainer = make_trainer(Path(path).parent, [restore, stop] if restore else [stop])
    gc.collect()
    before = read_status()
    with meta_init(enabled=meta):
        module = Layers(widths)
    with _until_restored():
        monitor.start()
        getattr(trainer, stage)(module, ckpt_path=path, weights_only=False)
    anonymous_bytes, file_bytes = _known(before.anonymous_bytes), _known(before.file_bytes)
    shmem_bytes, page_table_bytes = _known(before.shmem_bytes), _known(before.page_table_bytes)
    return {
        **stop.seen,
        "without_model_bytes": anonymous_bytes,
        "without_model_required_bytes": anonymous_bytes + file_bytes + shmem_bytes + page_table_bytes,
        "report": restore.report.as_dict() if restore is not None and restore.report is not None else None,
    }


def calibrate(folder: str, widths: list[int], num_bytes: int) -> dict[str, int]:
    """Fits without a checkpoint, first with nothing else, then with a known allocation where a restore would be.

    Returns:
        How far anonymous memory rose in each.
    """
    rises = {}
    for name, amount in (("first", 0), ("nothing", 0), ("known", num_bytes)):
        monitor = MemoryMonitor()
        module = Allocating(widths)
        module.monitor, module.num_bytes = monitor, amount
        trainer = make_trainer(Path(folder), [StopWhenRestored(monitor)])
        gc.collect()
        with _until_restored():
            monitor.start()
            trainer.fit(module)
        rises[name] = _known(monitor.peaks.anonymous_above_start_bytes)
    return rises


def repeat(path: str, widths: list[int], stage: str, mode: str, times: int) -> dict[str, Any]:
    """Restores so many times, a new module and Trainer each time, and once more while the module stays alive.

    Returns:
        ``levels`` after each restore, ``kept`` at the end, with one module and its Trainer alive, ``weight_bytes``.
    """
    levels = []
    for _ in range(times):
        _restore(path, widths, stage, mode)
        levels.append(_levels(path))
    module = _restore(path, widths, stage, mode)
    return {"levels": levels, "kept": _levels(path), "weight_bytes": sum(p.nbytes for p in module.parameters())}


def fail(path: str, widths: list[int], stage: str, meta: bool) -> dict[str, Any]:
    """Restores a damaged checkpoint.

    Args:
        path: The checkpoint.
        widths: Of the module.
        stage: ``fit`` or ``validate``.
        meta: Build the module under ``meta_init``.

    Returns:
        ``levels`` before the restore (the module exists), while the error is alive, and after it, with the module and
        the Trainer still alive; the error's ``message``; ``weight_bytes``.
    """
    with meta_init(enabled=meta):
        module = Layers(widths)
    trainer = make_trainer(Path(path).parent, [MemoryEfficientRestore(mode="copy")])
    before = _levels(path)
    try:
        getattr(trainer, stage)(module, ckpt_path=path, weights_only=False)
    except ChecksumError as error:
        message = str(error)
        during = _levels(path)
    return {
        "before": before,
        "during": during,
        "after": _levels(path),
        "message": message,
        "weight_bytes": sum(p.nbytes for p in module.parameters()),
    }


def held(path: str) -> list[str]:
    """The mappings and the descriptors of a file in this process."""
    found = [line for line in Path("/proc/self/maps").read_text().splitlines() if path in line]
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{number}")
            if path in target:
                found.append(f"descriptor {number}: {target}")
    return found


def _restore(path: str, widths: list[int], stage: str, mode: str) -> L.LightningModule:
    module = Layers(widths)
    restore = MemoryEfficientRestore(mode=mode)  # type: ignore[arg-type]
    trainer = make_trainer(Path(path).parent, [restore, StopWhenRestored()])
    with _until_restored():
        getattr(trainer, stage)(module, ckpt_path=path, weights_only=False)
    return module


def _levels(path: str) -> dict[str, Any]:
    gc.collect()
    _join_threads()
    return {
        "anonymous_bytes": _known(read_status().anonymous_bytes),
        "num_descriptors": len(os.listdir("/proc/self/fd")),
        "num_threads": _num_threads(),
        "num_mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "held": held(path),
    }


def _num_threads() -> int:
    """Threads that stay: one that was joined is in the kernel's list for a moment longer."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.005)
    return min(counts)


def _join_threads() -> None:
    """Waits for the thread that frees memory that was replaced."""
    for thread in threading.enumerate():
        if thread.name.startswith("memload-free"):
            thread.join(_JOIN_SECONDS)


@contextlib.contextmanager
def _until_restored() -> Iterator[None]:
    try:
        yield
    except _Restored:
        return
    raise AssertionError("the run ended before everything was restored")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{name}.{key}")


def _digest(tensor: torch.Tensor) -> str:
    # The tensor's own memory: a copy would count where the process has a limit.
    raw: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def _known(figure: int | None) -> int:
    assert figure is not None
    return figure
