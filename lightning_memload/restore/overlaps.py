"""Finds tensors of a module that share memory. Nothing is read or written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import nn

from lightning_memload.checkpoint import span_bytes
from lightning_memload.restore.recipes import WaitingParameter

__all__ = [
    "PLAIN_TYPES",
    "Sharing",
    "has_memory",
    "is_alias",
    "is_plain_tensor",
    "memory_of",
    "overlapping_ids",
    "overlaps_itself",
]

PLAIN_TYPES = (torch.Tensor, nn.Parameter, WaitingParameter)


class Sharing:
    """The tensors of a module that share memory without being the same object.

    Memory that a tensor had before still counts as its own. So the answer may be a wrong "yes", but never a wrong "no".
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners: dict[tuple[torch.device, int], set[int]] = {}
        self.note(module)

    def note(self, module: nn.Module) -> None:
        """Notes the present memory of the tensors of a module, or of a part of it."""
        for tensor in (*module.parameters(), *module.buffers()):
            if has_memory(tensor):
                self._owners.setdefault(memory_of(tensor), set()).add(id(tensor))

    def shares(self, tensor: torch.Tensor) -> bool:
        """Whether another parameter or buffer has the same storage."""
        return bool(self._owners.get(memory_of(tensor), set()) - {id(tensor)})


def overlapping_ids(tensors: Iterable[torch.Tensor]) -> set[int]:
    """The ids of the tensors that overlap with another one of them in memory."""
    by_device: dict[torch.device, list[tuple[int, int, int]]] = {}
    for tensor in tensors:
        if has_memory(tensor):
            start = tensor.data_ptr()
            by_device.setdefault(tensor.device, []).append((start, start + span_bytes(tensor), id(tensor)))
    overlapping: set[int] = set()
    for spans in by_device.values():
        furthest_end, furthest = -1, 0
        for start, end, number in sorted(spans):
            if start < furthest_end:
                overlapping |= {furthest, number}
            if end > furthest_end:
                furthest_end, furthest = end, number
    return overlapping


def has_memory(tensor: Any) -> TypeGuard[torch.Tensor]:
    """Whether a tensor is plain and takes memory."""
    # Questions to a waiting parameter run Python code. These two are answered without them.
    return (
        type(tensor) is not WaitingParameter and is_plain_tensor(tensor) and not tensor.is_meta and tensor.numel() > 0
    )


def is_alias(value: Any, tensor: torch.Tensor) -> bool:
    """Whether a value is another object with the same memory, dtype, shape and strides as a tensor."""
    return (
        value is not tensor
        and has_memory(value)
        and has_memory(tensor)
        and value.data_ptr() == tensor.data_ptr()
        and (value.device, value.dtype, value.shape, value.stride())
        == (tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        and not (value.is_conj() or value.is_neg() or tensor.is_conj() or tensor.is_neg())
    )


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether several elements of a tensor share one place in memory, as in an expanded tensor."""
    if tensor.is_contiguous():
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def memory_of(tensor: torch.Tensor) -> tuple[torch.device, int]:
    """The storage of a tensor: its device and its address."""
    return tensor.device, tensor.untyped_storage().data_ptr()


def is_plain_tensor(tensor: Any) -> TypeGuard[torch.Tensor]:
    """Whether the memory of a tensor is its values and nothing else. torch handles subclasses and special layouts."""
    kind = type(tensor)
    if kind is WaitingParameter:
        return True
    return kind in PLAIN_TYPES and tensor.layout is torch.strided and not tensor.is_quantized
