"""The states of an optimizer whose parameters are ``DTensor``: each state of a parameter's shape becomes a shard.

States are allocated as ``DTensor`` like their parameters, streamed, and handed to torch's own ``load_state_dict``. It
then converts nothing. Unlike torch's ``set_optimizer_state_dict`` this makes no step with zero gradients, and no whole
tensor.

A checkpoint has states under numbers or under names of parameters. Numbers count the parameters in the order of the
optimizer (torch) or of the module (Lightning's ``save_distributed_checkpoint=False``). The groups tell which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.restore.overlaps import is_plain_tensor
from lightning_memload.restore.placement import torch_policy
from lightning_memload.restore.shards import ShardTarget, Unshardable, is_distributed

__all__ = ["ShardedOptimizer"]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class _State:
    """Stands for one state tensor until its memory is allocated."""

    __slots__ = ("device", "dtype", "made", "name", "parameter", "value")

    def __init__(self, name: str, value: torch.Tensor, parameter: torch.Tensor | None, place: Any) -> None:
        self.name = name
        self.value = value
        self.parameter = parameter  # whose shards it has, None for a state that is not sharded
        self.device, self.dtype = place
        self.made: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        like = self.value if self.parameter is None else _local(self.parameter)
        return int(like.numel() * self.dtype.itemsize)

    def allocate(self) -> ShardTarget:
        if self.parameter is not None:
            self.made = _empty_like(self.parameter, self.dtype)
        elif isinstance(self.value, ChunkedTensor):
            shape, stride = self.value.shape, self.value.dense_stride
            self.made = torch.empty_strided(shape, stride, device=self.device, dtype=self.dtype)
        else:
            self.made = torch.empty_like(self.value.detach(), device=self.device, dtype=self.dtype)
        return ShardTarget.of(self.name, self.value, self.made)


class ShardedOptimizer:
    """The states of one optimizer, planned but not read.

    Args:
        optimizer: The optimizer.
        saved: Its state dict in the checkpoint, with whole tensors.
        module: The module with its parameters.
        name: Its name in messages.
        strict: Whether a state may be missing for a parameter that has been trained.

    Attributes:
        layout: What is planned, in words. Equal on all ranks.

    Raises:
        Unshardable: The states must be loaded in another way.
    """

    def __init__(
        self, optimizer: Optimizer, saved: Mapping[str, Any], module: nn.Module, *, name: str, strict: bool
    ) -> None:
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict or "load_state_dict" in vars(optimizer):
            raise Unshardable(f"{type(optimizer).__name__} has a load_state_dict of its own")
        self._optimizer = optimizer
        self._planned: list[_State] = []
        names = _names_of(module)
        groups = _pair(optimizer, saved, names, [id(parameter) for parameter in module.parameters()], name)
        state: dict[str, Any] = {}
        self._groups = []
        for (saved_group, keys), group in zip(groups, optimizer.param_groups, strict=True):
            merged = {**group, **saved_group, "params": [names[id(parameter)][0] for parameter in group["params"]]}
            self._groups.append(merged)
            for parameter, key in zip(group["params"], keys, strict=True):
                own = names[id(parameter)][0]
                if parameter.requires_grad and key in saved["state"]:
                    state[own] = self._place(saved["state"][key], f"{name}.state.{own}", None, parameter, merged)
                elif parameter.requires_grad and not strict:
                    # torch keeps the state of its step with zero gradients. Such a state is not reproduced here.
                    raise Unshardable(f"{name} has no state of {own}, and strict loading is off")
        self._state = state
        self.layout = [f"{item.name} {item.dtype} {item.parameter is None}" for item in self._planned]

    @property
    def needed_bytes(self) -> dict[torch.device, int]:
        """Bytes that the states of this rank take on each device."""
        needed: Counter[torch.device] = Counter()
        for item in self._planned:
            needed[item.device] += item.nbytes
        return dict(needed)

    def allocate(self) -> list[ShardTarget]:
        """Allocates the states of this rank, without values."""
        return [item.allocate() for item in self._planned]

    def load(self) -> None:
        """Hands the states, when they have their values, to the optimizer."""
        state = {name: _fill_in(value) for name, value in self._state.items()}
        self._optimizer.load_state_dict({"state": state, "param_groups": self._groups})

    def _place(self, value: Any, name: str, key: Any, parameter: torch.Tensor, group: dict[str, Any]) -> Any:
        """The state with a :class:`_State` for every tensor, nested containers rebuilt."""
        if isinstance(value, torch.Tensor):
            if not (isinstance(value, ChunkedTensor) or is_plain_tensor(value)):
                raise Unshardable(f"{name} is a {type(value).__name__}")
            sharded = is_distributed(parameter) and value.dim() > 0
            if sharded and value.shape != parameter.shape:
                raise Unshardable(f"{name} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
            place = torch_policy(value, key, parameter, group)
            self._planned.append(_State(name, value, parameter if sharded else None, place))
            return self._planned[-1]
        if isinstance(value, dict):
            return {k: self._place(v, f"{name}.{k}", k, parameter, group) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._place(v, f"{name}.{i}", None, parameter, group) for i, v in enumerate(value))
        return value


def _fill_in(value: Any) -> Any:
    if isinstance(value, _State):
        return value.made
    if isinstance(value, dict):
        return {k: _fill_in(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fill_in(v) for v in value)
    return value


def _local(parameter: Any) -> torch.Tensor:
    with torch.no_grad():
        return parameter.to_local()  # type: ignore[no-any-return]


@torch.no_grad()
def _empty_like(parameter: Any, dtype: torch.dtype) -> torch.Tensor:
    """A ``DTensor`` with the shards of a parameter, without values."""
    from torch.distributed.tensor import DTensor

    mesh, local = parameter.device_mesh, parameter.to_local()
    if local.device.type != mesh.device_type:  # FSDP2 with CPU offload. from_local would move it to the mesh.
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return DTensor.from_local(
        torch.empty_like(local, dtype=dtype),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _names_of(module: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter as torch's distributed state dicts have them: without those of wrappers."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        names.setdefault(id(parameter), []).append(name)
    return names


def _pair(
    optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[int, list[str]], order: Sequence[int], what: str
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """For each group of an optimizer the saved group, and the key of each of its parameters in the checkpoint."""
    live = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    if not set(chain.from_iterable(live)) <= set(names):
        raise Unshardable(f"{what} is for parameters that are not the module's")
    groups = saved["param_groups"]
    keys = [list(group["params"]) for group in groups]
    flat = list(chain.from_iterable(keys))
    pairs: list[list[Any]]
    if all(isinstance(key, int) for key in flat):
        position = {number: index for index, number in enumerate(order)}
        pairs = _pair_numbers([[position[number] for number in group] for group in live], keys, what)
    elif all(isinstance(key, str) for key in flat):
        owners = {key: number for number, of_group in enumerate(keys) for key in of_group}
        pairs = [[_saved_name(names[number], owners, what) for number in group] for group in live]
        groups = [groups[_only({owners[key] for key in pair}, what)] for pair in pairs]
    else:
        raise Unshardable(f"{what} lists its parameters by names and by numbers")
    return zip(groups, pairs, strict=True)


def _pair_numbers(live: list[list[int]], saved: list[list[int]], what: str) -> list[list[int]]:
    """The saved number of each parameter, whose position in the module is given."""
    by_order = [len(group) for group in live] == [len(group) for group in saved] and list(
        chain.from_iterable(saved)
    ) == list(range(sum(map(len, saved))))
    by_module = [sorted(group) for group in live] == [sorted(group) for group in saved]
    if by_order and by_module and live != saved:
        raise Unshardable(f"{what} may count its parameters in the order of the module or in that of the optimizer")
    if by_order:
        return saved
    if by_module:
        return live
    raise Unshardable(f"{what} is for other groups of parameters than the optimizer's")


def _saved_name(names: Sequence[str], saved: Mapping[str, int], what: str) -> str:
    found = next((name for name in names if name in saved), None)
    if found is None:
        raise Unshardable(f"{what} does not list {names[0]}")
    return found


def _only(groups: set[int], what: str) -> int:
    if len(groups) != 1:
        raise Unshardable(f"{what} has its parameters in other groups than the optimizer")
    return groups.pop()
