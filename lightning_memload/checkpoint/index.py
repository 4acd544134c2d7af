"""The index of a checkpoint: which bytes of the file are which tensor.

Plain frozen data that every format produces and every floor above reads. An index describes; it holds no tensor
data, no open file and no device. A checkpoint of several files is described as one run of bytes in which each file
starts on a page of its own (:func:`~lightning_memload.bytes.lay_out`), so an offset is one number; for a single file
it is the position in the file. Offsets are in bytes, unless a name says otherwise. Objects that exist once per tensor
are named tuples: creating one takes 0.4 us, a frozen dataclass takes 1.5 us.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lightning_memload.bytes import FileSpan, place_in
from lightning_memload.checkpoint.sections import TensorGroup, divide

__all__ = [
    "Checkpoint",
    "ChunkInfo",
    "KeyPath",
    "PickledGlobal",
    "SpecialTensor",
    "StorageInfo",
    "TensorInfo",
    "format_path",
    "span_elements",
]

KeyPath = tuple[str | int, ...]


class StorageInfo(NamedTuple):
    """One contiguous run of bytes that one or several tensors share.

    Attributes:
        key: The storage's name in the file, for example ``"17"``.
        offset: Position of its first byte.
        nbytes: Its length.
        crc32: CRC-32 of its bytes as the file records it, ``None`` where the file records none.
        location: The device it was saved from, as torch tagged it, for example ``"cuda:0"``.
    """

    key: str
    offset: int
    nbytes: int
    crc32: int | None
    location: str


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """One part of a tensor that the checkpoint holds in several, as distributed checkpoints do.

    Attributes:
        starts: Position of the part's first element in the tensor, for every dimension.
        shape: Sizes of the part.
        stride: Strides within the storage, in elements.
        storage_offset: Position of the part's first element in the storage, in elements.
        storage: The bytes underneath.
    """

    starts: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    storage: StorageInfo


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        path: Keys from the root of the saved object to the tensor, ``("state_dict", "layer.weight")``.
        dtype: Element type.
        shape: Sizes.
        stride: Strides in elements.
        storage_offset: Position of the first element in the storage, in elements.
        storage: The bytes underneath. Tied tensors and views name the same storage.
        is_parameter: Whether it was saved as an ``nn.Parameter``.
        chunks: The parts of a tensor that the checkpoint holds in parts, which cover it without overlap; empty for all
            others. Stride, storage and offset are then those of the first part.
    """

    path: KeyPath
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    storage: StorageInfo
    is_parameter: bool = False
    chunks: tuple[ChunkInfo, ...] = ()

    @property
    def name(self) -> str:
        """The path as one string: ``optimizer_states[0].state[5].exp_avg``."""
        return format_path(self.path)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the tensor's own elements in bytes (a view may span more of its storage, or less)."""
        return self.numel * self.dtype.itemsize

    @property
    def storages(self) -> tuple[StorageInfo, ...]:
        """The bytes underneath, those of every part."""
        return tuple(chunk.storage for chunk in self.chunks) or (self.storage,)

    @property
    def file_range(self) -> tuple[int, int]:
        """First byte and one past the last byte that the tensor's elements span, in the run of all files."""
        start = self.storage.offset + self.storage_offset * self.dtype.itemsize
        return start, start + span_elements(self.shape, self.stride) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PickledGlobal:
    """A class or function that the pickled objects of a checkpoint name. Loading them imports it.

    Attributes:
        module: The module that defines it.
        qualname: Its name in that module.
        path: Keys from the root to the first object that needs it, ``None`` if no object of the checkpoint keeps it.
        is_buildable: Whether torch can build it under ``weights_only`` once it is allowed. It cannot put items into
            objects of some classes that derive dict or list. These classes depend on the version of torch.
    """

    module: str
    qualname: str
    path: KeyPath | None
    is_buildable: bool = True

    @property
    def name(self) -> str:
        """Its full name, ``argparse.Namespace``."""
        return f"{self.module}.{self.qualname}"

    @property
    def place(self) -> str:
        """The path as one string, or words if no object needs it."""
        if self.path is None:
            return "(within another object)"
        return format_path(self.path) or "(the whole object)"


@dataclass(frozen=True, slots=True)
class SpecialTensor:
    """A tensor whose values are more than the bytes of one storage, or whose class is not torch's.

    Attributes:
        path: Keys from the root of the saved object to the tensor.
        kind: ``"quantized"``, ``"sparse_coo"``, ``"meta"``, ``"nested"``, the full name of its class, or why torch
            cannot hold it.
        dtype: Its element type, ``None`` if it is unknown.
        shape: Its sizes, ``None`` if they are unknown.
        nbytes: Its bytes in the file.
    """

    path: KeyPath
    kind: str
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    nbytes: int

    @property
    def name(self) -> str:
        """The path as one string."""
        return format_path(self.path)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that can be known of a checkpoint without reading its tensors.

    Attributes:
        path: The file or directory.
        format: Name of its format, for example ``"torch"``.
        files: The files that hold tensors.
        tensors: Every tensor, in the order in which the saved object holds them.
        storages: Every storage, each once, in the order in which torch meets them when it loads the file.
        metadata: Text beside the tensors, such as the ``__metadata__`` of safetensors. If several files have a key, the
            value is that of the first one. Empty for formats without such text.
        globals: Every class and function that the pickled objects name, without those that make tensors.
        special: Every tensor that is not plain: quantised, sparse, meta, of a subclass, of a dtype that torch lacks.
            Tensors that it is made of are among the others, under longer names.
    """

    path: str
    format: str
    files: tuple[FileSpan, ...]
    tensors: tuple[TensorInfo, ...]
    storages: tuple[StorageInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    globals: tuple[PickledGlobal, ...] = ()
    special: tuple[SpecialTensor, ...] = ()
    # Filled when a name is first asked for: to join the paths of 20,000 tensors takes 30 ms, and few callers need it.
    _by_name: dict[str, TensorInfo] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, name: str) -> TensorInfo:
        """The tensor of this name (``TensorInfo.name``).

        Raises:
            KeyError: No tensor has this name.
        """
        return self._names()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def _names(self) -> dict[str, TensorInfo]:
        if not self._by_name:
            self._by_name.update((tensor.name, tensor) for tensor in self.tensors)
        return self._by_name

    def place(self, offset: int) -> tuple[str, int]:
        """The file at an offset, and the position within that file."""
        return place_in(self.files, offset)

    @property
    def file_size(self) -> int:
        """Size of all files together, in bytes."""
        return sum(file.nbytes for file in self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all storages. Each storage counts once."""
        return sum(storage.nbytes for storage in self.storages)

    @property
    def ties(self) -> tuple[tuple[TensorInfo, ...], ...]:
        """Groups of two or more tensors that share a storage, in file order of their storages, empty ones left out."""
        groups: dict[str, list[TensorInfo]] = {}
        for tensor in self.tensors:
            if tensor.numel:
                groups.setdefault(tensor.storage.key, []).append(tensor)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @property
    def sections(self) -> tuple[TensorGroup, ...]:
        """The tensors by the part of the checkpoint that holds them: weights, each optimizer, callbacks, and so on."""
        return divide(self.tensors)


def span_elements(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from a strided tensor's first to one past its last, holes included; 0 for an empty tensor."""
    span = 1
    for size, step in zip(shape, stride, strict=True):
        if not size:
            return 0
        span += (size - 1) * step
    return span


def format_path(path: KeyPath) -> str:
    """Joins a key path into one readable string.

    Args:
        path: Keys and positions from the root.

    Returns:
        Names joined by dots, positions in brackets: ``optimizer_states[0].state[5].exp_avg``.
    """
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")
