"""A directory of ``torch.distributed.checkpoint``, as Lightning's FSDP and ModelParallel strategies save it.

``.metadata`` says which stretch of which file is which part of which tensor, and each stretch is a small archive of
``torch.save``. So every tensor's bytes are known, with their CRC-32, and the tensors can stay in the files: chunked
ones, since a part begins at any byte. The object is put together as it was saved; a checkpoint of a Trainer becomes the
ordinary one, with ``state_dict``, ``optimizer_states`` and all that is in ``meta.pt``. Optimizer states stay under the
names of their parameters, as the strategies save them.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_memload.checkpoint.dcp_metadata import (
    METADATA_NAME,
    Entry,
    Metadata,
    SavedTensor,
    read_metadata,
    survey_metadata,
)
from lightning_memload.checkpoint.index import Checkpoint, ChunkInfo, KeyPath, StorageInfo, TensorInfo
from lightning_memload.checkpoint.inventory import Damage, Inventory, Section
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint
from lightning_memload.checkpoint.source import FilePart, FileSet, LocalFile
from lightning_memload.checkpoint.torch_pickle import read_structure, walk_pickle
from lightning_memload.checkpoint.torch_zip import (
    TorchZip,
    pickle_is_sound,
    read_index,
    read_records,
    read_zip_inventory,
)
from lightning_memload.errors import CheckpointFormatError, listed

__all__ = ["DcpDirectory"]

_EXTRA_NAME = "meta.pt"
_SUFFIX = ".distcp"
# Lightning writes it into every checkpoint of a Trainer and demands it when it loads one.
_VERSION_KEY = "pytorch-lightning_version"
# Lists lose their empty containers when they are flattened. More holes than this are nobody's list.
_MAX_HOLES = 100_000


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
        directory = _open(path)
        directory.source.close()
        return directory.index

    def load(self, path: str, *, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        """Loads the object; the tensors stay in the files.

        Raises:
            pickle.UnpicklingError: ``weights_only`` forbids what the checkpoint holds beside tensors; torch's message.

        Peak memory: the index and what the checkpoint holds beside tensors.
        """
        directory = _open(path)
        try:
            return directory.load(weights_only)
        except BaseException:
            directory.source.close()
            raise

    def take_inventory(self, path: str) -> Inventory:
        """Every record of every entry, and the metadata, which have no checksum; see :class:`CheckpointFormat`."""
        metadata_path = os.path.join(path, METADATA_NAME)
        try:
            _require_metadata(path)
            metadata, problems = survey_metadata(metadata_path)
        except CheckpointFormatError as error:
            return Inventory(path, self.name, (), (), (Damage(error.path, str(error)),))
        names, damage = _survey_files(path, metadata)
        damage += [Damage(metadata_path, problem) for problem in problems]
        # The metadata last: the offsets of the others are then those of an index.
        source = FileSet([os.path.join(path, name) for name in (*names, METADATA_NAME)])
        with contextlib.closing(source):
            sections = [Section(METADATA_NAME, source.spans[-1].start, source.spans[-1].nbytes, None)]
            entries = _Entries(source)
            sound: set[Entry] = set()
            for entry, label in metadata.entries.items():
                # What is missing, or ends too early, was told with its file.
                if entry.file in entries.files and entry.end <= entries.files[entry.file].size_bytes:
                    found, wrong, readable = entries.take_inventory(entry, label)
                    sections += found
                    damage += wrong
                    sound.update([entry] if readable else [])
            readable = True
            if names[:1] == [_EXTRA_NAME]:
                found, wrong = read_zip_inventory(source.files[0])
                readable = pickle_is_sound(source.files[0], found)
                sections += found
                damage += wrong
            leaves: dict[str, _Tensor | _Object] = {}
            for name, item in metadata.items.items():
                readable_part = _part_within(item, sound)
                if readable_part is not None:
                    with _noting(damage, name):
                        leaves[name] = entries.read_item(name, readable_part)
            # What is not readable is found when records are held against their checksums.
            if not damage and readable and sound.issuperset(metadata.entries) and len(leaves) == len(metadata.items):
                with _noting(damage, None):
                    _Directory(path, metadata, entries, leaves)
            return Inventory(path, self.name, source.spans, tuple(sections), tuple(damage))


@contextlib.contextmanager
def _noting(damage: list[Damage], key: str | None) -> Iterator[None]:
    """Keeps what is wrong, and goes on."""
    try:
        yield
    except UnmappableCheckpoint:
        pass  # Nobody asks here whether the tensors can be used as they lie.
    except CheckpointFormatError as error:
        damage.append(Damage(error.path, str(error), key=key))


def _part_within(item: SavedTensor | Entry, entries: set[Entry]) -> SavedTensor | Entry | None:
    """As much of an item as lies in some entries, ``None`` if nothing does."""
    if isinstance(item, Entry):
        return item if item in entries else None
    parts = tuple(part for part in item.parts if part.entry in entries)
    return replace(item, parts=parts) if parts else None


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


class _Positions(dict[int, Any]):
    """A list that is being put together in any order."""


class _Entries:
    """The files of a directory, and what the entries in them say of themselves."""

    def __init__(self, source: FileSet) -> None:
        self.source = source
        self.files = {os.path.basename(file.name): file for file in source.files}
        self.starts = {os.path.basename(span.path): span.start for span in source.spans}
        self._walked: dict[Any, tuple[tuple[TensorInfo, ...], tuple[StorageInfo, ...]]] = {}

    def take_inventory(self, entry: Entry, label: str) -> tuple[list[Section], list[Damage], bool]:
        """The records of an entry, what is wrong with them, and whether those that describe it can be relied on.

        Raises:
            UnmappableCheckpoint: The records are compressed.
        """
        file, start = self.files[entry.file], self.starts[entry.file] + entry.offset
        part = FilePart(file, f"{file.name}, the entry of {label} at byte {entry.offset}", entry.offset, entry.nbytes)
        sections, damage = read_zip_inventory(part, start)
        readable = not damage and pickle_is_sound(part, sections, start)
        named = [replace(section, key=f"{label} ({section.key.partition('/')[2]})") for section in sections]
        placed = [replace(item, path=file.name, key=label, offset=entry.offset + (item.offset or 0)) for item in damage]
        return named, placed, readable

    def read_item(self, name: str, item: SavedTensor | Entry) -> _Tensor | _Object:
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
                    path=self.files[part.entry.file].name,
                )
            if found.nbytes > found.storage.nbytes or b"conj" in entry.pickled or b"neg" in entry.pickled:
                # torch writes neither the one nor, but for conjugate views, the other.
                raise CheckpointFormatError(
                    f"{entry.part.name}: the part at {part.starts} of {name} is a view ({found.nbytes} bytes of a "
                    f"storage of {found.storage.nbytes}, perhaps conjugate), whose bytes are not its values. Save "
                    "tensor.resolve_conj().contiguous() instead.",
                    path=self.files[part.entry.file].name,
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
        file = self.files[entry.file]
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
        start = self.starts[entry.file] + entry.offset
        placed: dict[str, StorageInfo] = {}
        for storage in storages:
            record = records[f"data/{storage.key}"]
            crc32 = record.crc32 if storage.nbytes == record.nbytes else None
            key = f"{entry.file}:{entry.offset}/{storage.key}"
            placed[storage.key] = StorageInfo(key, start + record.offset, storage.nbytes, crc32, storage.location)
        moved = tuple(replace(tensor, storage=placed[tensor.storage.key]) for tensor in tensors)
        return _Object(part, moved, tuple(placed.values()), pickled)


class _Directory:
    """One directory, read and checked: its files, the index, and the saved object with placeholders for its leaves."""

    def __init__(self, path: str, metadata: Metadata, entries: _Entries, leaves: dict[str, _Tensor | _Object]) -> None:
        self._path = path
        self.source = entries.source
        self._extra_file = entries.files.get(_EXTRA_NAME)
        self._extra = read_index(self._extra_file) if self._extra_file is not None else None
        self._root = self._restore_structure(metadata, leaves)
        self.index = self._make_index()

    def load(self, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        extra: Any = {}
        mapping = None
        if self._extra is not None:
            with _convertible(self._path):
                extra, mapped = TorchZip().load(self._extra.path, weights_only=weights_only)
            # It is the first of the files, so its offsets are those of all of them.
            mapping = mapped.mapping
        checkpoint = MappedCheckpoint(self.index, self.source, mapping)

        def load_leaf(leaf: _Tensor | _Object) -> Any:
            if isinstance(leaf, _Tensor):
                info = leaf.info
                return checkpoint.chunked_tensor(info.shape, info.dtype, info.chunks or (_only_chunk(info),))
            data = io.BytesIO(leaf.part.pread(leaf.part.size_bytes, 0))
            return torch.load(data, map_location="cpu", weights_only=weights_only)

        loaded = _map_leaves(self._root, load_leaf)
        return {**loaded, **extra}, checkpoint

    # The saved object -----------------------------------------------------------------------------------------------

    def _restore_structure(self, metadata: Metadata, leaves: dict[str, _Tensor | _Object]) -> dict[Any, Any]:
        root: dict[Any, Any] = {}
        for name, leaf in leaves.items():
            self._place(root, name, metadata.paths[name], leaf)
        self._holes = 0
        settled: dict[Any, Any] = self._settle(root)
        if self._extra_file is not None:
            extra = _read_extra_structure(self._extra_file)
            if _VERSION_KEY in extra:
                _rename_for_trainer(settled, extra)
        return settled

    def _place(self, root: dict[Any, Any], name: str, path: KeyPath, leaf: _Tensor | _Object) -> None:
        node: Any = root
        for depth, key in enumerate(path):
            last = depth + 1 == len(path)
            child: Any = leaf if last else _Positions() if isinstance(path[depth + 1], int) else {}
            found = node.setdefault(key, child)
            if type(found) is not type(child) or (last and found is not leaf):
                raise CheckpointFormatError(
                    f"{os.path.join(self._path, METADATA_NAME)} is damaged: the keys {path} that lead to {name} lead "
                    "to something else as well. Resume from another checkpoint.",
                    path=os.path.join(self._path, METADATA_NAME),
                )
            node = found

    def _settle(self, node: Any) -> Any:
        """Lists for positions, and an optimizer's states under the ids that it saved."""
        if isinstance(node, _Positions):
            length = max(node) + 1
            self._holes += length - len(node)
            if self._holes > _MAX_HOLES:
                raise CheckpointFormatError(
                    f"{os.path.join(self._path, METADATA_NAME)} is damaged: it describes lists with more than "
                    f"{_MAX_HOLES} positions that hold nothing. Resume from another checkpoint.",
                    path=os.path.join(self._path, METADATA_NAME),
                )
            return [self._settle(node.get(position)) for position in range(length)]
        if not isinstance(node, dict):
            return node
        settled = {key: self._settle(value) for key, value in node.items()}
        groups = settled.get("param_groups")
        if isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups):
            # Flattening makes strings of an optimizer's numbers, and loses a state that is empty.
            numbers = {str(number): number for group in groups for number in self._read_numbers(group["params"])}
            settled["state"] = {numbers.get(key, key): value for key, value in settled.get("state", {}).items()}
        return settled

    def _read_numbers(self, leaf: Any) -> Iterable[int]:
        ids = self._read_plain(leaf.part, leaf.pickled) if isinstance(leaf, _Object) else None
        return [number for number in ids if type(number) is int] if isinstance(ids, list) else []

    def _read_plain(self, part: FilePart, pickled: bytes) -> Any:
        return read_structure(part.name, pickled, read_records(part)[0])

    def _make_index(self) -> Checkpoint:
        tensors: list[TensorInfo] = []
        storages: list[StorageInfo] = []
        for path, leaf in _leaves(self._root):
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


def _read_extra_structure(file: LocalFile) -> dict[Any, Any]:
    records, pickled = read_records(file)
    extra = read_structure(file.name, pickled, records)
    if not isinstance(extra, dict):
        raise CheckpointFormatError(
            f"{file.name} holds a {type(extra).__name__}, where Lightning puts a dict.", path=file.name
        )
    return extra


def _open(path: str) -> _Directory:
    """Reads a directory, of which everything must be sound. Its source stays open."""
    _require_metadata(path)
    metadata = read_metadata(os.path.join(path, METADATA_NAME))
    source = FileSet(_find_files(path, metadata))
    try:
        with _convertible(path):
            entries = _Entries(source)
            leaves = {name: entries.read_item(name, item) for name, item in metadata.items.items()}
            return _Directory(path, metadata, entries, leaves)
    except BaseException:
        source.close()
        raise


def _require_metadata(path: str) -> None:
    if os.path.isfile(os.path.join(path, METADATA_NAME)):
        return
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


def _find_files(path: str, metadata: Metadata) -> list[str]:
    """The files, ``meta.pt`` first.

    Raises:
        CheckpointFormatError: Files are missing, are no files, or end before what they must hold.
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
    """The names of the files that can be read, ``meta.pt`` first, and what is wrong with them and with the others."""
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
            status = os.stat(file)
        except FileNotFoundError:
            problem = f"{file} is missing. {METADATA_NAME} declares {ends[name]} bytes in it."
            damage.append(Damage(file, problem, expected=ends[name]))
            continue
        if not stat.S_ISREG(status.st_mode):
            damage.append(Damage(file, f"{file} is no regular file. Resume from another checkpoint."))
            continue
        names.append(name)
        if status.st_size < ends[name]:
            problem = (
                f"{file} is truncated: {METADATA_NAME} declares data through byte {ends[name]}, but the file is only "
                f"{status.st_size} bytes."
            )
            damage.append(Damage(file, problem, expected=ends[name], actual=status.st_size))
        elif status.st_size < totals[name]:
            # A small file could else stand for a hundred thousand times its size.
            names.remove(name)
            problem = (
                f"{file} has {status.st_size} bytes, and {METADATA_NAME} declares entries of {totals[name]} in it."
            )
            damage.append(Damage(file, problem + " They overlap: it is damaged, or made to mislead."))
    if os.path.isfile(os.path.join(path, _EXTRA_NAME)) and _EXTRA_NAME not in ends:
        names.insert(0, _EXTRA_NAME)
    return names, damage


def _rename_for_trainer(root: dict[Any, Any], extra: dict[Any, Any]) -> None:
    """Gives what Lightning's strategies renamed when they saved its name in an ordinary checkpoint again."""
    if "state_dict" not in root:
        # FSDPStrategy; ModelParallelStrategy leaves the name.
        weights = root.pop("model", {})
        rest = dict(root)
        root.clear()
        root.update(state_dict=weights, **rest)
    optimizers: list[Any] = []
    while f"optimizer_{len(optimizers)}" in root:
        optimizers.append(root.pop(f"optimizer_{len(optimizers)}"))
    # A checkpoint without optimizers leaves no trace of the empty list; one of weights only has no schedulers either.
    if optimizers or "lr_schedulers" in extra:
        root["optimizer_states"] = optimizers


def _map_leaves(node: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(node, dict):
        return {key: _map_leaves(value, function) for key, value in node.items()}
    if isinstance(node, list):
        return [_map_leaves(value, function) for value in node]
    return None if node is None else function(node)


def _leaves(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, _Tensor | _Object]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _leaves(value, (*path, position))
    elif node is not None:
        yield path, node


def _only_chunk(info: TensorInfo) -> ChunkInfo:
    return ChunkInfo((0,) * len(info.shape), info.shape, info.stride, info.storage_offset, info.storage)
