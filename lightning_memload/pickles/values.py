"""Finds tensors, and the names of classes and functions, in an object that was read with placeholders."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from typing import Any

from lightning_memload.checkpoint.index import KeyPath, PickledGlobal, SpecialTensor, TensorInfo, format_path
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError
from lightning_memload.pickles.placeholders import (
    DefaultDict,
    GlobalName,
    Opaque,
    SpecialValue,
    TensorValue,
    TypedStorage,
)

__all__ = ["MAX_DEPTH", "collect_tensors", "keys_within_objects", "locate_globals", "path_key"]

# A pickle may hold a million objects of these types. None of them contains a tensor.
_LEAVES = frozenset((int, float, str, bool, bytes, type(None)))

# Python's recursion limit prevents the pickling of deeper objects. A path takes memory for every level.
MAX_DEPTH = 1000

_NUMPY_DTYPE = re.compile(r"[|<>=]?[a-zA-Z]\d{0,4}")


def collect_tensors(file_name: str, root: Any) -> tuple[tuple[TensorInfo, ...], tuple[SpecialTensor, ...]]:
    """Every tensor below ``root`` with its path, in the order of the containers. Visits a shared container once.

    Returns:
        The tensors that are views of one storage, including those inside special tensors; and the special tensors,
        including those of a subclass.

    Raises:
        CheckpointFormatError: A tensor does not lie within its storage.
        UnmappableCheckpointError: The containers are nested too deeply.
    """
    found: list[TensorInfo] = []
    special: list[SpecialTensor] = []
    visited: set[int] = set()
    # An explicit stack: a deeply nested file must not end in a RecursionError.
    stack: list[tuple[KeyPath, Any]] = [((), root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, TensorValue):
            info = value.info
            _check_bounds(file_name, path, info)
            found.append(
                TensorInfo(
                    path, info.dtype, info.shape, info.stride, info.storage_offset, info.storage, value.is_parameter
                )
            )
            if value.kind is not None:
                kind = ".".join(value.kind.global_name)
                special.append(SpecialTensor(path, kind, info.dtype, info.shape, info.nbytes))
            continue
        if not isinstance(value, (dict, list, tuple, set, Opaque)) or id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, SpecialValue):
            special.append(SpecialTensor(path, value.kind, value.dtype, value.shape, value.nbytes))
        if len(path) == MAX_DEPTH:
            raise UnmappableCheckpointError(
                f"{file_name} nests its objects more than {MAX_DEPTH} deep.", path=file_name
            )
        stack.extend(reversed(_children_of(path, value)))
    return tuple(found), tuple(special)


def _children_of(path: KeyPath, value: Any) -> list[tuple[KeyPath, Any]]:
    """Returns the items of a container with their paths, except numbers and texts."""
    if isinstance(value, dict):
        return [((*path, path_key(key)), item) for key, item in value.items() if type(item) not in _LEAVES]
    items = value.parts if isinstance(value, Opaque) else value
    return [((*path, position), item) for position, item in enumerate(items) if type(item) not in _LEAVES]


def locate_globals(root: Any, named: Iterable[GlobalName]) -> tuple[PickledGlobal, ...]:
    """Finds the places in an object of the classes and functions that its pickle names.

    Args:
        root: The object, with placeholders.
        named: The names.
    """
    places: dict[GlobalName, KeyPath | None] = dict.fromkeys(named)
    with_items: set[GlobalName] = set()
    if not places:
        return ()
    located: set[GlobalName] = set()

    def note(name: GlobalName | None, path: KeyPath) -> None:
        if name is not None and name not in located:
            located.add(name)
            places[name] = path

    visited: set[int] = set()
    stack: list[tuple[KeyPath, Any]] = [((), root)]
    while stack:
        path, value = stack.pop()
        if type(value) in _LEAVES or id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, type) and issubclass(value, Opaque):
            note(value.global_name, path)
        elif isinstance(value, TensorValue):
            stack += [(path, value.state), (path, value.kind)]
        elif isinstance(value, Opaque):
            name = type(value).global_name
            note(name, path)
            if value.holds_items and name is not None:
                with_items.add(name)
            note(_type_of_numpy_dtype(value), path)
            # Without the positions within it: only the program that wrote the object knows their meaning.
            stack += [(path, part) for part in reversed(value.parts)]
        elif isinstance(value, dict):
            if isinstance(value, DefaultDict):
                note(("collections", "defaultdict"), path)
                with_items.update([("collections", "defaultdict")] if value.holds_items else [])
            if type(value) is not dict:
                stack.append((path, getattr(value, "__dict__", None)))  # _metadata of a state dict
            stack += [(path, key) for key in value if type(key) not in _LEAVES]
            stack.extend(reversed(_children_of(path, value)))
        elif isinstance(value, (list, tuple, set)):
            stack.extend(reversed(_children_of(path, value)))
    return tuple(PickledGlobal(*name, path, name not in with_items) for name, path in places.items())


def keys_within_objects(root: Any) -> set[str]:
    """The keys of the storages that an object other than a dict, a list, a tuple or a plain tensor holds.

    Args:
        root: The object, with placeholders.
    """
    found: set[str] = set()
    visited: set[tuple[int, bool]] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        value, is_within = stack.pop()
        if type(value) in _LEAVES or (id(value), is_within) in visited:
            continue
        visited.add((id(value), is_within))
        if isinstance(value, TensorValue):
            is_within |= value.kind is not None
            found.update([value.info.storage.key] if is_within else [])
            stack.append((value.state, True))
        elif isinstance(value, TypedStorage):
            found.add(value.storage.key)
        elif isinstance(value, Opaque):
            stack += [(part, True) for part in value.parts]
        elif isinstance(value, dict):
            stack.append((getattr(value, "__dict__", None), is_within))
            stack += [(item, is_within) for pair in value.items() for item in pair]
        elif isinstance(value, (list, tuple, set)):
            stack += [(item, is_within) for item in value]
    return found


def _type_of_numpy_dtype(value: Opaque) -> GlobalName | None:
    """The class of a dtype of numpy: a file names ``numpy.dtype`` only, and torch wants both to be allowed."""
    code = value.parts[0] if value.parts else None
    if type(value).global_name != ("numpy", "dtype") or not isinstance(code, str) or not _NUMPY_DTYPE.fullmatch(code):
        return None
    try:
        import numpy

        kind = type(numpy.dtype(code))
    except (ImportError, TypeError, ValueError):
        return None
    return kind.__module__, kind.__qualname__


def path_key(key: Any) -> str | int:
    """What stands for a key of a dict in a path."""
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
