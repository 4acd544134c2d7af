"""Reads the entries of a distributed checkpoint: small archives of ``torch.save``, one after the other in the files.

Each entry is compared with the metadata before it is used. No code of an entry runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from lightning_memload.bytes import FileRange, Record
from lightning_memload.checkpoint.index import ChunkInfo, PickledGlobal, SpecialTensor, StorageInfo, TensorInfo
from lightning_memload.checkpoint.inventory import Damage
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError
from lightning_memload.formats.dcp.metadata import METADATA_NAME, SavedTensor
from lightning_memload.formats.torch_zip.records import pickle_is_sound, read_records, read_zip_inventory
from lightning_memload.pickles.structure import PickleContents, walk_pickle
from lightning_memload.storage import FileSet, FileView

__all__ = ["DcpObject", "DcpTensor", "EntryReader"]


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """Stands for a tensor in the saved object."""

    info: TensorInfo


@dataclass(frozen=True, slots=True)
class DcpObject:
    """Stands for any other object in the saved object, which is not loaded yet."""

    view: FileView
    tensors: tuple[TensorInfo, ...]
    storages: tuple[StorageInfo, ...]
    pickled: bytes
    globals: tuple[PickledGlobal, ...]
    special: tuple[SpecialTensor, ...]


class EntryReader:
    """Reads the entries in the files of a directory.

    Args:
        source: All files. The caller closes it.

    Attributes:
        source: All files.
        files: The files by name.
        starts: The position of each file in the run of all files, by name.
    """

    def __init__(self, source: FileSet) -> None:
        self.source = source
        self.files = {os.path.basename(file.name): file for file in source.files}
        self.starts = {os.path.basename(span.path): span.start for span in source.spans}
        self._walked: dict[Any, PickleContents] = {}

    def take_inventory(self, entry: FileRange, label: str) -> tuple[list[Record], list[Damage], bool]:
        """The records of an entry, their damage, and whether the records that describe it are sound.

        Raises:
            UnmappableCheckpointError: The records are compressed.
        """
        file, start = self.files[entry.file], self.starts[entry.file] + entry.offset
        view = FileView(file, f"{file.name}, the entry of {label} at byte {entry.offset}", entry.offset, entry.nbytes)
        records, damage = read_zip_inventory(view, start)
        readable = not damage and pickle_is_sound(view, records, start)
        named = [record._replace(name=f"{label} ({record.name.partition('/')[2]})") for record in records]
        placed = [replace(item, path=file.name, key=label, offset=entry.offset + (item.offset or 0)) for item in damage]
        return named, placed, readable

    def read_item(self, name: str, item: SavedTensor | FileRange) -> DcpTensor | DcpObject:
        """Indexes an item of the metadata: a tensor in chunks, or an entry that holds another object.

        Raises:
            CheckpointFormatError: An entry is damaged, or does not match the metadata.
            UnmappableCheckpointError: Its tensors cannot stay in the file.
        """
        if isinstance(item, FileRange):
            return self._read_entry(name, item)
        chunks = []
        for chunk in item.chunks:
            entry = self._read_entry(name, chunk.entry)
            found = entry.tensors[0] if len(entry.tensors) == 1 and entry.tensors[0].path == () else None
            if found is None or (found.dtype, found.shape) != (item.dtype, chunk.shape):
                holds = f"{found.dtype} of shape {found.shape}" if found is not None else "no single tensor"
                raise CheckpointFormatError(
                    f"{entry.view.name}: the chunk at {chunk.starts} of {name} is {item.dtype} of shape {chunk.shape} "
                    f"in {METADATA_NAME}, but what lies there is {holds}. The files belong to different checkpoints, "
                    "or are damaged. Resume from another checkpoint.",
                    path=self.files[chunk.entry.file].name,
                )
            if found.nbytes > found.storage.nbytes or b"conj" in entry.pickled or b"neg" in entry.pickled:
                # torch writes such an entry for conjugate views only.
                raise CheckpointFormatError(
                    f"{entry.view.name}: the chunk at {chunk.starts} of {name} is a view ({found.nbytes} bytes of a "
                    f"storage of {found.storage.nbytes}, perhaps conjugate), whose bytes are not its values. Save "
                    "tensor.resolve_conj().contiguous() instead.",
                    path=self.files[chunk.entry.file].name,
                )
            chunks.append(ChunkInfo(chunk.starts, chunk.shape, found.stride, found.storage_offset, found.storage))
        first = chunks[0]
        info = TensorInfo(
            (), item.dtype, item.shape, first.stride, first.storage_offset, first.storage,
            chunks=tuple(chunks) if len(chunks) > 1 else (),
        )  # fmt: skip
        return DcpTensor(info)

    def _read_entry(self, name: str, entry: FileRange) -> DcpObject:
        """Indexes one entry, which is a small archive. Runs no code of it."""
        file = self.files[entry.file]
        view = FileView(file, f"{file.name}, the entry of {name} at byte {entry.offset}", entry.offset, entry.nbytes)
        try:
            records, pickled = read_records(view)
            # Parts of equal shape have equal pickles, and walking a pickle is the slowest step, so it is cached.
            same = (pickled, tuple((key, record.nbytes) for key, record in records.items()))
            if same not in self._walked:
                self._walked[same] = walk_pickle(view.name, pickled, records)
        except (CheckpointFormatError, UnmappableCheckpointError) as error:
            error.path = file.name
            raise
        found = self._walked[same]
        start = self.starts[entry.file] + entry.offset
        placed: dict[str, StorageInfo] = {}
        for storage in found.storages:
            record = records[f"data/{storage.key}"]
            crc32 = record.crc32 if storage.nbytes == record.nbytes else None
            key = f"{entry.file}:{entry.offset}/{storage.key}"
            placed[storage.key] = StorageInfo(key, start + record.offset, storage.nbytes, crc32, storage.location)
        moved = tuple(tensor._replace(storage=placed[tensor.storage.key]) for tensor in found.tensors)
        return DcpObject(view, moved, tuple(placed.values()), pickled, found.globals, found.special)
