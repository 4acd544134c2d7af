"""The header of one safetensors file, which lists the tensors and their positions.

A file consists of a length of eight bytes, a JSON header, and the bytes of the tensors, with nothing before, between or
after them. This module parses the header itself because the index needs positions, which the safetensors package does
not provide. Every value is checked against the size of the file before use, by the rules of that package. No tensor
data is read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightning_memload.checkpoint.index import SpecialTensor, StorageInfo, TensorInfo
from lightning_memload.errors import CheckpointFormatError
from lightning_memload.formats.json_text import COPY_AGAIN, MAX_HEADER_BYTES, parse_json, short
from lightning_memload.storage import StoredFile

__all__ = ["PREFIX_BYTES", "SAFETENSORS_DTYPES", "Header", "read_header", "starts_like_header"]

_LENGTH = struct.Struct("<Q")
# The length and the opening brace after it.
PREFIX_BYTES = _LENGTH.size + 1
_DTYPE_NAME = re.compile(r"[A-Z][A-Za-z0-9_]{0,19}")
# torch counts elements and bytes in signed 64-bit integers.
_LIMIT = 1 << 63

_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    # These exist since torch 2.7 and 2.8.
    "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _DTYPE_NAMES.items() if hasattr(torch, attribute)
}
# The inverse mapping, without the type that packs two elements into one element of torch.
SAFETENSORS_DTYPES = {dtype: name for name, dtype in _DTYPES.items() if name != "F4"}


@dataclass(frozen=True, slots=True)
class Header:
    """The contents of a header, checked against the size of the file.

    Attributes:
        tensors: The tensors that can be loaded, in the order of the header.
        special: The tensors of a dtype that torch does not have. They cannot be loaded.
        ranges: The byte range of every tensor, by key: the first byte and one past the last, relative to the file.
        metadata: The contents of ``__metadata__``.
        nbytes: Length of the header in bytes, including the eight bytes of the length.
    """

    tensors: tuple[TensorInfo, ...]
    special: tuple[SpecialTensor, ...]
    ranges: Mapping[str, tuple[int, int]]
    metadata: dict[str, str]
    nbytes: int


def starts_like_header(start: bytes) -> bool:
    """Whether the first ``PREFIX_BYTES`` bytes of a file are a length and the start of a header."""
    return start[_LENGTH.size :] == b"{"


def read_header(file: StoredFile, start: int) -> Header:
    """Reads the header of one file.

    Args:
        file: The file.
        start: Offset of the file in the run of all files.

    Raises:
        CheckpointFormatError: The header contradicts itself or the size of the file.
    """
    path, size = file.name, file.size_bytes
    prefix = file.pread(PREFIX_BYTES, 0)
    if not starts_like_header(prefix):
        raise CheckpointFormatError(
            f"{path} ({size} bytes) does not start like a safetensors file, with eight bytes of length and a '{{', "
            f"but with {prefix!r}. It is truncated or not a safetensors file. Copy or download it again.",
            path=path,
        )
    (length,) = _LENGTH.unpack_from(prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointFormatError(
            f"{path}: the first eight bytes declare a header of {length} bytes, but the format allows "
            f"{MAX_HEADER_BYTES}. {COPY_AGAIN}",
            path=path,
        )
    data_start = _LENGTH.size + length
    if data_start > size:
        raise CheckpointFormatError(
            f"{path} is truncated: its header ends at byte {data_start}, but the file is only {size} bytes. Copy or "
            "download it again.",
            path=path,
        )
    header = parse_json(file.pread(length, _LENGTH.size), path, "the header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(word, str) for word in metadata.values()):
        raise CheckpointFormatError(
            f"{path}: __metadata__ must map strings to strings, but is {short(metadata)}. {COPY_AGAIN}", path=path
        )
    tensors: list[TensorInfo] = []
    special: list[SpecialTensor] = []
    ranges: dict[str, tuple[int, int]] = {}
    kinds: dict[tuple[object, ...], _EntryType] = {}
    for key, entry in header.items():
        kind, begin, end = _parse_entry(path, key, entry, kinds)
        if data_start + end > size:
            raise CheckpointFormatError(
                f"{path} is truncated: its header declares data of {short(key)} through byte {data_start + end}, "
                f"but the file is only {size} bytes. Copy or download it again.",
                path=path,
            )
        ranges[key] = data_start + begin, data_start + end
        if kind.dtype is None:
            special.append(SpecialTensor((key,), kind.unknown, None, kind.shape, end - begin))
            continue
        storage = StorageInfo(key, start + data_start + begin, end - begin, None, "cpu")
        tensors.append(TensorInfo((key,), kind.dtype, kind.shape, kind.stride, 0, storage))
    _require_full_cover(path, size, data_start, ranges)
    return Header(tuple(tensors), tuple(special), ranges, metadata, data_start)


class _EntryType(NamedTuple):
    """The meaning of the dtype and the shape of an entry. Thousands of tensors have the same.

    Attributes:
        dtype: The dtype. ``None`` if torch does not have it.
        shape: Sizes, as torch counts them.
        stride: Strides in elements.
        nbytes: Size in bytes. ``None`` if it is not known.
        unknown: Why torch cannot hold the tensor, if so.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    nbytes: int | None = None
    unknown: str = ""


def _parse_entry(
    path: str, key: str, entry: object, kinds: dict[tuple[object, ...], _EntryType]
) -> tuple[_EntryType, int, int]:
    """Returns the dtype and shape, the first byte and one past the last, relative to the end of the header.

    Args:
        path: The file.
        key: The name of the tensor.
        entry: The entry of the header.
        kinds: The dtypes and shapes that were checked before. A new one is added.

    Raises:
        CheckpointFormatError: The entry is malformed, or the length of the range is not the size of the tensor.
    """
    match entry:
        case {"dtype": str(dtype_name), "shape": [*sizes], "data_offsets": [begin, end]}:
            pass
        case _:
            what = f"must have a dtype, a shape and two data_offsets, but is {short(entry)}. {COPY_AGAIN}"
            raise _entry_error(path, key, what)
    numbers = (*sizes, begin, end)
    # bool is a subclass of int, but true is not a valid size.
    if {*map(type, numbers)} != {int} or min(numbers) < 0 or max(numbers) >= _LIMIT:
        what = f"has shape {short(sizes)} and data_offsets {short([begin, end])}, but these must be integers"
        raise _entry_error(path, key, f"{what} from 0 to 2**63 - 1. {COPY_AGAIN}")
    identity = (dtype_name, *sizes)
    kind = kinds.get(identity)
    if kind is None:
        kind = kinds[identity] = _parse_kind(path, key, dtype_name, tuple(sizes))
    if kind.nbytes is None and end < begin:
        what = f"has data_offsets [{begin}, {end}], which are {end - begin} bytes apart. {COPY_AGAIN}"
        raise _entry_error(path, key, what)
    if kind.nbytes is not None and end - begin != kind.nbytes:
        what = f"takes {kind.nbytes} bytes with shape {short(tuple(sizes))} of {dtype_name}, but its data_offsets"
        raise _entry_error(path, key, f"{what} [{begin}, {end}] are {end - begin} bytes apart. {COPY_AGAIN}")
    return kind, begin, end


def _parse_kind(path: str, key: str, dtype_name: str, shape: tuple[int, ...]) -> _EntryType:
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        if not _DTYPE_NAME.fullmatch(dtype_name):
            raise _entry_error(path, key, f"has dtype {short(dtype_name)}, which is not a dtype name. {COPY_AGAIN}")
        return _EntryType(None, shape, unknown=f"dtype {dtype_name}")
    if dtype_name == "F4":
        # Two elements per byte. torch counts bytes, and safetensors does the same when it loads.
        if not shape or shape[-1] % 2:
            return _EntryType(None, shape, unknown="dtype F4 of an odd last size")
        shape = (*shape[:-1], shape[-1] // 2)
    # Zeros are skipped: even for an empty tensor, torch multiplies the other sizes to compute the strides.
    nbytes = dtype.itemsize
    for number in shape:
        nbytes *= number or 1
        if nbytes >= _LIMIT:
            what = f"has shape {short(shape)}, but no tensor has 2**63 bytes or more. {COPY_AGAIN}"
            raise _entry_error(path, key, what)
    return _EntryType(dtype, shape, _contiguous_stride(shape), 0 if 0 in shape else nbytes)


def _entry_error(path: str, key: str, what: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path}: tensor {short(key)} {what}", path=path)


def _require_full_cover(path: str, size: int, data_start: int, ranges: Mapping[str, tuple[int, int]]) -> None:
    """Requires that every byte after the header belongs to exactly one tensor.

    Raises:
        CheckpointFormatError: Tensors overlap, or bytes belong to no tensor: the header may lack a tensor.
    """
    position = data_start
    before: str | None = None
    # Empty tensors come first: they may begin where another tensor begins.
    for key, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin != position:
            what = (
                f"overlap by {position - begin} bytes"
                if begin < position
                else f"leave {begin - position} bytes between them that belong to no tensor"
            )
            what = f"begins at byte {begin}, but {_before(before)} ends at byte {position}: they {what}. {COPY_AGAIN}"
            raise _entry_error(path, key, what)
        position, before = end, key
    if position != size:
        raise CheckpointFormatError(
            f"{path}: {_before(before)} ends at byte {position}, but the file has {size} bytes: the last "
            f"{size - position} belong to no tensor. {COPY_AGAIN}",
            path=path,
        )


def _before(key: str | None) -> str:
    return "the header" if key is None else f"tensor {short(key)}"


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    return tuple(reversed(strides))
