"""A format takes one class and one entry in the registry. This one is written here, and goes through everything."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, load_weights, meta_init, open_checkpoint, verify_checkpoint
from lightning_memload.bytes import Record
from lightning_memload.checkpoint import Checkpoint, Inventory, MappedCheckpoint, StorageInfo, TensorInfo, end_loading
from lightning_memload.cli import main
from lightning_memload.errors import CheckpointFormatError, ChecksumError
from lightning_memload.formats import registry
from lightning_memload.storage import FileSet, StoredFile, map_or_reserve, places
from lightning_memload.storage.places import is_file, read_start
from lightning_memload.transfer import choose_layout
from tests.formats.conformance import (
    Case,
    Writer,
    check_index,
    check_load,
    check_recognition,
    check_stream,
    format_of,
    write_case,
)
from tests.formats.files import as_bytes
from tests.plugins.harness import TinyModule, adamw, make_trainer
from tests.storage.toy import SCHEME, ToyBucket

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

MAGIC = b"TOY1"


def write_toy(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """Four letters, the size of the header, the header, and the bytes of every tensor with their CRC-32."""
    rows, data = [], b""
    for name, tensor in state.items():
        own = as_bytes(tensor)
        rows.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), len(data), zlib.crc32(own)])
        data += own + bytes(-len(own) % 64)
    header = json.dumps(rows).encode()
    header += b" " * (-(len(header) + 12) % 64)
    path = folder / "weights.toy"
    path.write_bytes(MAGIC + len(header).to_bytes(8, "little") + header + data)
    return path


class Toy:
    """Reads such files."""

    name = "toy"

    def recognizes(self, path: str) -> bool:
        return is_file(path) and read_start(path, 4) == MAGIC

    def read_index(self, path: str) -> Checkpoint:
        source = FileSet([path])
        try:
            return self._index(source)
        finally:
            source.close()

    def load(self, path: str, *, weights_only: bool | None, erases: bool = False) -> tuple[Any, MappedCheckpoint]:
        source = FileSet([path])
        try:
            index = self._index(source)
            mapping = map_or_reserve(source)
        except BaseException:
            source.close()
            raise
        state = {}
        for info in index:
            values = torch.empty(0, dtype=info.dtype)
            if info.nbytes:
                storage = mapping.storage(info.storage.offset, info.storage.nbytes)
                values = values.set_(storage, 0, info.shape, info.stride)
            state[info.name] = values.reshape(info.shape)
        return end_loading(state, index, source, mapping)

    def take_inventory(self, path: str) -> Inventory:
        index = self.read_index(path)
        records = [Record(item.key, item.offset, item.nbytes, item.crc32) for item in index.storages]
        return Inventory(path, self.name, index.files, tuple(records), ())

    def _index(self, source: FileSet) -> Checkpoint:
        (file,) = source.files
        rows, start = self._header(file)
        tensors = []
        for name, dtype_name, shape, begin, crc32 in rows:
            dtype = getattr(torch, dtype_name)
            empty = torch.empty(shape, dtype=dtype, device="meta")
            storage = StorageInfo(name, start + begin, empty.nbytes, crc32, "cpu")
            tensors.append(TensorInfo((name,), dtype, tuple(shape), empty.stride(), 0, storage))
        storages = tuple(info.storage for info in tensors)
        return Checkpoint(file.name, self.name, source.spans, tuple(tensors), storages)

    def _header(self, file: StoredFile) -> tuple[list[Any], int]:
        nbytes = int.from_bytes(file.pread(12, 0)[4:], "little")
        header = file.pread(nbytes, 12)
        if len(header) < nbytes:
            raise CheckpointFormatError(f"{file.name} is truncated.", path=file.name)
        return json.loads(header), 12 + nbytes


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A new format is registered in one place."""
    toy = Toy()
    monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, toy))
    return toy


@pytest.fixture
def case(tmp_path: Path) -> Case:
    (tmp_path / "case").mkdir()
    return write_case(Writer("toy", "toy", write_toy, checksums=True), tmp_path / "case")


def test_the_checks_of_every_format(registered: Toy, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.formats.conformance.FORMATS", registry.FORMATS)
    assert format_of(case) is registered
    check_recognition(registered, {"toy": case})
    check_index(registered, case)
    check_load(registered, case)
    check_stream(registered, case, choose_layout(1 << 20, 2))


def test_weights_and_verification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = nn.Linear(30, 30)
    path = write_toy(tmp_path, expected.state_dict())
    with meta_init():
        module = nn.Linear(30, 30)
    load_weights(module, path)
    assert all(as_bytes(value) == as_bytes(expected.state_dict()[name]) for name, value in module.state_dict().items())
    assert open_checkpoint(path).format == "toy"
    assert verify_checkpoint(path).is_verified
    assert main(["inspect", str(path)]) == main(["verify", str(path)]) == 0
    assert "weights.toy (toy): 2 tensors" in capsys.readouterr().out
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    assert verify_checkpoint(path).is_damaged
    with pytest.raises(ChecksumError):
        load_weights(nn.Linear(30, 30), path)


def test_at_a_new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = ToyBucket(tmp_path)
    monkeypatch.setitem(places.PLACES, SCHEME, bucket)
    expected, module = nn.Linear(30, 30), nn.Linear(30, 30)
    url = bucket.url(write_toy(tmp_path, expected.state_dict()))
    load_weights(module, url)
    assert all(as_bytes(value) == as_bytes(expected.state_dict()[name]) for name, value in module.state_dict().items())
    assert open_checkpoint(url).format == "toy"
    assert verify_checkpoint(url).is_verified


class Predicted(TinyModule):
    def predict_dataloader(self) -> Any:
        return self.train_dataloader()


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_restores_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = Predicted(adamw)
    path = write_toy(tmp_path, expected.state_dict())

    def restored(stage: str, restore: L.Callback, **options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        module = Predicted(adamw)
        getattr(make_trainer(tmp_path, [restore], **options), stage)(module, ckpt_path=path)
        return module.state_dict()

    trained = restored("fit", MemoryEfficientRestore(restore=["weights"]), max_steps=0)
    predicted = restored("predict", MemoryEfficientRestore())
    for name, value in expected.state_dict().items():
        assert as_bytes(trained[name]) == as_bytes(predicted[name]) == as_bytes(value)
