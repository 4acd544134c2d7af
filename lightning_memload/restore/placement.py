"""Where the states of an optimizer belong: the device and the dtype that ``Optimizer.load_state_dict`` gives each."""

from __future__ import annotations

from typing import Any

import torch

from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.restore.session import Move, RestoreSession

__all__ = ["Placement", "PlannedState", "fill_in", "torch_policy"]

_CPU = torch.device("cpu")


class PlannedState:
    """Stands for one state tensor until its memory is allocated.

    Args:
        name: Its name in messages.
        value: The tensor of the checkpoint.
        device: Where it belongs.
        dtype: Its type there.

    Attributes:
        destination: Its memory, ``None`` before it is allocated.
    """

    __slots__ = ("destination", "device", "dtype", "name", "value")

    def __init__(self, name: str, value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.name = name
        self.value = value
        self.device = device
        self.dtype = dtype
        self.destination: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.value.numel() * self.dtype.itemsize

    def allocate(self) -> Move:
        """The move of its values, into memory that is allocated now."""
        if isinstance(self.value, ChunkedTensor):
            # Any operation, empty_like too, would read it.
            shape, stride = self.value.shape, self.value.dense_stride
            self.destination = torch.empty_strided(shape, stride, device=self.device, dtype=self.dtype)
        else:
            self.destination = torch.empty_like(
                self.value.detach(), device=self.device, dtype=self.dtype, memory_format=torch.preserve_format
            )
        return Move(self.name, self.value, self.destination)


class Placement:
    """Finds the mapped tensors in a state and decides where each belongs.

    Attributes:
        planned: What is going to have memory of its own: torch would convert or move it.
        kept: What torch takes as it is, by name.
    """

    def __init__(self, session: RestoreSession) -> None:
        self._checkpoint = session.checkpoint
        self.planned: dict[int, PlannedState] = {}
        self.kept: dict[str, torch.Tensor] = {}
        self._chunked: dict[int, PlannedState] = {}

    def place(
        self, value: Any, name: str, parameter: torch.Tensor | None, group: dict[str, Any], key: Any = None
    ) -> Any:
        """Returns ``value`` with a ``PlannedState`` for every mapped tensor that moves, nested containers rebuilt."""
        if isinstance(value, torch.Tensor):
            if not self._checkpoint.holds(value):
                return value
            device, dtype = torch_policy(value, key, parameter, group)
            stays = device == _CPU and dtype == value.dtype
            if stays and not isinstance(value, ChunkedTensor):
                self.kept[name] = value
                return value
            plan = PlannedState(name, value, device, dtype)
            if stays:
                # It has no memory that others could share, but may itself be the state of several parameters.
                plan = self._chunked.setdefault(id(value), plan)
            self.planned[id(plan)] = plan
            return plan
        if isinstance(value, dict):
            return {k: self.place(v, f"{name}.{k}", parameter, group, k) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.place(v, f"{name}.{i}", parameter, group) for i, v in enumerate(value))
        return value


def fill_in(value: Any) -> Any:
    """A state that :meth:`Placement.place` returned, with the memory of each planned tensor in its place."""
    if isinstance(value, PlannedState):
        return value.destination
    if isinstance(value, dict):
        return {k: fill_in(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(fill_in(v) for v in value)
    return value


def torch_policy(
    value: torch.Tensor, key: Any, parameter: torch.Tensor | None, group: dict[str, Any]
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that ``Optimizer.load_state_dict`` gives a state tensor.

    Mirrors ``Optimizer._process_value_according_to_param_policy`` of torch 2.6 to 2.13: ``step`` stays on the CPU
    unless the optimizer is capturable or fused, other states take their parameter's device, and its dtype if that is a
    floating-point one. States that belong to no parameter stay as they are.
    """
    if parameter is None:
        return _CPU, value.dtype
    if key == "step":
        if group.get("capturable", False) or group.get("fused", False):
            return parameter.device, torch.float32
        return _CPU, value.dtype
    return parameter.device, parameter.dtype if parameter.is_floating_point() else value.dtype
