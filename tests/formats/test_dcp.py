"""Directories of torch.distributed.checkpoint: what torch reads from them, bit for bit, and every way to be broken."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lightning_memload.checkpoint import ChunkedTensor, ChunkInfo, MappedCheckpoint, StorageInfo
from lightning_memload.errors import CheckpointFormatError, CheckpointReadError, ChecksumError
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.formats.dcp.metadata import read_metadata
from lightning_memload.restore import Move, RestoreSession
from lightning_memload.storage import FileSet
from lightning_memload.transfer import LazyRing, choose_layout
from tests.formats.dcp_shards import Shards, change, chunks_of, cut, place_of, sharded, write_shards
from tests.formats.files import ALL_DTYPES, Settings, as_bytes, layouts, of_dtype, save_dcp, tensors_of
from tests.fresh_process import run_fresh

# Directories as several ranks write them, by one process -------------------------------------------------------------


def read_by_torch(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def assert_as_torch(path: Path) -> Any:
    """Loads the directory in both ways; returns ours, with nothing read."""
    expected = dict(tensors_of(read_by_torch(path)))
    ours, mapped = load_mapped(path, weights_only=False)
    found = dict(tensors_of(ours))
    assert list(map(str, found)) == [str(tensor.path) for tensor in mapped.index]
    assert {tuple(map(str, key)) for key in expected} == {tuple(map(str, key)) for key in found}
    by_text = {tuple(map(str, key)): value for key, value in found.items()}
    for key, value in expected.items():
        twin = by_text[tuple(map(str, key))]
        assert (twin.shape, twin.dtype) == (value.shape, value.dtype)
        assert as_bytes(copy.deepcopy(twin)) == as_bytes(value), key
    return load_mapped(path, weights_only=False)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Two ranks: one tensor cut along each dimension, one along both, one held by one rank alone, and a number."""
    torch.manual_seed(0)
    return write_shards(
        tmp_path / "several",
        {
            "model.rows": sharded(torch.randn(7, 5), 2),
            "model.columns": sharded(torch.randn(7, 5), 1, 2),
            "model.grid": sharded(torch.randn(6, 8, 2), 2, 3),
            "model.replicated": Shards((3,), [((0,), torch.randn(3))]),
            "epoch": 7,
        },
        {
            "model.rows": ("model", "rows"),
            "model.columns": ("model", "columns"),
            "model.grid": ("model", "grid"),
            "model.replicated": ("model", "replicated"),
            "epoch": ("epoch",),
        },
    )


class TestSameAsTorch:
    def test_of_one_process(self, tmp_path: Path) -> None:
        state = {
            "model": {**layouts(), "with.dots.0": torch.ones(2)},
            "dtypes": {str(dtype): of_dtype(dtype) for dtype in ALL_DTYPES if dtype is not torch.complex32},
            "list": [torch.ones(2), {"deep": torch.zeros(1)}, [torch.ones(1)]],
            "tuple": (torch.ones(3), 4),
            "plain": {"epoch": 3, "none": None, "name": "run"},
            "parameter": torch.nn.Parameter(torch.randn(4)),
        }
        save_dcp(state, tmp_path / "dcp")
        ours, mapped = assert_as_torch(tmp_path / "dcp")
        assert ours["plain"] == state["plain"]
        assert ours["tuple"][1] == 4
        assert mapped.index.format == "dcp"
        assert all(isinstance(value, ChunkedTensor) for value in ours["model"].values())
        assert not any(value.is_read for value in ours["model"].values())

    def test_of_several_processes(self, several: Path) -> None:
        ours, mapped = assert_as_torch(several)
        assert ours["epoch"] == 7
        assert len(mapped.index["model.grid"].chunks) == 6
        assert len(mapped.index["model.rows"].chunks) == 2
        assert mapped.index["model.replicated"].chunks == ()
        assert mapped.index.files == open_checkpoint(several).files

    @pytest.mark.parametrize("counts", [(5,), (1, 4), (3, 3), (7, 1), (1, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
    def test_cuts(self, counts: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
        assert_as_torch(write_shards(tmp_path / "cut", {"x": sharded(of_dtype(dtype, 7 * 9).view(7, 9), *counts)}))

    def test_empty_shards(self, tmp_path: Path) -> None:
        items = {
            "short": Shards((2, 3), [*cut(torch.randn(2, 3), 2), ((2, 0), torch.empty(0, 3))]),
            "empty": Shards((0, 3), [((0, 0), torch.empty(0, 3))]),
        }
        assert_as_torch(write_shards(tmp_path / "empty", items))

    def test_transposed_shards(self, tmp_path: Path) -> None:
        tensor = torch.randn(6, 4)
        chunks = [((0, 0), tensor[:3].t().contiguous().t()), ((3, 0), tensor[3:].t().contiguous().t())]
        path = write_shards(tmp_path / "transposed", {"x": Shards((6, 4), chunks)})
        assert_as_torch(path)
        assert open_checkpoint(path)["x"].chunks[0].stride == (1, 3)

    def test_many_files(self, tmp_path: Path) -> None:
        """More than are kept open."""
        path = write_shards(tmp_path / "many", {"x": sharded(torch.randn(70, 3), 70)})
        ours, mapped = assert_as_torch(path)
        assert len(mapped.source.files) == 70
        assert ours["x"].sum() == read_by_torch(path)["x"].sum()

    def test_metadata_is_torchs(self, several: Path) -> None:
        theirs = FileSystemReader(several).read_metadata()
        ours = read_metadata(str(several / ".metadata"))
        assert ours.paths == theirs.planner_data
        assert list(ours.items) == list(theirs.state_dict_metadata)

    def test_no_code_of_the_file_is_needed(self, tmp_path: Path) -> None:
        save_dcp({"settings": Settings(), "x": torch.ones(2)}, tmp_path / "dcp")
        index = open_checkpoint(tmp_path / "dcp")
        assert [tensor.name for tensor in index] == ["settings[0].table", "x"]
        with pytest.raises(pickle.UnpicklingError, match="Settings"):
            load_mapped(tmp_path / "dcp", weights_only=True)
        ours, _ = load_mapped(tmp_path / "dcp", weights_only=False)
        assert ours["settings"].rate == 0.5

    def test_optimizer_states_keep_their_numbers(self, tmp_path: Path) -> None:
        parameters = [torch.nn.Parameter(torch.randn(3)) for _ in range(11)]
        optimizer = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.randn(3)
        optimizer.step()
        save_dcp({"optim": optimizer.state_dict(), "plain": torch.optim.SGD(parameters).state_dict()}, tmp_path / "dcp")
        ours, mapped = load_mapped(tmp_path / "dcp")
        assert set(ours["optim"]["state"]) == set(range(11))
        assert ours["plain"]["state"] == {}
        assert mapped.index["optim.state[3].step"].shape == ()
        fresh = torch.optim.AdamW(parameters)
        fresh.load_state_dict(ours["optim"])
        for parameter in parameters:
            assert torch.equal(fresh.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])

    def test_torch_distributed_is_not_imported(self, several: Path) -> None:
        program = (
            "import sys\nfrom lightning_memload.formats import load_mapped\n"
            "import torch\nbefore = set(sys.modules)\n"
            f"loaded, _ = load_mapped({str(several)!r})\n"
            "RESULT = [n for n in set(sys.modules) - before if n.startswith('torch.distributed')]"
        )
        assert run_fresh(program).result == []


class TestMeta:
    """The file that Lightning saves beside the shards."""

    @staticmethod
    def load(path: Path, state: dict[str, Any], meta: dict[str, Any]) -> tuple[dict[str, Any], MappedCheckpoint]:
        save_dcp(state, path)
        torch.save(meta, path / "meta.pt")
        ours, mapped = load_mapped(path)
        assert [key for key, _ in tensors_of(ours)] == [tensor.path for tensor in mapped.index]
        return ours, mapped

    def test_of_a_trainer(self, tmp_path: Path) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
        state = {"model": {"a.b": torch.ones(3)}, "optimizer_0": optimizer.state_dict()}
        state["optimizer_1"] = {"state": {"a.b": {"step": torch.tensor(2.0)}}, "param_groups": [{"params": ["a.b"]}]}
        meta = {"pytorch-lightning_version": "2.6", "loops": {"x": 1}, "callbacks": {"average": torch.arange(4.0)}}
        ours, mapped = self.load(tmp_path / "dcp", state, meta)
        assert list(ours) == ["state_dict", "optimizer_states", "pytorch-lightning_version", "loops", "callbacks"]
        assert ours["optimizer_states"][0] == optimizer.state_dict()
        assert ours["optimizer_states"][1]["state"]["a.b"]["step"] == 2
        assert list(ours["state_dict"]) == ["a.b"]
        average = ours["callbacks"]["average"]
        assert type(average) is torch.Tensor
        assert mapped.holds(average)
        (piece,) = mapped.locate(average)  # type: ignore[misc]
        assert mapped.index["callbacks.average"].file_range[0] == piece.offset
        assert mapped.source.place(piece.offset)[0] == str(tmp_path / "dcp" / "meta.pt")
        mapped.detach()
        assert torch.equal(average, torch.arange(4.0))

    def test_of_a_trainer_without_optimizers(self, tmp_path: Path) -> None:
        meta: dict[str, Any] = {"pytorch-lightning_version": "2.6"}
        weights, _ = self.load(tmp_path / "weights", {"state_dict": {"a": torch.ones(3)}}, meta)
        assert "optimizer_states" not in weights
        none, _ = self.load(tmp_path / "none", {"model": {"a": torch.ones(3)}}, {**meta, "lr_schedulers": []})
        assert none["optimizer_states"] == []

    def test_of_others(self, tmp_path: Path) -> None:
        """Fabric: the names are its user's."""
        ours, _ = self.load(tmp_path / "dcp", {"model": {"a": torch.ones(3)}, "optimizer_0": {"x": 1}}, {"step": 3})
        assert list(ours) == ["model", "optimizer_0", "step"]


class TestStreaming:
    def test_values_arrive_and_nothing_is_read(self, several: Path) -> None:
        expected = read_by_torch(several)
        ours, mapped = load_mapped(several)
        names = ["rows", "columns", "grid", "replicated"]
        destinations = [torch.empty(ours["model"][name].shape, dtype=torch.float64) for name in names[:2]]
        destinations += [torch.empty(ours["model"][name].shape) for name in names[2:]]
        session = session_of(mapped)
        session.move([Move(n, ours["model"][n], d) for n, d in zip(names, destinations, strict=True)])
        for name, destination in zip(names, destinations, strict=True):
            assert torch.equal(destination.float(), expected["model"][name])
            assert not ours["model"][name].is_read
        assert session.bytes_copied_ordinarily == 0
        assert session.stats.bytes_verified == sum(tensor.nbytes for tensor in mapped.index)
        assert session.close() == sum(tensor.nbytes for tensor in mapped.index)

    def test_flipped_byte(self, several: Path) -> None:
        index = open_checkpoint(several)
        storage = index["model.grid"].chunks[4].storage
        file, position = index.place(storage.offset + 5)
        flip(Path(file), position)
        ours, mapped = load_mapped(several)
        session = session_of(mapped)
        with pytest.raises(ChecksumError, match=r"__4_0\.distcp is damaged.*model\.grid") as caught:
            session.move([Move("model.grid", ours["model"]["grid"], torch.empty(6, 8, 2))])
        assert caught.value.path == file
        session.close(detach=False)

    def test_touched_tensors_are_copied(self, several: Path) -> None:
        ours, mapped = load_mapped(several)
        with torch.no_grad():
            ours["model"]["rows"].mul_(2)
        destination = torch.empty(7, 5)
        session = session_of(mapped)
        session.move([Move("rows", ours["model"]["rows"], destination)])
        assert torch.equal(destination, read_by_torch(several)["model"]["rows"] * 2)
        assert session.bytes_copied_ordinarily == destination.nbytes
        session.close()


MEBIBYTE = 1 << 20
SIZES = (2048, 8192)

# Fills a tensor that is there already; what rises above its start is the way of the bytes, not the values.
FILLING = """
import torch
from lightning_memload.formats import load_mapped
from lightning_memload.memory import MemoryMonitor
from lightning_memload.restore import Move, RestoreSession
from lightning_memload.transfer import LazyRing, choose_layout

destinations = [torch.ones(ARGS["rows"], ARGS["columns"]) for _ in range(2)]
with MemoryMonitor() as monitor:
    loaded, mapped = load_mapped(ARGS["path"])
    if ARGS["streamed"]:
        ring = LazyRing(choose_layout(8 << 20, 2), pinned=False)
        session = RestoreSession(mapped, device=torch.device("cpu"), ring=ring)
        session.move([Move(n, loaded[n], d) for n, d in zip(("rows", "columns"), destinations)])
        session.close(detach=False)
    else:
        for name, destination in zip(("rows", "columns"), destinations):
            destination.copy_(loaded[name])
RESULT = [monitor.peaks.anonymous_above_start_bytes, [d.double().sum().item() for d in destinations]]
"""


@pytest.mark.memory
def test_streaming_needs_no_more_than_its_ring(tmp_path: Path) -> None:
    rows, columns = SIZES
    tensor = torch.randn(rows, columns)
    nbytes = tensor.nbytes
    path = write_shards(tmp_path / "large", {"rows": sharded(tensor, 4), "columns": sharded(tensor, 1, 4)})
    sums = [tensor.double().sum().item()] * 2
    streamed, arrived = run_fresh(FILLING, path=path, rows=rows, columns=columns, streamed=True).result
    assert arrived == sums
    touched, _ = run_fresh(FILLING, path=path, rows=rows, columns=columns, streamed=False).result
    assert touched >= 2 * nbytes - 8 * MEBIBYTE  # some memory is free at the start
    # The ring's 8 MiB, and what the threads and the index take.
    assert streamed <= 40 * MEBIBYTE


def session_of(mapped: MappedCheckpoint) -> RestoreSession:
    ring = LazyRing(choose_layout(1 << 20, 2), pinned=False)
    return RestoreSession(mapped, device=torch.device("cpu"), ring=ring)


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


# Chunked tensors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(several: Path) -> tuple[Any, torch.Tensor, MappedCheckpoint]:
    """A chunked tensor that has not been read, its values, and the checkpoint."""
    ours, mapped = load_mapped(several)
    return ours["model"].pop("grid"), read_by_torch(several)["model"]["grid"], mapped


class TestChunkedTensor:
    def test_looking_reads_nothing(self, pair: Any) -> None:
        tensor, values, mapped = pair
        assert (tensor.shape, tensor.dtype, tensor.device.type) == (values.shape, values.dtype, "cpu")
        assert (tensor.stride(), tensor.numel(), tensor.nbytes, tensor.dim()) == (
            values.stride(), values.numel(), values.nbytes, 3,
        )  # fmt: skip
        assert tensor.is_contiguous()
        assert tensor.is_floating_point()
        assert not any((tensor.requires_grad, tensor.is_meta, tensor.is_quantized, tensor.is_conj()))
        assert "6 parts" in repr(tensor)
        assert tensor.cpu() is tensor
        assert tensor.to(torch.float32) is tensor
        assert tensor.contiguous() is tensor
        assert isinstance(tensor, torch.Tensor)
        assert not tensor.is_read
        assert mapped.holds(tensor)
        assert mapped.is_chunked

    @pytest.mark.parametrize(
        "operation",
        [
            lambda t: t + 1,
            lambda t: t.sum(0),
            lambda t: t[1:3, 2],
            lambda t: t.clone(),
            lambda t: t.double(),
            lambda t: t.permute(2, 0, 1).reshape(-1),
            lambda t: torch.cat([t, t]),
            lambda t: torch.stack([t, torch.ones(6, 8, 2)]),
            lambda t: torch.empty(6, 8, 2).copy_(t),
            lambda t: torch.nn.Parameter(t.clone()).detach(),
            lambda t: torch.from_numpy(t.numpy()),
            lambda t: torch.tensor(t.tolist()),
            lambda t: torch.as_tensor(t.__array__()),
            lambda t: pickle.loads(pickle.dumps(t)),
            lambda t: through_torch_save(t),
            lambda t: copy.deepcopy(t),
            lambda t: copy.deepcopy({"a": t, "b": t})["b"],
            lambda t: torch._foreach_mul([t], 2)[0],
            lambda t: t.view(torch.int32),
        ],
    )  # fmt: skip
    def test_operations_see_the_values(self, operation: Callable[[torch.Tensor], torch.Tensor], pair: Any) -> None:
        tensor, values, mapped = pair
        result = operation(tensor)
        expected = operation(values)
        assert type(result) is torch.Tensor
        assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())
        assert as_bytes(result) == as_bytes(expected)
        assert tensor.is_read
        assert not mapped.holds(tensor)
        assert mapped.locate(tensor) is None

    def test_item(self, pair: Any) -> None:
        tensor, values, _ = pair
        assert tensor[2, 3, 1].item() == values[2, 3, 1].item()
        assert torch.equal(tensor, values)
        assert tensor.data_ptr() == tensor.untyped_storage().data_ptr() == tensor.read().data_ptr()

    def test_writing_is_seen_by_all(self, pair: Any) -> None:
        tensor, values, _ = pair
        twin, plain = tensor.detach(), tensor.data
        assert not tensor.is_read
        assert tensor.mul_(2) is tensor
        assert tensor.is_read
        assert twin.is_read
        expected = values * 2
        for each in (tensor, twin, plain):
            assert torch.equal(each, expected)
        tensor[0] = 5
        tensor.data.view(-1)[-1] = 6
        expected[0] = 5
        expected.view(-1)[-1] = 6
        assert torch.equal(twin, expected)
        assert not torch.equal(tensor, values)

    def test_detached_twins_are_located(self, pair: Any) -> None:
        tensor, _, mapped = pair
        twin = tensor.detach()
        assert type(twin) is ChunkedTensor
        assert mapped.locate(twin) == mapped.locate(tensor)
        parameter = torch.nn.Parameter(tensor)
        assert parameter.requires_grad
        assert not tensor.is_read

    def test_copies_of_one_tensor_stay_one(self, pair: Any) -> None:
        tensor, _, _ = pair
        copied = copy.deepcopy([tensor, tensor])
        assert copied[0] is copied[1]

    def test_gradient(self, pair: Any) -> None:
        tensor, values, _ = pair
        weight = torch.ones(6, 8, 2, requires_grad=True)
        (weight * tensor).sum().backward()
        assert torch.equal(weight.grad, values)  # type: ignore[arg-type]

    def test_state_dict_takes_it(self, several: Path) -> None:
        ours, _ = load_mapped(several)
        module = torch.nn.Linear(5, 7, bias=False)
        module.load_state_dict({"weight": ours["model"]["columns"]})
        assert torch.equal(module.weight, read_by_torch(several)["model"]["columns"])

    def test_ordinary_in_every_context(self, pair: Any) -> None:
        tensor, values, _ = pair
        with torch.inference_mode(), torch.device("meta"):
            memory = tensor.read()
        assert not memory.is_inference()
        assert memory.device.type == "cpu"
        assert torch.equal(tensor.add_(1), values + 1)

    def test_threads_share_one_reading(self, pair: Any) -> None:
        tensor, _, _ = pair
        barrier = threading.Barrier(4)
        memories: list[torch.Tensor] = []

        def read() -> None:
            barrier.wait()
            memories.append(tensor.read())

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(memory) for memory in memories}) == 1

    def test_locate(self, several: Path) -> None:
        ours, mapped = load_mapped(several)
        (whole,) = mapped.locate(ours["model"]["replicated"])  # type: ignore[misc]
        assert (whole.starts, whole.shape) == ((0,), (3,))
        assert whole.offset == mapped.index["model.replicated"].file_range[0]
        upper, lower = mapped.locate(ours["model"]["rows"])  # type: ignore[misc]
        assert (upper.starts, upper.shape, lower.starts, lower.shape) == ((0, 0), (4, 5), (4, 0), (3, 5))
        plain = torch.ones(7, 5)
        assert lower.within(plain).data_ptr() == plain[4:].data_ptr()
        assert mapped.locate(plain) is None
        assert mapped.locate_all([plain, ours["model"]["rows"]]) == [None, (upper, lower)]

    def test_of_another_checkpoint(self, several: Path) -> None:
        ours, _ = load_mapped(several)
        _, other = load_mapped(several)
        assert other.locate(ours["model"]["rows"]) is None

    def test_detach_reads_what_is_left(self, several: Path) -> None:
        ours, mapped = load_mapped(several)
        kept, used = ours["model"]["rows"], ours["model"]["columns"]
        total = sum(value.nbytes for value in ours["model"].values())
        assert mapped.referenced_bytes == total
        used.add_(1)
        del ours
        assert mapped.referenced_bytes == kept.nbytes
        assert mapped.detach() == kept.nbytes
        assert kept.is_read
        assert mapped.referenced_bytes == 0
        held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd_exists(fd)]
        assert not any(name.startswith(str(several)) for name in held)
        assert torch.equal(kept, read_by_torch(several)["model"]["rows"])

    def test_large_parts_are_read_in_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        values = torch.randn(40, 30)
        items = {"x": sharded(values, 1, 2), "t": Shards((40,), [((0,), values[:, 1])])}
        path = write_shards(tmp_path / "blocks", items)
        monkeypatch.setattr("lightning_memload.checkpoint.chunked._READ_BLOCK_BYTES", 100)
        reads = counting_reads(monkeypatch)
        ours, _ = load_mapped(path)
        reads.clear()
        assert torch.equal(ours["x"], values)
        assert torch.equal(ours["t"], values[:, 1])
        assert max(reads) <= 100
        assert sum(reads) == values.nbytes + 40 * 4

    def test_truncated_meanwhile(self, several: Path) -> None:
        ours, mapped = load_mapped(several)
        file = several / "__5_0.distcp"
        with open(file, "r+b") as stream:
            stream.truncate(200)
        with pytest.raises(CheckpointReadError, match=r"__5_0\.distcp ends at byte .* model\.grid needs .* truncated"):
            ours["model"]["grid"].sum()
        with pytest.raises(CheckpointReadError):
            mapped.detach()

    def test_scalar_and_interlocking_rows(self, tmp_path: Path) -> None:
        file = tmp_path / "raw"
        data = torch.arange(24, dtype=torch.int16)
        file.write_bytes(data.numpy().tobytes())
        storage = StorageInfo("0", 0, 48, None, "cpu")
        mapped = MappedCheckpoint(None, FileSet([file]), None)  # type: ignore[arg-type]
        scalar = mapped.chunked_tensor((), torch.int16, [ChunkInfo((), (), (), 7, storage)])
        assert scalar.item() == 7
        chunk = ChunkInfo((0, 0), (4, 6), (1, 4), 0, storage)
        assert torch.equal(mapped.chunked_tensor((4, 6), torch.int16, [chunk]), data.as_strided((4, 6), (1, 4)))


def through_torch_save(tensor: torch.Tensor) -> torch.Tensor:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def fd_exists(descriptor: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{descriptor}")


def counting_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    reads: list[int] = []
    original = FileSet.readv

    def readv(self: FileSet, buffers: Sequence[memoryview], offset: int) -> int:
        reads.append(original(self, buffers, offset))
        return reads[-1]

    monkeypatch.setattr(FileSet, "readv", readv)
    return reads


# Damage --------------------------------------------------------------------------------------------------------------


def _drop_chunk(metadata: Any) -> None:
    del chunks_of(metadata, "model.grid")[2]


def _overlap(metadata: Any) -> None:
    chunks_of(metadata, "model.rows")[0].sizes = torch.Size((5, 5))


def _outside(metadata: Any) -> None:
    chunks_of(metadata, "model.rows")[1].sizes = torch.Size((3, 6))


def _twice(metadata: Any) -> None:
    chunks_of(metadata, "model.rows").append(
        torch_metadata.ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((1, 1)))
    )


def _absurd(metadata: Any) -> None:
    metadata.state_dict_metadata["model.rows"].size = torch.Size((1 << 40, 1 << 40))


def _absurd_but_empty(metadata: Any) -> None:
    item = metadata.state_dict_metadata["model.rows"]
    item.size = torch.Size((1 << 40, 1 << 40, 0))


def _wrong_rank(metadata: Any) -> None:
    metadata.state_dict_metadata["model.rows"].size = torch.Size((35,))


def _larger(metadata: Any) -> None:
    item = metadata.state_dict_metadata["model.rows"]
    item.size = torch.Size((1007, 5))
    item.chunks[1].sizes = torch.Size((1003, 5))


def _other_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata["model.rows"].properties.dtype = torch.float16


def _no_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata["model.rows"].properties.dtype = "float32"


def _nowhere(metadata: Any) -> None:
    for key in [key for key in metadata.storage_data if key.fqn in ("model.rows", "epoch")]:
        del metadata.storage_data[key]


def _path(relative: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        place_of(metadata, "model.rows").relative_path = relative

    return edit


def _negative(metadata: Any) -> None:
    place_of(metadata, "model.rows").offset = -1


def _beyond(metadata: Any) -> None:
    place_of(metadata, "model.rows").offset = 1 << 50


def _true(metadata: Any) -> None:
    place_of(metadata, "model.rows").length = True


def _shifted(metadata: Any) -> None:
    place_of(metadata, "model.rows").offset += 3


def _swapped(metadata: Any) -> None:
    place_of(metadata, "model.rows").offset = place_of(metadata, "model.columns").offset
    place_of(metadata, "model.rows").length = place_of(metadata, "model.columns").length


def _compressed(metadata: Any) -> None:
    place_of(metadata, "model.rows").transform_descriptors = ["stream.zstd/1"]


def _to(path: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        metadata.planner_data["model.rows"] = path

    return edit


def _no_storage_data(metadata: Any) -> None:
    metadata.storage_data = None


def _nameless(metadata: Any) -> None:
    metadata.state_dict_metadata[3] = torch_metadata.BytesStorageMetadata()


def _undescribed(metadata: Any) -> None:
    metadata.state_dict_metadata["model.rows"] = 4


class TestDamage:
    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (_drop_chunk, r"hold 84 of the 96 elements of model\.grid, whose shape is \(6, 8, 2\): a rank's part is"),
            (_overlap, r"chunks of model\.rows overlap, the one at \(0, 0\) of sizes \(5, 5\) and the one at \(4, 0"),
            (_outside, r"at \(4, 0\) of sizes \(3, 6\) does not lie within the tensor's shape \(7, 5\)"),
            (_twice, r"two chunks of model\.rows begin at \(0, 0\)"),
            (_absurd, r"model\.rows has the absurd shape \(1099511627776, 1099511627776\)"),
            (_absurd_but_empty, r"model\.rows has the absurd shape"),
            (_wrong_rank, r"does not lie within the tensor's shape \(35,\)"),
            (_larger, r"is torch.float32 of shape \(1003, 5\) in .metadata, but .* torch.float32 of shape \(3, 5\)"),
            (_other_dtype, r"is torch.float16 of .* in .metadata, but what lies there is torch.float32"),
            (_no_dtype, r"the element type of model\.rows is 'float32'"),
            (_nowhere, r"has no entry for 3 of its parts: model\.rows at \(0, 0\), model.rows at \(4, 0\), epoch"),
            (_path("../secret"), r"it places .* in '../secret', which is not a file of the directory"),
            (_path("/etc/passwd"), r"which is not a file of the directory"),
            (_path(".."), r"which is not a file of the directory"),
            (_path("a\0b"), r"which is not a file of the directory"),
            (_path(""), r"which is not a file of the directory"),
            (_path(3), r"which is not a file of the directory"),
            (_path("__9_0.distcp"), r"lacks 1 of the 7 files that its .metadata names: __9_0\.distcp\. Every rank"),
            (_negative, r"offset and length of model\.rows in __0_0\.distcp is \(-1, \d+\)"),
            (_true, r"offset and length of model\.rows"),
            (_beyond, r"truncated: .*__0_0\.distcp \(data through byte 1125\d+, but the file is only \d+ bytes"),
            (_shifted, r"the entry of model\.rows at byte 3"),
            (_swapped, r"is torch.float32 of shape \(4, 5\) in .metadata, but what lies there is .* \(7, 3\)"),
            (_compressed, r"written through \['stream.zstd/1'\]"),
            (_to(("model",)), r"lead to another object as well"),
            (_to(("model", "columns")), r"keys \('model', 'columns'\) of model.columns lead to another object"),
            (_to(("model", 0)), r"lead to another object as well"),
            (_to(("epoch", "x")), r"lead to another object as well"),
            (_to(()), r"the keys that lead to model\.rows are \(\)"),
            (_to(("a", -1)), r"the keys that lead to model\.rows are"),
            (_to(("a", 1 << 40)), r"lists with more than 100000 empty positions"),
            (_to(("a",) * 101), r"the keys that lead to model\.rows are"),
            (_to("model"), r"the keys that lead to model\.rows are 'model'"),
            (_no_storage_data, r"its storage_data is None, not a dict"),
            (_nameless, r"an item is called 3, which is no string"),
            (_undescribed, r"model\.rows is described by 4"),
        ],
    )  # fmt: skip
    def test_metadata(self, edit: Callable[[Any], None], message: str, several: Path) -> None:
        change(several, edit)
        refused(several, message)

    def test_missing_files_are_listed_together(self, tmp_path: Path) -> None:
        path = write_shards(tmp_path / "lost", {"x": sharded(torch.randn(16, 2), 16)})
        for rank in range(12):
            (path / f"__{rank}_0.distcp").unlink()
        refused(path, r"lacks 12 of the 16 files .*: __0_0\.distcp, __10_0\.distcp, .* and 2 more\. Every rank wrote")

    @pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
    def test_truncated_file(self, keep: float, several: Path) -> None:
        file = several / "__1_0.distcp"
        size = file.stat().st_size
        os.truncate(file, int(keep * size) if isinstance(keep, float) else keep % size)
        refused(several, rf"truncated.*__1_0\.distcp \(data through byte {size}, but the file is only \d+ bytes\)")

    @pytest.mark.parametrize("keep", [0, 1, 2, 40, 0.3, 0.9, -1])
    def test_truncated_metadata(self, keep: float, several: Path) -> None:
        data = (several / ".metadata").read_bytes()
        (several / ".metadata").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        refused(several, r"\.metadata cannot be read .* is truncated or damaged")

    @pytest.mark.slow
    def test_flipped_bytes(self, several: Path) -> None:
        """Each flipped byte gives an error of this package or a sound index, in short time."""
        original = (several / ".metadata").read_bytes()
        for position in range(0, len(original), 5):
            data = bytearray(original)
            data[position] ^= 1 << (position % 8)
            (several / ".metadata").write_bytes(data)
            with contextlib.suppress(CheckpointFormatError):
                open_checkpoint(several)

    def test_description_of_a_part_is_checked(self, several: Path) -> None:
        file = several / "__3_0.distcp"
        data = file.read_bytes()
        flip(file, data.index(b"FloatStorage"))
        refused(several, r"__3_0\.distcp, the entry of model\.grid at byte 0 is damaged: .* have CRC-32")

    def test_unfinished_save(self, several: Path) -> None:
        (several / ".metadata").unlink()
        refused(several, r"no \.metadata, which torch.distributed.checkpoint writes last: the save was not finished")

    def test_metadata_of_single_ranks(self, several: Path) -> None:
        (several / ".metadata").rename(several / "__0.metadata")
        refused(several, r"separate metadata of each rank \(__0\.metadata\), because .* use_collectives=False")

    def test_no_metadata_at_all(self, tmp_path: Path) -> None:
        refused(tmp_path, "is a directory, but no checkpoint of a known format")

    def test_other_objects(self, tmp_path: Path) -> None:
        values: tuple[object, ...] = ({}, [], 3, torch.Size((1,)), torch_metadata.StorageMeta())
        for value in values:
            (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
            refused(tmp_path, "where torch writes a Metadata")

    def test_no_regular_file(self, several: Path) -> None:
        (several / "__5_0.distcp").unlink()
        os.mkfifo(several / "__5_0.distcp")
        refused(several, "is no regular file")

    def test_conjugate(self, tmp_path: Path) -> None:
        save_dcp({"x": torch.randn(3, dtype=torch.complex64).conj()}, tmp_path / "dcp")
        refused(tmp_path / "dcp", "is a view .* whose bytes are not its values")

    def test_repeated_elements(self, tmp_path: Path) -> None:
        path = write_shards(tmp_path / "huge", {"x": Shards((1 << 40,), [((0,), torch.zeros(1).expand(1 << 40))])})
        refused(path, "is a view .4398046511104 bytes of a storage of 4")

    def test_meta_that_is_no_dict(self, several: Path) -> None:
        torch.save([1], several / "meta.pt")
        refused(several, r"meta\.pt holds a list, where Lightning puts a dict")

    def test_meta_of_old_torch(self, several: Path) -> None:
        torch.save({}, several / "meta.pt", _use_new_zipfile_serialization=False)
        refused(several, r"meta\.pt is not what torch\.save writes by default")

    def test_safetensors_inside(self, tmp_path: Path) -> None:
        """torch's own reader takes none of it either."""
        filesystem = pytest.importorskip("torch.distributed.checkpoint.filesystem")
        if not hasattr(filesystem, "SerializationFormat"):
            pytest.skip("this torch writes only its own format")
        writer = dcp.FileSystemWriter(
            tmp_path / "dcp", serialization_format=filesystem.SerializationFormat.SAFETENSORS, sync_files=False
        )
        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"x": torch.ones(4)}, storage_writer=writer)
        refused(tmp_path / "dcp", r"__0_0\.distcp, the entry of x at byte 0 is not what torch.save writes by default")


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.path
    with pytest.raises(CheckpointFormatError):
        load_mapped(path, weights_only=False)


class Running:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


class TestHostilePickles:
    @pytest.fixture(autouse=True)
    def _watched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.chdir(tmp_path)
        yield
        assert not os.path.exists("ran")

    def test_in_metadata(self, several: Path) -> None:
        change(several, lambda metadata: setattr(metadata, "storage_meta", Running()))
        refused(several, r"names posix\.mkdir, which the metadata of torch.distributed.checkpoint never holds")

    @pytest.mark.parametrize(
        "pickled",
        [
            b"cbuiltins\neval\n(S'1'\ntR.",
            b"ctorch.distributed.checkpoint.filesystem\nos.mkdir\n(S'ran'\ntR.",
            b"ctorch.serialization\nload\n(S'ran'\ntR.",
            b"ctorch.distributed.run\nmain\n)R.",
            b"ctorch\nSize\n}S'x'\nI1\nsb.",
            b"ctorch.distributed.checkpoint.metadata\nMetadata\n}S'__class__'\nI1\nsb.",
            b"Pid\n.",
            b"\x80\x04N\x94r\xff\xff\xff\xff.",
            b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",
            b"(" * 100000,
            b"]" * 100000 + b"a" * 99999 + b".",
        ],
    )
    def test_written_by_hand(self, pickled: bytes, several: Path) -> None:
        (several / ".metadata").write_bytes(pickled)
        refused(several, r"\.metadata")

    def test_in_an_object(self, tmp_path: Path) -> None:
        path = write_shards(tmp_path / "hostile", {"x": sharded(torch.ones(2), 2), "object": Running()})
        assert [tensor.name for tensor in open_checkpoint(path)] == ["x"]
        with pytest.raises(pickle.UnpicklingError, match="mkdir"):
            load_mapped(path)

    def test_in_a_part(self, tmp_path: Path) -> None:
        path = write_shards(tmp_path / "hostile", {"x": sharded(torch.ones(2), 2), "y": Running()})
        change(path, lambda metadata: metadata.storage_data.update(swapped(metadata)))
        refused(path, "what lies there is no single tensor")


def swapped(metadata: Any) -> dict[Any, Any]:
    part = next(key for key in metadata.storage_data if key.fqn == "x")
    return {part: place_of(metadata, "y")}
