"""Walking the pickle of a torch checkpoint without running any of it.

The unpickler builds inert placeholders instead of calling anything, so it imports nothing that the file names; time and
memory are bounded by the size of the pickle, except that a dict key is hashed, as ``torch.load`` hashes it.
"""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import reprlib
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from lightning_memload.checkpoint.index import KeyPath, StorageInfo, TensorInfo, format_path
from lightning_memload.checkpoint.mapped import UnmappableCheckpoint
from lightning_memload.errors import CheckpointFormatError

__all__ = ["STUB_BYTES", "InertUnpickler", "Record", "read_structure", "walk_pickle"]

# What a file holds of a storage whose bytes lie elsewhere: one element or more of every type.
STUB_BYTES = 16

# What a million of may be in a pickle, and no tensor in any.
_LEAVES = frozenset((int, float, str, bool, bytes, type(None)))

# Pickling anything deeper runs into Python's recursion limit. A path costs memory for every level.
_MAX_DEPTH = 1000


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the zip.

    Attributes:
        offset: Position of its first byte.
        nbytes: Its length.
        crc32: CRC-32 of its bytes, ``None`` where the file records none.
    """

    offset: int
    nbytes: int
    crc32: int | None


def walk_pickle(
    path: str, data: bytes, records: Mapping[str, Record], elsewhere: Mapping[str, StorageInfo] = MappingProxyType({})
) -> tuple[tuple[TensorInfo, ...], tuple[StorageInfo, ...]]:
    """Finds every tensor and every storage in the pickle of a checkpoint.

    Args:
        path: What to call the file in messages.
        data: The pickle.
        records: The entries of the file that it may refer to, ``data/<key>`` for each storage.
        elsewhere: Storages by key whose bytes lie in other files: the file itself has a stub of 16 bytes for each.

    Returns:
        The tensors in the order in which the object holds them, the storages in the order in which torch meets them.

    Raises:
        CheckpointFormatError: The pickle is damaged or contradicts the records.
        UnmappableCheckpoint: Its objects are nested too deeply.
    """
    walker = _StructureUnpickler(path, data, records, elsewhere)
    with _damage_reported(path):
        return tuple(_collect_tensors(path, walker.load())), tuple(walker.storages.values())


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


@contextlib.contextmanager
def _damage_reported(path: str) -> Iterator[None]:
    try:
        yield
    except CheckpointFormatError:
        raise
    except Exception as error:  # a damaged or hostile pickle can fail in any way; none of its code has run
        raise CheckpointFormatError(
            f"{path}: its data.pkl cannot be read ({type(error).__name__}: {error}). The file is damaged, or not "
            "a checkpoint.",
            path=path,
        ) from error


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


class _Sealed:
    """What a pickle may hold but not change: pickle's BUILD would else set attributes of anything it can name."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it sets the state of a {type(self).__name__.lstrip('_').lower()}")


class _Typed(_Sealed):
    """A storage with the element type that its reference in the pickle gives it."""

    __slots__ = ("dtype", "storage")

    def __init__(self, storage: StorageInfo, dtype: torch.dtype) -> None:
        self.storage = storage
        self.dtype = dtype


class _Tensor(_Sealed):
    __slots__ = ("info", "is_parameter")

    def __init__(self, info: TensorInfo, is_parameter: bool = False) -> None:
        self.info = info
        self.is_parameter = is_parameter


class _Function(_Sealed):
    """A function of ours under the name of one that the pickle calls."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    """Mirrors ``torch._utils._rebuild_tensor``, ``_v2`` and ``_v3`` (which gives the dtype as its sixth argument)."""
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None)
    if not isinstance(storage, _Typed):
        return _Opaque(storage, offset, shape, stride, *rest)
    info = TensorInfo((), dtype or storage.dtype, tuple(shape), tuple(stride), offset, storage.storage)
    return _Tensor(info)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return _Tensor(data.info, is_parameter=True) if isinstance(data, _Tensor) else _Opaque(data, *rest)


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Mirrors ``torch._tensor._rebuild_from_type_v2``: a tensor that carries attributes, or of a subclass."""
    return function(*args) if isinstance(function, _Function) else _Opaque(function, kind, args, state)


# The only globals that become more than a placeholder. All of them build plain containers or our own records.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _Function(lambda *_: {}),
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function(_rebuild_from_type),
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


def _load_bytearray8(unpickler: Any) -> None:
    """Reads before it allocates; pickle's own version allocates whatever length the file announces."""
    (nbytes,) = struct.unpack("<Q", unpickler.read(8))
    unpickler.append(bytearray(unpickler.read(nbytes)))


class InertUnpickler(pickle._Unpickler):
    """An unpickler whose memory is bounded by the size of the pickle; what a pickle may name is its ``find_class``.

    The interpreted one, as under torch's ``weights_only``: the one in C sizes its memo by the largest number in the
    file, so that five bytes of a pickle can take all memory. It costs some 10 us a tensor.
    """

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray8}


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
        self._classes: dict[tuple[str, str], type[_Opaque]] = {}
        self._typed: dict[str, _Typed] = {}
        self.storages: dict[str, StorageInfo] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = _GLOBALS.get((module, name))
        if known is not None:
            return known
        if module.partition(".")[0] == "torch":
            if name in _STORAGE_DTYPES:
                return _STORAGE_DTYPES[name]
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
        if (module, name) not in self._classes:
            self._classes[module, name] = type(name, (_Opaque,), {"__module__": module})
        return self._classes[module, name]

    def persistent_load(self, saved_id: Any) -> Any:
        if not (isinstance(saved_id, tuple) and len(saved_id) == 5 and saved_id[0] in ("storage", b"storage")):
            raise CheckpointFormatError(
                f"{self._path}: its pickle refers to {reprlib.repr(saved_id)} outside itself; only storages are known.",
                path=self._path,
            )
        _, dtype, key, location, numel = saved_id
        if not isinstance(dtype, torch.dtype):
            return _Opaque(*saved_id)
        if not (isinstance(key, str) and isinstance(location, str) and isinstance(numel, int)):
            raise CheckpointFormatError(
                f"{self._path} is damaged: its pickle refers to a storage as {reprlib.repr(saved_id)}.", path=self._path
            )
        typed = self._typed.get(key)
        if typed is None:
            storage = self.storages[key] = self._find_storage(key, location, numel * dtype.itemsize)
            # Like torch: the first reference to a storage gives it its type.
            typed = self._typed[key] = _Typed(storage, dtype)
        return typed

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
        if key in self._elsewhere:
            if nbytes != STUB_BYTES:
                raise CheckpointFormatError(
                    f"{self._path} is damaged: storage {key!r} lies in a file of its own, yet the pickle gives it "
                    f"{nbytes} bytes instead of the {STUB_BYTES} of a stub.",
                    path=self._path,
                )
            if location != self._elsewhere[key].location:
                raise CheckpointFormatError(
                    f"{self._path} is damaged: its pickle has storage {key!r} on {reprlib.repr(location)}, but the "
                    f"manifest on {reprlib.repr(self._elsewhere[key].location)}.",
                    path=self._path,
                )
            return self._elsewhere[key]
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
        if not isinstance(value, (dict, list, tuple, set, _Opaque)) or id(value) in visited:
            continue
        visited.add(id(value))
        if len(path) == _MAX_DEPTH:
            raise UnmappableCheckpoint(f"{file_name} nests its objects more than {_MAX_DEPTH} deep.", path=file_name)
        if isinstance(value, dict):
            children = [((*path, _path_key(key)), item) for key, item in value.items() if type(item) not in _LEAVES]
        else:
            items = value._parts if isinstance(value, _Opaque) else value
            children = [((*path, position), item) for position, item in enumerate(items) if type(item) not in _LEAVES]
        stack.extend(reversed(children))
    return found


def _path_key(key: Any) -> str | int:
    # Never str(): a few bytes of pickle make a key with more text than fits in memory, or a number without end.
    if isinstance(key, int) and key.bit_length() > 64:
        return f"<int of {key.bit_length()} bits>"
    return key if isinstance(key, (str, int)) else reprlib.repr(key)


def _check_bounds(file_name: str, path: KeyPath, info: TensorInfo) -> None:
    """Raises unless the tensor lies within its storage."""
    sizes = (*info.shape, *info.stride, info.storage_offset)
    sound = len(info.shape) == len(info.stride) and all(isinstance(size, int) and size >= 0 for size in sizes)
    if sound and info.numel:
        start, end = info.file_range
        sound = info.storage.offset <= start <= end <= info.storage.offset + info.storage.nbytes
    if not sound:
        shape, stride, offset = map(reprlib.repr, (info.shape, info.stride, info.storage_offset))
        raise CheckpointFormatError(
            f"{file_name} is damaged: {format_path(path)} has shape {shape}, stride {stride} and offset {offset} of "
            f"{info.dtype}, which does not fit its storage of {info.storage.nbytes} bytes.",
            path=file_name,
        )
