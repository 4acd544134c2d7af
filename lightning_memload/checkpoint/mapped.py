"""A loaded object whose tensors are still in the files, and the position of each tensor there.

Most tensors are ordinary ones on top of the mapping. A tensor that the file holds in several parts is a
:class:`ChunkedTensor`. A position is computed from the address, and is ``None`` for a tensor that has been written.
"""

from __future__ import annotations

import operator
import os
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from lightning_memload.checkpoint.chunked import ChunkedTensor, ChunkedValues, FileChunk
from lightning_memload.checkpoint.index import Checkpoint, ChunkInfo, span_elements
from lightning_memload.checkpoint.unread import UnreadStorage, UnreadView
from lightning_memload.errors import UnsafeGlobalsError
from lightning_memload.storage import FileMapping, FileSet, FileWatch, Reservation

__all__ = ["MappedCheckpoint", "end_loading", "span_bytes"]

_CONTAINERS = frozenset((dict, list, OrderedDict, defaultdict))
# Tensors in deeper tuples are read into memory. Only a hostile file has them.
_MAX_TUPLE_DEPTH = 100


class MappedCheckpoint:
    """The files under the tensors of a loaded object.

    Args:
        index: The index of the checkpoint.
        source: Its files, in the order of the index. Closed by :meth:`detach`, or with the last reference.
        mapping: The mapping of these files. It lives as long as this object or any tensor on top of it. ``None`` if
            all tensors are chunked.
        refusal: See the attribute.

    Attributes:
        refusal: The error for parts of the object that were not loaded because ``weights_only`` refuses their classes.
            ``None`` if nothing was refused.
    """

    def __init__(
        self,
        index: Checkpoint,
        source: FileSet,
        mapping: FileMapping | None,
        refusal: UnsafeGlobalsError | None = None,
    ) -> None:
        self.index = index
        self.refusal = refusal
        self.source = source
        self.mapping = mapping
        self._chunked: weakref.WeakSet[ChunkedValues | UnreadStorage] = weakref.WeakSet()
        self._watch: FileWatch | None = None
        self._lock = threading.RLock()

    @classmethod
    def unmapped(cls, path: str | os.PathLike[str]) -> MappedCheckpoint:
        """An object for a checkpoint that was loaded into memory. None of its tensors is in a file."""
        index = Checkpoint(path=os.fspath(path), format="unmapped", files=(), tensors=(), storages=())
        return cls(index, FileSet([]), None)

    def chunked_tensor(
        self, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[ChunkInfo], *, name: str | None = None
    ) -> ChunkedTensor:
        """Creates a tensor that the checkpoint holds in several parts. No byte is read.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            chunks: The parts.
            name: Its name in messages.
        """
        values = ChunkedValues(shape, dtype, chunks, self.source, name)
        self._chunked.add(values)
        return ChunkedTensor(values)

    def unread_storage(self, offset: int, nbytes: int, crc32: int | None, name: str | None) -> UnreadStorage:
        """Creates a storage whose bytes stay in files that cannot be mapped. For the arguments see the class."""
        storage = UnreadStorage(self.source, offset, nbytes, crc32, name)
        self._chunked.add(storage)
        return storage

    @property
    def is_chunked(self) -> bool:
        """Whether there are chunked tensors. Pages of the files cannot be their memory."""
        return bool(self._chunked)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is that of the checkpoint, even if it has been written."""
        if isinstance(tensor, ChunkedTensor):
            return tensor.source is self.source and not tensor.is_read
        return self.mapping is not None and self.mapping.offset_of(tensor) is not None

    def locate(self, tensor: torch.Tensor) -> tuple[FileChunk, ...] | None:
        """The chunks of the files that hold the tensor's values.

        Args:
            tensor: Any tensor.

        Returns:
            One chunk for most tensors, several for chunked ones. ``None`` for a tensor that is not in the files, has
            been written since loading, is empty, or whose bytes are not its values (conjugate or negative views,
            subclasses).
        """
        return self.locate_all([tensor])[0]

    def locate_all(self, tensors: Sequence[torch.Tensor]) -> list[tuple[FileChunk, ...] | None]:
        """Locates many tensors with one query of the kernel, see :meth:`locate`."""
        offsets = [self._offset_of_values(tensor) for tensor in tensors]
        ranges = [
            (offset, offset + span_bytes(tensor))
            for offset, tensor in zip(offsets, tensors, strict=True)
            if offset is not None
        ]
        pristine = iter(self.mapping.are_pristine(ranges) if self.mapping is not None else [])
        return [
            self._chunks_of(tensor) if offset is None else _whole(tensor, offset) if next(pristine) else None
            for offset, tensor in zip(offsets, tensors, strict=True)
        ]

    def _chunks_of(self, tensor: torch.Tensor) -> tuple[FileChunk, ...] | None:
        if isinstance(tensor, ChunkedTensor) and self.holds(tensor) and tensor.numel():
            return tensor.chunks
        return None

    def _offset_of_values(self, tensor: torch.Tensor) -> int | None:
        # Exact types only: a subclass may interpret its bytes in another way.
        if self.mapping is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() == 0:
            return None
        if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return None
        return self.mapping.offset_of(tensor)

    @property
    def referenced_bytes(self) -> int:
        """Bytes under live tensors."""
        chunked = sum(values.nbytes for values in self._chunked if values.memory is None)
        return chunked + (self.mapping.referenced_bytes if self.mapping is not None else 0)

    def watch(self) -> str | None:
        """Starts a watch that detaches automatically when a program is about to change a file in place.

        Returns:
            ``None`` if the watch is active, else the reason why it is not.
        """
        watch = FileWatch(self.source)
        refusal = watch.begin()
        if refusal is None and watch.guard(lambda: self.detach(beside_others=True)):
            self._watch = watch
        return refusal

    def detach(self, *, beside_others: bool = False) -> int:
        """Releases the files: bytes under live tensors become ordinary memory.

        Args:
            beside_others: See :meth:`FileMapping.detach`.

        Returns:
            Bytes that were read or copied because live tensors use them.

        Raises:
            CheckpointReadError: Reading failed.
        """
        with self._lock:
            kept = 0
            for values in list(self._chunked):
                if values.memory is None:
                    values.read()
                    kept += values.nbytes
            kept += self.mapping.detach(beside_others=beside_others) if self.mapping is not None else 0
            self.source.close()
        watch, self._watch = self._watch, None
        if watch is not None and watch is not threading.current_thread():
            watch.end()
        return kept


def end_loading(
    loaded: Any,
    index: Checkpoint,
    source: FileSet,
    mapping: FileMapping,
    refusal: UnsafeGlobalsError | None = None,
) -> tuple[Any, MappedCheckpoint]:
    """The last step of :meth:`CheckpointFormat.load`, for an object whose storages are on a mapping.

    On mapped files nothing is left to do. On a :class:`Reservation`, the tensors in dicts, lists and tuples become
    chunked tensors, and all others are read into memory.

    Args:
        loaded: The object.
        index: The index of the checkpoint.
        source: Its files, in the order of the index.
        mapping: What :func:`map_or_reserve` returned for them.
        refusal: See :class:`MappedCheckpoint`.

    Returns:
        The object, and the mapped checkpoint.

    Raises:
        CheckpointReadError: Reading failed.
    """
    if not isinstance(mapping, Reservation):
        return loaded, MappedCheckpoint(index, source, mapping, refusal)
    checkpoint = MappedCheckpoint(index, source, None, refusal)
    try:
        loaded = _LeaveUnread(checkpoint, mapping).replace(loaded)
        mapping.fill(mapping.live_ranges())
    except BaseException:
        mapping.abandon()
        raise
    mapping.leave_to_storages()
    return loaded, checkpoint


class _LeaveUnread:
    """Replaces tensors on a reservation by chunked tensors."""

    def __init__(self, checkpoint: MappedCheckpoint, mapping: Reservation) -> None:
        self._checkpoint = checkpoint
        self._mapping = mapping
        self._crc32s = {item.offset: item.crc32 for item in checkpoint.index.storages if item.nbytes}
        self._names: dict[int, str] = {}
        for tensor in checkpoint.index:
            self._names.setdefault(tensor.storage.offset, tensor.name)
        self._storages: dict[tuple[int, int], UnreadStorage] = {}
        # The old tensors are kept until the end: a new object could get the identity of a freed one.
        self._done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._containers: list[Any] = []

    def replace(self, root: Any) -> Any:
        """The object with its tensors replaced. Dicts and lists are changed in place."""
        holder = [root]
        self._containers.append(holder)
        visited: set[int] = set()
        while self._containers:
            container = self._containers.pop()
            if id(container) in visited:
                continue
            visited.add(id(container))
            for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
                new = self._replaced(value)
                if new is not value:
                    container[key] = new
        return holder[0]

    def _replaced(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self._done:
                self._done[id(value)] = value, self._unread(value)
            return self._done[id(value)][1]
        if type(value) is tuple and depth < _MAX_TUPLE_DEPTH:
            items = [self._replaced(item, depth + 1) for item in value]
            return value if all(map(operator.is_, items, value)) else tuple(items)
        if type(value) in _CONTAINERS:
            self._containers.append(value)
        return value

    def _unread(self, tensor: torch.Tensor) -> torch.Tensor:
        """A chunked tensor in the place of a plain one on reserved addresses. Any other tensor itself."""
        offset = self._mapping.offset_of(tensor)
        if offset is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or vars(tensor):
            return tensor
        if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return tensor
        start = offset - int(tensor.storage_offset()) * tensor.element_size()
        nbytes = tensor.untyped_storage().nbytes()
        if self._mapping.is_filled(start, nbytes):
            return tensor
        if (start, nbytes) not in self._storages:
            crc32, name = self._crc32s.get(start), self._names.get(start)
            self._storages[start, nbytes] = self._checkpoint.unread_storage(start, nbytes, crc32, name)
        unread = ChunkedTensor(UnreadView(self._storages[start, nbytes], tensor))
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(unread, tensor.requires_grad)
        return unread.requires_grad_(tensor.requires_grad)


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's first element to the end of its last element. 0 for an empty tensor."""
    if tensor.is_contiguous():
        return tensor.nbytes
    return span_elements(tensor.shape, tensor.stride()) * tensor.element_size()


def _whole(tensor: torch.Tensor, offset: int) -> tuple[FileChunk, ...]:
    shape = tuple(tensor.shape)
    return (FileChunk(offset, tensor.stride(), (0,) * len(shape), shape),)
