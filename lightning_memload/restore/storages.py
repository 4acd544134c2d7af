"""Questions about the memory of a tensor: its size, other tensors in it, and its deferred contents."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from lightning_memload.restore.tape import Contents, StridedView
from lightning_memload.torch_private import COUNT_USES, storage_from_weak_reference

__all__ = [
    "PendingBlock",
    "RealisedParameter",
    "count_alone",
    "fill_uninitialized",
    "is_all_of",
    "is_alone",
    "reads_memory_directly",
    "storage_of",
    "strided_view",
    "unfilled",
    "use_count",
]


class PendingBlock:
    """A block of memory with deferred contents.

    Attributes:
        storage: A weak reference to the memory. While it exists, no other storage gets the same address.
        contents: The deferred contents.
        owner: Module class and name of the parameter in this memory; ``None`` if unknown.
        is_derived: Whether the memory belongs to a parameter, or its contents were computed from one.
        made: The contents that the memory already has; ``None`` if it has never been written.
        num_made: How often the contents were made for other memory.
        num_steps: Number of steps since the memory was last overwritten as a whole, or was allocated.
    """

    __slots__ = ("contents", "is_derived", "made", "num_made", "num_steps", "owner", "storage")

    def __init__(self, storage: torch.UntypedStorage, *, is_derived: bool = False) -> None:
        self.storage = StorageWeakRef(storage)
        self.contents = Contents(storage.nbytes(), storage.device, None)
        self.owner: tuple[type[nn.Module], str] | None = None
        self.is_derived = is_derived
        self.made: Contents | None = None
        self.num_made = 0
        self.num_steps = 0

    def get(self) -> torch.UntypedStorage | None:
        """The memory; ``None`` if no tensor refers to it any more."""
        # As torch.multiprocessing.reductions.storage_from_cache does (torch 2.6 to 2.14).
        return storage_from_weak_reference(self.storage.cdata)


@dataclass(frozen=True, slots=True)
class RealisedParameter:
    """A parameter that got its values during the construction.

    Attributes:
        owner: Module class and name of the parameter.
        reason: Why the values were needed.
        nbytes: Size of the memory in bytes.
        storage: A weak reference to the memory.
    """

    owner: tuple[type[nn.Module], str]
    reason: str
    nbytes: int
    storage: StorageWeakRef


def strided_view(tensor: torch.Tensor) -> StridedView:
    """The view of its memory that a tensor is."""
    return StridedView(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def reads_memory_directly(tensor: torch.Tensor) -> bool:
    """Whether type, shape and strides fully describe how a tensor reads its memory."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_conj() and not tensor.is_neg()


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor; ``None`` if it has none, or is a wrapper around other tensors."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return None  # a wrapper around other tensors
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None


def is_all_of(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether the memory holds only the tensor's values, each once."""
    if tensor.numel() * tensor.element_size() != storage.nbytes():
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_alone(tensor: torch.Tensor) -> bool:
    """Whether no other tensor uses the same memory."""
    return use_count(tensor) <= count_alone()


@functools.cache
def count_alone() -> int:
    """The :func:`use_count` of a tensor that shares its memory with no other one."""
    # If torch has no such function, no tensor counts as alone, and everything is built in memory.
    return -1 if COUNT_USES is None else use_count(torch.empty(1, device="cpu"))


def use_count(tensor: torch.Tensor) -> int:
    """The number of tensors in the memory of a tensor, plus a constant."""
    return 0 if COUNT_USES is None else COUNT_USES(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def unfilled() -> Iterator[bool]:
    """Prevents torch from filling new memory within the block, as it does with deterministic algorithms.

    Yields:
        Whether torch would fill new memory.
    """
    setting: Any = torch.utils.deterministic
    if not (torch.are_deterministic_algorithms_enabled() and setting.fill_uninitialized_memory):
        yield False
        return
    setting.fill_uninitialized_memory = False
    try:
        yield True
    finally:
        setting.fill_uninitialized_memory = True


def fill_uninitialized(tensor: torch.Tensor) -> None:
    """Fills a tensor as torch fills uninitialised memory with deterministic algorithms."""
    tensor.copy_(torch.empty_like(tensor))
