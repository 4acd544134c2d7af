"""A loaded object whose tensors still lie in the file, and the question where.

Most tensors are ordinary ones on top of the mapping. A tensor that the file holds in several parts cannot be that: it
is a :class:`ChunkedTensor`, which knows its parts and becomes an ordinary tensor when somebody touches its values.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lightning_memload.checkpoint.index import Checkpoint, ChunkInfo, span_elements
from lightning_memload.checkpoint.mapping import FileMapping
from lightning_memload.checkpoint.source import FileSet
from lightning_memload.errors import CheckpointFormatError, CheckpointReadError

__all__ = ["ChunkedTensor", "FilePiece", "MappedCheckpoint", "UnmappableCheckpoint", "span_bytes"]


class UnmappableCheckpoint(CheckpointFormatError):
    """A sound checkpoint whose tensors do not lie in the file as they are needed: compressed, or byte-swapped."""


@dataclass(frozen=True, slots=True)
class FilePiece:
    """Where a part of a tensor, or all of it, lies.

    Attributes:
        offset: Position of its first element.
        stride: Strides there, in elements.
        starts: Position of its first element in the tensor, for every dimension.
        shape: Sizes of the part.
    """

    offset: int
    stride: tuple[int, ...]
    starts: tuple[int, ...]
    shape: tuple[int, ...]

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor, of the whole tensor's shape, that this piece is: a view."""
        if self.shape == tensor.shape:
            return tensor
        return tensor[tuple(slice(start, start + n) for start, n in zip(self.starts, self.shape, strict=True))]


class MappedCheckpoint:
    """A loaded object together with the files under its tensors.

    Args:
        index: The index of the checkpoint.
        source: Its files, in the order of the index. Closed by :meth:`detach`, or with the last reference.
        mapping: The mapping of these files. It lives as long as this object or any tensor on top of it. ``None`` if
            all tensors are chunked.
    """

    def __init__(self, index: Checkpoint, source: FileSet, mapping: FileMapping | None) -> None:
        self.index = index
        self.source = source
        self.mapping = mapping
        self._chunked: weakref.WeakSet[ChunkedTensor] = weakref.WeakSet()

    @classmethod
    def unmapped(cls, path: str | os.PathLike[str]) -> MappedCheckpoint:
        """For a checkpoint that was loaded into memory: none of its tensors lies in a file."""
        index = Checkpoint(path=os.fspath(path), format="unmapped", files=(), tensors=(), storages=())
        return cls(index, FileSet([]), None)

    def chunked_tensor(self, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[ChunkInfo]) -> ChunkedTensor:
        """A tensor that the checkpoint holds in several parts. No byte is read."""
        tensor = ChunkedTensor(shape, dtype, chunks, self.source)
        self._chunked.add(tensor)
        return tensor

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is the checkpoint's, written to or not."""
        if isinstance(tensor, ChunkedTensor):
            return tensor.source is self.source and not tensor.is_read
        return self.mapping is not None and self.mapping.offset_of(tensor) is not None

    def locate(self, tensor: torch.Tensor) -> tuple[FilePiece, ...] | None:
        """The bytes that hold the tensor's values.

        Args:
            tensor: Any tensor.

        Returns:
            One piece for most tensors, several for chunked ones. ``None`` for a tensor that does not lie in the file,
            that somebody wrote to since, whose bytes are not its values (conjugate or negative views, subclasses), or
            that is empty.
        """
        return self.locate_all([tensor])[0]

    def locate_all(self, tensors: Sequence[torch.Tensor]) -> list[tuple[FilePiece, ...] | None]:
        """Locates many tensors at once, which asks the kernel once instead of for each; see :meth:`locate`."""
        offsets = [self._offset_of_values(tensor) for tensor in tensors]
        pristine = iter(
            self.mapping.are_pristine(
                [
                    (offset, offset + span_bytes(tensor))
                    for offset, tensor in zip(offsets, tensors, strict=True)
                    if offset is not None
                ]
            )
            if self.mapping is not None
            else ()
        )
        return [
            self._pieces_of(tensor) if offset is None else _whole(tensor, offset) if next(pristine) else None
            for offset, tensor in zip(offsets, tensors, strict=True)
        ]

    def _pieces_of(self, tensor: torch.Tensor) -> tuple[FilePiece, ...] | None:
        if isinstance(tensor, ChunkedTensor) and self.holds(tensor) and tensor.numel():
            return tensor.pieces
        return None

    def _offset_of_values(self, tensor: torch.Tensor) -> int | None:
        # The exact types: a subclass may give its bytes another meaning.
        if self.mapping is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() == 0:
            return None
        if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return None
        return self.mapping.offset_of(tensor)

    @property
    def referenced_bytes(self) -> int:
        """Bytes under tensors that are still alive."""
        chunked = sum(tensor.nbytes for tensor in self._chunked if not tensor.is_read)
        return chunked + (self.mapping.referenced_bytes if self.mapping is not None else 0)

    def detach(self) -> int:
        """Lets go of the files: what somebody still refers to becomes ordinary memory.

        Returns:
            Bytes that were read or copied because somebody still refers to them.

        Raises:
            CheckpointReadError: Reading a chunked tensor failed.
        """
        kept = 0
        for tensor in list(self._chunked):
            if not tensor.is_read:
                kept += tensor.read().nbytes
        kept += self.mapping.detach() if self.mapping is not None else 0
        self.source.close()
        return kept


class ChunkedTensor(torch.Tensor):
    """A CPU tensor whose values lie in several places of the files, until somebody uses them.

    Any operation reads the whole tensor into ordinary memory first, and all later ones see that memory. What only asks
    for shape, dtype or device reads nothing.

    Args:
        shape: Sizes.
        dtype: Element type.
        chunks: The parts, which cover the tensor without overlap.
        source: The files.
    """

    source: FileSet
    pieces: tuple[FilePiece, ...]
    _memory: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[ChunkInfo], source: FileSet
    ) -> ChunkedTensor:
        """Makes the tensor; ``__init__`` comes too late for a tensor."""
        cpu = torch.device("cpu")
        self: ChunkedTensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=cpu)
        self.source = source
        self.pieces = tuple(
            FilePiece(c.storage.offset + c.storage_offset * dtype.itemsize, c.stride, c.starts, c.shape)
            for c in chunks
            if math.prod(c.shape)
        )
        self._memory = None
        return self

    def __init__(self, *_: Any) -> None:
        pass

    @property
    def is_read(self) -> bool:
        """Whether the values are in memory, so that they may differ from the file's."""
        return self._memory is not None

    def read(self) -> torch.Tensor:
        """The values as an ordinary tensor: read from the files at first, the same tensor ever after.

        Raises:
            CheckpointReadError: Reading failed.
        """
        if self._memory is None:
            values = torch.empty(self.shape, dtype=self.dtype)
            for piece in self.pieces:
                nbytes = span_elements(piece.shape, piece.stride) * self.dtype.itemsize
                data = bytearray(nbytes)
                _read_into(self.source, memoryview(data), piece.offset)
                part = torch.frombuffer(data, dtype=self.dtype).as_strided(piece.shape, piece.stride)
                piece.within(values).copy_(part)
            self._memory = values
        return self._memory

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(ChunkedTensor, ChunkedTensor.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    # What the documentation of __torch_dispatch__ prescribes; else torch would make results instances of this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.read().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.read().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ChunkedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, in {len(self.pieces)} parts of the file)"


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's first element to the end of its last, 0 for an empty tensor."""
    return span_elements(tensor.shape, tensor.stride()) * tensor.element_size()


def _whole(tensor: torch.Tensor, offset: int) -> tuple[FilePiece, ...]:
    shape = tuple(tensor.shape)
    return (FilePiece(offset, tensor.stride(), (0,) * len(shape), shape),)


def _read_into(source: FileSet, buffer: memoryview, offset: int) -> None:
    while buffer:
        path, position = source.place(offset)
        try:
            count = source.readv([buffer], offset)
        except OSError as error:
            raise CheckpointReadError(
                f"Reading {path} failed at byte {position}: {error}.",
                path=path, key=None, offset=position, errno=error.errno,
            ) from error  # fmt: skip
        if count <= 0:
            raise CheckpointReadError(
                f"{path} ends at byte {position}, but {len(buffer)} bytes more are needed: it was cut short.",
                path=path, key=None, offset=position,
            )  # fmt: skip
        buffer, offset = buffer[count:], offset + count
