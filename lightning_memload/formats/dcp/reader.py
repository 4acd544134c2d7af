"""Reads directories of ``torch.distributed.checkpoint``, as Lightning's FSDP and ModelParallel strategies save them.

``.metadata`` maps each chunk of each tensor to a range of a file, and each range is a small archive of ``torch.save``.
So the bytes of every tensor are known, with their CRC-32, and the tensors can stay in the files. They are chunked
tensors, because a chunk can start at any byte. The object is assembled as it was saved. A checkpoint of a Trainer gets
the ordinary form, with ``state_dict``, ``optimizer_states`` and the content of ``meta.pt``. Optimizer states stay under
the names of their parameters, as the strategies save them.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lightning_memload.bytes import FileRange, Record
from lightning_memload.checkpoint.index import (
    Checkpoint,
    ChunkInfo,
    KeyPath,
    PickledGlobal,
    SpecialTensor,
    StorageInfo,
    TensorInfo,
    format_path,
)
from lightning_memload.checkpoint.inventory import Damage, Inventory
from lightning_memload.checkpoint.mapped import MappedCheckpoint
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError, UnsafeGlobalsError, listed
from lightning_memload.formats.dcp.assembly import assemble, map_leaves, rename_for_trainer, walk_leaves
from lightning_memload.formats.dcp.entries import DcpObject, DcpTensor, EntryReader
from lightning_memload.formats.dcp.metadata import METADATA_NAME, Metadata, SavedTensor, read_metadata, survey_metadata
from lightning_memload.formats.torch_zip.reader import TorchZip, read_index
from lightning_memload.formats.torch_zip.records import pickle_is_sound, read_records, read_zip_inventory
from lightning_memload.pickles.erasing import RefusedGlobal
from lightning_memload.pickles.globals import explain_refusal
from lightning_memload.pickles.structure import read_structure
from lightning_memload.storage import FileSet, StoredFile
from lightning_memload.storage.places import is_file, is_folder, names_in, size_of

__all__ = ["DcpDirectory"]

_EXTRA_NAME = "meta.pt"
_SUFFIX = ".distcp"
# Lightning writes this key into every checkpoint of a Trainer, and requires it when it loads one.
_VERSION_KEY = "pytorch-lightning_version"


class DcpDirectory:
    """The format of ``torch.distributed.checkpoint.save``, with the ``meta.pt`` that Lightning adds."""

    name = "dcp"

    def recognizes(self, path: str) -> bool:
        """Whether the directory holds the metadata, or files, of a distributed checkpoint."""
        if not is_folder(path):
            return False
        return is_file(os.path.join(path, METADATA_NAME)) or any(name.endswith(_SUFFIX) for name in names_in(path))

    def read_index(self, path: str) -> Checkpoint:
        """Indexes the directory.

        Raises:
            CheckpointFormatError: A file is missing, truncated or damaged, or the chunks of a tensor do not cover it.
        """
        directory = _open(path)
        directory.source.close()
        return directory.index

    def load(self, path: str, *, weights_only: bool | None, erases: bool = False) -> tuple[Any, MappedCheckpoint]:
        """Loads the object. The tensors stay in the files.

        Raises:
            pickle.UnpicklingError: ``weights_only`` forbids other objects in the checkpoint, see :class:`TorchZip`.

        Peak memory: the index and all objects in the checkpoint that are not tensors.
        """
        directory = _open(path)
        try:
            return directory.load(weights_only, erases)
        except BaseException:
            directory.source.close()
            raise

    def take_inventory(self, path: str) -> Inventory:
        """Every record of every entry, and the metadata, which has no checksum. See :class:`CheckpointFormat`."""
        metadata_path = os.path.join(path, METADATA_NAME)
        try:
            _require_metadata(path)
            metadata, problems = survey_metadata(metadata_path)
        except CheckpointFormatError as error:
            return Inventory(path, self.name, (), (), (Damage(error.path, str(error)),))
        names, damage = _survey_files(path, metadata)
        damage += [Damage(metadata_path, problem) for problem in problems]
        # The metadata file is last, so the offsets of the other files equal those of an index.
        source = FileSet([os.path.join(path, name) for name in (*names, METADATA_NAME)])
        with contextlib.closing(source):
            records = [Record(METADATA_NAME, source.spans[-1].start, source.spans[-1].nbytes, None)]
            entries = EntryReader(source)
            sound: set[FileRange] = set()
            for entry, label in metadata.entries.items():
                # A missing or truncated file is already in the damage.
                if entry.file in entries.files and entry.end <= entries.files[entry.file].size_bytes:
                    found, wrong, readable = entries.take_inventory(entry, label)
                    records += found
                    damage += wrong
                    sound.update([entry] if readable else [])
            readable = True
            if names[:1] == [_EXTRA_NAME]:
                found, wrong = read_zip_inventory(source.files[0])
                readable = pickle_is_sound(source.files[0], found)
                records += found
                damage += wrong
            leaves: dict[str, DcpTensor | DcpObject] = {}
            for name, item in metadata.items.items():
                readable_part = _part_within(item, sound)
                if readable_part is not None:
                    with _collecting_errors(damage, name):
                        leaves[name] = entries.read_item(name, readable_part)
            # Unreadable records are found later, when their checksums are verified.
            if not damage and readable and sound.issuperset(metadata.entries) and len(leaves) == len(metadata.items):
                with _collecting_errors(damage, None):
                    _CheckedDirectory(path, metadata, entries, leaves)
            return Inventory(path, self.name, source.spans, tuple(records), tuple(damage))


@contextlib.contextmanager
def _collecting_errors(damage: list[Damage], key: str | None) -> Iterator[None]:
    """Records an error as damage and continues."""
    try:
        yield
    except UnmappableCheckpointError:
        pass  # An inventory does not need mappable tensors.
    except CheckpointFormatError as error:
        damage.append(Damage(error.path, str(error), key=key))


def _part_within(item: SavedTensor | FileRange, entries: set[FileRange]) -> SavedTensor | FileRange | None:
    """The part of an item that is in the given entries. ``None`` if no part is."""
    if isinstance(item, FileRange):
        return item if item in entries else None
    chunks = tuple(chunk for chunk in item.chunks if chunk.entry in entries)
    return replace(item, chunks=chunks) if chunks else None


class _CheckedDirectory:
    """One directory after all checks: its files, its index, and the saved object with placeholders for its leaves."""

    def __init__(
        self, path: str, metadata: Metadata, entries: EntryReader, leaves: dict[str, DcpTensor | DcpObject]
    ) -> None:
        self._path = path
        self.source = entries.source
        self._extra_file = entries.files.get(_EXTRA_NAME)
        self._extra = read_index(self._extra_file) if self._extra_file is not None else None
        self._root = assemble(leaves, metadata.paths, _read_numbers, os.path.join(path, METADATA_NAME))
        if self._extra_file is not None:
            extra = _read_extra_structure(self._extra_file)
            if _VERSION_KEY in extra:
                rename_for_trainer(self._root, extra)
        self.index = self._make_index()

    def load(self, weights_only: bool | None, erases: bool) -> tuple[Any, MappedCheckpoint]:
        extra: Any = {}
        mapping = refusal = None
        if self._extra is not None:
            with _advising_conversion(self._path):
                extra, mapped = TorchZip().load(self._extra.path, weights_only=weights_only, erases=erases)
            # meta.pt is the first file, so its offsets are valid in the run of all files.
            mapping, refusal = mapped.mapping, mapped.refusal
        checkpoint = MappedCheckpoint(self.index, self.source, mapping, refusal)

        def load_leaf(path: KeyPath, leaf: DcpTensor | DcpObject) -> Any:
            if isinstance(leaf, DcpTensor):
                info = leaf.info
                chunks = info.chunks or (_only_chunk(info),)
                return checkpoint.chunked_tensor(info.shape, info.dtype, chunks, name=format_path(path))
            data = io.BytesIO(leaf.view.pread(leaf.view.size_bytes, 0))
            try:
                return torch.load(data, map_location="cpu", weights_only=weights_only)
            except pickle.UnpicklingError as error:
                refused = explain_refusal(self.index, error)
                if not erases or not isinstance(refused, UnsafeGlobalsError):
                    raise refused from error
                checkpoint.refusal = refused
                return RefusedGlobal(listed(refused.places))

        loaded = map_leaves(self._root, load_leaf)
        return {**loaded, **extra}, checkpoint

    def _make_index(self) -> Checkpoint:
        tensors: list[TensorInfo] = []
        storages: list[StorageInfo] = []
        found: list[PickledGlobal] = []
        special: list[SpecialTensor] = []
        for path, leaf in walk_leaves(self._root):
            if isinstance(leaf, DcpTensor):
                tensors.append(leaf.info._replace(path=path))
                storages.extend(leaf.info.storages)
            else:
                tensors.extend(tensor._replace(path=path + tensor.path) for tensor in leaf.tensors)
                storages.extend(leaf.storages)
                special.extend(replace(tensor, path=path + tensor.path) for tensor in leaf.special)
                found.extend(replace(item, path=path + (item.path or ())) for item in leaf.globals)
        if self._extra is not None:
            # Entries of meta.pt replace entries of the same name.
            names = {tensor.path[:1] for tensor in self._extra.tensors}
            tensors = [tensor for tensor in tensors if tensor.path[:1] not in names]
            tensors.extend(self._extra.tensors)
            storages.extend(self._extra.storages)
            found.extend(self._extra.globals)
            special.extend(self._extra.special)
        by_name = {item.name: item for item in reversed(found)}
        return Checkpoint(
            self._path,
            DcpDirectory.name,
            self.source.spans,
            tuple(tensors),
            tuple(storages),
            globals=tuple(by_name.values()),
            special=tuple(special),
        )


def _read_numbers(leaf: Any) -> list[int]:
    """The numbers of an optimizer's parameters, from the leaf that lists them. Parameter names are skipped."""
    if not isinstance(leaf, DcpObject):
        return []
    ids = read_structure(leaf.view.name, leaf.pickled, read_records(leaf.view)[0])
    return [number for number in ids if type(number) is int] if isinstance(ids, list) else []


def _read_extra_structure(file: StoredFile) -> dict[Any, Any]:
    records, pickled = read_records(file)
    extra = read_structure(file.name, pickled, records)
    if not isinstance(extra, dict):
        raise CheckpointFormatError(
            f"{file.name} holds a {type(extra).__name__}, where Lightning puts a dict.", path=file.name
        )
    return extra


def _open(path: str) -> _CheckedDirectory:
    """Reads a directory and requires that everything in it is sound. Its source stays open."""
    _require_metadata(path)
    metadata = read_metadata(os.path.join(path, METADATA_NAME))
    source = FileSet(_find_files(path, metadata))
    try:
        with _advising_conversion(path):
            entries = EntryReader(source)
            leaves = {name: entries.read_item(name, item) for name, item in metadata.items.items()}
            return _CheckedDirectory(path, metadata, entries, leaves)
    except BaseException:
        source.close()
        raise


def _require_metadata(path: str) -> None:
    if is_file(os.path.join(path, METADATA_NAME)):
        return
    of_ranks = sorted(name for name in names_in(path) if name.endswith(METADATA_NAME))
    if of_ranks:
        raise CheckpointFormatError(
            f"{path} holds separate metadata of each rank ({listed(of_ranks)}), because it was saved with "
            f"use_collectives=False, and no common {METADATA_NAME}. Save it with use_collectives=True.",
            path=path,
        )
    raise CheckpointFormatError(
        f"{path} holds {_SUFFIX} files but no {METADATA_NAME}, which torch.distributed.checkpoint writes last: "
        "the save was not finished, or the file was not copied with the others. Copy it again, or resume from "
        "another checkpoint.",
        path=path,
    )


@contextlib.contextmanager
def _advising_conversion(path: str) -> Iterator[None]:
    """Adds to :class:`UnmappableCheckpointError` the advice to convert the directory.

    ``torch.load`` cannot read a directory, so there is no other way to load it.
    """
    try:
        yield
    except UnmappableCheckpointError as reason:
        raise UnmappableCheckpointError(
            f"{reason} On the system that saved it, convert {path} to one file with Lightning's "
            "consolidate_checkpoint, or with torch.distributed.checkpoint.format_utils.dcp_to_torch_save, and load "
            "that file.",
            path=reason.path,
        ) from reason


def _find_files(path: str, metadata: Metadata) -> list[str]:
    """The paths of all files, ``meta.pt`` first.

    Raises:
        CheckpointFormatError: Files are missing, truncated, or not regular files.
    """
    names, damage = _survey_files(path, metadata)
    for item in damage:
        if item.expected is None:
            raise CheckpointFormatError(item.problem, path=path)
    missing = [os.path.basename(item.path) for item in damage if item.actual is None]
    if missing:
        named = {entry.file for entry in metadata.entries}
        raise CheckpointFormatError(
            f"{path} lacks {len(missing)} of the {len(named)} files that its {METADATA_NAME} names: "
            f"{listed(missing)}. Every rank wrote its own; if they wrote to disks of several machines, copy all of "
            "them into one directory.",
            path=path,
        )
    if damage:
        short = [
            f"{os.path.basename(item.path)} (data through byte {item.expected}, but the file is only {item.actual} "
            "bytes)"
            for item in damage
        ]
        raise CheckpointFormatError(
            f"{path} is truncated: {METADATA_NAME} declares more data than {len(short)} of its files hold: "
            f"{listed(short)}. Compare with the sizes of the originals, copy them again, or resume from another "
            "checkpoint.",
            path=path,
        )
    return [os.path.join(path, name) for name in names]


def _survey_files(path: str, metadata: Metadata) -> tuple[list[str], list[Damage]]:
    """The names of the files that can be read, ``meta.pt`` first, and the damage of all files."""
    ends: dict[str, int] = {}
    totals: dict[str, int] = {}
    for entry in metadata.entries:
        ends[entry.file] = max(ends.get(entry.file, 0), entry.end)
        totals[entry.file] = totals.get(entry.file, 0) + entry.nbytes
    names: list[str] = []
    damage: list[Damage] = []
    for name in sorted(ends):
        file = os.path.join(path, name)
        try:
            nbytes = size_of(file)
        except FileNotFoundError:
            problem = f"{file} is missing. {METADATA_NAME} declares {ends[name]} bytes in it."
            damage.append(Damage(file, problem, expected=ends[name]))
            continue
        if nbytes is None:
            damage.append(Damage(file, f"{file} is no regular file. Resume from another checkpoint."))
            continue
        names.append(name)
        if nbytes < ends[name]:
            problem = (
                f"{file} is truncated: {METADATA_NAME} declares data through byte {ends[name]}, but the file is only "
                f"{nbytes} bytes."
            )
            damage.append(Damage(file, problem, expected=ends[name], actual=nbytes))
        elif nbytes < totals[name]:
            # Overlapping entries would let a small file expand to a hundred thousand times its size.
            names.remove(name)
            problem = f"{file} has {nbytes} bytes, and {METADATA_NAME} declares entries of {totals[name]} in it."
            damage.append(Damage(file, problem + " They overlap: the file is damaged or malicious."))
    if is_file(os.path.join(path, _EXTRA_NAME)) and _EXTRA_NAME not in ends:
        names.insert(0, _EXTRA_NAME)
    return names, damage


def _only_chunk(info: TensorInfo) -> ChunkInfo:
    return ChunkInfo((0,) * len(info.shape), info.shape, info.stride, info.storage_offset, info.storage)
