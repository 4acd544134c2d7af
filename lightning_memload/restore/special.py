"""Assigns tensors that torch cannot copy into a plain parameter: quantised, sparse, and those of some subclasses.

They replace the parameter, as with ``load_state_dict(assign=True)``, but only if torch's copy fails. All other tensors
are copied as always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.restore.overlaps import is_plain_tensor
from lightning_memload.restore.waiting import WaitingAlias

__all__ = ["assign_special"]


def assign_special(module: nn.Module, state_dict: dict[str, Any]) -> list[str]:
    """Replaces plain parameters and buffers of a module by values that cannot be copied into them.

    Parameters that are one object stay one object.

    Args:
        module: The module. Submodules with their own ``_load_from_state_dict`` are skipped.
        state_dict: The new values. Values that were assigned are removed from it.

    Returns:
        The names of the parameters and buffers that were replaced.

    Peak memory: one tensor, on the CPU.
    """
    special = [name for name, value in state_dict.items() if isinstance(value, torch.Tensor) and not _is_plain(value)]
    assigned: list[str] = []
    replaced: dict[int, Any] = {}
    for name in special:
        path, _, leaf = name.rpartition(".")
        owner = _owner_of(module, path)
        target = None if owner is None else owner._parameters.get(leaf, owner._buffers.get(leaf))
        if owner is None or target is None or not _is_plain(target):
            continue
        value = state_dict[name]
        if value.shape != target.shape or _can_be_copied(value, target):
            continue
        new = replaced.setdefault(id(target), _as_target(value, target))
        setattr(owner, leaf, new)
        del state_dict[name]
        assigned.append(name)
    return assigned


def _owner_of(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split(".") if path else ():
        if not _loads_as_torch(module) or part not in module._modules:
            return None
        child = module._modules[part]
        if child is None:
            return None
        module = child
    return module if _loads_as_torch(module) else None


def _loads_as_torch(module: nn.Module) -> bool:
    return type(module)._load_from_state_dict.__module__.startswith("torch.")


def _can_be_copied(value: torch.Tensor, target: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            torch.empty(target.shape, dtype=target.dtype, device="cpu").copy_(value)
    except Exception:  # a subclass can raise any exception
        return False
    return True


def _as_target(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The value in the form in which ``load_state_dict(assign=True)`` would assign it."""
    if not isinstance(target, nn.Parameter):
        return value
    differentiable = value.is_floating_point() or value.is_complex()
    if isinstance(value, nn.Parameter):
        return value.requires_grad_(target.requires_grad and differentiable)
    return nn.Parameter(value, requires_grad=target.requires_grad and differentiable)


def _is_plain(tensor: torch.Tensor) -> bool:
    return is_plain_tensor(tensor) or isinstance(tensor, (ChunkedTensor, WaitingAlias))
