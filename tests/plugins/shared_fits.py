"""Fits of two ranks in one process group, stock and with ``read="stripes"``: the program of ``test_stripes``."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import signal
import time
import warnings
from typing import Any

import torch
from torch import nn

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, meta_init
from tests.plugins.harness import FEATURES, TRUSTED, Recorded, adamw, make_trainer

WIDTH = 256


class Mixed(Recorded):
    """Layers of several sizes and dtypes, a tie, a view, an odd buffer, and AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.middle = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.middle.get_parameter("0.weight")
        self.low = nn.Linear(WIDTH, 7, dtype=torch.bfloat16)
        self.last = nn.Linear(WIDTH, FEATURES)
        self.register_buffer("odd", torch.arange(1001) % 251)
        self.register_buffer("bytes", torch.arange(333, dtype=torch.int64).to(torch.uint8))
        self.register_buffer("turned", torch.randn(WIDTH, 100).t())
        self.register_buffer("scalar", torch.tensor(3.25))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs))
        for layer in (*self.middle, self.tied):
            hidden = torch.tanh(layer(hidden))
        return self.last(hidden) + self.low(hidden.to(self.low.weight.dtype)).float().mean()

    def configure_optimizers(self) -> Any:
        return adamw(self.parameters())


class Failing(L.Callback):
    """Fails on one rank, in a hook of the user, after the weights."""

    def on_load_checkpoint(self, *_: Any) -> None:
        raise ValueError("boom")


class FailingBefore(L.Callback):
    """The same, before the weights."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        def fail(checkpoint: Any) -> None:
            raise ValueError("boom")

        vars(pl_module)["on_load_checkpoint"] = fail


def digest(trainer: L.Trainer, module: L.LightningModule) -> str:
    """Of the bytes of all weights and states."""
    states = [value for optimizer in trainer.optimizers for s in optimizer.state.values() for value in s.values()]
    found = hashlib.sha256()
    for value in (*module.state_dict().values(), *states):
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Folder:
    """The results of the fits of one rank."""

    def __init__(self, folder: str) -> None:
        self.path = pathlib.Path(folder)
        self.rank = int(os.environ.get("LOCAL_RANK", 0))

    def fit(
        self,
        name: str,
        restore: MemoryEfficientRestore | None,
        checkpoint: str,
        *,
        predicts: bool = False,
        **more: Any,
    ) -> None:
        """Fits from a checkpoint, and writes what came of it: the values at the start, or the error."""
        torch.manual_seed(self.rank)
        with meta_init(enabled=more.pop("meta", False)):
            module = Mixed()
        callbacks = [*more.pop("callbacks", []), *([restore] if restore else [])]
        more = {"accelerator": os.environ.get("MEMLOAD_TEST_ACCELERATOR", "cpu"), **more}
        trainer = make_trainer(self.path, callbacks, max_epochs=2, devices=2, strategy="ddp", **more)
        result: dict[str, Any] = {}
        started = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                path = self.path / checkpoint.format(rank=self.rank)
                if predicts:
                    trainer.predict(
                        module, module.train_dataloader(), ckpt_path=path, return_predictions=False, **TRUSTED
                    )
                else:
                    trainer.fit(module, ckpt_path=path, **TRUSTED)
            except Exception as error:
                result = {"error": str(error), "type": type(error).__name__}
        result |= {
            "seconds": time.monotonic() - started,
            "digest": digest(trainer, module) if not result else None,
            "losses": [loss.item().hex() for loss in module.losses],
            "warnings": [str(item.message) for item in caught],
            "report": restore and restore.report and restore.report.as_dict(),
        }
        (self.path / f"{name}.{self.rank}.json").write_text(json.dumps(result))


def stripes(**options: Any) -> MemoryEfficientRestore:
    return MemoryEfficientRestore(read="stripes", host_budget_mib=1, log=False, **options)


def compare(folder: Folder) -> None:
    """Every format, whole and in parts."""
    folder.fit("stock", None, "last.ckpt")
    folder.fit("each", MemoryEfficientRestore(read="each"), "last.ckpt")
    folder.fit("stripes", stripes(), "last.ckpt")
    folder.fit("meta", stripes(), "last.ckpt", meta=True)
    folder.fit("directory", stripes(), "directory")
    folder.fit("safetensors", stripes(), "safetensors")
    folder.fit("overlap", stripes(overlap=True), "last.ckpt")
    folder.fit("rank 0 only", stripes() if folder.rank == 0 else MemoryEfficientRestore(), "last.ckpt")
    folder.fit("copies", stripes(on_corrupt="previous"), "node{rank}/last.ckpt")
    folder.fit("predict", stripes(mode="copy"), "last.ckpt", predicts=True)
    folder.fit("assign", stripes(), "last.ckpt", predicts=True, meta=True)
    folder.fit("double", stripes(), "last.ckpt", precision="64-true")
    folder.fit("double stock", None, "last.ckpt", precision="64-true")


def fail(folder: Folder) -> None:
    """One rank fails. All raise."""
    folder.fit("other", stripes(), "other{rank}.ckpt")
    folder.fit("damage", stripes(), "damage{rank}/last.ckpt")
    folder.fit("missing", stripes(), "missing{rank}.ckpt")
    folder.fit("hook before", stripes(), "last.ckpt", callbacks=[FailingBefore()] if folder.rank else [])
    folder.fit("hook after", stripes(), "last.ckpt", callbacks=[Failing()] if folder.rank else [])
    folder.fit("space", stripes(), "last.ckpt", callbacks=[Crowded()] if folder.rank else [])


class Crowded(L.Callback):
    """Little memory is free on one rank."""

    def setup(self, *_: Any, **__: Any) -> None:
        from lightning_memload.restore import free_memory

        vars(free_memory)["free_device_bytes"] = lambda _: 1000


class Killed(L.Callback):
    """Kills its rank when a part of the values has been read."""

    def setup(self, *_: Any, **__: Any) -> None:
        from lightning_memload.storage.local import LocalFile

        readv, calls = LocalFile.readv, []

        def read_and_die(self: LocalFile, *args: Any) -> int:
            calls.append(1)
            if len(calls) > 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return readv(self, *args)

        LocalFile.readv = read_and_die  # type: ignore[assignment,method-assign]


def gpus(folder: Folder) -> None:
    folder.fit("stock", None, "last.ckpt")
    folder.fit("each", MemoryEfficientRestore(read="each", host_budget_mib=16), "last.ckpt")
    folder.fit("stripes", MemoryEfficientRestore(read="stripes", host_budget_mib=16), "last.ckpt")
    folder.fit("directory", MemoryEfficientRestore(read="stripes", host_budget_mib=16), "directory")


def gpu_damage(folder: Folder) -> None:
    folder.fit("damage", stripes(), "damage{rank}/last.ckpt")


def kill(folder: Folder) -> None:
    from tests.lightning.fabric.strategies.launchers import subprocess_script

    # Lightning ends rank 0, within 5 s after it has seen that a process of its own is dead. Rank 0 may need longer.
    subprocess_script._ChildProcessObserver.start = lambda self: None
    folder.fit("killed", stripes(), "last.ckpt", callbacks=[Killed()] if folder.rank else [])


def write(folder: str) -> None:
    """Writes the checkpoints: in every format, and copies of them."""
    from lightning_memload import save_directory

    path = pathlib.Path(folder)
    torch.manual_seed(1)
    trainer = make_trainer(path, max_epochs=1, devices=1)
    trainer.fit(Mixed())
    trainer.save_checkpoint(path / "last.ckpt")
    loaded = torch.load(path / "last.ckpt", weights_only=False)
    save_directory(loaded, path / "directory")
    save_directory(loaded, path / "safetensors", safetensors=True)


if __name__ == "__main__":
    name, place = json.loads(os.environ["MEMLOAD_TEST_ARGUMENTS"])
    if name == "write":
        write(place)
    else:
        globals()[name](Folder(place))
