"""Moves tensors from the file to ordinary memory. Each tensor stays the same object.

Tensors that share memory in the loaded checkpoint share it afterwards: a storage moves as a whole, with all tensors of
the checkpoint in it. So an optimizer or a wrapper can use such tensors by value or by reference, as if the checkpoint
had been loaded into memory.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch

from lightning_memload.checkpoint import ChunkedTensor, MappedCheckpoint
from lightning_memload.restore.session import Move, RestoreSession
from lightning_memload.restore.storages import is_alone

__all__ = ["Settlement", "mapped_bytes", "plan_settlements", "settle_alone", "tensors_by_storage"]


class Settlement:
    """The move of one storage from the file to ordinary memory.

    Args:
        name: Its name in messages.
        tensors: All tensors in the storage. At least one.

    Attributes:
        name: See the argument.
        tensors: All tensors in the storage.
        nbytes: Size of the storage in bytes.
        is_simple: Whether one tensor is all of the storage, as nearly every state is.
        value: That tensor. Of a storage that is not simple, any of its tensors.
        device: The CPU.
        dtype: The type of ``value``.
        destination: The new memory, ``None`` before it is allocated.
    """

    __slots__ = ("_storage", "destination", "device", "dtype", "is_simple", "name", "nbytes", "tensors", "value")

    def __init__(self, name: str, tensors: list[torch.Tensor]) -> None:
        self.name = name
        self.tensors = tensors
        self.value = tensors[0]
        self.device = torch.device("cpu")
        self.dtype = self.value.dtype
        self.destination: torch.Tensor | None = None
        self._storage = self.value.untyped_storage()
        self.nbytes: int = self._storage.nbytes()
        self.is_simple = len(tensors) == 1 and self.value.is_contiguous() and self.value.nbytes == self.nbytes

    def allocate(self) -> Move:
        """The move of its bytes, into memory that is allocated now."""
        value = self.value
        if self.is_simple:
            self.destination = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            return Move(self.name, value, self.destination)
        self.destination = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        return Move(self.name, _whole(self._storage), self.destination)

    def end(self) -> None:
        """Gives the tensors their new memory. It must be filled."""
        assert self.destination is not None
        if self.is_simple:
            self.value.data = self.destination
            return
        storage = self.destination.untyped_storage()
        for tensor in self.tensors:
            placed = torch.empty(0, dtype=tensor.dtype, device="cpu")
            tensor.data = placed.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def settle_alone(kept: Mapping[str, torch.Tensor]) -> list[Settlement]:
    """One settlement for every tensor that shares its memory with no other one: nearly all states do not.

    Args:
        kept: The tensors, by what to call them in messages.
    """
    settlements = []
    seen: set[int] = set()
    for name, tensor in kept.items():
        if id(tensor) not in seen and is_alone(tensor) and _is_movable(tensor):
            settlements.append(Settlement(name, [tensor]))
        seen.add(id(tensor))
    return settlements


def plan_settlements(kept: Mapping[str, torch.Tensor], *owners: Mapping[int, list[torch.Tensor]]) -> list[Settlement]:
    """One settlement for every storage under some tensors.

    A storage with a tensor whose bytes are not its values (conjugate views, subclasses) is skipped. It stays in the
    file until the session releases the file.

    Args:
        kept: The tensors, by what to call them in messages.
        owners: What :func:`tensors_by_storage` found; all tensors that are moved.
    """
    names = {tensor.untyped_storage()._cdata: name for name, tensor in reversed(list(kept.items()))}
    settlements = []
    for key, name in names.items():
        candidates = [tensor for found in owners for tensor in found.get(key, ())]
        if len(candidates) > 1:
            candidates = list({id(tensor): tensor for tensor in candidates}.values())
        # A tensor that was found earlier may have moved since. Another storage may then have the id of its old one.
        tensors = [tensor for tensor in candidates if tensor.untyped_storage()._cdata == key]
        if tensors and all(map(_is_movable, tensors)):
            settlements.append(Settlement(name, tensors))
    return settlements


def tensors_by_storage(
    value: Any, checkpoint: MappedCheckpoint, known: Container[int] = ()
) -> dict[int, list[torch.Tensor]]:
    """The tensors in a nested structure that lie in the checkpoint's file, by the identity of their storages.

    Skips tensors in several parts, which have no storage, and tensors whose ``id`` is in ``known``.
    """
    found: dict[int, list[torch.Tensor]] = {}
    for tensor in _tensors(value):
        if id(tensor) not in known and checkpoint.holds(tensor) and not isinstance(tensor, ChunkedTensor):
            found.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    return found


def mapped_bytes(value: Any, session: RestoreSession) -> int:
    """Bytes of all tensors in a nested structure that still lie in the checkpoint's file."""
    return sum(tensor.nbytes for tensor in _tensors(value) if session.checkpoint.holds(tensor))


def _whole(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (storage.nbytes(),), (1,))


def _is_movable(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_quantized
    return plain and not (tensor.is_conj() or tensor.is_neg())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in dicts, lists and tuples, each once."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if not isinstance(item, (torch.Tensor, dict, list, tuple)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        else:
            stack.extend(item.values() if isinstance(item, dict) else item)
