"""Checkpoints that tell by their values which save wrote them, through the CheckpointIO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_memload import StreamingCheckpointIO, verify_checkpoint
from lightning_memload.formats import load_mapped

MIB = 1 << 20


def make_io(format: Any, way: str) -> Any:
    io = StreamingCheckpointIO(format=format, asynchronous=way == "asynchronous")
    return AsyncCheckpointIO(io) if way == "wrapped" else io


def state(number: int, num_mib: int, num_tensors: int = 2) -> dict[str, Any]:
    numel = num_mib * MIB // num_tensors // 8
    return {"number": number, "state_dict": {str(key): torch.full((numel,), number) for key in range(num_tensors)}}


def number_of(path: Path) -> int:
    """The number of the state. All of its tensors must have it."""
    assert not verify_checkpoint(path).is_damaged
    loaded, _ = load_mapped(path, weights_only=True)
    assert all((value == loaded["number"]).all() for value in loaded["state_dict"].values())
    return int(loaded["number"])
