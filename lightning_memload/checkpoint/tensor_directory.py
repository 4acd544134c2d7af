"""The format of ``save_directory``: a directory in which storages lie beside the file of everything else.

- ``tensors/00017.bin``: the bytes of storage 17 and nothing else; tied tensors and views share it. Or instead
  ``model.safetensors``: the weights, for every program that reads that format.
- ``state.pt``: what ``torch.save`` writes, but for these storages it holds stubs of 16 bytes. So whatever torch can
  save can live here, as it was: ties, parameters, ``_metadata``, tensors within objects.
- ``manifest.json``, written last: size and CRC-32 of each file, and path, dtype, shape, strides of each tensor.

The manifest is for other readers and a second witness: it must agree with the pickle, or nothing is loaded. It names
storages by number, so it cannot point out of the directory; neither may a link.
"""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from zlib_ng import zlib_ng

from lightning_memload.checkpoint.index import Checkpoint, StorageInfo, TensorInfo, lay_out
from lightning_memload.checkpoint.inventory import Damage, Inventory, Section
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint
from lightning_memload.checkpoint.mapping import FileMapping
from lightning_memload.checkpoint.safetensors_json import MAX_HEADER_BYTES
from lightning_memload.checkpoint.source import FileSet, LocalFile
from lightning_memload.checkpoint.torch_pickle import walk_pickle
from lightning_memload.checkpoint.torch_zip import (
    load_onto,
    name_sections,
    pickle_is_sound,
    read_records,
    read_zip_inventory,
)
from lightning_memload.errors import CheckpointFormatError, MemloadError, listed

__all__ = [
    "MANIFEST_FILE",
    "STATE_FILE",
    "TENSORS_FOLDER",
    "WEIGHTS_FILE",
    "StorageFile",
    "TensorDirectory",
    "WeightsLayout",
    "is_tensor_directory",
    "make_manifest",
    "read_storage_files",
    "storage_file",
]

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.pt"
TENSORS_FOLDER = "tensors"
WEIGHTS_FILE = "model.safetensors"

_FORMAT = "lightning_memload.tensor_directory"
_VERSION = 1
# The name stands at the very beginning, so that a directory is told without parsing anything.
_HEAD = f'{{"format": "{_FORMAT}",'.encode()
# A million tensors take some 200 MiB. Parsed, a hostile one takes up to thirty times its length.
_MAX_MANIFEST_BYTES = 256 << 20
_MAX_KEY_DIGITS = 9
# A directory that is replaced while it is read is read again: somebody saves in its place, every few seconds at most.
_MAX_TRIES = 5

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StorageFile:
    """One storage that lies beside ``state.pt``, as the manifest describes it.

    Attributes:
        key: Its number in ``state.pt``, which gives a file of its own its name.
        nbytes: Its size, at least 1.
        crc32: CRC-32 of its bytes.
        location: The device it was saved from, for example ``"cuda:0"``.
        offset: Where it begins in ``model.safetensors``; ``None``: it has a file of its own.
    """

    key: str
    nbytes: int
    crc32: int
    location: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class WeightsLayout:
    """What ``model.safetensors`` holds that is no storage, as the manifest describes it.

    Attributes:
        nbytes: Size of the file.
        header_bytes: Length of its header, from the first byte of the file.
        header_crc32: CRC-32 of that.
        copies: Weights whose storages are in ``state.pt`` too, since they are views or not contiguous: offset, size and
            CRC-32 of each.
    """

    nbytes: int
    header_bytes: int
    header_crc32: int
    copies: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Manifest:
    state_bytes: int
    pickle_crc32: int
    storages: tuple[StorageFile, ...]
    weights: WeightsLayout | None
    tensors: list[Any]

    def files(self) -> list[tuple[str, int]]:
        """Every file but the manifest: its name and size."""
        return _files(self.state_bytes, self.weights, self.storages)


def storage_file(key: str) -> str:
    """The file of a storage that has one of its own, relative to the directory."""
    return f"{TENSORS_FOLDER}/{int(key):05}.bin"


def is_tensor_directory(path: str) -> bool:
    """Whether a directory has a manifest of this format, or one that is missing or damaged where the rest is there.

    Weights beside a ``state.pt`` of whatever origin are no such directory unless there is a manifest.
    """
    manifest, state, folder, weights = (
        os.path.join(path, name) for name in (MANIFEST_FILE, STATE_FILE, TENSORS_FOLDER, WEIGHTS_FILE)
    )
    described = os.path.isfile(manifest)  # a pipe would never answer
    if described:
        with open(manifest, "rb") as file:
            if file.read(len(_HEAD)) == _HEAD:
                return True
    return os.path.isfile(state) and (os.path.isdir(folder) or (described and os.path.isfile(weights)))


class TensorDirectory:
    """What ``save_directory`` writes."""

    name = "tensor_directory"

    def recognizes(self, path: str) -> bool:
        """See :func:`is_tensor_directory`."""
        return is_tensor_directory(path)

    def read_index(self, path: str) -> Checkpoint:
        """Indexes the directory from its manifest and the pickle in ``state.pt``, of which nothing is run."""
        return _of_one_directory(path, lambda: _read_index(path))

    def load(self, path: str, *, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        """Loads the object; the tensors stay in their files.

        Raises:
            CheckpointFormatError: Also when others take the directory's place again and again.
            MemloadError: There are more files than the kernel maps in one process.
            pickle.UnpicklingError: ``weights_only`` forbids what ``state.pt`` holds; torch's own message.
        """
        return _of_one_directory(path, lambda: self._load(path, weights_only))

    def _load(self, path: str, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        index = _read_index(path)
        source = FileSet([file.path for file in index.files])
        try:
            if source.spans != index.files:
                raise _replaced(path)
            mapping = _map(path, source)
            stubs = {storage.key for storage in index.storages if storage.offset >= index.files[0].nbytes}
            loaded = load_onto(mapping, index, source.files[0], weights_only=weights_only, stubs=stubs)
        except BaseException:
            source.close()
            raise
        return loaded, MappedCheckpoint(index, source, mapping)

    def take_inventory(self, path: str) -> Inventory:
        """Every storage, and every record of ``state.pt``, see :class:`CheckpointFormat`."""
        try:
            manifest = _read_manifest(path)
        except CheckpointFormatError as error:
            return Inventory(path, self.name, (), (), (Damage(os.path.join(path, MANIFEST_FILE), str(error)),))
        damage = _file_damage(path, manifest)
        wrong = {problem.path for problem in damage}
        expected = [(os.path.join(path, name), nbytes) for name, nbytes in manifest.files()]
        sound = [file for file in expected if file[0] not in wrong and os.path.join(path, TENSORS_FOLDER) not in wrong]
        files = lay_out(sound)
        places = {file.path: file.start for file in files}
        sections = []
        for name, key, offset, nbytes, crc32 in _stretches(manifest):
            start = places.get(os.path.join(path, name))
            if start is not None:
                sections.append(Section(key, start + offset, nbytes, crc32))
        state = os.path.join(path, STATE_FILE)
        names: dict[int, str] = {}
        if state in places:
            with LocalFile(state) as file:
                of_state, problems = read_zip_inventory(file, places[state])
                sections += of_state
                damage += problems
                readable = not damage and pickle_is_sound(file, of_state, places[state])
            if readable:
                try:
                    names = name_sections(_read_index(path))
                except UnmappableCheckpoint:
                    pass  # Nobody asks here whether the tensors can be used as they lie.
                except CheckpointFormatError as error:
                    damage.append(Damage(path, str(error)))
        named = tuple(replace(section, key=names.get(section.offset, section.key)) for section in sections)
        return Inventory(path, self.name, files, named, tuple(damage))


def _of_one_directory(path: str, read: Callable[[], _T]) -> _T:
    """Reads again if another checkpoint took the directory's place meanwhile: what was read may be of both.

    Raises:
        CheckpointFormatError: That happened again and again.
        Exception: What ``read`` raises of a directory that is still there.
    """
    if not hasattr(os, "O_DIRECTORY"):  # There no directory can be held open, nor replaced in one step.
        return read()
    for _ in range(_MAX_TRIES):
        # Held open, so that its number is not given to a directory that replaces it.
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            result = read()
            if _is_at(path, directory):
                return result
        except (CheckpointFormatError, OSError):
            if _is_at(path, directory):
                raise
        finally:
            os.close(directory)
    raise _replaced(path)


def _is_at(path: str, directory: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(directory))
    except FileNotFoundError:
        return False


def _read_index(path: str) -> Checkpoint:
    manifest = _read_manifest(path)
    _check_files(path, manifest)
    if manifest.weights is not None:
        _check_header(path, manifest.weights)
    index, pickled = _index_state(path, manifest.files(), manifest.storages)
    if zlib_ng.crc32(pickled) != manifest.pickle_crc32:
        raise CheckpointFormatError(
            f"{path} is damaged: the pickle in its {STATE_FILE} has CRC-32 {zlib_ng.crc32(pickled):#010x}, but "
            f"{MANIFEST_FILE} records {manifest.pickle_crc32:#010x}: they were not written together. Copy the "
            "directory again, or resume from another checkpoint.",
            path=path,
        )
    unused = {storage.key for storage in manifest.storages}.difference(storage.key for storage in index.storages)
    if unused:
        raise _damaged(path, f"it lists storages that {STATE_FILE} does not refer to: {listed(sorted(unused))}.")
    _check_description(path, manifest.tensors, index.tensors)
    return index


def make_manifest(path: str, storages: Sequence[StorageFile], weights: WeightsLayout | None = None) -> bytes:
    """The manifest of a directory whose other files are written.

    Args:
        path: The directory.
        storages: The storages that lie beside ``state.pt``, in the order of their numbers.
        weights: Of ``model.safetensors``, if there is one.

    Raises:
        CheckpointFormatError: ``state.pt`` is not what was written.
    """
    state_bytes = os.path.getsize(os.path.join(path, STATE_FILE))
    index, pickled = _index_state(path, _files(state_bytes, weights, storages), storages)
    # One line for each storage and tensor: people and diffs read this too.
    lines = [
        _HEAD.decode(),
        f'"version": {_VERSION},',
        f'"state": {{"nbytes": {state_bytes}, "pickle_crc32": {zlib_ng.crc32(pickled)}}},',
        *([] if weights is None else [f'"weights": {json.dumps(asdict(weights))},']),
        '"storages": [',
        ",\n".join(
            json.dumps({name: value for name, value in asdict(storage).items() if value is not None})
            for storage in storages
        ),
        '],\n"tensors": [',
        ",\n".join(json.dumps(_describe(tensor)) for tensor in index.tensors),
        "]}\n",
    ]
    return "\n".join(lines).encode()


def read_storage_files(path: str) -> tuple[StorageFile, ...]:
    """The storages that have a file of their own, as the directory's manifest describes them.

    Raises:
        CheckpointFormatError: There is no manifest of this format, or it is damaged.
        OSError: It cannot be read.
    """
    return _read_manifest(path).storages


def _map(path: str, source: FileSet) -> FileMapping:
    try:
        return FileMapping(source)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemloadError(
            f"{path} has {len(source.files)} files, and the kernel does not map that many in one process: {error}. "
            "Raise the limit (sysctl vm.max_map_count, 65530 by default) or save it as one file."
        ) from error


def _files(state_bytes: int, weights: WeightsLayout | None, storages: Sequence[StorageFile]) -> list[tuple[str, int]]:
    """Name and size of each file, ``state.pt`` first."""
    of_weights = [] if weights is None else [(WEIGHTS_FILE, weights.nbytes)]
    own = [(storage_file(storage.key), storage.nbytes) for storage in storages if storage.offset is None]
    return [(STATE_FILE, state_bytes), *of_weights, *own]


def _stretches(manifest: _Manifest) -> list[tuple[str, str, int, int, int | None]]:
    """Everything outside of ``state.pt``: its file, what to call it, its place there, its size and its CRC-32."""
    found: list[tuple[str, str, int, int, int | None]] = []
    weights = manifest.weights
    if weights is not None:
        found.append((WEIGHTS_FILE, f"the header of {WEIGHTS_FILE}", 0, weights.header_bytes, weights.header_crc32))
        found += [(WEIGHTS_FILE, WEIGHTS_FILE, *copy) for copy in weights.copies]
    for storage in manifest.storages:
        name = storage_file(storage.key) if storage.offset is None else WEIGHTS_FILE
        found.append((name, name, storage.offset or 0, storage.nbytes, storage.crc32))
    return found


def _index_state(
    path: str, files: Sequence[tuple[str, int]], storages: Sequence[StorageFile]
) -> tuple[Checkpoint, bytes]:
    """The index, with the storages where they lie, and the pickle it was made from."""
    state = os.path.join(path, STATE_FILE)
    spans = lay_out([(os.path.join(path, name), nbytes) for name, nbytes in files])
    starts = {name: span.start for (name, _), span in zip(files, spans, strict=True)}
    elsewhere = {}
    for storage in storages:
        own = storage.offset is None
        offset = starts[storage_file(storage.key)] if own else starts[WEIGHTS_FILE] + (storage.offset or 0)
        elsewhere[storage.key] = StorageInfo(storage.key, offset, storage.nbytes, storage.crc32, storage.location)
    with LocalFile(state) as file:
        records, pickled = read_records(file)
    tensors, found = walk_pickle(state, pickled, records, elsewhere)
    return Checkpoint(path, TensorDirectory.name, spans, tensors, found), pickled


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


# What a manifest may hold ------------------------------------------------------------------------------------------


def _read_manifest(path: str) -> _Manifest:
    name = os.path.join(path, MANIFEST_FILE)
    try:
        nbytes = _regular_file_size(name)
        if nbytes is None:
            raise _damaged(path, "it is no regular file.")
        if nbytes > _MAX_MANIFEST_BYTES:
            raise _damaged(path, f"it has {nbytes} bytes, more than the {_MAX_MANIFEST_BYTES} that any needs.")
        with open(name, "rb") as file:
            content = json.loads(file.read(nbytes))
    except FileNotFoundError as error:
        raise CheckpointFormatError(
            f"{path} has a {STATE_FILE} and {TENSORS_FOLDER}/, but no {MANIFEST_FILE}: it was not copied completely.",
            path=path,
        ) from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, CheckpointFormatError):
            raise
        raise _damaged(path, f"it cannot be parsed ({type(error).__name__}: {reprlib.repr(str(error))}).") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _damaged(path, f"it does not name the format {_FORMAT!r}.")
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
        raise _damaged(path, "its storages are not in the order of their numbers, each once.")
    state = _field(path, content, "state", dict)
    weights = _weights(path, content, storages)
    return _Manifest(_count(path, state, "nbytes"), _crc32(path, state, "pickle_crc32"), storages, weights, tensors)


def _weights(path: str, content: Mapping[str, Any], storages: Sequence[StorageFile]) -> WeightsLayout | None:
    """What is said of ``model.safetensors``; every byte of it is accounted for once."""
    within = [(s.offset, s.nbytes) for s in storages if s.offset is not None]
    if "weights" not in content:
        if within:
            raise _damaged(
                path, f"it places {len(within)} storages in {WEIGHTS_FILE}, but does not describe that file."
            )
        return None
    entry = _field(path, content, "weights", dict)
    copies = []
    for copy in _field(path, entry, "copies", list):
        if not isinstance(copy, list) or len(copy) != 3:
            raise _damaged(path, f"it describes a copy of a weight as {reprlib.repr(copy)}.")
        numbers = dict(zip(("offset", "nbytes", "crc32"), copy, strict=True))
        copies.append(
            (_count(path, numbers, "offset"), _count(path, numbers, "nbytes"), _crc32(path, numbers, "crc32"))
        )
    weights = WeightsLayout(
        _count(path, entry, "nbytes"), _count(path, entry, "header_bytes"), _crc32(path, entry, "header_crc32"),
        tuple(copies),
    )  # fmt: skip
    if weights.header_bytes > MAX_HEADER_BYTES + 8:  # and its length
        raise _damaged(path, f"it gives the header of {WEIGHTS_FILE} {weights.header_bytes} bytes.")
    end = 0
    stretches = [(0, weights.header_bytes), *within, *((offset, nbytes) for offset, nbytes, _ in copies)]
    for offset, nbytes in sorted(stretches):
        if offset != end:
            raise _damaged(path, f"what it places in {WEIGHTS_FILE} ends at byte {end} and goes on at {offset}.")
        end += nbytes
    if end != weights.nbytes:
        raise _damaged(path, f"what it places in {WEIGHTS_FILE} ends at byte {end}, but gives it {weights.nbytes}.")
    return weights


def _storage(path: str, entry: Any) -> StorageFile:
    if not isinstance(entry, dict):
        raise _damaged(path, f"it describes a storage as {reprlib.repr(entry)}.")
    key = _field(path, entry, "key", str)
    # The key becomes a file name: digits and nothing else, and one spelling for each number.
    if not re.fullmatch(rf"0|[1-9][0-9]{{0,{_MAX_KEY_DIGITS - 1}}}", key):
        raise _damaged(path, f"it names a storage {reprlib.repr(key)}, which is no number.")
    nbytes = _count(path, entry, "nbytes")
    if nbytes == 0:
        raise _damaged(path, f"it gives storage {key} 0 bytes; an empty storage has no file.")
    offset = _count(path, entry, "offset") if "offset" in entry else None
    return StorageFile(key, nbytes, _crc32(path, entry, "crc32"), _field(path, entry, "location", str), offset)


def _field(path: str, entry: Mapping[str, Any], name: str, kind: type) -> Any:
    value = entry.get(name)
    if type(value) is not kind:  # exactly: True is an int
        raise _damaged(path, f"its {name!r} should be of type {kind.__name__}, but is {reprlib.repr(value)}.")
    return value


def _count(path: str, entry: Mapping[str, Any], name: str) -> int:
    value: int = _field(path, entry, name, int)
    if not 0 <= value < 1 << 63:
        raise _damaged(path, f"its {name!r} is {reprlib.repr(value)}, which is no number of bytes.")
    return value


def _crc32(path: str, entry: Mapping[str, Any], name: str) -> int:
    value: int = _field(path, entry, name, int)
    if not 0 <= value < 1 << 32:
        raise _damaged(path, f"its {name!r} is {reprlib.repr(value)}, which is no CRC-32.")
    return value


def _check_description(path: str, described: list[Any], tensors: Sequence[TensorInfo]) -> None:
    """Raises unless the manifest describes exactly these tensors."""
    if len(described) != len(tensors):
        raise _damaged(path, f"it lists {len(described)} tensors, but {STATE_FILE} has {len(tensors)}.")
    for entry, tensor in zip(described, tensors, strict=True):
        for field, value in _describe(tensor).items():
            stated = entry.get(field) if isinstance(entry, dict) else None
            # By text as well: True equals 1.
            if stated != value or repr(stated) != repr(value):
                raise _damaged(
                    path,
                    f"{tensor.name} has {field} {value} in {STATE_FILE} and {reprlib.repr(stated)} in the manifest.",
                )


# What is really there ----------------------------------------------------------------------------------------------


def _check_files(path: str, manifest: _Manifest) -> None:
    """Raises unless every file is there, regular, and as long as the manifest says."""
    damage = _file_damage(path, manifest)
    missing = [os.path.relpath(item.path, path) for item in damage if item.actual is None and item.expected is not None]
    wrong = [item.problem for item in damage if item.actual is not None or item.expected is None]
    if damage:
        missed = [f"{len(missing)} of {len(manifest.files())} files are missing ({listed(missing)})"]
        raise _damaged_files(path, (missed if missing else []) + wrong)


def _check_header(path: str, weights: WeightsLayout) -> None:
    """Raises unless ``model.safetensors`` has the header that was written together with the manifest."""
    name = os.path.join(path, WEIGHTS_FILE)
    with open(name, "rb") as file:
        crc32 = zlib_ng.crc32(file.read(weights.header_bytes))
    if crc32 != weights.header_crc32:
        raise CheckpointFormatError(
            f"{name} is damaged: its header has CRC-32 {crc32:#010x}, but {MANIFEST_FILE} records "
            f"{weights.header_crc32:#010x}: they were not written together. Copy the directory again, or resume from "
            "another checkpoint.",
            path=path,
        )


def _file_damage(path: str, manifest: _Manifest) -> list[Damage]:
    """Every file that is not there, not regular, or not as long as the manifest says."""
    damage: list[Damage] = []
    folder = os.path.join(path, TENSORS_FOLDER)
    if os.path.islink(folder):
        return [Damage(folder, f"{TENSORS_FOLDER} is a link")]
    for name, nbytes in manifest.files():
        file = os.path.join(path, name)
        try:
            actual = _regular_file_size(file)
        except (FileNotFoundError, NotADirectoryError):
            damage.append(Damage(file, f"{name} is missing", expected=nbytes))
            continue
        if actual is None:
            damage.append(Damage(file, f"{name} is no regular file"))
        elif actual != nbytes:
            change = "truncated" if actual < nbytes else "too long"
            problem = f"{name} is {change}: it has {actual} bytes instead of {nbytes}"
            damage.append(Damage(file, problem, expected=nbytes, actual=actual))
    return damage


def _regular_file_size(name: str) -> int | None:
    """Bytes of a regular file; ``None`` for a link, which may lead anywhere, a pipe, or anything else."""
    status = os.lstat(name)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _replaced(path: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path} was replaced or changed while it was loaded. Load it again.", path=path)


def _damaged_files(path: str, problems: Sequence[str]) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{path} is damaged: {listed(problems, separator='; ')}. Copy the directory again, or resume from another "
        "checkpoint.",
        path=path,
    )


def _damaged(path: str, problem: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{os.path.join(path, MANIFEST_FILE)} is damaged: {problem}", path=path)
