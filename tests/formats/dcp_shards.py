"""Directories of torch.distributed.checkpoint as several ranks write them, written by one process."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

Chunk = tuple[tuple[int, ...], torch.Tensor]


def cut(tensor: torch.Tensor, *counts: int) -> list[Chunk]:
    """The parts of a tensor that is sharded so many times in each dimension, the last ones smaller or empty."""
    axes = []
    for size, count in itertools.zip_longest(tensor.shape, counts, fillvalue=1):
        step = -(-size // count)
        axes.append([(start, min(step, size - start)) for start in range(0, size, step)] or [(0, 0)])
    chunks = []
    for corner in itertools.product(*axes):
        index = tuple(slice(start, start + size) for start, size in corner)
        chunks.append((tuple(start for start, _ in corner), tensor[index].clone()))
    return chunks


@dataclass
class Shards:
    """One tensor of a directory and its chunks."""

    shape: Sequence[int]
    chunks: Sequence[Chunk]


def write_shards(
    path: Path,
    items: dict[str, Shards | Any],
    paths: dict[str, tuple[Any, ...]] | None = None,
    edit: Callable[[torch_metadata.Metadata], None] | None = None,
) -> Path:
    """Writes what ranks would: chunk ``i`` of every tensor into the file of rank ``i``, others into that of rank 0.

    ``edit`` changes the metadata before they are written.
    """
    path.mkdir(exist_ok=True)
    files: dict[str, io.BytesIO] = {}
    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}

    def put(rank: int, value: Any) -> _StorageInfo:
        stream = files.setdefault(f"__{rank}_0.distcp", io.BytesIO())
        start, saved = stream.tell(), io.BytesIO()
        torch.save(value, saved)
        stream.write(saved.getvalue())
        return _StorageInfo(f"__{rank}_0.distcp", start, stream.tell() - start)

    for name, item in items.items():
        if not isinstance(item, Shards):
            described[name] = torch_metadata.BytesStorageMetadata()
            stored[torch_metadata.MetadataIndex(name)] = put(0, item)
            continue
        chunks = []
        for rank, (starts, value) in enumerate(item.chunks):
            chunks.append(torch_metadata.ChunkStorageMetadata(torch.Size(starts), value.shape))
            stored[torch_metadata.MetadataIndex(name, starts, rank)] = put(rank, value)
        described[name] = torch_metadata.TensorStorageMetadata(
            torch_metadata.TensorProperties.create_from_tensor(item.chunks[0][1]), torch.Size(item.shape), chunks
        )
    metadata = torch_metadata.Metadata(described, paths or {name: (name,) for name in items}, stored)
    if edit is not None:
        edit(metadata)
    for name, stream in files.items():
        (path / name).write_bytes(stream.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def sharded(tensor: torch.Tensor, *counts: int) -> Shards:
    return Shards(tensor.shape, cut(tensor, *counts))


def change(path: Path, edit: Callable[[torch_metadata.Metadata], None]) -> None:
    """Edits the metadata of a directory."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    edit(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def chunks_of(metadata: torch_metadata.Metadata, name: str) -> list[torch_metadata.ChunkStorageMetadata]:
    return metadata.state_dict_metadata[name].chunks


def place_of(metadata: torch_metadata.Metadata, name: str, number: int = 0) -> _StorageInfo:
    keys = [key for key in metadata.storage_data if key.fqn == name]
    return metadata.storage_data[keys[number]]
