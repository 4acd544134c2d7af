"""The safetensors format: one file, or the shards of a Hugging Face directory.

A file is a length of eight bytes, a JSON header, and the tensors' bytes, all of them and nothing else. The header is
parsed here because the index needs positions, which the safetensors package does not tell. Whatever a header says is
held against the size of the file before anybody relies on it, by the rules of that package, and no tensor byte is read.

The format knows neither views nor ties nor nesting, and has no checksums: a flipped bit in the values goes unnoticed.
"""

from __future__ import annotations

import json
import os
import reprlib
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_memload.checkpoint.index import Checkpoint, StorageInfo, TensorInfo
from lightning_memload.checkpoint.inventory import Damage, Inventory, Section
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint
from lightning_memload.checkpoint.mapping import FileMapping
from lightning_memload.checkpoint.source import FileSet, LocalFile
from lightning_memload.errors import CheckpointFormatError, listed

__all__ = ["MAX_HEADER_BYTES", "Safetensors"]

# The format's own limit. It bounds what a lying length can make us read; an index of shards is held to it as well.
MAX_HEADER_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")
_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
# torch counts elements and bytes in signed 64-bit integers.
_LIMIT = 1 << 63
_MAX_DIGITS = 20

_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    # Since torch 2.7 and 2.8.
    "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _DTYPE_NAMES.items() if hasattr(torch, attribute)
}

_COPY_AGAIN = "The file is damaged, or safetensors did not write it: copy or download it again."

# Names and numbers of a hostile header may be millions of characters long, and its lists deeper than the stack.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxtuple = 8
_SHORT.maxdict = 4
_SHORT.maxlevel = 2


class Safetensors:
    """A ``.safetensors`` file, a directory of such files, or the ``.safetensors.index.json`` that lists them."""

    name = "safetensors"

    def recognizes(self, path: str) -> bool:
        """Whether the file starts with a header or is an index of shards, or the directory has such files."""
        if os.path.isdir(path):
            return any(name.endswith((_SUFFIX, _INDEX_SUFFIX)) for name in _visible_names(path))
        if not os.path.isfile(path):
            return False
        return _is_shard_index(path) or _starts_like_header(_first_bytes(path))

    def read_index(self, path: str) -> Checkpoint:
        """Indexes the file or all shards.

        Reads the headers only: some hundred bytes per tensor. Peak memory is the index and one parsed header, which
        for a hostile one is up to some thirty times its length (measured: 26).

        Raises:
            CheckpointFormatError: It is truncated or damaged, shards are missing, or a tensor has a dtype that torch
                lacks.
            UnmappableCheckpoint: This machine has the other byte order.
        """
        files, weight_map = _find_files(path)
        source = FileSet(files)
        try:
            return _read_index(path, source, weight_map)
        finally:
            source.close()

    def load(self, path: str, *, weights_only: bool | None) -> tuple[dict[str, torch.Tensor], MappedCheckpoint]:
        """Loads a flat dict of tensors that lie in the files; ``weights_only`` has nothing to forbid here.

        A tensor may begin at any byte, as the header's length has it; torch computes on such tensors all the same.

        Raises:
            CheckpointFormatError: As :meth:`read_index`.
            UnmappableCheckpoint: This machine has the other byte order.
        """
        files, weight_map = _find_files(path)
        source = FileSet(files)
        try:
            index = _read_index(path, source, weight_map)
            mapping = FileMapping(source)
        except BaseException:
            source.close()
            raise
        state = {info.storage.key: _mapped_tensor(info, mapping) for info in index}
        return state, MappedCheckpoint(index, source, mapping)

    def take_inventory(self, path: str) -> Inventory:
        """The tensors and the headers, none of which has a checksum, see :class:`CheckpointFormat`."""
        sections: list[Section] = []
        damage: list[Damage] = []
        try:
            files, weight_map = _find_files(path)
        except CheckpointFormatError as error:
            return Inventory(path, self.name, (), (), (Damage(path, str(error)),))
        source = FileSet(files)
        try:
            for file, span in zip(source.files, source.spans, strict=True):
                try:
                    tensors, _ = _read_header(file, span.start)
                except CheckpointFormatError as error:
                    damage.append(Damage(file.name, str(error)))
                    continue
                sections += [Section(t.name, t.storage.offset, t.storage.nbytes, None) for t in tensors]
                header_bytes = span.nbytes - sum(tensor.storage.nbytes for tensor in tensors)
                sections.append(Section("the header", span.start, header_bytes, None))
            if not damage:
                try:
                    _read_index(path, source, weight_map)
                except UnmappableCheckpoint:
                    pass  # Nobody asks here whether the tensors can be used as they lie.
                except CheckpointFormatError as error:
                    damage.append(Damage(path, str(error)))
        finally:
            source.close()
        return Inventory(path, self.name, source.spans, tuple(sections), tuple(damage))


def _mapped_tensor(info: TensorInfo, mapping: FileMapping) -> torch.Tensor:
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype, device="cpu")
    storage = mapping.storage(info.storage.offset, info.storage.nbytes)
    return torch.empty(0, dtype=info.dtype, device="cpu").set_(storage, 0, info.shape, info.stride)


# Which files ---------------------------------------------------------------------------------------------------------


def _visible_names(folder: str) -> list[str]:
    # Hidden ones are leftovers of downloads and of other systems ("._model.safetensors"), never shards.
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_LENGTH.size + 1)


def _starts_like_header(start: bytes) -> bool:
    return start[_LENGTH.size :] == b"{"


def _is_shard_index(path: str) -> bool:
    """Whether a file is JSON text with a ``weight_map``; damaged JSON counts as well."""
    start = _first_bytes(path)
    # No text has a zero byte, and every length within the limit has one.
    if not start.lstrip().startswith(b"{") or b"\0" in start:
        return False
    with open(path, "rb") as file:
        return b'"weight_map"' in file.read(MAX_HEADER_BYTES)


def _find_files(path: str) -> tuple[list[str], dict[str, str] | None]:
    """The files of a checkpoint in the order of their names, and which file has which tensor if an index says so.

    Raises:
        CheckpointFormatError: There are several indexes, the one there is damaged, or it names files that are missing.
    """
    if os.path.isdir(path):
        folder, names = path, _visible_names(path)
        indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
        if len(indexes) > 1:
            raise CheckpointFormatError(
                f"{path} holds {len(indexes)} indexes ({_listed(indexes)}), so which one is meant cannot be told. Give "
                "the path of one of them.",
                path=path,
            )
        index_path = os.path.join(folder, indexes[0]) if indexes else None
        shards = [name for name in names if name.endswith(_SUFFIX)]
    elif _is_shard_index(path):
        # Not the directory behind a symbolic link: in a Hugging Face cache the shards lie beside the link.
        folder, index_path, shards = os.path.dirname(path), path, []
    else:
        return [path], None
    weight_map = None
    if index_path is not None:
        weight_map = _read_weight_map(index_path)
        shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise CheckpointFormatError(
            f"{path} is not complete: of its {len(shards)} files {len(missing)} are missing or no regular files: "
            f"{_listed(missing)}. Copy or download them again.",
            path=path,
        )
    return [os.path.join(folder, name) for name in shards], weight_map


def _read_weight_map(path: str) -> dict[str, str]:
    """Which file has which tensor, as the index of a sharded checkpoint says.

    Raises:
        CheckpointFormatError: It is no such index, or names a file outside its directory.
    """
    with LocalFile(path) as file:
        if file.size_bytes > MAX_HEADER_BYTES:
            raise CheckpointFormatError(
                f"{path} has {file.size_bytes} bytes, but an index of shards has at most {MAX_HEADER_BYTES}. "
                f"{_COPY_AGAIN}",
                path=path,
            )
        index = _parse_json(file.pread(file.size_bytes, 0), path, "the index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointFormatError(
            f"{path}: weight_map must map the names of tensors to the names of files, but is "
            f"{_SHORT.repr(weight_map)}. {_COPY_AGAIN}",
            path=path,
        )
    refused = [f"{_SHORT.repr(name)} for {_SHORT.repr(key)}" for key, name in weight_map.items() if not _is_name(name)]
    if refused:
        raise CheckpointFormatError(
            f"{path} names {len(refused)} shards that are no names of files in its own directory: "
            f"{_listed(refused, str)}. Put the shards beside the index.",
            path=path,
        )
    return weight_map


def _is_name(name: object) -> bool:
    """Whether a shard's name stays in the directory. A symbolic link there may lead out, as in a cache."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")


# What is in them -----------------------------------------------------------------------------------------------------


def _read_index(path: str, source: FileSet, weight_map: Mapping[str, str] | None) -> Checkpoint:
    if sys.byteorder != "little":
        raise UnmappableCheckpoint(
            f"{path} is of the other byte order than this machine; its tensors must be byte-swapped to be used.",
            path=path,
        )
    tensors: list[TensorInfo] = []
    metadata: dict[str, str] = {}
    holders: dict[str, str] = {}
    misplaced: list[str] = []
    for file, span in zip(source.files, source.spans, strict=True):
        found, words = _read_header(file, span.start)
        metadata = words | metadata
        shard = os.path.basename(file.name)
        for info in found:
            key = info.storage.key
            if weight_map is None and key in holders:
                misplaced.append(f"{_SHORT.repr(key)} in {holders[key]} and {shard}")
            elif weight_map is not None and weight_map.get(key) != shard:
                misplaced.append(f"{_SHORT.repr(key)} in {shard}")
            else:
                holders[key] = shard
        tensors += found
    if misplaced and weight_map is None:
        raise CheckpointFormatError(
            f"{path} has no index and holds {len(misplaced)} tensors twice: {_listed(misplaced, str)}. Give the path "
            "of one of the files.",
            path=path,
        )
    absent = [f"{_SHORT.repr(key)} in {shard}" for key, shard in (weight_map or {}).items() if key not in holders]
    if misplaced or absent:
        raise CheckpointFormatError(
            f"{path}: the index and the shards are not of one checkpoint. {len(absent)} tensors are not where the "
            f"index has them: {_listed(absent, str)}. {len(misplaced)} tensors are where the index does not have "
            f"them: {_listed(misplaced, str)}. Copy or download index and shards again.",
            path=path,
        )
    return Checkpoint(
        path=path,
        format=Safetensors.name,
        files=source.spans,
        tensors=tuple(tensors),
        storages=tuple(info.storage for info in tensors),
        metadata=metadata,
    )


def _read_header(file: LocalFile, start: int) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of one file, in the order of its header, and its ``__metadata__``.

    Args:
        file: The file.
        start: Offset of its first byte in the run of all files.

    Raises:
        CheckpointFormatError: The header contradicts itself or the size of the file.
    """
    path, size = file.name, file.size_bytes
    prefix = file.pread(_LENGTH.size + 1, 0)
    if not _starts_like_header(prefix):
        raise CheckpointFormatError(
            f"{path} ({size} bytes) does not start as a safetensors file does, with eight bytes of length and a '{{', "
            f"but with {prefix!r}. It is truncated or no such file: copy or download it again.",
            path=path,
        )
    (length,) = _LENGTH.unpack_from(prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointFormatError(
            f"{path}: the first eight bytes announce a header of {length} bytes, but the format allows "
            f"{MAX_HEADER_BYTES}. {_COPY_AGAIN}",
            path=path,
        )
    data_start = _LENGTH.size + length
    if data_start > size:
        raise CheckpointFormatError(
            f"{path} is truncated: its header ends at byte {data_start}, but the file is only {size} bytes. Copy or "
            "download it again.",
            path=path,
        )
    header = _parse_json(file.pread(length, _LENGTH.size), path, "the header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(word, str) for word in metadata.values()):
        raise CheckpointFormatError(
            f"{path}: __metadata__ must map texts to texts, but is {_SHORT.repr(metadata)}. {_COPY_AGAIN}", path=path
        )
    tensors = []
    for key, entry in header.items():
        dtype, shape, begin, end = _parse_entry(path, key, entry)
        if data_start + end > size:
            raise CheckpointFormatError(
                f"{path} is truncated: its header declares data of {_SHORT.repr(key)} through byte {data_start + end}, "
                f"but the file is only {size} bytes. Copy or download it again.",
                path=path,
            )
        storage = StorageInfo(key, start + data_start + begin, end - begin, None, "cpu")
        tensors.append(TensorInfo((key,), dtype, shape, _contiguous_stride(shape), 0, storage))
    _require_full_cover(path, size, data_start, start, tensors)
    return tensors, metadata


def _parse_entry(path: str, key: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Data type, shape, and first and last byte of a tensor, relative to the end of the header.

    Raises:
        CheckpointFormatError: The entry is malformed, torch lacks the dtype, or the range has not the tensor's size.
    """
    match entry:
        case {"dtype": str(dtype_name), "shape": [*sizes], "data_offsets": [begin, end]}:
            pass
        case _:
            what = f"must have a dtype, a shape and two data_offsets, but is {_SHORT.repr(entry)}. {_COPY_AGAIN}"
            raise _entry_error(path, key, what)
    # bool is a kind of int, and true is no size.
    if not all(type(number) is int and 0 <= number < _LIMIT for number in (*sizes, begin, end)):
        what = (
            f"has shape {_SHORT.repr(sizes)} and data_offsets {_SHORT.repr([begin, end])}, but these must be integers"
        )
        raise _entry_error(path, key, f"{what} from 0 to 2**63 - 1. {_COPY_AGAIN}")
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        what = (
            f"has dtype {_SHORT.repr(dtype_name)}, for which torch {torch.__version__} has none. Convert the tensor, or"
        )
        raise _entry_error(path, key, f"{what} use another torch; this one can hold {', '.join(_DTYPES)}.")
    shape = tuple(sizes)
    if dtype_name == "F4":
        # Two elements in a byte; torch counts bytes, as safetensors does when it loads.
        if not shape or shape[-1] % 2:
            what = f"has dtype 'F4' and shape {_SHORT.repr(shape)}, but torch keeps two such elements in a byte, so the"
            raise _entry_error(path, key, f"{what} last size must be even. Convert the tensor.")
        shape = (*shape[:-1], shape[-1] // 2)
    # Zeros aside: torch multiplies the other sizes for the strides of an empty tensor too.
    nbytes = dtype.itemsize
    for number in shape:
        nbytes *= number or 1
        if nbytes >= _LIMIT:
            what = f"has shape {_SHORT.repr(shape)}, but no tensor has 2**63 bytes or more. {_COPY_AGAIN}"
            raise _entry_error(path, key, what)
    nbytes = 0 if 0 in shape else nbytes
    if end - begin != nbytes:
        what = f"takes {nbytes} bytes with shape {_SHORT.repr(tuple(sizes))} of {dtype_name}, but its data_offsets"
        raise _entry_error(path, key, f"{what} [{begin}, {end}] are {end - begin} bytes apart. {_COPY_AGAIN}")
    return dtype, shape, begin, end


def _entry_error(path: str, key: str, what: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path}: tensor {_SHORT.repr(key)} {what}", path=path)


def _require_full_cover(path: str, size: int, data_start: int, start: int, tensors: Iterable[TensorInfo]) -> None:
    """Makes sure that every byte after the header belongs to exactly one tensor.

    Raises:
        CheckpointFormatError: Tensors overlap, or bytes are left over: some tensor is missing from the header.
    """
    position, before = data_start, None
    # Empty tensors first: they may stand wherever another one begins.
    for info in sorted(tensors, key=lambda info: (info.storage.offset, info.storage.nbytes)):
        begin = info.storage.offset - start
        if begin != position:
            what = (
                f"overlap by {position - begin} bytes"
                if begin < position
                else f"leave {begin - position} bytes between them that belong to no tensor"
            )
            what = f"begins at byte {begin}, but {_named(before)} ends at byte {position}: they {what}. {_COPY_AGAIN}"
            raise _entry_error(path, info.storage.key, what)
        position, before = begin + info.storage.nbytes, info
    if position != size:
        raise CheckpointFormatError(
            f"{path}: {_named(before)} ends at byte {position}, but the file has {size} bytes: the last "
            f"{size - position} belong to no tensor. {_COPY_AGAIN}",
            path=path,
        )


def _named(info: TensorInfo | None) -> str:
    return "the header" if info is None else f"tensor {_SHORT.repr(info.storage.key)}"


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    return tuple(reversed(strides))


# JSON ----------------------------------------------------------------------------------------------------------------


def _parse_json(data: bytes, path: str, what: str) -> Any:
    """Parses JSON more strictly than the standard library does by itself.

    Raises:
        CheckpointFormatError: It is no JSON, too deep, has a key twice, or numbers or texts that nobody can use.
    """
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_unique_keys, parse_int=_short_integer, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(
            f"{path}: {what}, {len(data)} bytes of JSON, cannot be read ({error}). {_COPY_AGAIN}", path=path
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys: set[str] = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {_SHORT.repr(twice)} twice, so which one is meant cannot be told")
    # Half of a surrogate pair is no text: it could neither be printed nor compared with a parameter's name.
    "".join(found).encode()
    return found


def _short_integer(digits: str) -> int:
    # Python's own limit may be switched off, and then the time is quadratic.
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"it has {name} for a number")


def _listed(items: list[str], show: Any = _SHORT.repr) -> str:
    """The first ten, for a message that has already said how many there are."""
    return listed(map(show, items)) or "none"
