"""The safetensors format: one file, or the shards of a Hugging Face directory.

The reader finds the files, checks that index and shards agree, and presents the tensors of all files as one checkpoint.
The format has no views, ties or nesting, and no checksums: a flipped bit in the values is not detected.
"""

from __future__ import annotations

import os
import sys
import warnings

import torch

from lightning_memload.bytes import Record
from lightning_memload.checkpoint.index import Checkpoint, SpecialTensor, TensorInfo
from lightning_memload.checkpoint.inventory import Damage, Inventory
from lightning_memload.checkpoint.mapped import MappedCheckpoint, end_loading
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError, listed
from lightning_memload.formats.json_text import MAX_HEADER_BYTES, short
from lightning_memload.formats.safetensors.header import PREFIX_BYTES, read_header, starts_like_header
from lightning_memload.formats.shard_index import (
    INDEX_SUFFIX,
    WHOLE_SAFETENSORS,
    find_shards,
    is_shard_index,
    is_torch_index,
    keep_last,
    visible_names,
)
from lightning_memload.storage import FileMapping, FileSet, map_or_reserve
from lightning_memload.storage.places import is_file, is_folder, read_start

__all__ = ["MAX_HEADER_BYTES", "Safetensors"]

_SUFFIX = ".safetensors"


class Safetensors:
    """A ``.safetensors`` file, a directory of such files, or the ``.safetensors.index.json`` that lists the files."""

    name = "safetensors"

    def recognizes(self, path: str) -> bool:
        """Whether the path is a file with a safetensors header, an index of shards, or a directory with such files."""
        if is_folder(path):
            return any(name.endswith((_SUFFIX, _SUFFIX + INDEX_SUFFIX)) for name in visible_names(path))
        if not is_file(path):
            return False
        if is_shard_index(path):
            return not is_torch_index(path)
        return starts_like_header(_first_bytes(path))

    def read_index(self, path: str) -> Checkpoint:
        """Indexes the file or all shards.

        Reads only the headers: about a hundred bytes per tensor. Peak memory is the index and one parsed header. A
        hostile header takes up to about thirty times its length (measured: 26).

        Raises:
            CheckpointFormatError: A file is truncated or damaged, or shards are missing.
            UnmappableCheckpointError: This machine is big-endian.
        """
        source = FileSet(_find_files(path))
        try:
            return _read_index(path, source)
        finally:
            source.close()

    def load(
        self, path: str, *, weights_only: bool | None, erases: bool = False
    ) -> tuple[dict[str, torch.Tensor], MappedCheckpoint]:
        """Loads a flat dict of tensors whose bytes stay in the files. ``weights_only`` has no effect on this format.

        Tensors of a dtype that torch does not have are ignored, with a warning. The length of the header may put a
        tensor at any byte. torch can compute on such unaligned tensors.

        Raises:
            CheckpointFormatError: As for :meth:`read_index`.
            UnmappableCheckpointError: This machine is big-endian.
        """
        source = FileSet(_find_files(path))
        try:
            index = _read_index(path, source)
            mapping = map_or_reserve(source)
        except BaseException:
            source.close()
            raise
        if index.special:
            lacking = [f"{short(item.name)} ({item.kind})" for item in index.special]
            warnings.warn(
                f"{path} holds {len(lacking)} tensors that torch {torch.__version__} has no dtype for. They are "
                f"ignored: {listed(lacking)}. Convert them, or use another version of torch.",
                stacklevel=2,
            )
        state = {info.storage.key: _mapped_tensor(info, mapping) for info in index}
        return end_loading(state, index, source, mapping)

    def take_inventory(self, path: str) -> Inventory:
        """Returns the tensors and the headers, all without a checksum. See :class:`CheckpointFormat`."""
        records: list[Record] = []
        damage: list[Damage] = []
        try:
            files = _find_files(path)
        except CheckpointFormatError as error:
            return Inventory(path, self.name, (), (), (Damage(path, str(error)),))
        source = FileSet(files)
        try:
            for file, span in zip(source.files, source.spans, strict=True):
                try:
                    header = read_header(file, span.start)
                except CheckpointFormatError as error:
                    damage.append(Damage(file.name, str(error)))
                    continue
                records.append(Record("the header", span.start, header.nbytes, None))
                records += [
                    Record(key, span.start + begin, end - begin, None) for key, (begin, end) in header.ranges.items()
                ]
            if not damage:
                try:
                    _read_index(path, source)
                except UnmappableCheckpointError:
                    pass  # An inventory does not need tensors that can be mapped.
                except CheckpointFormatError as error:
                    damage.append(Damage(path, str(error)))
        finally:
            source.close()
        return Inventory(path, self.name, source.spans, tuple(records), tuple(damage))


def _mapped_tensor(info: TensorInfo, mapping: FileMapping) -> torch.Tensor:
    if info.storage.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype, device="cpu")
    return mapping.tensor(info.storage.offset, info.shape, info.dtype)


# Which files ---------------------------------------------------------------------------------------------------------


def _first_bytes(path: str) -> bytes:
    return read_start(path, PREFIX_BYTES)


def _find_files(path: str) -> list[str]:
    """Returns the files of a checkpoint in the order of their names.

    Raises:
        CheckpointFormatError: There are several indexes, the index is damaged, or files that it lists are missing.
    """
    files = find_shards(path, _SUFFIX, WHOLE_SAFETENSORS)
    if files is None:
        files = [os.path.join(path, name) for name in visible_names(path) if name.endswith(_SUFFIX)]
        missing = [os.path.basename(file) for file in files if not is_file(file)]
        if missing:
            raise CheckpointFormatError(
                f"{path} is not complete: of its {len(files)} files {len(missing)} are missing or no regular files: "
                f"{listed(map(short, missing))}. Copy or download them again.",
                path=path,
            )
    return files


# What is in them -----------------------------------------------------------------------------------------------------


def _read_index(path: str, source: FileSet) -> Checkpoint:
    if sys.byteorder != "little":
        raise UnmappableCheckpointError(
            f"{path} is little-endian, but this machine is big-endian. Its tensors must be byte-swapped before use.",
            path=path,
        )
    found: list[tuple[str, tuple[TensorInfo, ...]]] = []
    special: list[SpecialTensor] = []
    metadata: dict[str, str] = {}
    for file, span in zip(source.files, source.spans, strict=True):
        header = read_header(file, span.start)
        metadata = header.metadata | metadata
        special += header.special
        found.append((file.name, header.tensors))
    tensors = found[0][1] if len(found) == 1 else _merge(path, [(f, info) for f, infos in found for info in infos])
    return Checkpoint(
        path=path,
        format=Safetensors.name,
        files=source.spans,
        tensors=tensors,
        storages=tuple(info.storage for info in tensors),
        metadata=metadata,
        special=tuple(special),
    )


def _merge(path: str, found: list[tuple[str, TensorInfo]]) -> tuple[TensorInfo, ...]:
    """The tensors of several files, each with the file that it is in, each tensor once."""
    if not _has_index(path):
        _require_once(path, found)
    holders = keep_last(path, ((info.storage.key, file) for file, info in found))
    return tuple(info for file, info in found if holders[info.storage.key] == file)


def _has_index(path: str) -> bool:
    return not is_folder(path) or any(name.endswith(_SUFFIX + INDEX_SUFFIX) for name in visible_names(path))


def _require_once(path: str, found: list[tuple[str, TensorInfo]]) -> None:
    holders: dict[str, str] = {}
    twice: list[str] = []
    for file, info in found:
        shard, key = os.path.basename(file), info.storage.key
        if key in holders:
            twice.append(f"{short(key)} in {holders[key]} and {shard}")
        holders.setdefault(key, shard)
    if twice:
        raise CheckpointFormatError(
            f"{path} has no index and holds {len(twice)} tensors twice: {listed(twice)}. Give the path of one of the "
            "files.",
            path=path,
        )
