"""One state in every format, and the checks that a format gives its very bytes.

A new format joins by one entry in ``WRITERS``. The checks are functions of a format and a case. A test can hand them a
format that lies, and see that they notice.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_memload.bytes import Record
from lightning_memload.checkpoint import (
    Checkpoint,
    ChunkedTensor,
    ChunkInfo,
    FileChunk,
    MappedCheckpoint,
    TensorInfo,
    span_elements,
)
from lightning_memload.checkpoint.index import KeyPath, format_path
from lightning_memload.formats import CheckpointFormat
from lightning_memload.formats.registry import FORMATS
from lightning_memload.save import save_directory
from lightning_memload.transfer import RingLayout, StagingRing, TensorCopy, TransferStats, transfer
from tests.formats.files import ALL_DTYPES, as_bytes, from_file, layouts, of_dtype, save_dcp, tensors_of


def write_torch(folder: Path, state: Mapping[str, Any]) -> Path:
    torch.save(state, folder / "last.ckpt")
    return folder / "last.ckpt"


def write_directory(folder: Path, state: Mapping[str, Any]) -> Path:
    save_directory(state, folder / "last")
    return folder / "last"


def write_safetensors_and_state(folder: Path, state: Mapping[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="safetensors cannot hold .*complex128")
        save_directory(state, folder / "last", safetensors=True)
    return folder / "last"


def write_dcp(folder: Path, state: Mapping[str, Any]) -> Path:
    save_dcp(dict(state), folder / "last")
    return folder / "last"


def write_safetensors(folder: Path, state: Mapping[str, Any]) -> Path:
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def write_shards(folder: Path, state: Mapping[str, Any], count: int = 3) -> Path:
    """As Hugging Face lays them out, beside a file that the index does not know."""
    weight_map: dict[str, str] = {}
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(list(state.items())[number::count])
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    save_file({next(iter(state)): torch.zeros(3)}, folder / "older.safetensors")
    return folder


def write_shards_to_open_by_index(folder: Path, state: Mapping[str, Any]) -> Path:
    return write_shards(folder, state) / "model.safetensors.index.json"


def write_files_without_index(folder: Path, state: Mapping[str, Any]) -> Path:
    names = list(state)
    save_file({name: state[name] for name in names[::2]}, folder / "a.safetensors")
    save_file({name: state[name] for name in names[1::2]}, folder / "b.safetensors")
    return folder


def write_bin_shards(folder: Path, state: Mapping[str, Any], count: int = 3) -> Path:
    weight_map: dict[str, str] = {}
    for number in range(count):
        part = dict(list(state.items())[number::count])
        shard = f"pytorch_model-{number + 1:05}-of-{count:05}.bin"
        torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save({"lr": 1}, folder / "optimizer.bin")
    return folder


def write_bin_shards_to_open_by_index(folder: Path, state: Mapping[str, Any]) -> Path:
    return write_bin_shards(folder, state) / "pytorch_model.bin.index.json"


def write_bin(folder: Path, state: Mapping[str, Any]) -> Path:
    torch.save(dict(state), folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    return folder


@dataclass(frozen=True)
class Writer:
    """One way to write a state, and what of it the format can carry.

    Attributes:
        label: What the tests are called by.
        format: Name of the format, as its index says it.
        write: Writes a state into an empty folder and returns what to open.
        nested: The state has containers and plain values; otherwise it is one dict of tensors by name.
        strided: The tensors are views and ties as they come; otherwise each is contiguous and by itself.
        checksums: Every storage has a CRC-32.
        lacks: Dtypes that are left out.
    """

    label: str
    format: str
    write: Callable[[Path, Mapping[str, Any]], Path]
    nested: bool = False
    strided: bool = False
    checksums: bool = False
    lacks: frozenset[torch.dtype] = frozenset()

    def adapt(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """As much of a state as the format carries."""
        if self.nested:
            return dict(state) if self.strided else _by_themselves(state)
        named = {format_path(path): tensor.detach() for path, tensor in tensors_of(state)}
        return {
            name: tensor if self.strided else tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in named.items()
        }


def _by_themselves(value: Any) -> Any:
    """The same with every tensor contiguous and in memory of its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _by_themselves(item) for key, item in value.items()}
    return [_by_themselves(item) for item in value] if isinstance(value, list) else value


LACKED_BY_SAFETENSORS = frozenset({torch.complex128, torch.complex32})


WRITERS = [
    Writer("torch", "torch", write_torch, nested=True, strided=True, checksums=True),
    Writer("directory", "tensor_directory", write_directory, nested=True, strided=True, checksums=True),
    Writer("safetensors+state", "tensor_directory", write_safetensors_and_state, True, strided=True, checksums=True),
    Writer("dcp", "dcp", write_dcp, nested=True, checksums=True),
    Writer("safetensors", "safetensors", write_safetensors, lacks=LACKED_BY_SAFETENSORS),
    Writer("shards", "safetensors", write_shards, lacks=LACKED_BY_SAFETENSORS),
    Writer("shards-by-index", "safetensors", write_shards_to_open_by_index, lacks=LACKED_BY_SAFETENSORS),
    Writer("shards-without-index", "safetensors", write_files_without_index, lacks=LACKED_BY_SAFETENSORS),
    Writer("bin-shards", "torch_shards", write_bin_shards, checksums=True),
    Writer("bin-shards-by-index", "torch_shards", write_bin_shards_to_open_by_index, checksums=True),
    Writer("bin", "torch_shards", write_bin, checksums=True),
]


def make_state(lacks: frozenset[torch.dtype] = frozenset()) -> dict[str, Any]:
    torch.manual_seed(0)
    tied = torch.randn(6, 6)
    weights = {f"dtypes.{dtype}": of_dtype(dtype) for dtype in ALL_DTYPES if dtype not in lacks}
    weights |= {f"layouts.{name}": tensor for name, tensor in layouts().items()}
    weights |= {"tied.a": tied, "tied.b": tied, "tied.row": tied[2], "large": torch.randn(150, 1000)}
    optimizer = {"step": torch.tensor(7.0), "exp_avg": torch.randn(6, 6), "exp_avg_sq": torch.randn(6, 6)}
    return {
        "epoch": 3,
        "state_dict": weights,
        "optimizer_states": [{"state": {0: optimizer}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
    }


@dataclass(frozen=True)
class Case:
    writer: Writer
    path: Path
    expected: dict[KeyPath, torch.Tensor]

    def again(self, folder: Path) -> Case:
        """The same once more, for a test that damages or deletes it."""
        return write_case(self.writer, folder)

    def files(self) -> list[Path]:
        folder = self.path if self.path.is_dir() else self.path.parent
        return [file for file in folder.rglob("*") if file.is_file()]


def write_case(writer: Writer, folder: Path) -> Case:
    state = writer.adapt(make_state(writer.lacks))
    path = writer.write(folder, state)
    return Case(writer, path, dict(tensors_of(state)))


def parts_of(info: TensorInfo) -> tuple[ChunkInfo, ...]:
    whole = ChunkInfo((0,) * len(info.shape), info.shape, info.stride, info.storage_offset, info.storage)
    return info.chunks or (whole,)


def raw_bytes(index: Checkpoint, info: TensorInfo) -> bytes:
    """A tensor's elements in order, by the index and open() alone."""
    whole = torch.empty(info.shape, dtype=info.dtype)
    for part in parts_of(info):
        if not math.prod(part.shape):
            continue
        offset = part.storage.offset + part.storage_offset * info.dtype.itemsize
        nbytes = span_elements(part.shape, part.stride) * info.dtype.itemsize
        assert part.storage.offset <= offset
        assert offset + nbytes <= part.storage.offset + part.storage.nbytes
        path, position = index.place(offset)
        data = bytearray(from_file(Path(path), (position, position + nbytes)))
        assert len(data) == nbytes
        values = torch.frombuffer(data, dtype=info.dtype).as_strided(part.shape, part.stride)
        FileChunk(offset, part.stride, part.starts, part.shape).within(whole).copy_(values)
    return as_bytes(whole)


def differing(got: Mapping[KeyPath, bytes], expected: Mapping[KeyPath, bytes]) -> list[str]:
    """Names of the values that are not the same.

    Compared here and not by an assertion: where ``CI`` is set pytest explains all of a difference, and takes minutes
    over that of two large values.
    """
    return [format_path(path) for path in {**got, **expected} if got.get(path) != expected.get(path)]


def check_recognition(checkpoint_format: CheckpointFormat, cases: Mapping[str, Case]) -> None:
    """The first format of the registry that recognises a checkpoint has it."""
    names = [known.name for known in FORMATS]
    first = FORMATS[: names.index(checkpoint_format.name)]
    left = {label: str(case.path) for label, case in cases.items()}
    left = {label: path for label, path in left.items() if not any(known.recognizes(path) for known in first)}
    recognized = {label for label, path in left.items() if checkpoint_format.recognizes(path)}
    assert recognized == {label for label, case in cases.items() if case.writer.format == checkpoint_format.name}


def check_index(checkpoint_format: CheckpointFormat, case: Case) -> None:
    index = checkpoint_format.read_index(str(case.path))
    assert (index.path, index.format) == (str(case.path), case.writer.format)
    assert sorted(info.name for info in index) == sorted(map(format_path, case.expected))
    assert {info.path for info in index} == set(case.expected)
    for info in index:
        expected = case.expected[info.path]
        assert index[info.name] is info
        assert (info.dtype, info.shape) == (expected.dtype, tuple(expected.shape))
        assert info.nbytes == expected.nbytes
        assert not differing({info.path: raw_bytes(index, info)}, {info.path: as_bytes(expected)})
        assert all(part.storage in index.storages for part in parts_of(info))
        if not info.chunks:
            assert info.stride == expected.stride()
            start, end = info.file_range
            assert end - start == span_elements(info.shape, info.stride) * info.dtype.itemsize
            assert info.storage.offset <= start <= end <= info.storage.offset + info.storage.nbytes
    for file in index.files:
        assert file.nbytes == os.path.getsize(file.path)
        assert file.start % mmap.PAGESIZE == 0
    assert len({storage.key for storage in index.storages}) == len(index.storages)
    for storage in index.storages:
        path, position = index.place(storage.offset)
        data = from_file(Path(path), (position, position + storage.nbytes)) if storage.nbytes else b""
        if data:
            assert storage.crc32 == (zlib.crc32(data) if case.writer.checksums else None)
    groups: dict[int, set[str]] = {}
    for key_path, tensor in case.expected.items():
        if tensor.numel():
            groups.setdefault(tensor.untyped_storage().data_ptr(), set()).add(format_path(key_path))
    ties = [{info.name for info in tie} for tie in index.ties]
    assert sorted(map(sorted, ties)) == sorted(sorted(group) for group in groups.values() if len(group) > 1)
    assert bool(ties) == case.writer.strided


def check_load(checkpoint_format: CheckpointFormat, case: Case) -> None:
    loaded, mapped = checkpoint_format.load(str(case.path), weights_only=True)
    tensors = dict(tensors_of(loaded))
    assert isinstance(loaded, dict)
    assert set(tensors) == set(case.expected)
    assert mapped.index == checkpoint_format.read_index(str(case.path))
    assert [info.path for info in mapped.index] == list(tensors)
    if case.writer.nested:
        assert loaded["epoch"] == 3
    for path, tensor in tensors.items():
        info, expected = mapped.index[format_path(path)], case.expected[path]
        assert (tensor.dtype, tensor.shape, tensor.device) == (expected.dtype, expected.shape, expected.device)
        assert mapped.holds(tensor) or not tensor.numel()
        pieces = mapped.locate(tensor)
        if not tensor.numel():
            assert pieces is None
            continue
        assert pieces is not None, path
        assert [piece.offset for piece in pieces] == [
            part.storage.offset + part.storage_offset * info.dtype.itemsize
            for part in parts_of(info)
            if math.prod(part.shape)
        ]
        if not info.chunks:
            assert type(tensor) in (type(expected), ChunkedTensor)
            assert tensor.stride() == expected.stride()
    # Last: a format may read its values only when they are used.
    assert not differing(values_of(loaded), expected_values(case))


def check_stream(checkpoint_format: CheckpointFormat, case: Case, layout: RingLayout) -> None:
    loaded, mapped = checkpoint_format.load(str(case.path), weights_only=True)
    for make in (in_order, transposed):
        destinations = {path: make(tensor) for path, tensor in tensors_of(loaded)}
        stats = stream(loaded, mapped, destinations, layout)
        got = {path: as_bytes(tensor) for path, tensor in destinations.items()}
        assert not differing(got, expected_values(case))
        assert stats.staging_bytes <= layout.nbytes
        assert stats.bytes_verified == (mapped.index.nbytes if case.writer.checksums else 0)
    # The mapping was not used meanwhile, and a second stream finds the tensors at the same places.
    assert all(mapped.locate(tensor) is not None for _, tensor in tensors_of(loaded) if tensor.numel())


def in_order(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    axes = tuple(reversed(range(tensor.ndim)))
    return torch.zeros(tuple(reversed(tensor.shape)), dtype=tensor.dtype).permute(axes)


def stream(
    loaded: Any, mapped: MappedCheckpoint, destinations: Mapping[KeyPath, torch.Tensor], layout: RingLayout
) -> TransferStats:
    copies = []
    for path, tensor in tensors_of(loaded):
        for piece in mapped.locate(tensor) or ():
            destination = piece.within(destinations[path])
            copies.append(TensorCopy(format_path(path), piece.offset, tensor.dtype, piece.stride, destination))
    records = [
        Record(storage.key, storage.offset, storage.nbytes, storage.crc32)
        for storage in mapped.index.storages
        if storage.crc32 is not None
    ]
    with StagingRing(layout, pinned=False) as ring:
        return transfer(
            mapped.source,
            copies,
            lambda: ring,
            num_threads=layout.num_threads,
            block_bytes=layout.block_bytes,
            records=records,
        )


def values_of(loaded: Any) -> dict[KeyPath, bytes]:
    return {path: as_bytes(tensor) for path, tensor in tensors_of(loaded)}


def expected_values(case: Case) -> dict[KeyPath, bytes]:
    return {path: as_bytes(tensor) for path, tensor in case.expected.items()}


def format_of(case: Case) -> CheckpointFormat:
    (found,) = [known for known in FORMATS if known.name == case.writer.format]
    return found
