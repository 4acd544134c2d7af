"""Disks that are full, protected or without room for another file: an error that says so, and the old checkpoint stays.

Real ones: small file systems in memory, and a process without privileges. Where those cannot be had it is skipped.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.lightning.pytorch.callbacks import ModelCheckpoint
from tests.lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_memload import CheckpointWriteError, MemoryEfficientRestore, verify_checkpoint
from lightning_memload.plugins.checkpoint_io import SaveFormat
from lightning_memload.save import saving
from tests.fresh_process import run_fresh
from tests.plugins.harness import TRUSTED, WRAPS, Recorded, adamw, make_trainer
from tests.plugins.numbered_saves import MIB, make_io, number_of, state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="file systems are mounted as on Linux")

DISK_BYTES = 8 * MIB
FORMATS = get_args(SaveFormat)
WAYS = ["at once", "asynchronous", *(["wrapped"] if WRAPS else [])]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB and 60 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size={DISK_BYTES},nr_inodes=60"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def failing_save(io: Any, checkpoint: Any, path: Path) -> CheckpointWriteError:
    def save() -> None:
        io.save_checkpoint(checkpoint, path)
        io.teardown()

    with pytest.raises(CheckpointWriteError) as caught:
        save()
    if isinstance(io, AsyncCheckpointIO):
        io._error = None  # Lightning keeps it forever
    return caught.value


# What asks first is the plan, before the way of the save is chosen.
@pytest.mark.axes("way", "asks")
@pytest.mark.parametrize("asks", [True, False], ids=["asks first", "fills up meanwhile"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", FORMATS)
def test_full(format: Any, way: str, asks: bool, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not asks:
        monkeypatch.setattr(saving, "_check_space", lambda path, plan: None)
    io, path, ballast = make_io(format, way), disk / "last.ckpt", disk / "ballast"
    io.save_checkpoint(state(1, 2), path)
    io.teardown()
    # At every stage: nothing can be written at all, something, nearly everything.
    for free_kib in (0, 4, 64, 500, 1500, 2040):
        with open(ballast, "wb") as file:
            statistics = os.statvfs(disk)
            file.write(bytes(max(0, statistics.f_bfree * statistics.f_frsize - (free_kib << 10))))
        error = failing_save(io, state(2, 2), path)
        assert error.errno == errno.ENOSPC
        assert str(error).startswith(f"{path} could not be saved: No space left on device.")
        assert error.needed_bytes is not None
        assert 2 * MIB < error.needed_bytes < 2 * MIB + 100_000
        assert error.free_bytes is not None
        assert error.free_bytes <= free_kib << 10
        assert f"It takes {error.needed_bytes} bytes, and {error.free_bytes} are free in {disk}." in str(error)
        assert error.path == str(path)
        assert sorted(os.listdir(disk)) == ["ballast", "last.ckpt"]
        assert number_of(path) == 1
    ballast.unlink()
    io.save_checkpoint(state(3, 2), path)
    io.teardown()
    assert (number_of(path), os.listdir(disk)) == (3, ["last.ckpt"])


@pytest.mark.parametrize("way", WAYS)
def test_no_room_for_another_file(way: str, disk: Path) -> None:
    io, path = make_io("directory", way), disk / "last.ckpt"
    io.save_checkpoint(state(1, 1, num_tensors=4), path)
    io.teardown()
    error = failing_save(io, state(2, 1, num_tensors=100), path)
    assert error.errno == errno.ENOSPC
    assert os.listdir(disk) == ["last.ckpt"]
    assert number_of(path) == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", FORMATS)
def test_read_only(format: Any, way: str, disk: Path) -> None:
    io, path = make_io(format, way), disk / "last.ckpt"
    io.save_checkpoint(state(1, 1), path)
    io.teardown()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        error = failing_save(io, state(2, 1), path)
        assert (error.errno, error.path) == (errno.EROFS, str(path))
        assert number_of(path) == 1
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert os.listdir(disk) == ["last.ckpt"]


class Large(Recorded):
    """Its checkpoints take 1.5 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 6)
        self.table = torch.nn.Parameter(torch.zeros(MIB // 8))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) + self.table[0]

    def configure_optimizers(self) -> Any:
        return adamw(self.parameters())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_run_that_fills_the_disk(format: Any, asynchronous: bool, disk: Path, tmp_path: Path) -> None:
    """It ends with the error, every checkpoint that has its name is whole, and the newest is resumed."""

    restore = MemoryEfficientRestore(save_format=format, asynchronous_save=asynchronous)
    saver = ModelCheckpoint(disk, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    with pytest.raises(CheckpointWriteError, match=r"step=\d+\.ckpt could not be saved: No space left on device"):
        make_trainer(tmp_path, [restore, saver], max_epochs=2, enable_checkpointing=True).fit(Large())
    names = os.listdir(disk)
    assert sorted(names) == [f"step={number + 1}.ckpt" for number in range(len(names))]
    assert 3 <= len(names) <= 5
    assert not any(verify_checkpoint(disk / name).is_damaged for name in names)
    module = Large()
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()], max_epochs=1)
    trainer.fit(module, ckpt_path=disk / sorted(names)[-1], **TRUSTED)
    assert len(module.losses) == 8 - len(names)


UNPRIVILEGED = """
import json, os, pathlib, shutil, tempfile, traceback
import torch
from tests.plugins.numbered_saves import make_io, number_of, state
from lightning_memload import CheckpointWriteError
torch.set_num_threads(1)  # threads of torch do not survive a fork
RESULT = {}

def attempt(format, way):
    path, io, found = closed / format, make_io(format, way), {}
    try:
        io.save_checkpoint(state(2, 1), path)
        io.teardown()
    except CheckpointWriteError as error:
        found |= {"errno": error.errno, "said": str(error)}
    try:
        make_io(format, "at once").remove_checkpoint(path)
    except OSError as error:
        found["removal"] = type(error).__name__
    return {**found, "path": str(path), "number": number_of(path), "left": sorted(os.listdir(closed))}

# Not below the folders of tests, which are for their owner only.
folder = pathlib.Path(tempfile.mkdtemp())
try:
    folder.chmod(0o755)
    closed = folder / "closed"
    closed.mkdir()
    for format in ARGS["formats"]:
        make_io(format, "at once").save_checkpoint(state(1, 1), closed / format)
    closed.chmod(0o555)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            said = [attempt(format, way) for format in ARGS["formats"] for way in ARGS["ways"]]
            os.write(writing, json.dumps(said).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as stream:
        RESULT = json.loads(stream.read() or "[]")
    os.waitpid(child, 0)
finally:
    closed.chmod(0o755)
    shutil.rmtree(folder)
"""


@pytest.mark.lightning_only
def test_without_permission() -> None:
    """Permission bits do not bind the superuser, so a child gives up its privileges."""
    results = run_fresh(UNPRIVILEGED, formats=FORMATS, ways=WAYS, timeout_seconds=60).result
    assert len(results) == len(FORMATS) * len(WAYS)
    for result in results:
        assert result["errno"] == errno.EACCES
        assert result["said"].startswith(f"{result['path']} could not be saved: Permission denied. It takes ")
        assert result["said"].endswith("What was there is untouched.")
        assert result["removal"] == "PermissionError"
        assert (result["number"], result["left"]) == (1, sorted(FORMATS))
