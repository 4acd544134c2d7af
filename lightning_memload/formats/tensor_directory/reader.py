"""Reads the format of ``save_directory``: a directory with the tensors beside a file for everything else.

- ``tensors/00017.bin``: the bytes of storage 17 and nothing else. Tied tensors and views share it. Alternatively
  ``model.safetensors``: the weights, for every program that reads that format.
- ``state.pt``: a file of ``torch.save`` with stubs of 16 bytes for these storages. So the format keeps everything that
  torch can save: ties, parameters, ``_metadata``, tensors within objects.
- ``manifest.json``, written last: size and CRC-32 of each file, and path, dtype, shape and strides of each tensor.

The manifest serves other readers and as a check: if it does not match the pickle, nothing is loaded. It names storages
by number, so it cannot point outside the directory. Links in the directory are refused.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from zlib_ng import zlib_ng

from lightning_memload.bytes import Record, lay_out
from lightning_memload.checkpoint.index import Checkpoint, StorageInfo
from lightning_memload.checkpoint.inventory import Damage, Inventory
from lightning_memload.checkpoint.mapped import MappedCheckpoint, end_loading
from lightning_memload.errors import CheckpointFormatError, MemloadError, UnmappableCheckpointError, listed
from lightning_memload.formats.tensor_directory.manifest import (
    MANIFEST_FILE,
    STATE_FILE,
    TENSORS_FOLDER,
    WEIGHTS_FILE,
    Manifest,
    StorageFile,
    WeightsLayout,
    check_description,
    damaged,
    files_of,
    is_tensor_directory,
    read_manifest,
    regular_file_size,
    render_manifest,
    storage_file,
)
from lightning_memload.formats.torch_zip.reader import load_what_is_allowed, name_records
from lightning_memload.formats.torch_zip.records import pickle_is_sound, read_records, read_zip_inventory
from lightning_memload.pickles.structure import walk_pickle
from lightning_memload.storage import FileMapping, FileSet, map_or_reserve
from lightning_memload.storage.places import held, is_link, open_file, read_start, size_of

__all__ = ["TensorDirectory", "make_manifest"]

# A directory that is replaced while it is read is read again. A running save replaces it every few seconds at most.
_MAX_TRIES = 5

_T = TypeVar("_T")


class TensorDirectory:
    """The format of ``save_directory``."""

    name = "tensor_directory"

    def recognizes(self, path: str) -> bool:
        """See :func:`is_tensor_directory`."""
        return is_tensor_directory(path)

    def read_index(self, path: str) -> Checkpoint:
        """Indexes the directory from its manifest and the pickle in ``state.pt``. No code of the pickle runs."""
        return _read_one_version(path, lambda: _read_index(path))

    def load(self, path: str, *, weights_only: bool | None, erases: bool = False) -> tuple[Any, MappedCheckpoint]:
        """Loads the object. The tensors stay in their files.

        Raises:
            CheckpointFormatError: It is damaged, or it was replaced again and again while it was read.
            MemloadError: There are more files than the kernel maps in one process.
            pickle.UnpicklingError: ``weights_only`` forbids what ``state.pt`` holds, see :class:`TorchZip`.
        """
        return _read_one_version(path, lambda: self._load(path, weights_only, erases))

    def _load(self, path: str, weights_only: bool | None, erases: bool) -> tuple[Any, MappedCheckpoint]:
        index = _read_index(path)
        source = FileSet([file.path for file in index.files])
        try:
            if source.spans != index.files:
                raise _replaced_error(path)
            mapping = _map(path, source)
            stubs = {storage.key for storage in index.storages if storage.offset >= index.files[0].nbytes}
            loaded, refusal = load_what_is_allowed(
                mapping, index, source.files[0], weights_only=weights_only, erases=erases, stubs=stubs
            )
            return end_loading(loaded, index, source, mapping, refusal)
        except BaseException:
            source.close()
            raise

    def take_inventory(self, path: str) -> Inventory:
        """Every storage, and every record of ``state.pt``, see :class:`CheckpointFormat`."""
        try:
            manifest = read_manifest(path)
        except CheckpointFormatError as error:
            return Inventory(path, self.name, (), (), (Damage(os.path.join(path, MANIFEST_FILE), str(error)),))
        damage = _file_damage(path, manifest)
        wrong = {problem.path for problem in damage}
        expected = [(os.path.join(path, name), nbytes) for name, nbytes in manifest.files()]
        sound = [file for file in expected if file[0] not in wrong and os.path.join(path, TENSORS_FOLDER) not in wrong]
        files = lay_out(sound)
        places = {file.path: file.start for file in files}
        records = []
        for name, key, offset, nbytes, crc32 in manifest.ranges():
            start = places.get(os.path.join(path, name))
            if start is not None:
                records.append(Record(key, start + offset, nbytes, crc32))
        state = os.path.join(path, STATE_FILE)
        names: dict[int, str] = {}
        if state in places:
            with open_file(state) as file:
                of_state, problems = read_zip_inventory(file, places[state])
                records += of_state
                damage += problems
                readable = not damage and pickle_is_sound(file, of_state, places[state])
            if readable:
                try:
                    names = name_records(_read_index(path))
                except UnmappableCheckpointError:
                    pass  # An inventory does not need mappable tensors.
                except CheckpointFormatError as error:
                    damage.append(Damage(path, str(error)))
        named = tuple(record._replace(name=names.get(record.offset, record.name)) for record in records)
        return Inventory(path, self.name, files, named, tuple(damage))


def _read_one_version(path: str, read: Callable[[], _T]) -> _T:
    """Calls ``read``, and again if the directory was replaced meanwhile: the result could mix two checkpoints.

    Raises:
        CheckpointFormatError: The directory was replaced again and again.
        Exception: ``read`` raised it, and the directory was not replaced.
    """
    for _ in range(_MAX_TRIES):
        with held(path) as is_same:
            try:
                result = read()
                if is_same():
                    return result
            except (MemloadError, OSError):
                if is_same():
                    raise
    raise _replaced_error(path)


def _read_index(path: str) -> Checkpoint:
    manifest = read_manifest(path)
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
        raise damaged(path, f"it lists storages that {STATE_FILE} does not refer to: {listed(sorted(unused))}.")
    check_description(path, manifest.tensors, index.tensors)
    return index


def make_manifest(path: str, storages: Sequence[StorageFile], weights: WeightsLayout | None = None) -> bytes:
    """Makes the manifest of a directory after its other files are written.

    Args:
        path: The directory.
        storages: The storages outside of ``state.pt``, in the order of their numbers.
        weights: The layout of ``model.safetensors``. ``None`` if there is no such file.

    Returns:
        The content of ``manifest.json``.

    Raises:
        CheckpointFormatError: ``state.pt`` has changed since it was written.
    """
    state_bytes = size_of(os.path.join(path, STATE_FILE)) or 0
    index, pickled = _index_state(path, files_of(state_bytes, storages, weights), storages)
    return render_manifest(state_bytes, zlib_ng.crc32(pickled), storages, weights, index.tensors)


def _map(path: str, source: FileSet) -> FileMapping:
    try:
        return map_or_reserve(source)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemloadError(
            f"{path} has {len(source.files)} files, and the kernel does not map that many in one process: {error}. "
            "Raise the limit (sysctl vm.max_map_count, 65530 by default) or save it as one file."
        ) from error


def _index_state(
    path: str, files: Sequence[tuple[str, int]], storages: Sequence[StorageFile]
) -> tuple[Checkpoint, bytes]:
    """The index with the positions of all storages, and the pickle that it was made from."""
    state = os.path.join(path, STATE_FILE)
    spans = lay_out([(os.path.join(path, name), nbytes) for name, nbytes in files])
    starts = {name: span.start for (name, _), span in zip(files, spans, strict=True)}
    elsewhere = {}
    for storage in storages:
        own = storage.offset is None
        offset = starts[storage_file(storage.key)] if own else starts[WEIGHTS_FILE] + (storage.offset or 0)
        elsewhere[storage.key] = StorageInfo(storage.key, offset, storage.nbytes, storage.crc32, storage.location)
    with open_file(state) as file:
        records, pickled = read_records(file)
    found = walk_pickle(state, pickled, records, elsewhere)
    index = Checkpoint(
        path,
        TensorDirectory.name,
        spans,
        found.tensors,
        found.storages,
        globals=found.globals,
        special=found.special,
    )
    return index, pickled


# Checks of the files ----------------------------------------------------------------------------------------------


def _check_files(path: str, manifest: Manifest) -> None:
    """Raises unless every file exists, is a regular file, and has the size in the manifest."""
    damage = _file_damage(path, manifest)
    missing = [os.path.relpath(item.path, path) for item in damage if item.actual is None and item.expected is not None]
    wrong = [item.problem for item in damage if item.actual is not None or item.expected is None]
    if damage:
        missed = [f"{len(missing)} of {len(manifest.files())} files are missing ({listed(missing)})"]
        raise _damaged_files(path, (missed if missing else []) + wrong)


def _check_header(path: str, weights: WeightsLayout) -> None:
    """Raises unless the header of ``model.safetensors`` has the CRC-32 in the manifest."""
    name = os.path.join(path, WEIGHTS_FILE)
    crc32 = zlib_ng.crc32(read_start(name, weights.header_bytes))
    if crc32 != weights.header_crc32:
        raise CheckpointFormatError(
            f"{name} is damaged: its header has CRC-32 {crc32:#010x}, but {MANIFEST_FILE} records "
            f"{weights.header_crc32:#010x}: they were not written together. Copy the directory again, or resume from "
            "another checkpoint.",
            path=path,
        )


def _file_damage(path: str, manifest: Manifest) -> list[Damage]:
    """The damage of every file that is missing, not a regular file, or of another size than in the manifest."""
    damage: list[Damage] = []
    folder = os.path.join(path, TENSORS_FOLDER)
    if is_link(folder):
        return [Damage(folder, f"{TENSORS_FOLDER} is a link")]
    for name, nbytes in manifest.files():
        file = os.path.join(path, name)
        try:
            actual = regular_file_size(file)
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


def _replaced_error(path: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path} was replaced or changed while it was loaded. Load it again.", path=path)


def _damaged_files(path: str, problems: Sequence[str]) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{path} is damaged: {listed(problems, separator='; ')}. Copy the directory again, or resume from another "
        "checkpoint.",
        path=path,
    )
