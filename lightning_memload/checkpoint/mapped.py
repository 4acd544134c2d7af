"""A loaded object whose tensors are still in the files, and the position of each tensor there.

Most tensors are ordinary ones on top of the mapping. A tensor that the file holds in several parts is a
:class:`ChunkedTensor`. A position is computed from the address, and is ``None`` for a tensor that has been written.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence

import torch

from lightning_memload.checkpoint.chunked import ChunkedTensor, ChunkedValues, FilePiece
from lightning_memload.checkpoint.index import Checkpoint, ChunkInfo, span_elements
from lightning_memload.errors import UnsafeGlobalsError
from lightning_memload.storage.lease import FileWatch
from lightning_memload.storage.local import FileSet
from lightning_memload.storage.mapping import FileMapping

__all__ = ["MappedCheckpoint", "span_bytes"]


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
        self._chunked: weakref.WeakSet[ChunkedValues] = weakref.WeakSet()
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

    @property
    def is_chunked(self) -> bool:
        """Whether there are chunked tensors. Pages of the files cannot be their memory."""
        return bool(self._chunked)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is that of the checkpoint, even if it has been written."""
        if isinstance(tensor, ChunkedTensor):
            return tensor.source is self.source and not tensor.is_read
        return self.mapping is not None and self.mapping.offset_of(tensor) is not None

    def locate(self, tensor: torch.Tensor) -> tuple[FilePiece, ...] | None:
        """The pieces of the files that hold the tensor's values.

        Args:
            tensor: Any tensor.

        Returns:
            One piece for most tensors, several for chunked ones. ``None`` for a tensor that is not in the files, has
            been written since loading, is empty, or whose bytes are not its values (conjugate or negative views,
            subclasses).
        """
        return self.locate_all([tensor])[0]

    def locate_all(self, tensors: Sequence[torch.Tensor]) -> list[tuple[FilePiece, ...] | None]:
        """Locates many tensors with one query of the kernel, see :meth:`locate`."""
        offsets = [self._offset_of_values(tensor) for tensor in tensors]
        ranges = [
            (offset, offset + span_bytes(tensor))
            for offset, tensor in zip(offsets, tensors, strict=True)
            if offset is not None
        ]
        pristine = iter(self.mapping.are_pristine(ranges) if self.mapping is not None else [])
        return [
            self._pieces_of(tensor) if offset is None else _whole(tensor, offset) if next(pristine) else None
            for offset, tensor in zip(offsets, tensors, strict=True)
        ]

    def _pieces_of(self, tensor: torch.Tensor) -> tuple[FilePiece, ...] | None:
        if isinstance(tensor, ChunkedTensor) and self.holds(tensor) and tensor.numel():
            return tensor.pieces
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
                    kept += values.read().nbytes
            kept += self.mapping.detach(beside_others=beside_others) if self.mapping is not None else 0
            self.source.close()
        watch, self._watch = self._watch, None
        if watch is not None and watch is not threading.current_thread():
            watch.end()
        return kept


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's first element to the end of its last element. 0 for an empty tensor."""
    if tensor.is_contiguous():
        return tensor.nbytes
    return span_elements(tensor.shape, tensor.stride()) * tensor.element_size()


def _whole(tensor: torch.Tensor, offset: int) -> tuple[FilePiece, ...]:
    shape = tuple(tensor.shape)
    return (FilePiece(offset, tensor.stride(), (0,) * len(shape), shape),)
