"""A directory of ``torch.distributed.checkpoint``, as Lightning's FSDP and ModelParallel strategies save it.

``.metadata`` says which stretch of which file is which part of which tensor, and each stretch is a small archive of
``torch.save``. So every tensor's bytes are known, with their CRC-32, and the tensors can stay in the files: chunked
ones, since a part begins at any byte. The object is put together as it was saved; a checkpoint of a Trainer becomes the
ordinary one, with ``state_dict``, ``optimizer_states`` and all that is in ``meta.pt``.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_memload.checkpoint.dcp_metadata import METADATA_NAME, Entry, Metadata, SavedTensor, read_metadata
from lightning_memload.checkpoint.dcp_structure import assemble, map_leaves, rename_for_trainer, walk_leaves
from lightning_memload.checkpoint.index import Checkpoint, ChunkInfo, KeyPath, StorageInfo, TensorInfo, format_path
from lightning_memload.checkpoint.inventory import Damage, Inventory, Section
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint
from lightning_memload.checkpoint.source import FilePart, FileSet, LocalFile
from lightning_memload.checkpoint.torch_pickle import read_structure, walk_pickle
from lightning_memload.checkpoint.torch_zip import TorchZip, name_sections, read_index, read_records, read_zip_inventory
from lightning_memload.errors import CheckpointFormatError, listed

__all__ = ["DcpDirectory"]

_EXTRA_NAME = "meta.pt"
_SUFFIX = ".distcp"
# Lightning writes it into every checkpoint of a Trainer and demands it when it loads one.
_VERSION_KEY = "pytorch-lightning_version"


class DcpDirectory:
    """What ``torch.distributed.checkpoint.save`` writes, with the ``meta.pt`` that Lightning puts beside it."""

    name = "dcp"

    def recognizes(self, path: str) -> bool:
        """Whether the directory holds the metadata, or files, of a distributed checkpoint."""
        if not os.path.isdir(path):
            return False
        return os.path.isfile(os.path.join(path, METADATA_NAME)) or any(
            name.endswith(_SUFFIX) for name in os.listdir(path)
        )

    def read_index(self, path: str) -> Checkpoint:
        """Indexes the directory.

        Raises:
            CheckpointFormatError: A file is missing, truncated or damaged, or the parts of a tensor do not cover it.
        """
        directory = _Directory(path)
        directory.source.close()
        return directory.index

    def load(self, path: str, *, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        """Loads the object; the tensors stay in the files.

        Raises:
            pickle.UnpicklingError: ``weights_only`` forbids what the checkpoint holds beside tensors; torch's message.

        Peak memory: the index and what the checkpoint holds beside tensors.
        """
        directory = _Directory(path)
        try:
            return directory.load(weights_only)
        except BaseException:
            directory.source.close()
            raise

    def take_inventory(self, path: str) -> Inventory:
        """Every record of every entry, see :class:`CheckpointFormat`. The metadata itself carries no checksum.

        Entries that contradict the metadata leave nothing to list: then only the first of them is told.
        """
        try:
            directory = _Directory(path)
        except UnmappableCheckpoint:
            raise
        except CheckpointFormatError as error:
            return Inventory(path, self.name, (), (), (Damage(error.path, str(error)),))
        with contextlib.closing(directory.source):
            return directory.take_inventory()


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor in its place in the saved object."""

    info: TensorInfo


@dataclass(frozen=True, slots=True)
class _Object:
    """Any other object in its place, not loaded."""

    part: FilePart
    tensors: tuple[TensorInfo, ...]
    storages: tuple[StorageInfo, ...]
    pickled: bytes


class _Directory:
    """One directory, read and checked: its files, the index, and the saved object with placeholders for its leaves."""

    def __init__(self, path: str) -> None:
        self._path = path
        metadata_path = _find_metadata(path)
        self._metadata = metadata = read_metadata(metadata_path)
        self.source = FileSet(_find_files(path, metadata))
        try:
            with _convertible(path):
                self._files = {os.path.basename(file.name): file for file in self.source.files}
                self._starts = {os.path.basename(span.path): span.start for span in self.source.spans}
                self._extra = read_index(self._files[_EXTRA_NAME]) if _EXTRA_NAME in self._files else None
                self._walked: dict[Any, tuple[tuple[TensorInfo, ...], tuple[StorageInfo, ...]]] = {}
                leaves = {name: self._read_item(name, item) for name, item in metadata.items.items()}
                self._root = assemble(leaves, metadata.paths, self._read_numbers, metadata_path)
                if self._extra is not None:
                    extra = self._read_extra_structure()
                    if _VERSION_KEY in extra:
                        rename_for_trainer(self._root, extra)
                self.index = self._make_index()
        except BaseException:
            self.source.close()
            raise

    def load(self, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        extra: Any = {}
        mapping = None
        if self._extra is not None:
            with _convertible(self._path):
                extra, mapped = TorchZip().load(self._extra.path, weights_only=weights_only)
            # It is the first of the files, so its offsets are those of all of them.
            mapping = mapped.mapping
        checkpoint = MappedCheckpoint(self.index, self.source, mapping)

        def load_leaf(path: KeyPath, leaf: _Tensor | _Object) -> Any:
            if isinstance(leaf, _Tensor):
                info = leaf.info
                chunks = info.chunks or (_only_chunk(info),)
                return checkpoint.chunked_tensor(info.shape, info.dtype, chunks, name=format_path(path))
            data = io.BytesIO(leaf.part.pread(leaf.part.size_bytes, 0))
            return torch.load(data, map_location="cpu", weights_only=weights_only)

        loaded = map_leaves(self._root, load_leaf)
        return {**loaded, **extra}, checkpoint

    def take_inventory(self) -> Inventory:
        """Lists the records of all entries, which are sound as far as they describe tensors."""
        entries = {(entry.file, entry.offset): entry for entry in self._metadata.entries}
        parts: list[tuple[LocalFile | FilePart, int]] = []
        for entry in entries.values():
            file = self._files[entry.file]
            name = f"{file.name}, the entry at byte {entry.offset}"
            part = FilePart(file, name, entry.offset, entry.nbytes)
            parts.append((part, self._starts[entry.file] + entry.offset))
        if _EXTRA_NAME in self._files:
            parts.append((self._files[_EXTRA_NAME], self._starts[_EXTRA_NAME]))
        sections: list[Section] = []
        damage: list[Damage] = []
        for archive, start in parts:
            found, problems = read_zip_inventory(archive, start)
            sections += found
            damage += problems
        names = name_sections(self.index)
        named = tuple(replace(section, key=names.get(section.offset, section.key)) for section in sections)
        return Inventory(self._path, DcpDirectory.name, self.index.files, named, tuple(damage))

    # Entries --------------------------------------------------------------------------------------------------------

    def _read_item(self, name: str, item: SavedTensor | Entry) -> _Tensor | _Object:
        if isinstance(item, Entry):
            return self._read_entry(name, item)
        chunks = []
        for part in item.parts:
            entry = self._read_entry(name, part.entry)
            found = entry.tensors[0] if len(entry.tensors) == 1 and entry.tensors[0].path == () else None
            if found is None or (found.dtype, found.shape) != (item.dtype, part.shape):
                holds = f"{found.dtype} of shape {found.shape}" if found is not None else "no single tensor"
                raise CheckpointFormatError(
                    f"{entry.part.name}: the part at {part.starts} of {name} is {item.dtype} of shape {part.shape} in "
                    f"{METADATA_NAME}, but what lies there is {holds}. The files belong to different checkpoints, or "
                    "are damaged. Resume from another checkpoint.",
                    path=self._files[part.entry.file].name,
                )
            if found.nbytes > found.storage.nbytes or b"conj" in entry.pickled or b"neg" in entry.pickled:
                # torch writes neither the one nor, but for conjugate views, the other.
                raise CheckpointFormatError(
                    f"{entry.part.name}: the part at {part.starts} of {name} is a view ({found.nbytes} bytes of a "
                    f"storage of {found.storage.nbytes}, perhaps conjugate), whose bytes are not its values. Save "
                    "tensor.resolve_conj().contiguous() instead.",
                    path=self._files[part.entry.file].name,
                )
            chunks.append(ChunkInfo(part.starts, part.shape, found.stride, found.storage_offset, found.storage))
        first = chunks[0]
        info = TensorInfo(
            (), item.dtype, item.shape, first.stride, first.storage_offset, first.storage,
            chunks=tuple(chunks) if len(chunks) > 1 else (),
        )  # fmt: skip
        return _Tensor(info)

    def _read_entry(self, name: str, entry: Entry) -> _Object:
        """Indexes one entry, itself a small archive. Runs none of its code."""
        file = self._files[entry.file]
        part = FilePart(file, f"{file.name}, the entry of {name} at byte {entry.offset}", entry.offset, entry.nbytes)
        try:
            records, pickled = read_records(part)
            # Equal parts of equal tensors have equal pickles, and walking one takes longer than all the rest.
            same = (pickled, tuple((key, record.nbytes) for key, record in records.items()))
            if same not in self._walked:
                self._walked[same] = walk_pickle(part.name, pickled, records)
        except CheckpointFormatError as error:
            error.path = file.name
            raise
        tensors, storages = self._walked[same]
        start = self._starts[entry.file] + entry.offset
        placed: dict[str, StorageInfo] = {}
        for storage in storages:
            record = records[f"data/{storage.key}"]
            crc32 = record.crc32 if storage.nbytes == record.nbytes else None
            key = f"{entry.file}:{entry.offset}/{storage.key}"
            placed[storage.key] = StorageInfo(key, start + record.offset, storage.nbytes, crc32, storage.location)
        moved = tuple(replace(tensor, storage=placed[tensor.storage.key]) for tensor in tensors)
        return _Object(part, moved, tuple(placed.values()), pickled)

    # The saved object -----------------------------------------------------------------------------------------------

    def _read_numbers(self, leaf: Any) -> list[int]:
        """The numbers of an optimizer's parameters, from what lists them. Names are none."""
        if not isinstance(leaf, _Object):
            return []
        ids = read_structure(leaf.part.name, leaf.pickled, read_records(leaf.part)[0])
        return [number for number in ids if type(number) is int] if isinstance(ids, list) else []

    def _read_extra_structure(self) -> Any:
        file = self._files[_EXTRA_NAME]
        records, pickled = read_records(file)
        extra = read_structure(file.name, pickled, records)
        if not isinstance(extra, dict):
            raise CheckpointFormatError(
                f"{file.name} holds a {type(extra).__name__}, where Lightning puts a dict.", path=file.name
            )
        return extra

    def _make_index(self) -> Checkpoint:
        tensors: list[TensorInfo] = []
        storages: list[StorageInfo] = []
        for path, leaf in walk_leaves(self._root):
            if isinstance(leaf, _Tensor):
                tensors.append(replace(leaf.info, path=path))
                storages.extend(leaf.info.storages)
            else:
                tensors.extend(replace(tensor, path=path + tensor.path) for tensor in leaf.tensors)
                storages.extend(leaf.storages)
        if self._extra is not None:
            # What meta.pt holds takes the place of what is called the same.
            names = {tensor.path[:1] for tensor in self._extra.tensors}
            tensors = [tensor for tensor in tensors if tensor.path[:1] not in names]
            tensors.extend(self._extra.tensors)
            storages.extend(self._extra.storages)
        return Checkpoint(self._path, DcpDirectory.name, self.source.spans, tuple(tensors), tuple(storages))


@contextlib.contextmanager
def _convertible(path: str) -> Iterator[None]:
    """Nothing loads a directory the ordinary way, so what cannot stay in the files must be converted first."""
    try:
        yield
    except UnmappableCheckpoint as reason:
        raise CheckpointFormatError(
            f"{reason} Where it was saved, make one file of {path} with Lightning's consolidate_checkpoint, or with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save, and load that.",
            path=reason.path,
        ) from reason


def _find_metadata(path: str) -> str:
    """The file that says what the directory holds.

    Raises:
        CheckpointFormatError: There is none.
    """
    metadata_path = os.path.join(path, METADATA_NAME)
    if os.path.isfile(metadata_path):
        return metadata_path
    of_ranks = sorted(name for name in os.listdir(path) if name.endswith(METADATA_NAME))
    if of_ranks:
        raise CheckpointFormatError(
            f"{path} holds the metadata of each rank by itself ({listed(of_ranks)}), since it was saved with "
            f"use_collectives=False, and no {METADATA_NAME} of all. Save it with use_collectives=True.",
            path=path,
        )
    raise CheckpointFormatError(
        f"{path} holds {_SUFFIX} files but no {METADATA_NAME}, which torch.distributed.checkpoint writes last: "
        "the save was not finished, or the file was left behind in a copy. Copy it again, or resume from "
        "another checkpoint.",
        path=path,
    )


def _find_files(path: str, metadata: Metadata) -> list[str]:
    """The files that hold data, ``meta.pt`` first.

    Raises:
        CheckpointFormatError: Files are missing, are no files, or end before what they must hold.
    """
    ends: dict[str, int] = {}
    for entry in metadata.entries:
        ends[entry.file] = max(ends.get(entry.file, 0), entry.offset + entry.nbytes)
    names = sorted(ends)
    missing = [name for name in names if not os.path.exists(os.path.join(path, name))]
    if missing:
        raise CheckpointFormatError(
            f"{path} lacks {len(missing)} of the {len(names)} files that its {METADATA_NAME} names: "
            f"{listed(missing)}. Every rank wrote its own; if they wrote to disks of several machines, copy all of "
            "them into one directory.",
            path=path,
        )
    short = []
    for name in names:
        status = os.stat(os.path.join(path, name))
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointFormatError(
                f"{os.path.join(path, name)} is no regular file. Resume from another checkpoint.", path=path
            )
        if status.st_size < ends[name]:
            short.append(f"{name} (data through byte {ends[name]}, but the file is only {status.st_size} bytes)")
    if short:
        raise CheckpointFormatError(
            f"{path} is truncated: {METADATA_NAME} declares more data than {len(short)} of its files hold: "
            f"{listed(short)}. Compare with the sizes of the originals, copy them again, or resume from another "
            "checkpoint.",
            path=path,
        )
    if os.path.isfile(os.path.join(path, _EXTRA_NAME)) and _EXTRA_NAME not in ends:
        names.insert(0, _EXTRA_NAME)
    return [os.path.join(path, name) for name in names]


def _only_chunk(info: TensorInfo) -> ChunkInfo:
    return ChunkInfo((0,) * len(info.shape), info.shape, info.stride, info.storage_offset, info.storage)
