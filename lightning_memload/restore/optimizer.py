"""Streaming into optimizers, behind torch's own ``load_state_dict``.

A pre-hook allocates every state tensor where, and as what, torch would put it afterwards, streams into it and hands it
back. Torch's conversion is then a no-op, so each state exists once, on its device, and never in host memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.errors import OptimizerMismatchError, listed
from lightning_memload.restore.session import Move, RestoreSession

__all__ = ["OptimizerRestore", "mapped_bytes"]

# What torch.compile and activation checkpointing put into the names of a module, and no strategy saves.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")


class OptimizerRestore:
    """Makes an optimizer's ``load_state_dict`` stream from the mapped checkpoint while it is installed.

    Args:
        optimizer: Any optimizer with torch's ``register_load_state_dict_pre_hook``.
        session: The restore.
        name: What to call it in messages, for example ``optimizer_states[0]``.
        parameters: The module's parameters by name, for checkpoints that keep the states under these names, as
            distributed ones do.

    Raises:
        OptimizerMismatchError: (from ``load_state_dict``) The checkpoint's names are not those of the parameters that
            the optimizer updates.

    Peak memory: the states, once, on their device, and the session's staging ring.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        session: RestoreSession,
        *,
        name: str = "optimizer",
        parameters: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._session: RestoreSession | None = session
        self._name = name
        self._parameters = parameters or {}
        self._handle = optimizer.register_load_state_dict_pre_hook(self._before_load)

    def remove(self) -> None:
        """Removes the hook. Removing twice is fine."""
        self._handle.remove()
        self._session = None
        self._parameters = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerRestore:
        # An optimizer that is copied during the restore takes the hook along; it ends with this one's.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_session": None}  # One that is pickled takes a hook along that does nothing.

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        session = self._session
        if session is None:
            return None
        state_dict = _in_live_order(state_dict, optimizer, self._parameters, self._name)
        saved_groups = state_dict.get("param_groups", [])
        if [len(group["params"]) for group in saved_groups] != [len(g["params"]) for g in optimizer.param_groups]:
            return state_dict  # torch refuses this; no byte need be read for that
        parameters: dict[Any, tuple[torch.Tensor, dict[str, Any]]] = {}
        for saved, group in zip(saved_groups, optimizer.param_groups, strict=True):
            for number, parameter in zip(saved["params"], group["params"], strict=True):
                parameters[number] = (parameter, saved)
        placement = _Placement(session, self._name)
        state = {
            number: placement.place(value, (number,), *parameters.get(number, (None, {})))
            for number, value in state_dict.get("state", {}).items()
        }
        needed: dict[torch.device, int] = {}
        for plan in placement.planned.values():
            needed[plan.device] = needed.get(plan.device, 0) + plan.nbytes
        session.require(needed)
        moves = {number: plan.allocate() for number, plan in placement.planned.items()}
        session.move(list(moves.values()))
        filled = {number: move.destination for number, move in moves.items()}
        return {**state_dict, "state": {number: _fill(value, filled) for number, value in state.items()}}


def _in_live_order(
    state_dict: dict[str, Any], optimizer: Optimizer, parameters: Mapping[str, torch.Tensor], name: str
) -> dict[str, Any]:
    """Puts the names of saved parameters in the order of the live ones, which is all that torch goes by.

    Returns:
        The state dict, as it is unless its groups list parameters by name.
    """
    saved_groups = state_dict.get("param_groups", [])
    saved_ids = [saved for group in saved_groups for saved in group["params"]]
    if not parameters or not saved_ids or not all(isinstance(saved, str) for saved in saved_ids):
        return state_dict
    if len(saved_groups) != len(optimizer.param_groups):
        return state_dict  # torch refuses this
    live = {_WRAPPERS.sub("", full_name): parameter for full_name, parameter in parameters.items()}
    groups = []
    for number, (saved, group) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True)):
        names = {id(live[saved_name]): saved_name for saved_name in saved["params"] if saved_name in live}
        ids = {id(parameter) for parameter in group["params"]}
        surplus = [saved_name for saved_name in saved["params"] if id(live.get(saved_name)) not in ids]
        lacking = [live_name for live_name, p in live.items() if id(p) in ids and id(p) not in names]
        unnamed = len(ids - {id(parameter) for parameter in live.values()})
        if surplus or lacking or unnamed:
            raise OptimizerMismatchError(
                f"{name}.param_groups[{number}] of the checkpoint is for {len(saved['params'])} parameters by name, "
                f"the optimizer's is for {len(group['params'])}. "
                + (f"Not among the optimizer's: {listed(surplus)}. " if surplus else "")
                + (f"Missing from the checkpoint's: {listed(lacking)}. " if lacking else "")
                + (f"{unnamed} of the optimizer's are no parameters of the module. " if unnamed else "")
                + "Configure the optimizer as it was when the checkpoint was saved, or rename the states in "
                "on_load_checkpoint.",
                missing=tuple(lacking),
                unexpected=tuple(surplus),
            )
        groups.append({**saved, "params": [names[id(parameter)] for parameter in group["params"]]})
    return {**state_dict, "param_groups": groups}


class _Planned:
    """Stands for one state tensor until its memory is allocated."""

    __slots__ = ("device", "dtype", "name", "value")

    def __init__(self, name: str, value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.name = name
        self.value = value
        self.device = device
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.dtype.itemsize

    def allocate(self) -> Move:
        if isinstance(self.value, ChunkedTensor):
            # Any operation, empty_like too, would read it.
            empty = torch.empty(self.value.shape, device=self.device, dtype=self.dtype)
        else:
            empty = torch.empty_like(
                self.value.detach(), device=self.device, dtype=self.dtype, memory_format=torch.preserve_format
            )
        return Move(self.name, self.value, empty)


class _Placement:
    """Finds the mapped tensors in a state and decides where each belongs."""

    def __init__(self, session: RestoreSession, name: str) -> None:
        self._checkpoint = session.checkpoint
        self._name = name
        self.planned: dict[int, _Planned] = {}
        self._shared: dict[int, _Planned] = {}

    def place(
        self, value: Any, path: tuple[Any, ...], parameter: torch.Tensor | None, group: dict[str, Any], key: Any = None
    ) -> Any:
        """Returns ``value`` with a ``_Planned`` for every mapped tensor, nested containers rebuilt."""
        if isinstance(value, torch.Tensor):
            if not self._checkpoint.holds(value):
                return value
            device, dtype = _torch_policy(value, key, parameter, group)
            name = ".".join(str(part) for part in (self._name, "state", *path))
            plan = _Planned(name, value, device, dtype)
            if device.type == "cpu" and dtype == value.dtype:
                # Nothing to convert: torch takes the tensor itself, so parameters that share it go on sharing it.
                plan = self._shared.setdefault(id(value), plan)
            self.planned[id(plan)] = plan
            return plan
        if isinstance(value, dict):
            return {k: self.place(v, (*path, k), parameter, group, k) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.place(v, (*path, i), parameter, group) for i, v in enumerate(value))
        return value


def _fill(value: Any, filled: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, _Planned):
        return filled[id(value)]
    if isinstance(value, dict):
        return {k: _fill(v, filled) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fill(v, filled) for v in value)
    return value


def _torch_policy(
    value: torch.Tensor, key: Any, parameter: torch.Tensor | None, group: dict[str, Any]
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that ``Optimizer.load_state_dict`` gives a state tensor.

    Mirrors ``Optimizer._process_value_according_to_param_policy`` of torch 2.6 to 2.13: ``step`` stays on the CPU
    unless the optimizer is capturable or fused, other states take their parameter's device, and its dtype if that is a
    floating-point one. States that belong to no parameter stay as they are.
    """
    if parameter is None:
        return torch.device("cpu"), value.dtype
    if key == "step":
        if group.get("capturable", False) or group.get("fused", False):
            return parameter.device, torch.float32
        return torch.device("cpu"), value.dtype
    return parameter.device, parameter.dtype if parameter.is_floating_point() else value.dtype


def mapped_bytes(value: Any, session: RestoreSession) -> int:
    """Bytes of all tensors in a nested structure that still lie in the checkpoint's file."""
    return sum(tensor.nbytes for tensor in _tensors(value) if session.checkpoint.holds(tensor))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
