"""Writes weights as safetensors: one file, or a directory of shards with the index that Hugging Face reads.

A weight belongs to the shard that has room for it, in the order of the state dict. Tied weights are in one shard: the
values are written once, and the metadata of the file maps the other names to the first one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence

import torch

from lightning_memload.formats.safetensors.layout import ContiguousWriter, WeightsFile
from lightning_memload.storage.descriptors import OwnDescriptors
from lightning_memload.storage.replacement import Replacement
from lightning_memload.transfer.contents import Content
from lightning_memload.transfer.sinks import LocalSink, SplitWriter
from lightning_memload.transfer.writing import WriteEngine, WriteOrder

__all__ = ["INDEX_FILE", "SINGLE_FILE", "WeightsWriter", "divide_into_shards", "shard_name"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class WeightsWriter:
    """The :class:`CheckpointWriter` of weights.

    Args:
        weights: The weights by name. At least one.
        shard_bytes: The most bytes of a shard, unless one tensor is larger. ``None``: one file, not a directory.
        content_of: See :func:`plan_torch_save`.
        host_budget_bytes: Maximum host memory for staging tensors from devices.
        num_threads: Number of writing threads.

    Attributes:
        left_out: The names of weights that the format cannot hold.
        ties: For each weight that is stored under another name: that name.
    """

    streamed = True
    bytes_linkable = bytes_linked = 0

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        shard_bytes: int | None,
        content_of: Callable[[Content], Content],
        host_budget_bytes: int,
        num_threads: int,
    ) -> None:
        self.is_directory = shard_bytes is not None
        shards = [dict(weights)] if shard_bytes is None else divide_into_shards(weights, shard_bytes)
        self._files = [WeightsFile.of(shard, ()) for shard in shards]
        self.left_out = [name for file in self._files for name in file.left_out]
        self.ties = {name: first for file in self._files for name, first in file.ties.items()}
        unwritten = {*self.left_out, *self.ties}
        self._places = {name: number for number, shard in enumerate(shards) for name in shard if name not in unwritten}
        self.file_names = [shard_name(number, len(shards)) for number in range(len(shards))]
        contents = [[content_of(content) for content in file.take_contents()] for file in self._files]
        self._counts = [len(of_file) for of_file in contents]
        self.storage_sizes = [content.nbytes for file in contents for content in file if not isinstance(content, bytes)]
        self.records = WriteEngine([item for file in contents for item in file], host_budget_bytes, num_threads)
        self.nbytes = sum(file.nbytes for file in self._files)

    @property
    def names(self) -> Sequence[str]:
        """The files in the directory."""
        if not self.is_directory:
            return ()
        return [*self.file_names, *([INDEX_FILE] if len(self.file_names) > 1 else [])]

    def write(self, place: Replacement, *, durable: bool, order: WriteOrder | None) -> int:
        """Writes all files except the index."""
        with contextlib.ExitStack() as stack:
            descriptors = [place.descriptor]
            if self.is_directory:
                paths = [os.path.join(place.temporary_path, name) for name in self.file_names]
                descriptors = [stack.enter_context(OwnDescriptors.new_file(path)) for path in paths]
            sinks = [LocalSink(descriptor, start_writeback=durable) for descriptor in descriptors]
            files = zip(self._counts, sinks, self._files, strict=True)
            target = SplitWriter(*((count, ContiguousWriter(sink, file.offsets)) for count, sink, file in files))
            self.records.write(target, order)
        return self.nbytes

    def finish(self, place: Replacement) -> None:
        """Writes the index, if there are several files."""
        if len(self.file_names) == 1:
            return
        weight_map = {name: self.file_names[number] for name, number in sorted(self._places.items())}
        index = {"metadata": {"total_size": sum(self.storage_sizes)}, "weight_map": weight_map}
        with open(os.path.join(place.temporary_path, INDEX_FILE), "x", encoding="utf-8") as file:
            json.dump(index, file, indent=2)
            file.write("\n")


def shard_name(number: int, count: int) -> str:
    """The name of a shard in the layout of Hugging Face, ``model-00001-of-00002.safetensors`` for number 0 of 2."""
    return SINGLE_FILE if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def divide_into_shards(weights: Mapping[str, torch.Tensor], shard_bytes: int) -> list[dict[str, torch.Tensor]]:
    """Divides weights, in their order, into shards of at most so many bytes of tensors.

    A shard with a single tensor may be larger. Tensors on one storage are in one shard and count once.

    Args:
        weights: The weights by name.
        shard_bytes: The most bytes of a shard.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    owners: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        storage = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
        owner = owners.get(storage)
        if owner is not None:
            owner[name] = tensor
            continue
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        owners[storage] = shards[-1]
        used += tensor.nbytes
    return shards
