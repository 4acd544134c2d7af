"""The bytes under a tensor, and parts of consecutive buffers."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Sequence

import torch

from lightning_memload.transfer.copies import TensorCopy

__all__ = ["address_of", "bytes_of", "cut", "is_raw"]


def is_raw(copy: TensorCopy) -> bool:
    """Whether the destination's memory holds the same bytes in the same order as the file."""
    destination = copy.destination
    if destination.dtype != copy.dtype or destination.is_conj() or destination.is_neg():
        return False
    if destination.is_contiguous() and destination.stride() == copy.stride:
        return True
    axes = sorted(
        (in_memory, in_file, size)
        for size, in_file, in_memory in zip(destination.shape, copy.stride, destination.stride(), strict=True)
        if size > 1
    )
    # Dense: no gaps between the elements, and no shared elements.
    expected = 1
    for in_memory, in_file, size in axes:
        if in_memory != expected or in_file != expected:
            return False
        expected *= size
    return True


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a dense tensor on a device as a flat tensor."""
    start = tensor.storage_offset() * tensor.element_size()
    nbytes = tensor.numel() * tensor.element_size()
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), start, (nbytes,), (1,))


def cut(parts: Sequence[tuple[int, memoryview]], start: int, nbytes: int) -> list[memoryview]:
    """Returns the parts of consecutive buffers that hold bytes ``[start, start + nbytes)`` of a read."""
    # Binary search: a block may hold a hundred thousand small tensors, with one call for each.
    number = bisect_right(parts, start, key=lambda item: item[0]) - 1
    found = []
    while number < len(parts) and parts[number][0] < start + nbytes:
        position, part = parts[number]
        low, high = max(start, position), min(start + nbytes, position + len(part))
        found.append(part[low - position : high - position])
        number += 1
    return found


def address_of(view: memoryview) -> int:
    """Returns the address of a writable buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
