"""One state, written in every format: whatever the format, the index, the load and the stream give its very bytes.

A new format joins by one entry in ``WRITERS``. The checks are functions of a format, so that the last tests can hand
them formats that lie, and see that they notice.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import math
import mmap
import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_memload.checkpoint import (
    Checkpoint,
    ChunkedTensor,
    ChunkInfo,
    FilePiece,
    MappedCheckpoint,
    TensorInfo,
    span_elements,
)
from lightning_memload.checkpoint.index import KeyPath, format_path
from lightning_memload.errors import CheckpointFormatError, ChecksumError, MemloadError
from lightning_memload.formats import CheckpointFormat, load_mapped, open_checkpoint
from lightning_memload.formats.registry import FORMATS, find_format
from lightning_memload.save import save_directory
from lightning_memload.storage.mapping import FileMapping
from lightning_memload.transfer import (
    Record,
    RingLayout,
    StagingRing,
    TensorCopy,
    TransferStats,
    choose_layout,
    transfer,
)
from tests.formats.files import ALL_DTYPES, as_bytes, from_file, layouts, of_dtype, save_dcp, tensors_of
from tests.fresh_process import run_fresh

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.skipif(not FileMapping.supported, reason="mappings need Linux"),
]


# The writers ---------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {writer.label: write_case(writer, tmp_path_factory.mktemp(writer.label)) for writer in WRITERS}


@pytest.fixture(params=[writer.label for writer in WRITERS])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


# The checks ----------------------------------------------------------------------------------------------------------


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
        FilePiece(offset, part.stride, part.starts, part.shape).within(whole).copy_(values)
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
    # Last: whatever a format reads late, it reads when somebody looks.
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
    # Nobody touched the mapping meanwhile, and a second stream finds the tensors where the first did.
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


def traces(folder: Path) -> list[str]:
    """Mappings and open descriptors of files in a folder."""
    gc.collect()
    found = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}{os.sep}" in line]
    for number in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        found += [link] if link.startswith(f"{folder}{os.sep}") else []
    return found


def values_of(loaded: Any) -> dict[KeyPath, bytes]:
    return {path: as_bytes(tensor) for path, tensor in tensors_of(loaded)}


def expected_values(case: Case) -> dict[KeyPath, bytes]:
    return {path: as_bytes(tensor) for path, tensor in case.expected.items()}


# The tests -----------------------------------------------------------------------------------------------------------


def format_of(case: Case) -> CheckpointFormat:
    (found,) = [known for known in FORMATS if known.name == case.writer.format]
    return found


def test_every_format_has_a_writer() -> None:
    assert {known.name for known in FORMATS} == {writer.format for writer in WRITERS}
    assert len({known.name for known in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_recognizes_only_its_own(known: CheckpointFormat, cases: dict[str, Case], tmp_path: Path) -> None:
    check_recognition(known, cases)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("12345678 is a number, and {this} is not")
    (tmp_path / "list.json").write_text('{"some": "other", "json": {}}')
    torch.save({"a": torch.ones(1)}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "picture.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n and so on")
    for other in tmp_path.iterdir():
        assert not known.recognizes(str(other)), other


def test_the_format_is_told_without_its_suffix(case: Case, tmp_path: Path) -> None:
    assert find_format(case.path).name == case.writer.format
    again = case.again(tmp_path)
    if again.path.is_file():
        renamed = again.path.rename(again.path.parent / "no-suffix")
        assert values_of(load_mapped(renamed)[0]) == expected_values(case)


def test_index(case: Case) -> None:
    check_index(format_of(case), case)


def test_load(case: Case) -> None:
    check_load(format_of(case), case)


@pytest.mark.parametrize(
    "layout",
    [RingLayout(2, 4, 4096), RingLayout(1, 1, 12345), choose_layout(512 << 10, 1), choose_layout(8 << 20, 3)],
    ids=["16KiB", "odd", "512KiB", "8MiB"],
)
def test_stream(case: Case, layout: RingLayout) -> None:
    check_stream(format_of(case), case, layout)


def test_a_flipped_bit_is_told_where_there_are_checksums(case: Case, tmp_path: Path) -> None:
    again = case.again(tmp_path)
    index = open_checkpoint(again.path)
    large = next(info for info in index if info.name.endswith("large"))
    part = parts_of(large)[0]
    path, position = index.place(part.storage.offset + part.storage.nbytes // 2)
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    loaded, mapped = load_mapped(again.path)
    destinations = {path: in_order(tensor) for path, tensor in tensors_of(loaded)}
    layout = choose_layout(512 << 10, 1)
    if case.writer.checksums:
        with pytest.raises(ChecksumError, match="is damaged"):
            stream(loaded, mapped, destinations, layout)
    else:
        stream(loaded, mapped, destinations, layout)
        assert as_bytes(destinations[large.path]) != as_bytes(case.expected[large.path])


MEASURE_READING = """
import os
from pathlib import Path
from lightning_memload.formats import load_mapped, open_checkpoint

def read_bytes():
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

def resident_bytes(folder):
    "Pages of files of this folder that somebody touched in a mapping."
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            counts = folder + "/" in line
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total

RESULT = {}
for label, (folder, path) in ARGS["paths"].items():
    load_mapped(path)  # whatever is imported late is imported now
    open_checkpoint(path)
    start = read_bytes()
    open_checkpoint(path)
    opened = read_bytes() - start
    start = read_bytes()
    loaded, mapped = load_mapped(path, weights_only=True)
    located = mapped.locate_all(list(loaded.values()))
    read, touched = read_bytes() - start, resident_bytes(folder)
    total = float(loaded["ones"].sum())
    RESULT[label] = {
        "open": opened, "load": read, "touched": touched, "located": all(located), "sum": total,
        "touched by sum": resident_bytes(folder) + read_bytes() - start - read,
    }
"""


def test_neither_open_nor_load_read_tensor_data(tmp_path: Path) -> None:
    numel = 2 << 20
    paths = {}
    for writer in WRITERS:
        folder = tmp_path / writer.label
        folder.mkdir()
        path = writer.write(folder, {"ones": torch.ones(numel), "more": torch.zeros(64, 1000)})
        paths[writer.label] = [str(folder), str(path)]
    results = run_fresh(MEASURE_READING, paths=paths).result
    assert set(results) == set(paths)
    for label, result in results.items():
        # /proc/self/io and smaps themselves are read as well.
        assert result["open"] < 64 << 10, (label, result)
        assert result["load"] < 128 << 10, (label, result)
        assert result["touched"] == 0, (label, result)
        assert result["located"], label
        # The meter sees what it should see: the sum needs all of the bytes, however the format brings them.
        assert result["sum"] == numel
        assert result["touched by sum"] >= 4 * numel, (label, result)


class TestLettingGo:
    def test_detach_leaves_nothing_and_the_values_stay(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        loaded, mapped = load_mapped(again.path)
        assert traces(tmp_path)  # the meter can see
        assert mapped.referenced_bytes > 0
        kept = mapped.detach()
        assert kept >= max(tensor.nbytes for tensor in case.expected.values())
        assert traces(tmp_path) == []
        for file in again.files():
            file.unlink()
        assert values_of(loaded) == expected_values(case)
        assert all(mapped.locate(tensor) is None for _, tensor in tensors_of(loaded))
        dict(tensors_of(loaded))[next(path for path in case.expected if str(path[-1]).endswith("large"))].zero_()

    def test_without_references_nothing_is_kept(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        loaded, mapped = load_mapped(again.path)
        del loaded
        gc.collect()
        assert mapped.referenced_bytes == 0
        assert mapped.detach() == 0
        assert traces(tmp_path) == []

    def test_the_end_of_all_references_lets_go_too(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        loaded, mapped = load_mapped(again.path)
        del mapped
        assert traces(tmp_path)
        del loaded
        assert traces(tmp_path) == []

    def test_an_index_holds_nothing_open(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        index = open_checkpoint(again.path)
        assert traces(tmp_path) == []
        assert copy.deepcopy(pickle.loads(pickle.dumps(index))) == index

    def test_deleted_under_the_mapping(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        loaded, mapped = load_mapped(again.path)
        for file in again.files():
            file.unlink()
        layout = choose_layout(512 << 10, 1)
        destinations = {path: in_order(tensor) for path, tensor in tensors_of(loaded)}
        stream(loaded, mapped, destinations, layout)
        assert {path: as_bytes(tensor) for path, tensor in destinations.items()} == expected_values(case)
        assert values_of(loaded) == expected_values(case)
        mapped.detach()
        assert values_of(loaded) == expected_values(case)

    def test_writes_stay_in_the_process(self, case: Case, tmp_path: Path) -> None:
        again = case.again(tmp_path)
        before = {file: file.read_bytes() for file in again.files()}
        loaded, mapped = load_mapped(again.path)
        for _, tensor in tensors_of(loaded):
            tensor.view(-1)[:1].fill_(1) if tensor.numel() and tensor.is_contiguous() else None
        mapped.detach()
        assert {file: file.read_bytes() for file in again.files()} == before


class TestCopies:
    @pytest.fixture
    def loaded(self, case: Case, tmp_path: Path) -> tuple[Case, Any, MappedCheckpoint]:
        again = case.again(tmp_path)
        return again, *load_mapped(again.path)

    def test_deepcopy(self, loaded: tuple[Case, Any, MappedCheckpoint]) -> None:
        case, state, mapped = loaded
        copied = copy.deepcopy(state)
        assert values_of(copied) == expected_values(case)
        assert not any(mapped.holds(tensor) for _, tensor in tensors_of(copied) if tensor.numel())

    def test_saved_again(self, loaded: tuple[Case, Any, MappedCheckpoint]) -> None:
        case, state, _ = loaded
        stream = io.BytesIO()
        torch.save(state, stream)
        # The tensors' own storages, not the files under them.
        assert len(stream.getvalue()) < 1.1 * sum(file.stat().st_size for file in case.files()) + 64_000
        stream.seek(0)
        assert values_of(torch.load(stream)) == expected_values(case)

    def test_pickle(self, loaded: tuple[Case, Any, MappedCheckpoint]) -> None:
        case, state, _ = loaded
        compared = 0
        for path, tensor in tensors_of(state):
            try:
                pickle.loads(pickle.dumps(tensor.detach().clone()))
            except AttributeError:
                continue  # torch 2.13 cannot unpickle any tensor of a dtype without a storage class, such as uint16
            assert as_bytes(pickle.loads(pickle.dumps(tensor))) == as_bytes(case.expected[path])
            compared += 1
        assert compared > len(case.expected) // 2


def test_a_missing_path_and_an_unknown_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointFormatError, match="is a directory, but no checkpoint of a known format"):
        open_checkpoint(tmp_path)


class Lying:
    """A format with one fault."""

    def __init__(self, truth: CheckpointFormat, fault: str) -> None:
        self.truth = truth
        self.fault = fault
        self.name = truth.name

    def recognizes(self, path: str) -> bool:
        return self.fault == "recognizes all" or (self.fault != "recognizes none" and self.truth.recognizes(path))

    def read_index(self, path: str) -> Checkpoint:
        return self.bend(self.truth.read_index(path))

    def bend(self, index: Checkpoint) -> Checkpoint:
        first = next(info for info in index if info.name.endswith("large"))
        moved = first.storage._replace(offset=first.storage.offset + 1)
        bent: dict[str, Any] = {
            "offset": {"storage": moved},
            "dtype": {"dtype": torch.int32},
            "shape": {"shape": (10, *first.shape[1:])},
            "stride": {"stride": tuple(reversed(first.stride))},
            "name": {"path": (*first.path[:-1], "other")},
        }.get(self.fault, {})
        if first.chunks and self.fault in ("offset", "stride"):
            bent["chunks"] = (dataclasses.replace(first.chunks[0], **bent), *first.chunks[1:])
        tensors = tuple(info._replace(**bent) if info is first else info for info in index)
        storages = tuple(s._replace(crc32=5) if self.fault == "crc32" else s for s in index.storages)
        return dataclasses.replace(index, tensors=tensors[self.fault == "forgets" :], storages=storages)

    def load(self, path: str, *, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        loaded, mapped = self.truth.load(path, weights_only=weights_only)
        if self.fault == "reads":
            return copy.deepcopy(loaded), mapped
        if self.fault == "writes":
            next(tensor for name, tensor in tensors_of(loaded) if str(name[-1]).endswith("large")).mul_(1)
        if self.fault == "swaps":
            mapped.source.files = tuple(reversed(mapped.source.files))
        mapped.index = self.bend(mapped.index)
        return loaded, mapped


class TestTheChecksCanFail:
    """And pass for a format without a fault that goes through the same hands."""

    LAYOUT = choose_layout(512 << 10, 1)

    @pytest.mark.parametrize("fault", ["none", "offset", "dtype", "shape", "stride", "name", "crc32", "forgets"])
    def test_index(self, case: Case, fault: str) -> None:
        lying = Lying(format_of(case), fault)
        if fault == "none":
            check_index(lying, case)
        else:
            with pytest.raises(AssertionError):
                check_index(lying, case)

    @pytest.mark.parametrize("fault", ["none", "reads", "writes", "offset", "forgets"])
    def test_load(self, case: Case, fault: str) -> None:
        lying = Lying(format_of(case), fault)
        if fault == "none":
            check_load(lying, case)
        else:
            with pytest.raises(AssertionError):
                check_load(lying, case)

    @pytest.mark.parametrize("fault", ["none", "reads", "crc32", "swaps"])
    def test_stream(self, cases: dict[str, Case], fault: str) -> None:
        case = cases["torch" if fault == "crc32" else "shards"]
        lying = Lying(format_of(case), fault)
        if fault == "none":
            check_stream(lying, case, self.LAYOUT)
        else:
            with pytest.raises((AssertionError, MemloadError)):
                check_stream(lying, case, self.LAYOUT)

    @pytest.mark.parametrize("fault", ["none", "recognizes all", "recognizes none"])
    def test_recognition(self, cases: dict[str, Case], fault: str) -> None:
        lying = Lying(FORMATS[0], fault)
        if fault == "none":
            check_recognition(lying, cases)
        else:
            with pytest.raises(AssertionError):
                check_recognition(lying, cases)
