"""The program of the processes of ``test_cycles``: train, save, be killed, resume, many times.

``python -m tests.endurance.cycles_in_process FOLDER 30 [FORMAT]`` runs the full number under the limit and prints what
it saw; the format is one of ``MemoryEfficientRestore(save_format=...)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import threading
import traceback
import warnings
import zlib
from pathlib import Path
from typing import Any

from tests.fresh_process import run_fresh

__all__ = ["MARGIN_BYTES", "STATE_BYTES", "cycle", "cycle_in_one_process", "run_cycles", "training_bytes"]

NUM_LAYERS = 8
WIDTH = 2048
# Weights and biases, and two states of AdamW for each.
STATE_BYTES = 3 * NUM_LAYERS * (WIDTH * WIDTH + WIDTH) * 4
# Beside what training alone takes. At less than this the kernel has little room for page cache, and all becomes slow.
# Training takes what a process holds that has imported everything and trains nothing, model and optimizer, and one
# layer's gradients: in all less than model + optimizer + 256 MiB beside what such a process holds. A test compares.
MARGIN_BYTES = 128 << 20
_M_MMAP_THRESHOLD = -3  # from malloc.h
_KILL_AFTER_SECONDS = 0.05


def _make_net() -> Any:
    """A module that trains one layer in each step: the limit leaves no room for the gradients of all."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import tests.lightning as L

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, WIDTH, WIDTH) for _ in range(NUM_LAYERS))
            for number, parameter in enumerate(self.parameters()):
                nn.init.constant_(parameter, 1.0 + number)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            layer = self.layers[batch_idx % NUM_LAYERS]
            return 0.5 * sum(p.pow(2).sum() for p in layer.parameters())  # type: ignore[return-value]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            # Fused: without temporaries of the size of the weights. Parameters without a gradient are passed over.
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.zeros(100_000, 1)))

    return Net()


def _fit(folder: str, path: Path | None, callback: Any, *, ours: bool, format: Any = "torch") -> None:
    import torch

    from lightning_memload import MemoryEfficientRestore
    from tests.plugins.harness import TRUSTED, make_trainer

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Left to itself glibc raises this threshold, and keeps freed blocks of up to 32 MiB, now more and now fewer.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    restore = [MemoryEfficientRestore(progress_bar=False, save_format=format)] if ours else []
    make_trainer(Path(folder), [*restore, callback], max_epochs=1).fit(_make_net(), ckpt_path=path, **TRUSTED)


def cycle(folder: str, *, ours: bool, format: str = "torch") -> None:
    """Resumes ``last.ckpt`` if it is there, compares it, trains, saves, and dies in the middle of the next save.

    Never returns. ``cycle.json`` then holds what it saw. It dies by ``SIGUSR2``, which has no handler, so
    that it can be told from a process that was killed for its memory.
    """
    import tests.lightning as L

    path, seen_path = Path(folder, "last.ckpt"), Path(folder, "cycle.json")
    before = json.loads(seen_path.read_text()) if path.exists() else None

    class Cycle(L.Callback):
        batches = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if before is not None:
                assert (trainer.global_step, _digest(trainer, pl_module)) == (before["step"], before["digest"])

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.batches += 1
            if self.batches < NUM_LAYERS:  # states for all layers
                return
            trainer.save_checkpoint(path)
            seen = {
                "resumed": before is not None,
                "step": trainer.global_step,
                "digest": _digest(trainer, pl_module),
                "anonymous_bytes": _held()["anonymous_bytes"],
            }
            seen_path.write_text(json.dumps(seen))
            threading.Timer(_KILL_AFTER_SECONDS, os.kill, (os.getpid(), signal.SIGUSR2)).start()
            while True:
                trainer.save_checkpoint(Path(folder, "next.ckpt"))

    _fit(folder, path if before is not None else None, Cycle(), ours=ours, format=format)


def _digest(trainer: Any, module: Any) -> int:
    """A checksum over weights and states."""
    crc = 0
    for parameter in module.parameters():
        for value in (parameter.detach(), *trainer.optimizers[0].state[parameter].values()):
            crc = zlib.crc32(value.numpy(), crc)
    return crc


def _held() -> dict[str, int]:
    """The memory, descriptors and mappings of this process."""
    from lightning_memload.memory.host import read_status

    return {
        "anonymous_bytes": read_status().anonymous_bytes or 0,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def training_bytes(folder: str) -> int:
    """The peak of anonymous memory of training alone, which neither resumes nor saves."""
    import tests.lightning as L
    from lightning_memload import MemoryMonitor

    class Train(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, batch: Any, outputs: Any, batch_idx: int) -> None:
            if batch_idx == 2 * NUM_LAYERS:
                raise _Enough

    with MemoryMonitor() as monitor, contextlib.suppress(_Enough):
        _fit(folder, None, Train(), ours=False)
    assert monitor.peaks.anonymous_peak_bytes is not None
    return monitor.peaks.anonymous_peak_bytes


def empty_bytes(folder: str) -> int:
    """Anonymous memory of a process that has imported everything and made a Trainer, and trains nothing."""
    import torch

    import lightning_memload.plugins  # noqa: F401
    from tests.plugins.harness import make_trainer

    torch.set_num_threads(1)
    trainer = make_trainer(Path(folder))
    held = _held()["anonymous_bytes"]
    del trainer
    return held


def cycle_in_a_child(folder: str, *, ours: bool, format: str) -> None:
    """One cycle in a child, whose end is expected; a child that was killed for its memory takes this process along."""
    child = os.fork()
    if not child:
        try:
            cycle(folder, ours=ours, format=format)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(status), f"the cycle ended with status {status}"
    assert os.WTERMSIG(status) == signal.SIGUSR2, status


def run_cycles(folder: str, num_cycles: int, *, ours: bool = True, format: str = "torch") -> dict[str, Any]:
    """Runs cycles in fresh processes, each under a limit of what training alone takes and ``MARGIN_BYTES``.

    Returns:
        ``cycles``: how many were completed; ``killed``: whether one was killed for its memory; ``limit_bytes``;
        ``empty_bytes``: what a process holds that trains nothing; ``state_bytes``: model and optimizer;
        ``anonymous_bytes`` after the save of each cycle; ``left``: the files in the folder after each.
    """
    module = "tests.endurance.cycles_in_process"
    limit_bytes = run_fresh(f"{module}:training_bytes", folder=folder).result + MARGIN_BYTES
    result: dict[str, Any] = {"cycles": 0, "killed": False, "limit_bytes": limit_bytes, "state_bytes": STATE_BYTES}
    result["empty_bytes"] = run_fresh(f"{module}:empty_bytes", folder=folder).result
    result |= {"anonymous_bytes": [], "left": []}
    for _ in range(num_cycles):
        done = run_fresh(
            f"{module}:cycle_in_a_child", folder=folder, ours=ours, format=format, memory_limit_bytes=limit_bytes
        )
        if done.killed:
            result["killed"] = True
            break
        seen = json.loads(Path(folder, "cycle.json").read_text())
        result["cycles"] += 1
        result["anonymous_bytes"].append(seen["anonymous_bytes"])
        result["left"].append(len(os.listdir(folder)))
    return result


class _Enough(Exception):
    """Ends a run."""


def cycle_in_one_process(folder: str, num_cycles: int, format: str = "torch") -> list[dict[str, int]]:
    """Trains, saves and resumes again and again in one process; returns what it holds after each cycle."""
    import tests.lightning as L

    path = Path(folder, "last.ckpt")

    class Cycle(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step % NUM_LAYERS == 0:
                trainer.save_checkpoint(path)
                raise _Enough

    found = []
    for number in range(num_cycles):
        with contextlib.suppress(_Enough):
            _fit(folder, path if number else None, Cycle(), ours=True, format=format)
        gc.collect()
        for thread in threading.enumerate():
            if thread.name.startswith("memload"):
                thread.join()
        found.append(_held())
    return found


if __name__ == "__main__":
    print(json.dumps(run_cycles(sys.argv[1], int(sys.argv[2]), **dict(zip(["format"], sys.argv[3:], strict=False)))))  # type: ignore[arg-type]
