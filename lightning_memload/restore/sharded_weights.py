"""Which tensors of a checkpoint go into which shards of a module: what Lightning's strategies for DTensors load.

Mirrors ``_load_raw_module_state`` of Lightning 2.5 and 2.6: the names are those of the modules in the tree, parameters
and persistent buffers are loaded, and names of the checkpoint that the module lacks are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_memload.restore.overlaps import overlapping_ids, overlaps_itself
from lightning_memload.restore.shards import ShardTarget, Unshardable, is_distributed

__all__ = ["plan_sharded_weights", "run_load_hooks", "show_shards"]

# In the names of modules that activation checkpointing wraps. Their load_state_dict takes names without it.
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."


def show_shards(module: nn.Module) -> None:
    """Makes the parameters of FSDP2 modules their shards again, as after a forward pass that left them whole."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def plan_sharded_weights(module: nn.Module, state_dict: Mapping[str, Any], *, strict: bool) -> list[ShardTarget]:
    """Plans the weights of a module. Nothing is changed or read.

    Args:
        module: The module. Its parameters have memory.
        state_dict: The whole weights by name.
        strict: Whether each parameter and persistent buffer must be in ``state_dict``.

    Returns:
        The targets, each tensor once. Of a tensor with several names, the last value counts, as in Lightning.

    Raises:
        KeyError: A name is missing, with ``strict``. The message is Lightning's.
        Unshardable: The weights must be loaded in another way.
    """
    if not any(is_distributed(parameter) for parameter in module.parameters()):
        raise Unshardable("no parameter is a DTensor")
    targets: dict[int, ShardTarget] = {}
    for child in module.modules():
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            raise Unshardable(f"{type(child).__name__} has an extra state")
    for _, name, tensor in _tensors_to_load(module):
        if name in state_dict:
            targets[id(tensor)] = ShardTarget.of(name, state_dict[name], tensor)
        elif strict:
            raise KeyError(
                f"The model contains a key '{name}' that does not exist in the loaded checkpoint."
                " To disable strict loading, set `strict=False`."
            )
    destinations = [target.destination for target in targets.values()]
    if overlapping_ids(destinations) or any(map(overlaps_itself, destinations)):
        raise Unshardable("weights share memory without being the same tensor")
    return list(targets.values())


@torch.no_grad()
def run_load_hooks(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Calls ``load_state_dict`` of each module that has weights of its own, as Lightning does, with its own tensors.

    torch copies each tensor onto itself, which does nothing, and runs the hooks of the modules.

    Args:
        module: The module, when its values are loaded.
        state_dict: The names that were loaded.
    """
    loaded = {id(child): child for child, name, _ in _tensors_to_load(module) if name in state_dict}
    for child in loaded.values():
        own = {name.replace(_CHECKPOINT_WRAPPER, ""): tensor for _, name, tensor in _tensors_to_load(child)}
        child.load_state_dict(state_dict=own, strict=False, assign=False)


def _tensors_to_load(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Each module with its own buffers and parameters that a checkpoint holds, and their full names."""
    for path, child in module.named_modules():
        for tensors in (child.named_buffers(recurse=False), child.named_parameters(recurse=False)):
            for name, tensor in tensors:
                if name not in child._non_persistent_buffers_set:
                    yield child, f"{path}{'.' if path else ''}{name}", tensor
