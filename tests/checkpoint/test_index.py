"""The index against the file's own bytes and against torch."""

from __future__ import annotations

import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload.checkpoint import Checkpoint
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError
from lightning_memload.formats import open_checkpoint
from tests.formats.files import (
    ALL_DTYPES,
    Settings,
    as_bytes,
    from_file,
    layouts,
    nested,
    of_dtype,
    save_bytes,
    storage_pickle,
    tensor_pickle,
    tensors_of,
    write_zip,
)
from tests.fresh_process import run_fresh

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def assert_describes(index: Checkpoint, path: Path, saved: Any) -> None:
    """Names, dtypes, sizes as in ``saved``; and what the file holds in the ranges are the values."""
    expected = dict(tensors_of(saved))
    assert {tensor.path for tensor in index} == set(expected)
    for info in index:
        tensor = expected[info.path]
        assert (info.dtype, info.shape, info.stride) == (tensor.dtype, tuple(tensor.shape), tensor.stride()), info.name
        assert info.is_parameter == isinstance(tensor, torch.nn.Parameter)
        raw = from_file(path, info.file_range)
        if info.numel:
            in_file = torch.frombuffer(bytearray(raw), dtype=info.dtype).as_strided(info.shape, info.stride)
            assert as_bytes(in_file) == as_bytes(tensor), info.name
        else:
            assert raw == b""


def assert_offsets_are_torchs(index: Checkpoint, path: Path) -> None:
    reader: Any = torch._C.PyTorchFileReader(str(path))
    for storage in index.storages:
        assert storage.offset == reader.get_record_offset(f"data/{storage.key}")
        assert storage.crc32 in (None, zlib.crc32(from_file(path, (storage.offset, storage.offset + storage.nbytes))))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype(path: Path, dtype: torch.dtype) -> None:
    saved = {"a": of_dtype(dtype), "b": of_dtype(dtype, 1).reshape(()), "c": of_dtype(dtype, 24).view(4, 6).t()}
    torch.save(saved, path)
    index = open_checkpoint(path)
    assert_describes(index, path, saved)
    assert_offsets_are_torchs(index, path)


def test_every_layout(path: Path) -> None:
    torch.save(layouts(), path)
    index = open_checkpoint(path)
    assert_describes(index, path, layouts() | {"channels_last": torch.load(path)["channels_last"]})
    assert_offsets_are_torchs(index, path)


def test_nested_containers_and_order(path: Path) -> None:
    saved = nested()
    torch.save(saved, path)
    index = open_checkpoint(path)
    assert_describes(index, path, saved)
    assert [tensor.path for tensor in index] == [name for name, _ in tensors_of(saved)]
    assert "optimizer_states[0].state[0].exp_avg" in index
    assert index["state_dict.row"].storage is index["state_dict.weight"].storage
    assert [[tensor.name for tensor in group] for group in index.ties] == [
        ["state_dict.weight", "state_dict.tied", "state_dict.row"]
    ]
    assert index.nbytes == sum(storage.nbytes for storage in index.storages)


def test_tensors_within_other_objects_are_found(path: Path) -> None:
    torch.manual_seed(0)
    marked = torch.arange(7.0)
    marked.note = "a tensor with an attribute"
    sparse = torch.eye(4).to_sparse()
    saved = {"user": Settings(), "module": torch.nn.Linear(3, 2), "sparse": sparse, "set": {1, 2}, "marked": marked}
    torch.save(saved, path)
    index = open_checkpoint(path)
    found = {from_file(path, tensor.file_range) for tensor in index}
    module = saved["module"]
    assert isinstance(module, torch.nn.Linear)
    wanted = [Settings().table, module.weight, module.bias, sparse.indices(), sparse.values(), marked]
    for tensor in wanted:
        assert as_bytes(tensor) in found
    assert len(index) == len(wanted)
    assert from_file(path, index["marked"].file_range) == as_bytes(marked)


def test_a_checkpoint_of_lightning(path: Path) -> None:
    import tests.lightning as L

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)
            self.tied = self.layer

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).sum()
            return loss

    loader: Any = torch.utils.data.DataLoader(list(torch.randn(4, 4)))  # type: ignore[arg-type]
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=path.parent,
    )  # fmt: skip
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Model(), loader)
    trainer.save_checkpoint(path)
    index = open_checkpoint(path)
    assert_describes(index, path, torch.load(path, weights_only=False))
    assert index["state_dict.layer.weight"].storage is index["state_dict.tied.weight"].storage
    assert "optimizer_states[0].state[0].exp_avg" in index


def test_a_bare_tensor_and_a_file_without_tensors(path: Path) -> None:
    torch.save(torch.ones(3), path)
    (only,) = open_checkpoint(path)
    assert (only.path, only.name) == ((), "")
    torch.save({"epoch": 1}, path)
    assert len(open_checkpoint(path)) == 0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(path: Path, protocol: int) -> None:
    saved = nested() | {"raw": bytearray(b"abc")}
    torch.save(saved, path, pickle_protocol=protocol)
    assert_describes(open_checkpoint(path), path, torch.load(path, weights_only=False))


@pytest.fixture
def without_crc() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def test_records_without_checksum(path: Path, without_crc: None) -> None:
    torch.save(nested(), path)
    index = open_checkpoint(path)
    # torch then writes another checksum of its own into the field, or none.
    reported = {storage.crc32 for storage in index.storages}
    true = {zlib.crc32(from_file(path, (s.offset, s.offset + s.nbytes))) for s in index.storages}
    assert reported <= {None} | true


def test_data_that_was_skipped(path: Path) -> None:
    with torch.serialization.skip_data():
        torch.save({"a": torch.ones(1000), "b": torch.ones(3)}, path)
    index = open_checkpoint(path)
    assert {storage.nbytes for storage in index.storages} == {4000, 12}
    assert [from_file(path, tensor.file_range) for tensor in index] == [bytes(4000), bytes(12)]
    assert {storage.crc32 for storage in index.storages} == {None}


class TestNoDataIsRead:
    def test_bytes_that_the_process_reads(self, path: Path) -> None:
        torch.save({str(number): torch.zeros(1 << 20) for number in range(16)}, path)  # 64 MiB
        program = """
import os
from lightning_memload.formats import load_mapped, open_checkpoint
def read_bytes():
    return int(open("/proc/self/io").read().split("rchar: ")[1].split()[0])
open_checkpoint(ARGS["path"])  # the first use imports
start = read_bytes()
open_checkpoint(ARGS["path"])
opened = read_bytes()
loaded, _ = load_mapped(ARGS["path"], weights_only=True)
mapped = read_bytes()
sum(value[-1].item() for value in loaded.values())
open(ARGS["path"], "rb").read(1 << 20)
RESULT = [opened - start, mapped - opened, read_bytes() - mapped]
"""
        opened, mapped, calibration = run_fresh(program, path=path).result
        assert opened < 64 << 10
        assert mapped < 4 << 20  # torch's own zip reader and imports of torch.load
        assert 1 << 20 <= calibration < 2 << 20


class TestNoCodeRuns:
    """The pickle's own code would leave a file behind."""

    def pickles(self, trace: Path) -> dict[str, bytes]:
        command = f"touch {trace}".encode()
        python = f"open({str(trace)!r}, 'w').close()".encode()
        return {
            "os.system": b"\x80\x02cposix\nsystem\n(X" + len(command).to_bytes(4, "little") + command + b"tR.",
            "eval": b"\x80\x02cbuiltins\nexec\n(X" + len(python).to_bytes(4, "little") + python + b"tR.",
            "inst": b"(X" + len(python).to_bytes(4, "little") + python + b"ibuiltins\nexec\n.",
            "stack_global": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c" + bytes([len(python)]) + python + b"\x85R.",
        }

    @pytest.mark.parametrize("name", ["os.system", "eval", "inst", "stack_global"])
    def test_indexing(self, tmp_path: Path, path: Path, name: str) -> None:
        trace = tmp_path / "trace"
        write_zip(path, self.pickles(trace)[name])
        assert len(open_checkpoint(path)) == 0
        assert not trace.exists()

    def test_the_pickles_would_work(self, tmp_path: Path) -> None:
        import pickle

        for name, pickled in self.pickles(tmp_path / "trace").items():
            pickle.loads(pickled)
            assert (tmp_path / "trace").exists(), name
            (tmp_path / "trace").unlink()

    def test_nothing_is_imported(self, path: Path) -> None:
        write_zip(path, b"\x80\x02cantigravity\nflight\n)R.")
        open_checkpoint(path)
        assert "antigravity" not in sys.modules

    @pytest.mark.parametrize(
        "target",
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ccollections\ndefaultdict\n",
            b"ccollections\nOrderedDict\n",
            b"cos\nsystem\n",
            b"ctorch\nfloat32\n",
            tensor_pickle(storage_pickle()),
            storage_pickle(),
        ],
    )
    @pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00xK\x01s", b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86"])
    def test_a_pickle_cannot_change_what_it_names(self, path: Path, target: bytes, state: bytes) -> None:
        write_zip(path, b"\x80\x02" + target + state + b"b.", {"0": bytes(16)})
        with pytest.raises(CheckpointFormatError, match=r"data\.pkl cannot be read"):
            open_checkpoint(path)
        torch.save({"a": torch.ones(2)}, path)
        assert open_checkpoint(path)["a"].shape == (2,)

    def test_a_storage_has_the_type_of_its_first_reference_as_in_torch(self, path: Path) -> None:
        four = storage_pickle()
        two = storage_pickle(numel=b"K\x02", kind=b"DoubleStorage")
        pickled = b"\x80\x02](" + tensor_pickle(four) + tensor_pickle(two, shape=b"(K\x02t") + b"e."
        write_zip(path, pickled, {"0": bytes(range(16))})
        index = open_checkpoint(path)
        assert [tensor.dtype for tensor in index] == [tensor.dtype for tensor in torch.load(path)]


class TestNotMappable:
    @pytest.mark.parametrize("protocol", [1, 2, 4])
    def test_legacy_format(self, path: Path, protocol: int) -> None:
        torch.save(nested(), path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
        with pytest.raises(UnmappableCheckpointError, match="none of the known formats"):
            open_checkpoint(path)

    def test_what_only_the_directory_calls_compressed_is_damaged(self, path: Path) -> None:
        torch.save({"weight": torch.ones(3)}, path)
        data = bytearray(path.read_bytes())
        data[data.index(b"PK\x01\x02") + 10] ^= 8
        path.write_bytes(data)
        with pytest.raises(CheckpointFormatError, match="the directory has compression 8"):
            open_checkpoint(path)

    def test_compressed(self, tmp_path: Path, path: Path) -> None:
        (tmp_path / "plain").write_bytes(save_bytes(nested()))
        with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
        with pytest.raises(UnmappableCheckpointError, match="compressed") as caught:
            open_checkpoint(path)
        # A sound file is not a damaged one.
        assert not isinstance(caught.value, CheckpointFormatError)
        assert caught.value.path == str(path)

    def test_other_byte_order(self, path: Path) -> None:
        pickled = b"\x80\x02" + tensor_pickle(storage_pickle()) + b"."
        write_zip(path, pickled, {"0": bytes(16)}, byteorder=b"big" if sys.byteorder == "little" else b"little")
        with pytest.raises(UnmappableCheckpointError, match="byte order"):
            open_checkpoint(path)
        write_zip(path, pickled, {"0": bytes(16)}, byteorder=None)
        assert len(open_checkpoint(path)) == 1

    def test_torchscript(self, path: Path) -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
        with pytest.raises(UnmappableCheckpointError, match=r"TorchScript archive\. torch\.jit\.load reads it"):
            open_checkpoint(path)

    @pytest.mark.parametrize("content", [b"", b"P", b"hello world" * 100, b"PK\x03\x04", b"PK\x03\x04" + bytes(500)])
    def test_something_else(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(CheckpointFormatError, match="checkpoint") as caught:
            open_checkpoint(path)
        assert caught.value.path == str(path)
        # Nor is it one that the ordinary way would read.
        assert not isinstance(caught.value, UnmappableCheckpointError)

    def test_a_zip_of_something_else(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(CheckpointFormatError, match=r"holds no data\.pkl"):
            open_checkpoint(path)

    def test_directory_and_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointFormatError, match="is a directory, but no checkpoint of a known format"):
            open_checkpoint(tmp_path)
        with pytest.raises(FileNotFoundError):
            open_checkpoint(tmp_path / "absent")

    def test_no_descriptor_is_left_open(self, path: Path) -> None:
        path.write_bytes(b"PK\x03\x04" + bytes(500))
        before = os.listdir("/proc/self/fd")
        for _ in range(5):
            with pytest.raises(CheckpointFormatError):
                open_checkpoint(path)
        assert len(os.listdir("/proc/self/fd")) == len(before)
