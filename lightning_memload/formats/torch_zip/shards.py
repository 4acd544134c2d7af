"""The older format of Hugging Face: a directory with ``pytorch_model.bin``, or with shards that an index lists.

Each shard is a complete torch zip file that holds a state dict. All shards together are one checkpoint. The rules for a
single torch file apply to each shard.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from lightning_memload.bytes import FileSpan, Record, lay_out
from lightning_memload.checkpoint.index import Checkpoint, TensorInfo
from lightning_memload.checkpoint.inventory import Damage, Inventory
from lightning_memload.checkpoint.mapped import MappedCheckpoint, end_loading
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError
from lightning_memload.formats.shard_index import (
    WHOLE_TORCH,
    find_shards,
    holds_torch_shards,
    is_torch_index,
    keep_last,
)
from lightning_memload.formats.torch_zip.reader import TorchZip, load_what_is_allowed, read_index
from lightning_memload.formats.torch_zip.records import is_zip
from lightning_memload.storage import FileSet, map_or_reserve
from lightning_memload.storage.places import is_file, is_folder, read_start, size_of

__all__ = ["TorchShards"]

_SUFFIX = ".bin"


class TorchShards:
    """A directory with ``pytorch_model.bin`` or its shards, or the ``.bin.index.json`` that lists the shards."""

    name = "torch_shards"

    def recognizes(self, path: str) -> bool:
        """Whether the path is a directory with such files, or the index of shards that are not safetensors files."""
        if is_folder(path):
            return holds_torch_shards(path)
        return is_file(path) and is_torch_index(path)

    def read_index(self, path: str) -> Checkpoint:
        """Indexes all shards. See :class:`TorchZip`."""
        source = FileSet(_find_files(path))
        try:
            return _join(path, source, _read_shards(source))
        finally:
            source.close()

    def load(self, path: str, *, weights_only: bool | None, erases: bool = False) -> tuple[Any, MappedCheckpoint]:
        """Loads one dict with all tensors. Their bytes stay in the files.

        Raises:
            CheckpointFormatError: A shard does not hold a dict.
            UnmappableCheckpointError: A shard cannot be mapped.
            UnsafeGlobalsError: A shard holds globals that ``weights_only`` forbids.
        """
        source = FileSet(_find_files(path))
        try:
            shards = _read_shards(source)
            mapping = map_or_reserve(source)
            state: dict[Any, Any] = {}
            refusal = None
            for file, shard in zip(source.files, shards, strict=True):
                loaded, refused = load_what_is_allowed(mapping, shard, file, weights_only=weights_only, erases=erases)
                refusal = refusal or refused
                if not isinstance(loaded, dict):
                    raise CheckpointFormatError(
                        f"{file.name} holds a {type(loaded).__name__}, but a shard is a dict of tensors.", path=path
                    )
                metadata = getattr(state, "_metadata", None) or getattr(loaded, "_metadata", None)
                if not state:
                    state = loaded
                else:
                    state.update(loaded)
                if metadata is not None and type(state) is not dict:
                    state._metadata = metadata  # type: ignore[attr-defined]
            return end_loading(state, _join(path, source, shards), source, mapping, refusal)
        except BaseException:
            source.close()
            raise

    def take_inventory(self, path: str) -> Inventory:
        """Returns one inventory of all shards. See :class:`TorchZip`."""
        try:
            files = _find_files(path)
        except CheckpointFormatError as error:
            return Inventory(path, self.name, (), (), (Damage(path, str(error)),))
        records: list[Record] = []
        damage: list[Damage] = []
        spans = lay_out((file, size_of(file) or 0) for file in files)
        for span in spans:
            try:
                found = TorchZip().take_inventory(span.path)
            except UnmappableCheckpointError:
                raise
            except CheckpointFormatError as error:
                damage.append(Damage(span.path, str(error)))
                continue
            records += [record._replace(offset=record.offset + span.start) for record in found.records]
            damage += found.damage
        return Inventory(path, self.name, spans, tuple(records), tuple(damage))


def _find_files(path: str) -> list[str]:
    files = find_shards(path, _SUFFIX, WHOLE_TORCH)
    assert files is not None  # recognizes() accepted the path
    for file in files:
        if not is_zip(file) and is_file(file):
            kind = UnmappableCheckpointError if read_start(file, 2).startswith(b"\x80") else CheckpointFormatError
            raise kind(
                f"{file}, a shard of {path}, does not have the format that torch.save writes since torch 1.6. "
                "Download it again, or load it with torch.load and save it again.",
                path=path,
            )
    return files


def _read_shards(source: FileSet) -> list[Checkpoint]:
    """Returns the index of each shard. The offsets of its storages are those in the run of all files."""
    return [_shift(read_index(file), span) for file, span in zip(source.files, source.spans, strict=True)]


def _shift(index: Checkpoint, span: FileSpan) -> Checkpoint:
    shard = os.path.basename(span.path)
    moved = {
        storage.key: storage._replace(key=f"{shard}/{storage.key}", offset=storage.offset + span.start)
        for storage in index.storages
    }
    tensors = tuple(tensor._replace(storage=moved[tensor.storage.key]) for tensor in index.tensors)
    return replace(index, files=(span,), tensors=tensors, storages=tuple(moved.values()))


def _join(path: str, source: FileSet, shards: list[Checkpoint]) -> Checkpoint:
    """Returns one index of all shards. If several shards hold a tensor, the last shard is used."""
    holders = keep_last(
        path, ((tensor.name, file.name) for file, shard in zip(source.files, shards, strict=True) for tensor in shard)
    )
    tensors: list[TensorInfo] = []
    for file, shard in zip(source.files, shards, strict=True):
        tensors += [tensor for tensor in shard if holders[tensor.name] == file.name]
    return Checkpoint(
        path=path,
        format=TorchShards.name,
        files=source.spans,
        tensors=tuple(tensors),
        storages=tuple(storage for shard in shards for storage in shard.storages),
        globals=tuple({item.name: item for shard in shards for item in shard.globals}.values()),
        special=tuple(item for shard in shards for item in shard.special),
    )
