"""The format of ``torch.save``: an uncompressed zip with one pickle and one record per storage.

The index comes from the standard library alone: ``zipfile`` lists the records, their local headers tell where the
data starts, and the pickle is walked by an unpickler that builds inert placeholders instead of calling anything.
So indexing runs no code from the file, imports nothing that the file names, and reads no tensor data. It does not
judge whether the file is safe to *load*: that stays with ``torch.load`` and its ``weights_only``.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import sys
import zipfile
from typing import Any

import torch
from zlib_ng import zlib_ng

from lightning_memload.checkpoint.index import Checkpoint, KeyPath, StorageInfo, TensorInfo, format_path
from lightning_memload.checkpoint.source import LocalFile
from lightning_memload.errors import CheckpointFormatError

__all__ = ["UnmappableCheckpoint", "is_zip", "read_index"]

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class UnmappableCheckpoint(CheckpointFormatError):
    """A sound checkpoint whose tensors do not lie in the file as they are needed: compressed, or byte-swapped."""


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether the file starts like a zip archive. Legacy ``torch.save`` files (before torch 1.6) do not."""
    with open(path, "rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def read_index(file: LocalFile) -> Checkpoint:
    """Indexes a torch zip checkpoint.

    Reads the zip's directory, one local header per record and the pickle: a few hundred bytes per tensor, none of
    the tensors. Peak memory is that of the pickle and the index.

    Args:
        file: The open file.

    Returns:
        The index.

    Raises:
        CheckpointFormatError: The file is truncated, or its parts contradict one another.
        UnmappableCheckpoint: The records are compressed or of the other byte order.
    """
    records = _read_directory(file)
    order = records.get("byteorder")
    if order is not None and _read_small(file, order) != sys.byteorder.encode():
        raise UnmappableCheckpoint(
            f"{file.name} was saved on a machine of the other byte order; its tensors must be byte-swapped to be used.",
            path=file.name,
        )
    if "data.pkl" not in records:
        raise CheckpointFormatError(
            f"{file.name} is a zip archive but holds no data.pkl, so torch.save did not write it.", path=file.name
        )
    walker = _StructureUnpickler(file.name, _read_small(file, records["data.pkl"]), records)
    root = walker.load_structure()
    tensors = _collect_tensors(file.name, root)
    return Checkpoint(
        path=file.name, file_size=file.size_bytes, tensors=tuple(tensors), storages=tuple(walker.storages.values())
    )


class _Record:
    __slots__ = ("crc32", "nbytes", "offset")

    def __init__(self, offset: int, nbytes: int, crc32: int | None) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.crc32 = crc32


def _read_directory(file: LocalFile) -> dict[str, _Record]:
    """Records by their name below the archive's one top folder (``data.pkl``, ``data/0``)."""
    try:
        with open(file.name, "rb") as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise CheckpointFormatError(
            f"{file.name} starts like a torch checkpoint, but the directory at its end cannot be read ({error}): the "
            f"file is truncated or damaged. It has {file.size_bytes} bytes. Compare with the size of the original, "
            "copy it again, or resume from another checkpoint.",
            path=file.name,
        ) from error
    records = {}
    for entry in entries:
        name = entry.filename.partition("/")[2]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UnmappableCheckpoint(
                f"{file.name} holds its record {entry.filename!r} compressed, so its tensors are not in the file as "
                "they are.",
                path=file.name,
            )
        header = file.pread(_LOCAL_HEADER.size, entry.header_offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
            raise CheckpointFormatError(
                f"{file.name}: the directory places record {entry.filename!r} at byte {entry.header_offset}, but no "
                "record starts there. The file is damaged.",
                path=file.name,
            )
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if offset + entry.file_size > file.size_bytes:
            raise CheckpointFormatError(
                f"{file.name} is truncated: record {entry.filename!r} ends at byte {offset + entry.file_size}, but "
                f"the file is only {file.size_bytes} bytes.",
                path=file.name,
            )
        # torch.serialization.set_crc32_options(False) and skip_data() leave the field zero. A record whose true
        # CRC-32 is zero (one in four billion) then goes unverified, which is better than a false alarm.
        records[name] = _Record(offset, entry.file_size, entry.CRC or None)
    return records


def _read_small(file: LocalFile, record: _Record) -> bytes:
    data = file.pread(record.nbytes, record.offset)
    if record.crc32 is not None and zlib_ng.crc32(data) != record.crc32:
        raise CheckpointFormatError(
            f"{file.name} is damaged: the {record.nbytes} bytes at {record.offset}, which describe its contents, have "
            f"CRC-32 {zlib_ng.crc32(data):#010x}, but the file records {record.crc32:#010x}. Resume from another "
            "checkpoint.",
            path=file.name,
        )
    return data


class _Opaque:
    """Stands for any object of the pickle that is neither a container nor a tensor. Accepts all, does nothing."""

    _parts: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> _Opaque:
        self = super().__new__(cls)
        self._parts = [*args, *kwargs.values()]
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self._parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._parts.append((key, value))

    def append(self, value: Any) -> None:
        self._parts.append(value)

    def extend(self, values: Any) -> None:
        self._parts.extend(values)

    def add(self, value: Any) -> None:
        self._parts.append(value)

    def __call__(self, *args: Any, **kwargs: Any) -> _Opaque:
        return _Opaque(self, *args, *kwargs.values())

    def __hash__(self) -> int:
        return id(self)


class _Typed:
    """A storage with the element type that its reference in the pickle gives it."""

    __slots__ = ("dtype", "storage")

    def __init__(self, storage: StorageInfo, dtype: torch.dtype) -> None:
        self.storage = storage
        self.dtype = dtype


class _Tensor:
    __slots__ = ("info", "is_parameter")

    def __init__(self, info: TensorInfo, is_parameter: bool = False) -> None:
        self.info = info
        self.is_parameter = is_parameter


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    """Mirrors ``torch._utils._rebuild_tensor``, ``_v2`` and ``_v3`` (which gives the dtype as its sixth argument)."""
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None)
    if not isinstance(storage, _Typed):
        return _Opaque(storage, offset, shape, stride, *rest)
    info = TensorInfo((), dtype or storage.dtype, tuple(shape), tuple(stride), offset, storage.storage)
    return _Tensor(info)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return _Tensor(data.info, is_parameter=True) if isinstance(data, _Tensor) else _Opaque(data, *rest)


# The only globals that become more than a placeholder. All of them build plain containers or our own records.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}

# Storage classes as torch's pickles name them, see torch.storage.
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QUInt8Storage": torch.quint8,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
    "UntypedStorage": torch.uint8,
}


class _StructureUnpickler(pickle.Unpickler):
    """Rebuilds the containers of a checkpoint with placeholders for everything that is not one."""

    def __init__(self, path: str, data: bytes, records: dict[str, _Record]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path = path
        self._records = records
        self.storages: dict[str, StorageInfo] = {}

    def load_structure(self) -> Any:
        try:
            return self.load()
        except CheckpointFormatError:
            raise
        except Exception as error:  # a damaged or hostile pickle can fail in any way; none of its code has run
            raise CheckpointFormatError(
                f"{self._path}: its data.pkl cannot be read ({type(error).__name__}: {error}). The file is damaged, "
                "or not a checkpoint.",
                path=self._path,
            ) from error

    def find_class(self, module: str, name: str) -> Any:
        known = _GLOBALS.get((module, name))
        if known is not None:
            return known
        if module.partition(".")[0] == "torch":
            if name in _STORAGE_DTYPES:
                return _STORAGE_DTYPES[name]
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
        return type(name, (_Opaque,), {"__module__": module})

    def persistent_load(self, saved_id: Any) -> Any:
        if not (isinstance(saved_id, tuple) and len(saved_id) == 5 and saved_id[0] in ("storage", b"storage")):
            raise CheckpointFormatError(
                f"{self._path}: its pickle refers to {str(saved_id)[:80]!r} outside itself; only storages are known.",
                path=self._path,
            )
        _, dtype, key, location, numel = saved_id
        if not isinstance(dtype, torch.dtype):
            return _Opaque(*saved_id)
        storage = self.storages.get(key)
        if storage is None:
            storage = self.storages[key] = self._find_storage(key, str(location), int(numel) * dtype.itemsize)
        return _Typed(storage, dtype)

    def _find_storage(self, key: str, location: str, nbytes: int) -> StorageInfo:
        record = self._records.get(f"data/{key}")
        if record is None:
            raise CheckpointFormatError(
                f"{self._path} is damaged: its pickle needs storage {key!r} of {nbytes} bytes, which the file lacks.",
                path=self._path,
            )
        if not 0 <= nbytes <= record.nbytes:
            raise CheckpointFormatError(
                f"{self._path} is damaged: its pickle gives storage {key!r} {nbytes} bytes, the file {record.nbytes}.",
                path=self._path,
            )
        crc32 = record.crc32 if nbytes == record.nbytes else None
        return StorageInfo(key=key, offset=record.offset, nbytes=nbytes, crc32=crc32, location=location)


def _collect_tensors(file_name: str, root: Any) -> list[TensorInfo]:
    """Every tensor below ``root`` with its path, in the order of the containers. Visits a shared container once."""
    found: list[TensorInfo] = []
    visited: set[int] = set()
    # An explicit stack: a deeply nested file must not end in a RecursionError.
    stack: list[tuple[KeyPath, Any]] = [((), root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, _Tensor):
            info = value.info
            _check_bounds(file_name, path, info)
            found.append(
                TensorInfo(
                    path, info.dtype, info.shape, info.stride, info.storage_offset, info.storage, value.is_parameter
                )
            )
            continue
        if isinstance(value, dict):
            children = [
                ((*path, key if isinstance(key, (str, int)) else str(key)), item) for key, item in value.items()
            ]
        elif isinstance(value, (list, tuple, set)):
            children = [((*path, position), item) for position, item in enumerate(value)]
        elif isinstance(value, _Opaque):
            children = [((*path, position), item) for position, item in enumerate(value._parts)]
        else:
            continue
        if id(value) not in visited:
            visited.add(id(value))
            stack.extend(reversed(children))
    return found


def _check_bounds(file_name: str, path: KeyPath, info: TensorInfo) -> None:
    """Raises unless the tensor lies within its storage."""
    sizes = (*info.shape, *info.stride, info.storage_offset)
    sound = len(info.shape) == len(info.stride) and all(isinstance(size, int) and size >= 0 for size in sizes)
    if sound and info.numel:
        start, end = info.file_range
        sound = info.storage.offset <= start <= end <= info.storage.offset + info.storage.nbytes
    if not sound:
        raise CheckpointFormatError(
            f"{file_name} is damaged: {format_path(path)} has shape {info.shape}, stride {info.stride} and offset "
            f"{info.storage_offset} of {info.dtype}, which does not fit its storage of {info.storage.nbytes} bytes.",
            path=file_name,
        )
