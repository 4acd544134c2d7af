"""Walking the pickle of a torch checkpoint without running any of it.

Most pickles are plain, and :func:`index_plain` reads them in a third of the time. For all others, the unpickler builds
inert placeholders instead of calling anything, so it imports nothing that the file names. In both ways, time and memory
are bounded by the size of the pickle, except that a dict key is hashed, as ``torch.load`` hashes it.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import reprlib
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from lightning_memload.bytes import Record
from lightning_memload.checkpoint.index import PickledGlobal, SpecialTensor, StorageInfo, TensorInfo
from lightning_memload.errors import CheckpointFormatError, MemloadError
from lightning_memload.pickles.placeholders import KNOWN_GLOBALS, STORAGE_DTYPES, GlobalName, Opaque, TypedStorage
from lightning_memload.pickles.plain import NotPlain, index_plain
from lightning_memload.pickles.values import collect_tensors, keys_within_objects, locate_globals

__all__ = [
    "STUB_BYTES",
    "InertUnpickler",
    "PickleContents",
    "current_name",
    "find_globals",
    "find_storage",
    "read_structure",
    "storages_of_objects",
    "walk_pickle",
]

# What a file holds of a storage whose bytes lie elsewhere: one element or more of every type.
STUB_BYTES = 16


@dataclass(frozen=True, slots=True)
class PickleContents:
    """What the pickle of a checkpoint holds.

    Attributes:
        tensors: Every tensor that is a view of one storage, in the order in which the object holds them.
        storages: Every storage, in the order in which torch meets them.
        globals: Every class and function that the pickle names, without those that make tensors and storages.
        special: Every other tensor.
    """

    tensors: tuple[TensorInfo, ...]
    storages: tuple[StorageInfo, ...]
    globals: tuple[PickledGlobal, ...]
    special: tuple[SpecialTensor, ...]


def walk_pickle(
    path: str, data: bytes, records: Mapping[str, Record], elsewhere: Mapping[str, StorageInfo] = MappingProxyType({})
) -> PickleContents:
    """Finds every tensor, every storage and every name in the pickle of a checkpoint.

    Args:
        path: What to call the file in messages.
        data: The pickle.
        records: The entries of the file that it may refer to, ``data/<key>`` for each storage.
        elsewhere: Storages by key whose bytes lie in other files: the file itself has a stub of 16 bytes for each.

    Raises:
        CheckpointFormatError: The pickle is damaged or contradicts the records.
        UnmappableCheckpointError: Its objects are nested too deeply.
    """
    find = partial(find_storage, path, records, elsewhere=elsewhere)
    with contextlib.suppress(NotPlain):
        return PickleContents(*index_plain(data, find), (), ())
    walker = _StructureUnpickler(path, data, records, elsewhere)
    with _damage_reported(path):
        root = walker.load()
        tensors, special = collect_tensors(path, root)
        return PickleContents(tensors, tuple(walker.storages.values()), locate_globals(root, walker.named), special)


def read_structure(path: str, data: bytes, records: Mapping[str, Record]) -> Any:
    """The containers, numbers and strings of a pickle, with inert placeholders for everything else.

    Args:
        path: What to call the file in messages.
        data: The pickle.
        records: The entries of the file that it may refer to.

    Raises:
        CheckpointFormatError: The pickle is damaged or contradicts the records.
    """
    with _damage_reported(path):
        return _StructureUnpickler(path, data, records).load()


def find_globals(stream: io.BytesIO) -> tuple[PickledGlobal, ...]:
    """The classes and functions that the pickle at the position of a stream names. Its storages are ignored.

    Args:
        stream: The pickle. Afterwards its position is the end of the pickle.

    Raises:
        Exception: The pickle is damaged. None of its code has run.
    """
    walker = _GlobalsUnpickler(stream)
    return locate_globals(walker.load(), walker.named)


def storages_of_objects(path: str, data: bytes, records: Mapping[str, Record]) -> list[bool]:
    """Whether an object other than a dict, a list, a tuple or a plain tensor holds a storage.

    Such an object may read its tensors while it is built. All code that a pickle runs sees only what it holds.

    Args:
        path: What to call the file in messages.
        data: The pickle.
        records: The entries of the file that it may refer to.

    Returns:
        One value for each storage, in the order in which torch meets them.

    Raises:
        CheckpointFormatError: The pickle is damaged or contradicts the records.
    """
    walker = _StructureUnpickler(path, data, records)
    with _damage_reported(path):
        found = keys_within_objects(walker.load())
        return [key in found for key in walker.storages]


def find_storage(
    path: str,
    records: Mapping[str, Record],
    key: str,
    location: str,
    nbytes: int,
    elsewhere: Mapping[str, StorageInfo] = MappingProxyType({}),
) -> StorageInfo:
    """The storage that a pickle refers to.

    Args:
        path: What to call the file in messages.
        records: See :func:`walk_pickle`.
        key: The storage's name.
        location: The device that the pickle has it on.
        nbytes: Its length there.
        elsewhere: See :func:`walk_pickle`.

    Raises:
        CheckpointFormatError: The file lacks it, or has less of it.
    """
    record = records.get(f"data/{key}")
    if record is None:
        raise CheckpointFormatError(
            f"{path} is damaged: its pickle needs storage {key!r} of {nbytes} bytes, which the file lacks.",
            path=path,
        )
    if not 0 <= nbytes <= record.nbytes:
        raise CheckpointFormatError(
            f"{path} is damaged: its pickle gives storage {key!r} {nbytes} bytes, the file {record.nbytes}.",
            path=path,
        )
    if key in elsewhere:
        if nbytes != STUB_BYTES:
            raise CheckpointFormatError(
                f"{path} is damaged: storage {key!r} lies in a file of its own, yet the pickle gives it {nbytes} bytes "
                f"instead of the {STUB_BYTES} of a stub.",
                path=path,
            )
        if location != elsewhere[key].location:
            raise CheckpointFormatError(
                f"{path} is damaged: its pickle has storage {key!r} on {reprlib.repr(location)}, but the manifest on "
                f"{reprlib.repr(elsewhere[key].location)}.",
                path=path,
            )
        return elsewhere[key]
    crc32 = record.crc32 if nbytes == record.nbytes else None
    # Half the time of its own.
    return tuple.__new__(StorageInfo, (key, record.offset, nbytes, crc32, location))


@contextlib.contextmanager
def _damage_reported(path: str) -> Iterator[None]:
    try:
        yield
    except MemloadError:
        raise
    except Exception as error:  # a damaged or hostile pickle can fail in any way; none of its code has run
        raise CheckpointFormatError(
            f"{path}: its data.pkl cannot be read ({type(error).__name__}: {error}). The file is damaged, or not "
            "a checkpoint.",
            path=path,
        ) from error


def _load_bytearray8(unpickler: Any) -> None:
    """Reads before it allocates; pickle's own version allocates any length that the file announces."""
    (nbytes,) = struct.unpack("<Q", unpickler.read(8))
    unpickler.append(bytearray(unpickler.read(nbytes)))


class InertUnpickler(pickle._Unpickler):
    """An unpickler whose memory is bounded by the size of the pickle; what a pickle may name is its ``find_class``.

    The interpreted one, as under torch's ``weights_only``: the one in C sizes its memo by the largest number in the
    file, so that five bytes of a pickle can take all memory. It costs some 10 us a tensor.
    """

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray8}


def current_name(module: str, name: str) -> GlobalName:
    """Today's name of what a pickle names: Python 2 had other names for some, and torch writes its protocol."""
    if (module, name) in NAME_MAPPING:
        return NAME_MAPPING[module, name]
    return IMPORT_MAPPING.get(module, module), name


class _StructureUnpickler(InertUnpickler):
    """Rebuilds the containers of a checkpoint with placeholders for everything that is not one."""

    def __init__(
        self,
        path: str,
        data: bytes,
        records: Mapping[str, Record],
        elsewhere: Mapping[str, StorageInfo] = MappingProxyType({}),
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path = path
        self._records = records
        self._elsewhere = elsewhere
        self._classes: dict[tuple[str, str], type[Opaque]] = {}
        self._typed: dict[str, TypedStorage] = {}
        self.storages: dict[str, StorageInfo] = {}
        # Names in the order in which the pickle has them.
        self.named: dict[GlobalName, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        module, name = current_name(module, name)
        known = KNOWN_GLOBALS.get((module, name))
        if known is not None:
            if name == "defaultdict":
                self.named.setdefault((module, name))
            return known
        if module.partition(".")[0] == "torch":
            if name in STORAGE_DTYPES:
                return STORAGE_DTYPES[name]
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
        self.named.setdefault((module, name))
        if (module, name) not in self._classes:
            self._classes[module, name] = Opaque.named(module, name)
        return self._classes[module, name]

    def persistent_load(self, saved_id: Any) -> Any:
        if not (isinstance(saved_id, tuple) and len(saved_id) == 5 and saved_id[0] in ("storage", b"storage")):
            raise CheckpointFormatError(
                f"{self._path}: its pickle refers to {reprlib.repr(saved_id)} outside itself; only storages are known.",
                path=self._path,
            )
        _, dtype, key, location, numel = saved_id
        if not isinstance(dtype, torch.dtype):
            return Opaque(*saved_id)
        if not (isinstance(key, str) and isinstance(location, str) and isinstance(numel, int)):
            raise CheckpointFormatError(
                f"{self._path} is damaged: its pickle refers to a storage as {reprlib.repr(saved_id)}.", path=self._path
            )
        typed = self._typed.get(key)
        if typed is None:
            storage = self.storages[key] = find_storage(
                self._path, self._records, key, location, numel * dtype.itemsize, self._elsewhere
            )
            # Like torch: the first reference to a storage gives it its type.
            typed = self._typed[key] = TypedStorage(storage, dtype)
        return typed


class _GlobalsUnpickler(_StructureUnpickler):
    """Reads a pickle for its names. Its storages may be anywhere, as in files of torch < 1.6."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__("", b"", {})
        InertUnpickler.__init__(self, stream, encoding="utf-8")

    def persistent_load(self, saved_id: Any) -> Any:
        is_storage = isinstance(saved_id, tuple) and len(saved_id) >= 5 and saved_id[0] in ("storage", b"storage")
        if not is_storage or not isinstance(saved_id[1], torch.dtype):
            return Opaque(*saved_id) if isinstance(saved_id, tuple) else Opaque(saved_id)
        return TypedStorage(StorageInfo(reprlib.repr(saved_id[2]), 0, 0, None, ""), saved_id[1])
