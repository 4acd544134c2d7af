"""The content of a record that is written: bytes, a part of a storage, or the elements of a tensor in their order."""

from __future__ import annotations

import ctypes

import torch

from lightning_memload.pickles.pickling import SavedStorage

__all__ = ["Content", "GatheredBytes", "memory_of", "size_of"]

_GATHERED_ELEMENTS = 64 << 10
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class GatheredBytes:
    """The elements of a non-contiguous tensor as contiguous bytes, in the order of the elements.

    The bytes are gathered part by part. Each part takes its own size in memory on the tensor's device, and 512 KiB
    for positions.

    Args:
        tensor: A strided tensor with elements of 1, 2, 4 or 8 bytes.

    Attributes:
        tensor: The tensor.
        storage: Its storage.
        nbytes: Bytes of its elements.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._integers = tensor.detach().view(_INTEGERS[tensor.dtype.itemsize])
        self.storage = tensor.untyped_storage()
        self.nbytes = tensor.nbytes

    @property
    def is_in_host_memory(self) -> bool:
        """Whether the bytes can be read without a copy from a device."""
        return self.storage.device.type == "cpu"

    def gather(self, start: int, nbytes: int) -> torch.Tensor:
        """Gathers ``nbytes`` bytes from byte ``start``, as a 1-D uint8 tensor on the tensor's device.

        Both numbers must be multiples of the element size.
        """
        integers, itemsize = self._integers, self._integers.dtype.itemsize
        first, end = start // itemsize, (start + nbytes) // itemsize
        values = integers.new_empty(end - first)
        for done in range(first, end, _GATHERED_ELEMENTS):
            positions = torch.arange(done, min(done + _GATHERED_ELEMENTS, end), device=integers.device)
            torch.take(integers, positions, out=values[done - first : done - first + len(positions)])
        return values.view(torch.uint8)


Content = bytes | SavedStorage | GatheredBytes


def size_of(content: Content | memoryview) -> int:
    """Number of bytes of a content."""
    return len(content) if isinstance(content, bytes) else content.nbytes


def memory_of(address: int, nbytes: int) -> memoryview:
    """The bytes at an address. They are valid as long as the owner of the memory lives."""
    if not nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
