"""What lies in the memory of a tensor: how much of it, whether other tensors lie there too, and what waits there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from lightning_memload.restore.tape import Contents, Own

__all__ = [
    "Pending",
    "Realised",
    "count_alone",
    "fill_uninitialized",
    "is_all_of",
    "is_alone",
    "is_plain",
    "own_view",
    "storage_of",
    "unfilled",
    "use_count",
]


class Pending:
    """A stretch of memory whose contents wait.

    Attributes:
        storage: The memory. A storage that is referred to weakly keeps its identity for itself.
        contents: What it is to contain.
        owner: The module class and the name of the parameter that it belongs to, ``None`` if none is known.
        is_derived: Whether a parameter's values went into it, or it is one.
        made: The contents that its memory has already, ``None`` if it has never been written.
        num_made: How often its contents were made for others.
        num_steps: How many steps its contents are away from memory that nobody has written.
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
        """The memory, ``None`` if nobody refers to it any more."""
        # As torch.multiprocessing.reductions.storage_from_cache does (torch 2.6 to 2.14).
        return torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)


@dataclass(frozen=True, slots=True)
class Realised:
    """A parameter that got its values while it was built.

    Attributes:
        owner: The module class and the name.
        reason: What needed them.
        nbytes: What it takes.
        storage: The memory.
    """

    owner: tuple[type[nn.Module], str]
    reason: str
    nbytes: int
    storage: StorageWeakRef


def own_view(tensor: torch.Tensor) -> Own:
    """Where a tensor lies in its memory."""
    return Own(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what its type, shape and strides say of its memory."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_conj() and not tensor.is_neg()


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor that has one of its own."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return None  # A wrapper around others.
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None


def is_all_of(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether the memory holds nothing but the tensor's values, each once."""
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
    """Whether no other tensor lies in the same memory."""
    return use_count(tensor) <= count_alone()


# torch has no public way to ask (2.6 to 2.14).
_COUNT: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


@functools.cache
def count_alone() -> int:
    """The :func:`use_count` of a tensor that is alone in its memory."""
    # Without an answer nothing counts as alone, and everything is built in memory.
    return -1 if _COUNT is None else use_count(torch.empty(1, device="cpu"))


def use_count(tensor: torch.Tensor) -> int:
    """How many tensors lie in the memory of one, and something constant."""
    return 0 if _COUNT is None else _COUNT(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def unfilled() -> Iterator[bool]:
    """Makes memory without writing to it, also where torch is told to fill it for the sake of determinism.

    Yields:
        Whether torch is told so.
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
    """Fills a tensor as torch fills uninitialised memory if its algorithms are to be deterministic."""
    tensor.copy_(torch.empty_like(tensor))
