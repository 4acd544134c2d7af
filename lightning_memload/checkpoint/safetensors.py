"""The safetensors format: one file, or the shards of a Hugging Face directory.

Which files there are, whether index and shards agree, and the tensors of all of them as one checkpoint. The format
knows neither views nor ties nor nesting, and has no checksums: a flipped bit in the values goes unnoticed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import torch

from lightning_memload.checkpoint.index import Checkpoint, TensorInfo
from lightning_memload.checkpoint.inventory import Damage, Inventory, Section
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint
from lightning_memload.checkpoint.mapping import FileMapping
from lightning_memload.checkpoint.safetensors_header import PREFIX_BYTES, read_header, starts_like_header
from lightning_memload.checkpoint.safetensors_json import COPY_AGAIN, MAX_HEADER_BYTES, parse_json, short
from lightning_memload.checkpoint.source import FileSet, LocalFile
from lightning_memload.checkpoint.tensor_manifest import is_tensor_directory
from lightning_memload.errors import CheckpointFormatError, listed

__all__ = ["MAX_HEADER_BYTES", "Safetensors"]

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"


class Safetensors:
    """A ``.safetensors`` file, a directory of such files, or the ``.safetensors.index.json`` that lists them."""

    name = "safetensors"

    def recognizes(self, path: str) -> bool:
        """Whether the file starts with a header or is an index of shards, or the directory has such files.

        One with our own manifest is more than that, see :class:`TensorDirectory`.
        """
        if os.path.isdir(path):
            return not is_tensor_directory(path) and any(
                name.endswith((_SUFFIX, _INDEX_SUFFIX)) for name in _visible_names(path)
            )
        if not os.path.isfile(path):
            return False
        return _is_shard_index(path) or starts_like_header(_first_bytes(path))

    def read_index(self, path: str) -> Checkpoint:
        """Indexes the file or all shards.

        Reads the headers only: some hundred bytes per tensor. Peak memory is the index and one parsed header, which
        for a hostile one is up to some thirty times its length (measured: 26).

        Raises:
            CheckpointFormatError: It is truncated or damaged, shards are missing, or a tensor has a dtype that torch
                lacks.
            UnmappableCheckpoint: This machine has the other byte order.
        """
        files, weight_map = _find_files(path)
        source = FileSet(files)
        try:
            return _read_index(path, source, weight_map)
        finally:
            source.close()

    def load(self, path: str, *, weights_only: bool | None) -> tuple[dict[str, torch.Tensor], MappedCheckpoint]:
        """Loads a flat dict of tensors that lie in the files; ``weights_only`` has nothing to forbid here.

        A tensor may begin at any byte, as the header's length has it; torch computes on such tensors all the same.

        Raises:
            CheckpointFormatError: As :meth:`read_index`.
            UnmappableCheckpoint: This machine has the other byte order.
        """
        files, weight_map = _find_files(path)
        source = FileSet(files)
        try:
            index = _read_index(path, source, weight_map)
            mapping = FileMapping(source)
        except BaseException:
            source.close()
            raise
        state = {info.storage.key: _mapped_tensor(info, mapping) for info in index}
        return state, MappedCheckpoint(index, source, mapping)

    def take_inventory(self, path: str) -> Inventory:
        """The tensors and the headers, none of which has a checksum, see :class:`CheckpointFormat`."""
        sections: list[Section] = []
        damage: list[Damage] = []
        try:
            files, weight_map = _find_files(path)
        except CheckpointFormatError as error:
            return Inventory(path, self.name, (), (), (Damage(path, str(error)),))
        source = FileSet(files)
        try:
            for file, span in zip(source.files, source.spans, strict=True):
                try:
                    tensors, _ = read_header(file, span.start)
                except CheckpointFormatError as error:
                    damage.append(Damage(file.name, str(error)))
                    continue
                sections += [Section(t.name, t.storage.offset, t.storage.nbytes, None) for t in tensors]
                header_bytes = span.nbytes - sum(tensor.storage.nbytes for tensor in tensors)
                sections.append(Section("the header", span.start, header_bytes, None))
            if not damage:
                try:
                    _read_index(path, source, weight_map)
                except UnmappableCheckpoint:
                    pass  # Nobody asks here whether the tensors can be used as they lie.
                except CheckpointFormatError as error:
                    damage.append(Damage(path, str(error)))
        finally:
            source.close()
        return Inventory(path, self.name, source.spans, tuple(sections), tuple(damage))


def _mapped_tensor(info: TensorInfo, mapping: FileMapping) -> torch.Tensor:
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype, device="cpu")
    storage = mapping.storage(info.storage.offset, info.storage.nbytes)
    return torch.empty(0, dtype=info.dtype, device="cpu").set_(storage, 0, info.shape, info.stride)


# Which files ---------------------------------------------------------------------------------------------------------


def _visible_names(folder: str) -> list[str]:
    # Hidden ones are leftovers of downloads and of other systems ("._model.safetensors"), never shards.
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(PREFIX_BYTES)


def _is_shard_index(path: str) -> bool:
    """Whether a file is JSON text with a ``weight_map``; damaged JSON counts as well."""
    start = _first_bytes(path)
    # No text has a zero byte, and every length within the limit has one.
    if not start.lstrip().startswith(b"{") or b"\0" in start:
        return False
    with open(path, "rb") as file:
        return b'"weight_map"' in file.read(MAX_HEADER_BYTES)


def _find_files(path: str) -> tuple[list[str], dict[str, str] | None]:
    """The files of a checkpoint in the order of their names, and which file has which tensor if an index says so.

    Raises:
        CheckpointFormatError: There are several indexes, the one there is damaged, or it names files that are missing.
    """
    if os.path.isdir(path):
        folder, names = path, _visible_names(path)
        indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
        if len(indexes) > 1:
            raise CheckpointFormatError(
                f"{path} holds {len(indexes)} indexes ({listed(map(short, indexes))}), so which one is meant cannot be "
                "told. Give the path of one of them.",
                path=path,
            )
        index_path = os.path.join(folder, indexes[0]) if indexes else None
        shards = [name for name in names if name.endswith(_SUFFIX)]
    elif _is_shard_index(path):
        # Not the directory behind a symbolic link: in a Hugging Face cache the shards lie beside the link.
        folder, index_path, shards = os.path.dirname(path), path, []
    else:
        return [path], None
    weight_map = None
    if index_path is not None:
        weight_map = _read_weight_map(index_path)
        shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise CheckpointFormatError(
            f"{path} is not complete: of its {len(shards)} files {len(missing)} are missing or no regular files: "
            f"{listed(map(short, missing))}. Copy or download them again.",
            path=path,
        )
    return [os.path.join(folder, name) for name in shards], weight_map


def _read_weight_map(path: str) -> dict[str, str]:
    """Which file has which tensor, as the index of a sharded checkpoint says.

    Raises:
        CheckpointFormatError: It is no such index, or names a file outside its directory.
    """
    with LocalFile(path) as file:
        if file.size_bytes > MAX_HEADER_BYTES:
            raise CheckpointFormatError(
                f"{path} has {file.size_bytes} bytes, but an index of shards has at most {MAX_HEADER_BYTES}. "
                f"{COPY_AGAIN}",
                path=path,
            )
        index = parse_json(file.pread(file.size_bytes, 0), path, "the index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointFormatError(
            f"{path}: weight_map must map the names of tensors to the names of files, but is "
            f"{short(weight_map)}. {COPY_AGAIN}",
            path=path,
        )
    refused = [f"{short(name)} for {short(key)}" for key, name in weight_map.items() if not _is_name(name)]
    if refused:
        raise CheckpointFormatError(
            f"{path} names {len(refused)} shards that are no names of files in its own directory: "
            f"{listed(refused)}. Put the shards beside the index.",
            path=path,
        )
    return weight_map


def _is_name(name: object) -> bool:
    """Whether a shard's name stays in the directory. A symbolic link there may lead out, as in a cache."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")


# What is in them -----------------------------------------------------------------------------------------------------


def _read_index(path: str, source: FileSet, weight_map: Mapping[str, str] | None) -> Checkpoint:
    if sys.byteorder != "little":
        raise UnmappableCheckpoint(
            f"{path} is of the other byte order than this machine; its tensors must be byte-swapped to be used.",
            path=path,
        )
    tensors: list[TensorInfo] = []
    metadata: dict[str, str] = {}
    holders: dict[str, str] = {}
    misplaced: list[str] = []
    for file, span in zip(source.files, source.spans, strict=True):
        found, words = read_header(file, span.start)
        metadata = words | metadata
        shard = os.path.basename(file.name)
        for info in found:
            key = info.storage.key
            if weight_map is None and key in holders:
                misplaced.append(f"{short(key)} in {holders[key]} and {shard}")
            elif weight_map is not None and weight_map.get(key) != shard:
                misplaced.append(f"{short(key)} in {shard}")
            else:
                holders[key] = shard
        tensors += found
    if misplaced and weight_map is None:
        raise CheckpointFormatError(
            f"{path} has no index and holds {len(misplaced)} tensors twice: {listed(misplaced)}. Give the path "
            "of one of the files.",
            path=path,
        )
    absent = [f"{short(key)} in {shard}" for key, shard in (weight_map or {}).items() if key not in holders]
    if misplaced or absent:
        raise CheckpointFormatError(
            f"{path}: the index and the shards are not of one checkpoint. {len(absent)} tensors are not where the "
            f"index has them: {listed(absent) or 'none'}. {len(misplaced)} tensors are where the index does not have "
            f"them: {listed(misplaced) or 'none'}. Copy or download index and shards again.",
            path=path,
        )
    return Checkpoint(
        path=path,
        format=Safetensors.name,
        files=source.spans,
        tensors=tuple(tensors),
        storages=tuple(info.storage for info in tensors),
        metadata=metadata,
    )
