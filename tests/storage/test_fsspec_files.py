"""Checkpoints at places that only fsspec knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

from lightning_memload import load_weights, open_checkpoint, verify_checkpoint
from lightning_memload.errors import CheckpointReadError
from lightning_memload.save import save_directory
from lightning_memload.storage.fsspec_files import FsspecFile, FsspecPlace, is_known
from lightning_memload.storage.places import is_local, path_of


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def upload(system: fsspec.AbstractFileSystem, path: Path, name: str) -> None:
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            relative = "" if path.is_file() else f"/{file.relative_to(path)}"
            system.pipe_file(f"/run/{name}{relative}", file.read_bytes())


@pytest.mark.parametrize("format", ["torch", "directory", "safetensors"])
def test_weights(memory: fsspec.AbstractFileSystem, tmp_path: Path, format: str) -> None:
    torch.manual_seed(0)
    module, other = nn.Linear(300, 300), nn.Linear(300, 300)
    if format == "torch":
        torch.save({"state_dict": module.state_dict()}, tmp_path / "saved")
    else:
        save_directory({"state_dict": module.state_dict()}, tmp_path / "saved", safetensors=format == "safetensors")
    upload(memory, tmp_path / "saved", "saved")
    url = "memory://run/saved"
    assert len(open_checkpoint(url)) == 2
    assert verify_checkpoint(url).is_verified
    load_weights(other, url)
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other.bias, module.bias)


def test_nothing_there(memory: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint("memory://run/nothing")


def test_a_file_that_became_shorter(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    torch.save({f"{number}": torch.zeros(1 << 20) for number in range(3)}, tmp_path / "a")
    upload(memory, tmp_path / "a", "a")
    place = FsspecPlace()
    before = place.identity("memory://run/a")
    file = place.open("memory://run/a")
    memory.pipe_file("/run/a", b"short")
    with pytest.raises(OSError, match="The server sent 0 of the"):
        file.pread(2 << 20, 4 << 20)
    assert file.is_changed()
    assert place.identity("memory://run/a") != before


def test_small_reads_are_one_request(memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/run/a", bytes(range(256)) * 100)
    file = FsspecFile(memory, "/run/a", "memory://run/a")
    asked: list[int] = []
    original = memory.cat_file
    monkeypatch.setattr(memory, "cat_file", lambda key, **kwargs: asked.append(1) or original(key, **kwargs))
    assert [file.pread(2, offset) for offset in (0, 256, 300)] == [b"\0\1", b"\0\1", bytes([44, 45])]
    assert len(asked) == 1


def test_schemes() -> None:
    assert is_known("memory")
    assert not is_known("nowhere")
    assert not is_local("memory://run/a")
    assert path_of("memory://run/a") == "memory://run/a"
    with pytest.raises(FileNotFoundError):
        path_of("nowhere://run/a")


def test_a_system_whose_package_is_missing() -> None:
    with pytest.raises(OSError, match=r"fsspec cannot open this URL|No such"):
        open_checkpoint("oci://bucket/run/a")


def test_errors_of_a_system_name_the_path(memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/run/a", bytes(4 << 20))
    file = FsspecFile(memory, "/run/a", "memory://run/a")

    def fail(*_: object, **__: object) -> bytes:
        raise RuntimeError("connection lost?secret=1")

    monkeypatch.setattr(memory, "cat_file", fail)
    with pytest.raises(OSError, match="RuntimeError: connection lost") as raised:
        file.pread(10, 0)
    assert "secret" not in str(raised.value)
    assert not isinstance(raised.value, CheckpointReadError)
