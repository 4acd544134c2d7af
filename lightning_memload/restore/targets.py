"""The tensors of a module that a ``load_state_dict`` is about to fill, with their values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.restore.matching import is_of_restore, walk_apart
from lightning_memload.restore.overlaps import has_memory, is_plain_tensor, memory_of

__all__ = ["Target", "find_targets", "overrides_load"]


class Target(NamedTuple):
    """A parameter or persistent buffer that ``load_state_dict`` is about to fill.

    Attributes:
        key: Its key in the state dict.
        tensor: The parameter or buffer.
        value: The value in the state dict, of the same shape.
    """

    key: str
    tensor: torch.Tensor
    value: torch.Tensor


def find_targets(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> Iterator[Target]:
    """Yields the pairs of tensors that torch would copy, in torch's order: parents first, parameters before buffers.

    Skips the tensors of submodules whose own code sees or replaces the values before torch copies them, and tensors
    that share memory with these. Their own hook finds them later.

    Args:
        module: The module.
        state_dict: The state dict that the module loads.
        prefix: The prefix of the module's keys.
    """
    taken: list[tuple[str, nn.Module]] = []
    left: list[nn.Module] = []
    overrides = overrides_load(module)
    # A module with its own method may use the values of its children after it has called torch's method.
    for path, child, is_left in walk_apart(module, lambda child: overrides or _has_own_ways(child)):
        if is_left:
            left.append(child)
        else:
            taken.append((path, child))
    tensors = [tensor for child in left for tensor in (*child._parameters.values(), *child._buffers.values())]
    later = {id(tensor) for tensor in tensors} | {memory_of(tensor) for tensor in tensors if has_memory(tensor)}
    for path, child in taken:
        child_prefix = f"{prefix}{path}." if path else prefix
        # torch 2.13 has no public name for non-persistent buffers; load_state_dict itself reads this set. Filling such
        # a buffer from a key that happens to exist would hide torch's "unexpected key".
        skipped = child._non_persistent_buffers_set
        buffers = ((name, buffer) for name, buffer in child._buffers.items() if name not in skipped)
        for name, tensor in (*child._parameters.items(), *buffers):
            value = state_dict.get(child_prefix + name)
            if not isinstance(value, ChunkedTensor) and not is_plain_tensor(value):
                continue
            if not is_plain_tensor(tensor) or tensor.shape != value.shape:
                continue
            if path and later and (id(tensor) in later or (has_memory(tensor) and memory_of(tensor) in later)):
                continue
            yield Target(child_prefix + name, tensor, value)


def overrides_load(module: nn.Module) -> bool:
    """Whether a module has a ``_load_from_state_dict`` that is not torch's."""
    return not type(module)._load_from_state_dict.__module__.startswith("torch.")


def _has_own_ways(module: nn.Module) -> bool:
    """Whether code that is not torch's sees the values of a module before they are there."""
    if overrides_load(module):
        return True
    return any(not is_of_restore(hook) for hook in module._load_state_dict_pre_hooks.values())
