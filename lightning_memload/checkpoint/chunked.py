"""A tensor whose values stay in the files although no pages of the files can be its memory.

The files hold it in several parts, or are at a place that cannot be mapped. It knows its parts, and gives shape, dtype
and device without reading. It becomes an ordinary tensor when its values are used. A restore takes the parts and never
uses the values.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from lightning_memload.checkpoint.index import ChunkInfo, span_elements
from lightning_memload.storage import FileSet, read_fully
from lightning_memload.torch_private import make_wrapper_subclass, no_torch_function, tree_map_only
from lightning_memload.units import counted

__all__ = ["ChunkedTensor", "ChunkedValues", "FileChunk", "ValuesInFiles", "part_of"]

# When a chunked tensor is used, at most this much is read at a time.
_READ_BLOCK_BYTES = 16 << 20


class FileChunk(NamedTuple):
    """The place in the files of a part of a tensor, or of all of it.

    Attributes:
        offset: Position of its first element, in bytes.
        stride: Strides in the file, in elements.
        starts: Position of its first element in the tensor, for every dimension.
        shape: Sizes of the part.
    """

    offset: int
    stride: tuple[int, ...]
    starts: tuple[int, ...]
    shape: tuple[int, ...]

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the part of a whole tensor that this chunk describes, as a view."""
        if self.shape == tensor.shape:
            return tensor
        return tensor[tuple(slice(start, start + n) for start, n in zip(self.starts, self.shape, strict=True))]


class ValuesInFiles(Protocol):
    """The values of a :class:`ChunkedTensor`: in the files, or in memory."""

    @property
    def shape(self) -> torch.Size:
        """Sizes of the tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""
        ...

    @property
    def layout(self) -> tuple[tuple[int, ...], int] | None:
        """Its strides and storage offset in elements. ``None``: it is contiguous in a storage of its own."""
        ...

    @property
    def source(self) -> FileSet:
        """The files."""
        ...

    @property
    def chunks(self) -> tuple[FileChunk, ...]:
        """The parts, which cover the tensor without overlap."""
        ...

    @property
    def memory(self) -> torch.Tensor | None:
        """The values. ``None`` until they are read."""
        ...

    def read(self) -> torch.Tensor:
        """See :meth:`ChunkedTensor.read`."""
        ...


class ChunkedValues:
    """The parts in the files, or the values in memory. A chunked tensor and the results of its ``detach()`` share them.

    Args:
        shape: Sizes of the tensor.
        dtype: Its element type.
        chunks: Its parts.
        source: The files.
        name: Its name in messages.

    Attributes:
        memory: The values, ``None`` until they are read.
    """

    __slots__ = ("__weakref__", "_lock", "chunks", "dtype", "memory", "name", "shape", "source")

    layout = None

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[ChunkInfo], source: FileSet, name: str | None
    ) -> None:
        self.name = name
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.source = source
        self.chunks = tuple(
            FileChunk(c.storage.offset + c.storage_offset * dtype.itemsize, c.stride, c.starts, c.shape)
            for c in chunks
            if math.prod(c.shape)
        )
        self.memory: torch.Tensor | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that the values have, or would have, in memory."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """See :meth:`ChunkedTensor.read`."""
        # Two threads that read twice would each write to a tensor of their own. An ordinary tensor in any context:
        # one of inference mode could not be written to later, and none must land on a default device.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.memory is None:
                values = torch.empty(self.shape, dtype=self.dtype, device="cpu")
                for chunk in self.chunks:
                    self._read_chunk(chunk, chunk.within(values))
                self.memory = values
            return self.memory

    def _read_chunk(self, chunk: FileChunk, destination: torch.Tensor) -> None:
        length, row_bytes = (chunk.shape[0], chunk.stride[0] * self.dtype.itemsize) if chunk.shape else (1, 0)
        if row_bytes and chunk.stride[0] >= span_elements(chunk.shape[1:], chunk.stride[1:]):
            rows = max(1, _READ_BLOCK_BYTES // row_bytes)
        else:
            rows = length  # Their ranges in the file overlap, so no row can be read without the others.
        for start in range(0, length, rows):
            part = destination[start : start + rows] if chunk.shape else destination
            data = bytearray(span_elements(part.shape, chunk.stride) * self.dtype.itemsize)
            offset = chunk.offset + start * row_bytes
            read_fully(self.source, [memoryview(data)], offset, name_at=lambda _: self.name)
            part.copy_(torch.frombuffer(data, dtype=self.dtype).as_strided(part.shape, chunk.stride))


class _PartOfValues:
    """A part of the values of a chunked tensor, see :class:`ValuesInFiles`. To read it reads the whole tensor.

    Args:
        whole: The values of the tensor.
        starts: Position of the first element.
        shape: Sizes of the part.
    """

    __slots__ = ("_starts", "_whole", "chunks", "dtype", "shape", "source")

    layout = None

    def __init__(self, whole: ValuesInFiles, starts: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self._whole = whole
        self._starts = starts
        self.shape = torch.Size(shape)
        self.dtype = whole.dtype
        self.source = whole.source
        parts = [_cut_chunk(chunk, starts, shape, whole.dtype.itemsize) for chunk in whole.chunks]
        self.chunks = tuple(part for part in parts if math.prod(part.shape))

    @property
    def memory(self) -> torch.Tensor | None:
        """The values. ``None`` until the tensor is read."""
        return None if self._whole.memory is None else self.read()

    def read(self) -> torch.Tensor:
        """See :meth:`ChunkedTensor.read`."""
        parts = zip(self._starts, self.shape, strict=True)
        return self._whole.read()[tuple(slice(start, start + n) for start, n in parts)]


class ChunkedTensor(torch.Tensor):
    """A CPU tensor whose values lie in several places of the files until they are used.

    The first operation reads the whole tensor into ordinary memory. All later operations use that memory, also those on
    the results of ``detach()`` and ``.data``. A question for the shape, the dtype or the device reads nothing.

    Args:
        values: The values in the files.
    """

    _held: ValuesInFiles

    @staticmethod
    def __new__(cls, values: ValuesInFiles) -> ChunkedTensor:
        """Makes the tensor; ``__init__`` comes too late for a tensor."""
        cpu = torch.device("cpu")
        stride, offset = values.layout or (None, None)
        self: ChunkedTensor = make_wrapper_subclass(cls, values.shape, stride, offset, dtype=values.dtype, device=cpu)
        self._held = values
        return self

    def __init__(self, *_: Any) -> None:
        pass

    @property
    def source(self) -> FileSet:
        """The files."""
        return self._held.source

    @property
    def chunks(self) -> tuple[FileChunk, ...]:
        """The parts, which cover the tensor without overlap."""
        return self._held.chunks

    @property
    def storage_in_files(self) -> tuple[int, int] | None:
        """Offset and length of its storage, which others may share. ``None`` if it has none: it is in several parts."""
        storage = getattr(self._held, "storage", None)
        return None if storage is None else (storage.offset, storage.nbytes)

    @property
    def dense_stride(self) -> tuple[int, ...]:
        """The strides of a copy with ``torch.preserve_format``: its own ones if they leave no gaps, else contiguous."""
        expected = 1
        for step, size in sorted(zip(self.stride(), self.shape, strict=True)):
            if size > 1 and step != expected:
                return torch.empty(self.shape, device="meta").stride()
            expected *= size
        return self.stride()

    def part(self, starts: Sequence[int], shape: Sequence[int]) -> ChunkedTensor:
        """A part of the tensor, as another chunked tensor. No byte is read.

        Args:
            starts: Position of its first element, for every dimension.
            shape: Its sizes.
        """
        return ChunkedTensor(_PartOfValues(self._held, tuple(starts), tuple(shape)))

    @property
    def is_read(self) -> bool:
        """Whether the values are in memory, so that they may differ from the file's."""
        return self._held.memory is not None

    def read(self) -> torch.Tensor:
        """Returns the values as an ordinary tensor. Only the first call reads; later calls return the same tensor.

        Checksums are not compared.

        Raises:
            CheckpointReadError: Reading failed.

        Peak memory: the tensor, and 16 MiB. If the rows of a part overlap in the file: the tensor and that part.
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

    # As the documentation of __torch_dispatch__ says. Otherwise results would be instances of this class.
    __torch_function__ = no_torch_function  # type: ignore[assignment]

    # These methods read memory without an operation, and this object has no memory.
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

    def _ordinary(self, values: torch.Tensor) -> torch.Tensor:
        """Returns values as the same kind of tensor: a parameter, or a tensor that requires a gradient or does not."""
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(values, self.requires_grad)
        return values.detach().requires_grad_() if self.requires_grad else values

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = memo[id(self)] = self._ordinary(self.read().clone())
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._ordinary(self.read()).__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        parts = counted(len(self.chunks), "part")
        return f"ChunkedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, in {parts} of the file)"


def part_of(tensor: torch.Tensor, starts: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """A part of a tensor of a checkpoint that is in the files where the tensor is. No byte is read.

    Args:
        tensor: The tensor.
        starts: Position of the part's first element, for every dimension.
        shape: Sizes of the part.
    """
    if isinstance(tensor, ChunkedTensor):
        return tensor.part(starts, shape)
    return tensor.detach()[tuple(slice(start, start + n) for start, n in zip(starts, shape, strict=True))]


def _cut_chunk(chunk: FileChunk, starts: Sequence[int], shape: Sequence[int], itemsize: int) -> FileChunk:
    """What a chunk of a tensor holds of a part of the tensor. Its sizes contain 0 if it holds nothing of it."""
    ends = [start + n for start, n in zip(starts, shape, strict=True)]
    low = [max(start, of_chunk) for start, of_chunk in zip(starts, chunk.starts, strict=True)]
    high = [min(end, c + n) for end, c, n in zip(ends, chunk.starts, chunk.shape, strict=True)]
    skipped = sum((at - of_chunk) * step for at, of_chunk, step in zip(low, chunk.starts, chunk.stride, strict=True))
    return FileChunk(
        offset=chunk.offset + skipped * itemsize,
        stride=chunk.stride,
        starts=tuple(at - start for at, start in zip(low, starts, strict=True)),
        shape=tuple(max(0, end - at) for at, end in zip(low, high, strict=True)),
    )
