"""Reads and checks the ``.metadata`` of a distributed checkpoint. No code of the file runs.

``torch.distributed.checkpoint`` pickles its own records there and reads them back with plain ``pickle``, which runs
any code that the file names. Here the records become inert ones, and all other names are refused. Every number is
checked before it is used: the chunks of a tensor cover it exactly once, and each chunk has an entry. Nothing of
``torch.distributed`` is imported, so this works on a torch that was built without it.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_memload.bytes import FileRange
from lightning_memload.checkpoint.index import KeyPath
from lightning_memload.errors import CheckpointFormatError, listed
from lightning_memload.formats.dcp.unpickler import ForeignGlobal, InertObject, MetadataUnpickler
from lightning_memload.storage.places import read_start, size_of

__all__ = ["METADATA_NAME", "Metadata", "SavedChunk", "SavedTensor", "read_metadata", "survey_metadata"]

METADATA_NAME = ".metadata"
# Larger than any size or element count of a torch tensor, which are 64-bit signed integers.
_TOO_LARGE = 1 << 63
_MAX_DIMENSIONS = 64
# A million chunks take some 200 MiB.
_MAX_METADATA_BYTES = 1 << 30
# No real state dict is nested deeper. The assembly is recursive, so the depth must be limited.
_MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class SavedChunk:
    """One chunk of a tensor, stored by itself.

    Attributes:
        starts: Index of its first element in the tensor, for every dimension.
        shape: Its shape.
        entry: The entry that holds it.
    """

    starts: tuple[int, ...]
    shape: tuple[int, ...]
    entry: FileRange


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor of the checkpoint, and the chunks that cover it without overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[SavedChunk, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """The content of a ``.metadata`` file.

    Attributes:
        items: The items by flat name: a tensor, or the entry of any other object.
        paths: The keys and positions from the root of the saved object to each item, by flat name.
        entries: Every entry, and its name in messages.
    """

    items: dict[str, SavedTensor | FileRange]
    paths: dict[str, KeyPath]
    entries: dict[FileRange, str]


def read_metadata(path: str) -> Metadata:
    """Reads and checks a ``.metadata`` file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        CheckpointFormatError: It is damaged or inconsistent, or names a class that such a file never holds.

    Peak memory: a few times the size of the file, which has some hundred bytes for each chunk of a tensor.
    """
    metadata, problems = survey_metadata(path)
    if problems:
        raise CheckpointFormatError(problems[0], path=path)
    return metadata


def survey_metadata(path: str) -> tuple[Metadata, list[str]]:
    """Reads the sound parts of a ``.metadata`` file and lists all errors in the others.

    Args:
        path: The file.

    Returns:
        The sound parts, and the description of every error.

    Raises:
        CheckpointFormatError: No part is usable: the file is not a pickle of such metadata.

    Peak memory: as for :func:`read_metadata`.
    """
    nbytes = size_of(path) or 0
    if nbytes > _MAX_METADATA_BYTES:
        raise CheckpointFormatError(
            f"{path} is damaged: it has {nbytes} bytes, and the limit is {_MAX_METADATA_BYTES}. Resume from another "
            "checkpoint.",
            path=path,
        )
    data = read_start(path, nbytes)
    unpickler = MetadataUnpickler(data)
    try:
        return _Reader(path, unpickler.load()).read()
    except CheckpointFormatError:
        raise
    except ForeignGlobal as error:
        raise CheckpointFormatError(
            f"{path} names {error}, which the metadata of torch.distributed.checkpoint never holds. torch would "
            "import and run it; lightning_memload ran nothing. Do not load this checkpoint with torch unless you trust "
            "its origin.",
            path=path,
        ) from error
    except Exception as error:  # a damaged or hostile pickle can fail in any way; none of its code has run
        raise CheckpointFormatError(
            f"{path} cannot be read ({type(error).__name__}: {error}). It has {len(data)} bytes and is truncated or "
            "damaged. Copy it again, or resume from another checkpoint.",
            path=path,
        ) from error


class _Reader:
    """Converts the inert records of one file to :class:`Metadata`, and checks them."""

    def __init__(self, path: str, root: Any) -> None:
        self._path = path
        self._root = root
        self._problems: list[str] = []

    def read(self) -> tuple[Metadata, list[str]]:
        saved = self._mapping(self._field(self._root, "Metadata", "state_dict_metadata"), "state_dict_metadata")
        places = self._read_places()
        items: dict[str, SavedTensor | FileRange] = {}
        missing: list[str] = []
        for name, item in saved.items():
            with self._collecting_errors():
                found = self._read_item(name, item, places, missing)
                if found is not None:
                    items[name] = found
        if missing:
            self._problems.append(
                f"{self._path} has no entry for {len(missing)} of its parts: {listed(missing)}. The save was not "
                "finished, or the file is damaged. Resume from another checkpoint."
            )
        entries: dict[FileRange, str] = {}
        for (name, starts), entry in places.items():
            if entry is not None:
                entries.setdefault(entry, f"{name} at {starts}" if starts and any(starts) else name)
        return Metadata(items, self._read_paths(items), entries), self._problems

    @contextlib.contextmanager
    def _collecting_errors(self) -> Iterator[None]:
        """Records the error of one item and continues with the next."""
        try:
            yield
        except CheckpointFormatError as error:
            self._problems.append(str(error))

    def _read_item(
        self, name: Any, item: Any, places: Mapping[tuple[str, Any], FileRange | None], missing: list[str]
    ) -> SavedTensor | FileRange | None:
        if not isinstance(name, str):
            raise self._damaged(f"an item is called {reprlib.repr(name)}, which is no string")
        kind = type(item).__name__ if isinstance(item, InertObject) else None
        if kind == "TensorStorageMetadata":
            return self._read_tensor(name, item, places, missing)
        if kind != "BytesStorageMetadata":
            raise self._damaged(f"{name} is described by {reprlib.repr(item)}")
        if (name, None) not in places:
            missing.append(name)
        return places.get((name, None))

    def _read_places(self) -> dict[tuple[str, tuple[int, ...] | None], FileRange | None]:
        """The entry of each chunk. ``None`` for a chunk whose entry is invalid."""
        places: dict[tuple[str, tuple[int, ...] | None], FileRange | None] = {}
        stored = self._mapping(self._field(self._root, "Metadata", "storage_data"), "storage_data")
        for key, info in stored.items():
            with self._collecting_errors():
                name = self._field(key, "MetadataIndex", "fqn")
                starts = self._field(key, "MetadataIndex", "offset", None)
                if not isinstance(name, str):
                    raise self._damaged(f"an entry belongs to {reprlib.repr(name)}, which is no string")
                if starts is not None:
                    starts = self._integers(starts, f"the offset of an entry of {name}")
                places[name, starts] = None
                places[name, starts] = self._read_place(name, info)
        return places

    def _read_place(self, name: str, info: Any) -> FileRange:
        file = self._field(info, "_StorageInfo", "relative_path")
        offset, nbytes = self._field(info, "_StorageInfo", "offset"), self._field(info, "_StorageInfo", "length")
        transforms = self._field(info, "_StorageInfo", "transform_descriptors", None)
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", "..") or "\0" in file:
            raise self._damaged(f"it places {name} in {reprlib.repr(file)}, which is not a file of the directory")
        self._integers((offset, nbytes), f"offset and length of {name} in {file}")
        if transforms:
            raise CheckpointFormatError(
                f"{self._path}: {name} was written through {reprlib.repr(transforms)}, so {file} does not hold its "
                "plain bytes. Save without such extensions, or convert the checkpoint with "
                "torch.distributed.checkpoint.format_utils.dcp_to_torch_save.",
                path=self._path,
            )
        return FileRange(file, offset, nbytes)

    def _read_tensor(
        self, name: str, item: Any, places: Mapping[tuple[str, Any], FileRange | None], missing: list[str]
    ) -> SavedTensor | None:
        shape = self._integers(self._field(item, "TensorStorageMetadata", "size"), f"the shape of {name}")
        dtype = self._read_dtype(name, self._field(item, "TensorStorageMetadata", "properties"))
        if math.prod(size or 1 for size in shape) * dtype.itemsize >= _TOO_LARGE:
            raise self._damaged(f"{name} has the absurd shape {shape}")
        saved = self._field(item, "TensorStorageMetadata", "chunks")
        if not isinstance(saved, list):
            raise self._damaged(f"the chunks of {name} are {reprlib.repr(saved)}")
        chunks: dict[tuple[int, ...], SavedChunk] = {}
        absent = False
        for item_chunk in saved:
            starts = self._integers(self._field(item_chunk, "ChunkStorageMetadata", "offsets"), f"a chunk of {name}")
            sizes = self._integers(self._field(item_chunk, "ChunkStorageMetadata", "sizes"), f"a chunk of {name}")
            ends = [start + size for start, size in zip(starts, sizes, strict=False)]
            if not len(starts) == len(sizes) == len(shape) or any(map(operator.gt, ends, shape)):
                raise self._damaged(
                    f"a chunk of {name} at {starts} of sizes {sizes} does not lie within the tensor's shape {shape}"
                )
            entry = places.get((name, starts))
            if entry is None:
                if (name, starts) not in places:
                    missing.append(f"{name} at {starts}")
                absent = True
                continue
            if chunks.setdefault(starts, SavedChunk(starts, sizes, entry)).shape != sizes:
                raise self._damaged(f"two chunks of {name} begin at {starts}")
        if absent:
            return None
        full = [chunk for chunk in chunks.values() if math.prod(chunk.shape)]
        overlap = _find_overlap(full)
        if overlap is not None:
            first, second = overlap
            raise self._damaged(
                f"two chunks of {name} overlap, the one at {first.starts} of sizes {first.shape} and the one at "
                f"{second.starts} of sizes {second.shape}"
            )
        held, numel = sum(math.prod(chunk.shape) for chunk in full), math.prod(shape)
        if held != numel or not chunks:
            raise self._damaged(
                f"its chunks hold {held} of the {numel} elements of {name}, whose shape is {shape}: a rank's part is "
                "missing"
            )
        return SavedTensor(dtype, shape, tuple(full) or (next(iter(chunks.values())),))

    def _read_dtype(self, name: str, properties: Any) -> torch.dtype:
        state = properties.state if isinstance(properties, InertObject) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if isinstance(state, dict):
            dtype = state.get("dtype")
        if not isinstance(dtype, torch.dtype):
            raise self._damaged(f"the element type of {name} is {reprlib.repr(dtype)}")
        return dtype

    def _read_paths(self, items: Iterable[str]) -> dict[str, KeyPath]:
        planner_data = self._field(self._root, "Metadata", "planner_data", None)
        known = self._mapping(planner_data, "planner_data") if planner_data is not None else {}
        paths: dict[str, KeyPath] = {}
        for name in items:
            # Without planner data the state dict was flat when it was saved.
            with self._collecting_errors():
                path = known.get(name, (name,))
                sound = isinstance(path, tuple) and 0 < len(path) <= _MAX_DEPTH and type(path[0]) is str
                if not sound or not all(type(key) is str or (type(key) is int and key >= 0) for key in path):
                    raise self._damaged(f"the keys that lead to {name} are {reprlib.repr(path)}")
                paths[name] = path
        return paths

    def _field(self, record: Any, kind: str, field: str, *default: Any) -> Any:
        if type(record).__name__ != kind or not isinstance(record, InertObject) or not isinstance(record.state, dict):
            raise self._damaged(f"it holds {reprlib.repr(record)} where torch writes a {kind}")
        if field not in record.state and not default:
            raise self._damaged(f"a {kind} lacks its {field}")
        return record.state.get(field, *default)

    def _mapping(self, value: Any, what: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise self._damaged(f"its {what} is {reprlib.repr(value)}, not a dict")
        return value

    def _integers(self, values: Any, what: str) -> tuple[int, ...]:
        sound = isinstance(values, tuple) and len(values) <= _MAX_DIMENSIONS
        if not sound or not all(type(v) is int and 0 <= v < _TOO_LARGE for v in values):
            raise self._damaged(f"{what} is {reprlib.repr(values)}, where sizes are expected")
        return tuple(values)

    def _damaged(self, what: str) -> CheckpointFormatError:
        return CheckpointFormatError(
            f"{self._path} is damaged: {what}. Resume from another checkpoint.", path=self._path
        )


def _find_overlap(chunks: Sequence[SavedChunk]) -> tuple[SavedChunk, SavedChunk] | None:
    """Two chunks that share an element, or ``None``. No chunk may be empty.

    Sweeps along the dimension with the most distinct starts, so that few chunks are compared at a time: a sharded
    tensor has as many chunks as there are ranks.
    """
    if len(chunks) < 2:
        return None
    axis = max(range(len(chunks[0].starts)), key=lambda d: len({chunk.starts[d] for chunk in chunks}), default=None)
    if axis is None:
        return chunks[0], chunks[1]
    alive: list[SavedChunk] = []
    for chunk in sorted(chunks, key=lambda p: p.starts[axis]):
        alive = [other for other in alive if other.starts[axis] + other.shape[axis] > chunk.starts[axis]]
        for other in alive:
            if all(map(_intersect, chunk.starts, chunk.shape, other.starts, other.shape)):
                return other, chunk
        alive.append(chunk)
    return None


def _intersect(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size
