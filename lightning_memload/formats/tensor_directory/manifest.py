"""Writes, reads and checks ``manifest.json`` of a directory of ``save_directory``.

All values are checked against the limits of the format before they are used. The manifest names files by numbers only,
so it cannot point outside the directory. This module does not check the files themselves.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_memload.checkpoint.index import TensorInfo
from lightning_memload.errors import CheckpointFormatError
from lightning_memload.formats.json_text import MAX_HEADER_BYTES
from lightning_memload.storage.places import is_file, is_folder, names_in, read_start, size_of

__all__ = [
    "MANIFEST_FILE",
    "STATE_FILE",
    "TENSORS_FOLDER",
    "WEIGHTS_FILE",
    "Manifest",
    "StorageFile",
    "WeightsLayout",
    "check_description",
    "damaged",
    "files_of",
    "foreign_names",
    "is_tensor_directory",
    "read_manifest",
    "regular_file_size",
    "render_manifest",
    "storage_file",
]

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.pt"
TENSORS_FOLDER = "tensors"
WEIGHTS_FILE = "model.safetensors"

_FORMAT = "lightning_memload.tensor_directory"
_VERSION = 1
# The format name is at the very beginning, so that a directory is recognised without parsing.
_HEAD = f'{{"format": "{_FORMAT}",'.encode()
# A manifest of a million tensors takes some 200 MiB. A hostile one takes up to 30 times its size when it is parsed.
_MAX_MANIFEST_BYTES = 256 << 20
_MAX_KEY_DIGITS = 9


@dataclass(frozen=True, slots=True)
class StorageFile:
    """One storage outside of ``state.pt``, as described in the manifest.

    Attributes:
        key: Its number in ``state.pt``. Its own file, if it has one, is named after it.
        nbytes: Its size in bytes, at least 1.
        crc32: CRC-32 of its bytes.
        location: The device that it was saved from, for example ``"cuda:0"``.
        offset: Its position in ``model.safetensors`` in bytes. ``None`` if it has its own file.
    """

    key: str
    nbytes: int
    crc32: int
    location: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class WeightsLayout:
    """The parts of ``model.safetensors`` that are not storages, as described in the manifest.

    Attributes:
        nbytes: Size of the file in bytes.
        header_bytes: Length of its header in bytes, from the start of the file.
        header_crc32: CRC-32 of the header.
        copies: Offset, size and CRC-32 of each weight whose storage is in ``state.pt`` too, because it is a view or not
            contiguous.
    """

    nbytes: int
    header_bytes: int
    header_crc32: int
    copies: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        state_bytes: Size of ``state.pt`` in bytes.
        pickle_crc32: CRC-32 of the pickle in ``state.pt``.
        storages: The storages outside of ``state.pt``, in the order of their numbers.
        weights: The layout of ``model.safetensors``. ``None`` if there is no such file.
        tensors: The description of every tensor, as parsed and not yet checked.
    """

    state_bytes: int
    pickle_crc32: int
    storages: tuple[StorageFile, ...]
    weights: WeightsLayout | None
    tensors: list[Any]

    def files(self) -> list[tuple[str, int]]:
        """Name and size of every file except the manifest."""
        return files_of(self.state_bytes, self.storages, self.weights)

    def ranges(self) -> list[tuple[str, str, int, int, int | None]]:
        """Each range outside of ``state.pt``: its file, its name in messages, its offset, its size and its CRC-32."""
        found: list[tuple[str, str, int, int, int | None]] = []
        weights = self.weights
        if weights is not None:
            found.append((WEIGHTS_FILE, f"the header of {WEIGHTS_FILE}", 0, weights.header_bytes, weights.header_crc32))
            found += [(WEIGHTS_FILE, WEIGHTS_FILE, *copy) for copy in weights.copies]
        for storage in self.storages:
            name = storage_file(storage.key) if storage.offset is None else WEIGHTS_FILE
            found.append((name, name, storage.offset or 0, storage.nbytes, storage.crc32))
        return found


def storage_file(key: str) -> str:
    """The path of a storage's own file, relative to the directory."""
    return f"{TENSORS_FOLDER}/{int(key):05}.bin"


def is_tensor_directory(path: str) -> bool:
    """Whether a path is a directory of this format. The manifest may be missing or damaged if the rest is there.

    A directory with ``model.safetensors`` and ``state.pt`` but no manifest is not one: both may have another origin.
    """
    manifest, state, folder, weights = (
        os.path.join(path, name) for name in (MANIFEST_FILE, STATE_FILE, TENSORS_FOLDER, WEIGHTS_FILE)
    )
    described = is_file(manifest)  # opening a pipe would block
    if described and read_start(manifest, len(_HEAD)) == _HEAD:
        return True
    return is_file(state) and (is_folder(folder) or (described and is_file(weights)))


def foreign_names(path: str) -> list[str]:
    """The names in a directory of this format that are not part of the checkpoint, such as ``config.json``.

    Raises:
        OSError: It cannot be listed.
    """
    own = {MANIFEST_FILE, STATE_FILE, TENSORS_FOLDER, WEIGHTS_FILE}
    return sorted(name for name in names_in(path) if name not in own)


def files_of(state_bytes: int, storages: Sequence[StorageFile], weights: WeightsLayout | None) -> list[tuple[str, int]]:
    """Name and size of every file except the manifest, ``state.pt`` first."""
    of_weights = [] if weights is None else [(WEIGHTS_FILE, weights.nbytes)]
    own = [(storage_file(storage.key), storage.nbytes) for storage in storages if storage.offset is None]
    return [(STATE_FILE, state_bytes), *of_weights, *own]


def render_manifest(
    state_bytes: int,
    pickle_crc32: int,
    storages: Sequence[StorageFile],
    weights: WeightsLayout | None,
    tensors: Sequence[TensorInfo],
) -> bytes:
    """The content of ``manifest.json``. For the arguments see :class:`Manifest`."""
    # One line for each storage and tensor, for human readers and diffs.
    lines = [
        _HEAD.decode(),
        f'"version": {_VERSION},',
        f'"state": {{"nbytes": {state_bytes}, "pickle_crc32": {pickle_crc32}}},',
        *([] if weights is None else [f'"weights": {json.dumps(asdict(weights))},']),
        '"storages": [',
        ",\n".join(
            json.dumps({name: value for name, value in asdict(storage).items() if value is not None})
            for storage in storages
        ),
        '],\n"tensors": [',
        ",\n".join(json.dumps(_describe(tensor)) for tensor in tensors),
        "]}\n",
    ]
    return "\n".join(lines).encode()


def _describe(tensor: TensorInfo) -> dict[str, Any]:
    return {
        "path": list(tensor.path),
        "storage": tensor.storage.key,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride),
        "storage_offset": tensor.storage_offset,
        "parameter": tensor.is_parameter,
    }


def read_manifest(path: str) -> Manifest:
    """Reads and checks the manifest of a directory. Does not look at the other files.

    Raises:
        CheckpointFormatError: The manifest is missing, damaged, or of another format.
        OSError: It cannot be read.
    """
    name = os.path.join(path, MANIFEST_FILE)
    try:
        nbytes = regular_file_size(name)
        if nbytes is None:
            raise damaged(path, "it is no regular file.")
        if nbytes > _MAX_MANIFEST_BYTES:
            raise damaged(path, f"it has {nbytes} bytes, and the limit is {_MAX_MANIFEST_BYTES}.")
        content = json.loads(read_start(name, nbytes))
    except FileNotFoundError as error:
        raise CheckpointFormatError(
            f"{path} has a {STATE_FILE} and {TENSORS_FOLDER}/, but no {MANIFEST_FILE}: it was not copied completely.",
            path=path,
        ) from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, CheckpointFormatError):
            raise
        raise damaged(path, f"it cannot be parsed ({type(error).__name__}: {reprlib.repr(str(error))}).") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise damaged(path, f"it does not name the format {_FORMAT!r}.")
    if content.get("version") != _VERSION or type(content["version"]) is not int:
        raise CheckpointFormatError(
            f"{path} has version {reprlib.repr(content.get('version'))} of the format {_FORMAT}; this release of "
            f"lightning_memload reads version {_VERSION}. Use a newer release.",
            path=path,
        )
    tensors = _field(path, content, "tensors", list)
    entries = _field(path, content, "storages", list)
    storages = tuple(_storage(path, entry) for entry in entries)
    numbers = [int(storage.key) for storage in storages]
    if numbers != sorted(set(numbers)):
        raise damaged(path, "its storages are not in the order of their numbers, each once.")
    state = _field(path, content, "state", dict)
    weights = _weights(path, content, storages)
    return Manifest(_count(path, state, "nbytes"), _crc32(path, state, "pickle_crc32"), storages, weights, tensors)


def _weights(path: str, content: Mapping[str, Any], storages: Sequence[StorageFile]) -> WeightsLayout | None:
    """Reads the description of ``model.safetensors``, and checks that it covers every byte of the file once."""
    within = [(s.offset, s.nbytes) for s in storages if s.offset is not None]
    if "weights" not in content:
        if within:
            raise damaged(path, f"it places {len(within)} storages in {WEIGHTS_FILE}, but does not describe that file.")
        return None
    entry = _field(path, content, "weights", dict)
    copies = []
    for copy in _field(path, entry, "copies", list):
        if not isinstance(copy, list) or len(copy) != 3:
            raise damaged(path, f"it describes a copy of a weight as {reprlib.repr(copy)}.")
        numbers = dict(zip(("offset", "nbytes", "crc32"), copy, strict=True))
        copies.append(
            (_count(path, numbers, "offset"), _count(path, numbers, "nbytes"), _crc32(path, numbers, "crc32"))
        )
    weights = WeightsLayout(
        _count(path, entry, "nbytes"), _count(path, entry, "header_bytes"), _crc32(path, entry, "header_crc32"),
        tuple(copies),
    )  # fmt: skip
    if weights.header_bytes > MAX_HEADER_BYTES + 8:  # 8 bytes hold the length of the header
        raise damaged(path, f"it gives the header of {WEIGHTS_FILE} {weights.header_bytes} bytes.")
    end = 0
    ranges = [(0, weights.header_bytes), *within, *((offset, nbytes) for offset, nbytes, _ in copies)]
    for offset, nbytes in sorted(ranges):
        if offset != end:
            raise damaged(path, f"what it places in {WEIGHTS_FILE} ends at byte {end} and goes on at {offset}.")
        end += nbytes
    if end != weights.nbytes:
        raise damaged(path, f"what it places in {WEIGHTS_FILE} ends at byte {end}, but gives it {weights.nbytes}.")
    return weights


def _storage(path: str, entry: Any) -> StorageFile:
    if not isinstance(entry, dict):
        raise damaged(path, f"it describes a storage as {reprlib.repr(entry)}.")
    key = _field(path, entry, "key", str)
    # The key becomes a file name, so only digits are allowed, without leading zeros.
    if not re.fullmatch(rf"0|[1-9][0-9]{{0,{_MAX_KEY_DIGITS - 1}}}", key):
        raise damaged(path, f"it names a storage {reprlib.repr(key)}, which is no number.")
    nbytes = _count(path, entry, "nbytes")
    if nbytes == 0:
        raise damaged(path, f"it gives storage {key} 0 bytes; an empty storage has no file.")
    offset = _count(path, entry, "offset") if "offset" in entry else None
    return StorageFile(key, nbytes, _crc32(path, entry, "crc32"), _field(path, entry, "location", str), offset)


def _field(path: str, entry: Mapping[str, Any], name: str, kind: type) -> Any:
    value = entry.get(name)
    if type(value) is not kind:  # not isinstance: True is an int
        raise damaged(path, f"its {name!r} should be of type {kind.__name__}, but is {reprlib.repr(value)}.")
    return value


def _count(path: str, entry: Mapping[str, Any], name: str) -> int:
    value: int = _field(path, entry, name, int)
    if not 0 <= value < 1 << 63:
        raise damaged(path, f"its {name!r} is {reprlib.repr(value)}, which is no number of bytes.")
    return value


def _crc32(path: str, entry: Mapping[str, Any], name: str) -> int:
    value: int = _field(path, entry, name, int)
    if not 0 <= value < 1 << 32:
        raise damaged(path, f"its {name!r} is {reprlib.repr(value)}, which is no CRC-32.")
    return value


def check_description(path: str, described: list[Any], tensors: Sequence[TensorInfo]) -> None:
    """Raises unless the manifest describes exactly these tensors."""
    if len(described) != len(tensors):
        raise damaged(path, f"it lists {len(described)} tensors, but {STATE_FILE} has {len(tensors)}.")
    for entry, tensor in zip(described, tensors, strict=True):
        for field, value in _describe(tensor).items():
            stated = entry.get(field) if isinstance(entry, dict) else None
            # repr is compared too, because True equals 1.
            if stated != value or repr(stated) != repr(value):
                raise damaged(
                    path,
                    f"{tensor.name} has {field} {value} in {STATE_FILE} and {reprlib.repr(stated)} in the manifest.",
                )


def regular_file_size(name: str) -> int | None:
    """Size of a regular file in bytes. ``None`` for a link (its target may be anywhere), a pipe, or another kind."""
    return size_of(name, follow_links=False)


def damaged(path: str, problem: str) -> CheckpointFormatError:
    """The error for a damaged manifest."""
    return CheckpointFormatError(f"{os.path.join(path, MANIFEST_FILE)} is damaged: {problem}", path=path)
