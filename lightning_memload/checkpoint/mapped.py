"""A loaded object whose tensors still lie in the file, and the question where.

Most tensors are ordinary ones on top of the mapping. A tensor that the file holds in several parts cannot be that: it
is a :class:`ChunkedTensor`, which knows its parts and becomes an ordinary tensor when somebody touches its values.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lightning_memload.checkpoint.index import Checkpoint, ChunkInfo, span_elements
from lightning_memload.checkpoint.mapping import FileMapping
from lightning_memload.checkpoint.source import FileSet, read_fully
from lightning_memload.errors import CheckpointFormatError

__all__ = ["ChunkedTensor", "FilePiece", "MappedCheckpoint", "UnmappableCheckpoint", "span_bytes"]

# Of a chunked tensor that somebody touches, read at a time.
_READ_BLOCK_BYTES = 16 << 20


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
        self._chunked: weakref.WeakSet[_Values] = weakref.WeakSet()

    @classmethod
    def unmapped(cls, path: str | os.PathLike[str]) -> MappedCheckpoint:
        """For a checkpoint that was loaded into memory: none of its tensors lies in a file."""
        index = Checkpoint(path=os.fspath(path), format="unmapped", files=(), tensors=(), storages=())
        return cls(index, FileSet([]), None)

    def chunked_tensor(
        self, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[ChunkInfo], *, name: str | None = None
    ) -> ChunkedTensor:
        """A tensor that the checkpoint holds in several parts. No byte is read.

        Args:
            shape: Its sizes.
            dtype: Its element type.
            chunks: The parts.
            name: What to call it in messages.
        """
        values = _Values(shape, dtype, chunks, self.source, name)
        self._chunked.add(values)
        return ChunkedTensor(values)

    @property
    def is_chunked(self) -> bool:
        """Whether tensors lie in several places, so that none of the files' pages can be their memory."""
        return bool(self._chunked)

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
        chunked = sum(values.nbytes for values in self._chunked if values.memory is None)
        return chunked + (self.mapping.referenced_bytes if self.mapping is not None else 0)

    def detach(self) -> int:
        """Lets go of the files: what somebody still refers to becomes ordinary memory.

        Returns:
            Bytes that were read or copied because somebody still refers to them.

        Raises:
            CheckpointReadError: Reading a chunked tensor failed.
        """
        kept = 0
        for values in list(self._chunked):
            if values.memory is None:
                kept += values.read().nbytes
        kept += self.mapping.detach() if self.mapping is not None else 0
        self.source.close()
        return kept


class _Values:
    """What a chunked tensor and its detached twins share: the parts in the files, or the values in memory."""

    __slots__ = ("__weakref__", "_lock", "dtype", "memory", "name", "pieces", "shape", "source")

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[ChunkInfo], source: FileSet, name: str | None
    ) -> None:
        self.name = name
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.source = source
        self.pieces = tuple(
            FilePiece(c.storage.offset + c.storage_offset * dtype.itemsize, c.stride, c.starts, c.shape)
            for c in chunks
            if math.prod(c.shape)
        )
        self.memory: torch.Tensor | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        # Two threads that read twice would each write to a tensor of their own. An ordinary tensor in any context:
        # one of inference mode could not be written to later, and none must land on a default device.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.memory is None:
                values = torch.empty(self.shape, dtype=self.dtype, device="cpu")
                for piece in self.pieces:
                    self._read_piece(piece, piece.within(values))
                self.memory = values
            return self.memory

    def _read_piece(self, piece: FilePiece, destination: torch.Tensor) -> None:
        length, row_bytes = (piece.shape[0], piece.stride[0] * self.dtype.itemsize) if piece.shape else (1, 0)
        if row_bytes and piece.stride[0] >= span_elements(piece.shape[1:], piece.stride[1:]):
            rows = max(1, _READ_BLOCK_BYTES // row_bytes)
        else:
            rows = length  # They interlock in the file, so that none can be read without the others.
        for start in range(0, length, rows):
            part = destination[start : start + rows] if piece.shape else destination
            data = bytearray(span_elements(part.shape, piece.stride) * self.dtype.itemsize)
            offset = piece.offset + start * row_bytes
            read_fully(self.source, [memoryview(data)], offset, name_at=lambda _: self.name)
            part.copy_(torch.frombuffer(data, dtype=self.dtype).as_strided(part.shape, piece.stride))


class ChunkedTensor(torch.Tensor):
    """A CPU tensor whose values lie in several places of the files, until somebody uses them.

    Any operation reads the whole tensor into ordinary memory first, and all later ones see that memory: those on this
    object and on what ``detach()`` or ``.data`` made of it. What only asks for shape, dtype or device reads nothing.

    Args:
        values: Where the values are.
    """

    _held: _Values

    @staticmethod
    def __new__(cls, values: _Values) -> ChunkedTensor:
        """Makes the tensor; ``__init__`` comes too late for a tensor."""
        cpu = torch.device("cpu")
        self: ChunkedTensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=cpu)
        self._held = values
        return self

    def __init__(self, *_: Any) -> None:
        pass

    @property
    def source(self) -> FileSet:
        """The files."""
        return self._held.source

    @property
    def pieces(self) -> tuple[FilePiece, ...]:
        """The parts, which cover the tensor without overlap."""
        return self._held.pieces

    @property
    def is_read(self) -> bool:
        """Whether the values are in memory, so that they may differ from the file's."""
        return self._held.memory is not None

    def read(self) -> torch.Tensor:
        """The values as an ordinary tensor: read from the files at first, the same tensor ever after.

        Checksums are not compared.

        Raises:
            CheckpointReadError: Reading failed.

        Peak memory: the tensor, and 16 MiB, or the largest part where its rows interlock in the file.
        """
        return self._held.read()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._held)
        args, kwargs = tree_map_only(ChunkedTensor, ChunkedTensor.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    # What the documentation of __torch_dispatch__ prescribes; else torch would make results instances of this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # These go to the memory without an operation, and this object has none.
    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """As for any tensor."""
        return self.read().numpy(*args, **kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.read().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        """As for any tensor."""
        return self.read().tolist()

    def data_ptr(self) -> int:
        """As for any tensor."""
        return self.read().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """As for any tensor."""
        return self.read().untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = memo[id(self)] = self.read().clone()
        return copy

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
