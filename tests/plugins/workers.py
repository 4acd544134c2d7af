"""Workers of a data loader that tell what they hold of a checkpoint, and a module that notes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from tests.plugins.harness import FEATURES, TinyModule

__all__ = ["HeldByWorker", "Looks"]


class HeldByWorker(Dataset[Any]):
    """Samples of zeros if the worker neither maps the checkpoint nor has it open, else of ones."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        assert torch.utils.data.get_worker_info() is not None
        opened = [_target(fd) for fd in os.listdir("/proc/self/fd")]
        held = self.path in opened or self.path in Path("/proc/self/maps").read_text()
        return torch.full((FEATURES,), float(held)), torch.zeros(FEATURES)


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""  # of the listing itself, or one that another thread has closed meanwhile


class Looks(TinyModule):
    """Notes what its batches say."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.held.append(bool(batch[0].any()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.held.append(bool(batch[0].any()))
