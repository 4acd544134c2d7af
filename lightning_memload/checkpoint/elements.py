"""Reads the elements of a tensor from the files of its checkpoint, part by part, in their order.

Only the asked elements take memory. A tensor may be in several chunks. The values of a chunk whose elements are not in
order in the file (a transposed tensor) are read through a mapping of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from lightning_memload.checkpoint.chunked import FileChunk
from lightning_memload.checkpoint.index import TensorInfo, span_elements
from lightning_memload.storage import FileMapping, FileSet, read_fully

__all__ = ["ElementReader", "file_chunks", "is_in_order"]

# Position of the first element in every dimension, and the sizes.
_Box = tuple[tuple[int, ...], tuple[int, ...]]


class ElementReader:
    """One tensor in the files. Several threads may read from it at once.

    Args:
        source: The files. They stay open.
        dtype: Its dtype.
        shape: Its shape.
        chunks: Its parts, which cover it without overlap.
        name: Its name in messages.

    Attributes:
        dtype: Its dtype.
        numel: Number of its elements.
        chunks: Its parts, without empty ones.
    """

    def __init__(
        self, source: FileSet, dtype: torch.dtype, shape: Sequence[int], chunks: Sequence[FileChunk], name: str
    ) -> None:
        self.dtype = dtype
        self.numel = math.prod(shape)
        self._source = source
        self._shape = tuple(shape)
        self._name = name
        self.chunks = tuple(chunk for chunk in chunks if math.prod(chunk.shape))
        self._places = [(chunk, self._map(chunk)) for chunk in self.chunks]

    @classmethod
    def of(cls, tensor: TensorInfo, source: FileSet) -> ElementReader:
        """The reader of a tensor of an index."""
        return cls(source, tensor.dtype, tensor.shape, file_chunks(tensor), tensor.name)

    def read(self, start: int, count: int) -> torch.Tensor:
        """The elements from ``start`` to ``start + count``, as a new 1-D tensor of the tensor's dtype on the CPU.

        Raises:
            CheckpointReadError: Reading failed.

        Peak memory: twice the elements.
        """
        data = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8, device="cpu")
        values = data.view(self.dtype)
        done = 0
        for starts, sizes in _boxes(self._shape, start, count):
            numel = math.prod(sizes)
            self._read_box(starts, sizes, values[done : done + numel].view(sizes))
            done += numel
        return values

    def _read_box(self, starts: tuple[int, ...], sizes: tuple[int, ...], destination: torch.Tensor) -> None:
        for chunk, mapped in self._places:
            overlap = _overlap((starts, sizes), (chunk.starts, chunk.shape))
            if overlap is None:
                continue
            lows, lengths = overlap
            of_box = tuple(slice(low - at, low - at + n) for low, at, n in zip(lows, starts, lengths, strict=True))
            skipped = zip(lows, chunk.starts, chunk.stride, strict=True)
            first = sum((low - at) * step for low, at, step in skipped)
            if mapped is not None:
                destination[of_box].copy_(mapped.as_strided(lengths, chunk.stride, first))
            else:
                self._read_into(destination[of_box], chunk.offset + first * self.dtype.itemsize)

    def _map(self, chunk: FileChunk) -> torch.Tensor | None:
        """The elements of a chunk as a 1-D tensor on a mapping of the file. ``None`` if they are in order there."""
        if is_in_order(chunk.shape, chunk.stride):
            return None
        return FileMapping(self._source).tensor(chunk.offset, (span_elements(chunk.shape, chunk.stride),), self.dtype)

    def _read_into(self, destination: torch.Tensor, offset: int) -> None:
        direct = destination.is_contiguous()
        memory = destination if direct else torch.empty(destination.shape, dtype=self.dtype, device="cpu")
        # A scalar has no last dimension to view as bytes.
        buffer = memory.reshape(-1).view(torch.uint8).numpy().data
        read_fully(self._source, [buffer], offset, name_at=lambda _: self._name)
        if not direct:
            destination.copy_(memory)


def file_chunks(tensor: TensorInfo) -> tuple[FileChunk, ...]:
    """The places of a tensor of an index in the files."""
    if not tensor.chunks:
        start, _ = tensor.file_range
        return (FileChunk(start, tensor.stride, (0,) * len(tensor.shape), tensor.shape),)
    itemsize = tensor.dtype.itemsize
    return tuple(
        FileChunk(c.storage.offset + c.storage_offset * itemsize, c.stride, c.starts, c.shape) for c in tensor.chunks
    )


def is_in_order(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements with these strides follow one another without gaps, in the order of a contiguous tensor."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _boxes(shape: Sequence[int], start: int, count: int) -> Iterator[_Box]:
    """Divides a run of elements into boxes, in order: at most two for each dimension.

    A box has one index in the first dimensions, a range in one dimension, and all of the last ones. So the elements of
    its overlap with any chunk follow one another in the chunk.
    """
    if not shape:
        yield (), ()
        return
    row, end = math.prod(shape[1:]), start + count
    while start < end:
        index, within = divmod(start, row)
        if within or end - start < row:
            numel = min(row - within, end - start)
            for starts, sizes in _boxes(shape[1:], within, numel):
                yield (index, *starts), (1, *sizes)
        else:
            rows = (end - start) // row
            numel = rows * row
            yield (index, *(0 for _ in shape[1:])), (rows, *shape[1:])
        start += numel


def _overlap(first: _Box, second: _Box) -> _Box | None:
    lows, lengths = [], []
    for start, size, other_start, other_size in zip(*first, *second, strict=True):
        low, high = max(start, other_start), min(start + size, other_start + other_size)
        if low >= high:
            return None
        lows.append(low)
        lengths.append(high - low)
    return tuple(lows), tuple(lengths)
