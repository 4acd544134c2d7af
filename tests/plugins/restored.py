"""Damages files before a restore, and checks that nothing is left after it."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

import tests.lightning as L
from lightning_memload import open_checkpoint
from lightning_memload.restore.recipes import WaitingParameter, fill_before_load


def flip_byte(path: Path, name: str) -> None:
    """Changes one byte of a tensor, far from everything that the archive itself needs."""
    (tensor,) = [tensor for tensor in open_checkpoint(path) if tensor.name == name]
    data = bytearray(path.read_bytes())
    data[tensor.storage.offset + 1] ^= 0x10
    path.write_bytes(data)


def held(path: Path) -> list[str]:
    """The mappings and the descriptors of a file in this process."""
    found = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.startswith(str(path)):
            found.append(f"fd {number}: {target}")
    return found


def assert_clean(trainer: L.Trainer, module: nn.Module) -> None:
    """No hook and no guard of ours is left."""
    for part in module.modules():
        hooks = [getattr(hook, "hook", hook) for hook in part._load_state_dict_pre_hooks.values()]
        # What got no values still waits for them.
        waits = any(type(parameter) is WaitingParameter for parameter in part.parameters(recurse=False))
        assert hooks == ([fill_before_load] if waits else [])
        assert not part._load_state_dict_post_hooks
    assert not {"to", "cpu", "load_state_dict"} & module.__dict__.keys()
    assert "model_to_device" not in trainer.strategy.__dict__
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_load_state_dict_pre_hooks
    io = trainer.strategy.checkpoint_io
    assert not getattr(io, "_observers", [])
