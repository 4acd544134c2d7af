"""Saves whose tensors are copied to host memory first: the file holds the state before, also if all of it changes."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_memload import CheckpointWriteError
from lightning_memload.bytes import RecordPart
from lightning_memload.errors import UnstreamableError
from lightning_memload.formats import load_mapped
from lightning_memload.pickles.pickling import SavedStorage
from lightning_memload.save import (
    BackgroundSave,
    plan_directory_save,
    plan_torch_save,
    save_directory,
    save_torch,
    torch_file,
)
from lightning_memload.transfer import contents, sinks, snapshot, writing
from lightning_memload.transfer.snapshot import Snapshot
from tests.formats.files import ALL_DTYPES, as_bytes, layouts, of_dtype, tensors_of
from tests.fresh_process import run_fresh

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="snapshots on Linux only")

MIB = 1 << 20
WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "torch": (plan_torch_save, save_torch, {}),
    "directory": (plan_directory_save, save_directory, {}),
    "safetensors+state": (plan_directory_save, save_directory, {"safetensors": True}),
}


def everything() -> dict[str, Any]:
    """Every dtype and layout, ties, windows, large and tiny tensors, empty ones, and what is not a tensor."""
    generator = torch.Generator().manual_seed(3)
    big = torch.randn(5 * MIB // 4 + 1, generator=generator)
    return {
        "state_dict": {
            **{str(dtype): of_dtype(dtype) for dtype in ALL_DTYPES if not dtype.is_complex},
            "big": big,
            "tied": big,
            "turned": torch.randn(300, 700, generator=generator).t(),
            "half": torch.randn(2 * MIB, generator=generator)[:MIB],
            "empty": torch.empty(0, 3),
        },
        "layouts": layouts(),
        "steps": [torch.tensor(float(number)) for number in range(500)],
        "epoch": 3,
    }


def destroy(obj: Any) -> None:
    """Changes every byte, in a way that no counter shows."""
    for _, tensor in tensors_of(obj):
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).bitwise_not_()


def content_of(path: Path) -> dict[str, bytes]:
    files = [path, *sorted(path.rglob("*"))]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def allow(needed_bytes: int) -> None:
    """No reason against a snapshot."""


class Gate:
    """Holds back every write until it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = threading.Event()
        original = sinks.LocalSink.write

        def write(sink: Any, buffers: Any, offset: int) -> None:
            assert self.is_open.wait(60)
            original(sink, buffers, offset)

        monkeypatch.setattr(sinks.LocalSink, "write", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.is_open.set()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("from_device", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_file_is_that_of_a_save_at_once(
    tmp_path: Path, way: str, from_device: bool, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, though all tensors have changed before the first byte is written; also through the ring."""
    if from_device:
        for kind in (SavedStorage, contents.GatheredBytes):
            monkeypatch.setattr(kind, "is_in_host_memory", property(lambda self: False))
    monkeypatch.setattr(writing, "_COPIED_BLOCK_BYTES", MIB)
    monkeypatch.setattr(snapshot, "_CHUNK_BYTES", 2 * MIB)
    plan, at_once, options = WAYS[way]
    obj = everything()
    at_once(obj, tmp_path / "expected", num_threads=num_threads, **options)
    gate = Gate(monkeypatch)
    save = plan(obj, tmp_path / "found", num_threads=num_threads, host_budget_bytes=2 * MIB, **options)
    assert save.copy(allow)
    background = BackgroundSave(save)
    destroy(obj)
    assert not (tmp_path / "found").exists()
    gate.is_open.set()
    background.result()
    assert content_of(tmp_path / "found") == content_of(tmp_path / "expected")
    assert background.held_bytes == 0
    assert os.listdir(tmp_path) == ["expected", "found"] or os.listdir(tmp_path) == ["found", "expected"]


def test_the_figures_tell_what_was_copied(tmp_path: Path) -> None:
    ended: list[Any] = []
    save = plan_torch_save({"weight": torch.ones(MIB), "buffer": torch.ones(5)}, tmp_path / "file.pt")
    assert save.copy(allow)
    BackgroundSave(save, on_end=lambda save, stats: ended.append(stats)).result()
    (stats,) = ended
    assert 4 * MIB < stats.snapshot_bytes < 4 * MIB + 1024
    assert 0 < stats.snapshot_seconds < stats.seconds
    assert stats.snapshot_refusal is None


def test_the_tensors_are_no_longer_referenced(tmp_path: Path, gate: Gate) -> None:
    """Also by a directory's plan, which needs their devices later. A device may have no room for old values."""
    for way, (plan, _, options) in WAYS.items():
        memory = np.ones(1000)
        owner = weakref.ref(memory)
        save = plan(
            {"state_dict": {"a": torch.from_numpy(memory), "b": torch.from_numpy(memory)[::2]}},
            tmp_path / way,
            **options,
        )
        assert save.copy(allow)
        background = BackgroundSave(save)
        del memory
        gc.collect()
        assert owner() is None, way
        gate.is_open.set()
        background.result()
        gate.is_open.clear()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_refused_is_saved_without(tmp_path: Path, way: str) -> None:
    plan, _, options = WAYS[way]
    asked: list[int] = []
    ended: list[Any] = []

    def refuse(needed_bytes: int) -> str:
        asked.append(needed_bytes)
        return "3 GiB needed, 2 free"

    weight = torch.arange(1000.0)
    save = plan({"state_dict": {"weight": weight}}, tmp_path / "found", **options)
    assert not save.copy(refuse)
    assert asked == [4000]
    background = BackgroundSave(save, on_end=lambda save, stats: ended.append(stats))
    weight.zero_()
    background.result()
    assert torch.equal(load_mapped(tmp_path / "found")[0]["state_dict"]["weight"], torch.arange(1000.0))
    assert ended[0].snapshot_refusal == "3 GiB needed, 2 free"


@pytest.mark.parametrize("call", ["map_memory", "advise"])
def test_a_kernel_that_has_no_memory_refuses(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_mapping(nbytes: int) -> int:
        raise OSError(12, "cannot map")

    real = snapshot.advise
    no_pages = lambda *args: 12 if args[2] == snapshot.Advice.POPULATE_WRITE else real(*args)  # noqa: E731
    monkeypatch.setattr(snapshot, call, no_mapping if call == "map_memory" else no_pages)
    weight = torch.arange(1000.0)
    save = plan_torch_save({"weight": weight}, tmp_path / "file.pt")
    assert not save.copy(allow)
    assert save.run().snapshot_refusal in (
        "[Errno 12] cannot map",
        "cannot allocate 4032 bytes: Cannot allocate memory",
    )
    assert torch.equal(torch.load(tmp_path / "file.pt")["weight"], weight)


def test_an_old_kernel_allocates_by_page_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "advise", lambda *args: 22)
    obj = everything()
    save = plan_torch_save(obj, tmp_path / "file.pt")
    assert save.copy(allow)
    BackgroundSave(save).result()
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    for (name, ours), (_, theirs) in zip(tensors_of(loaded), tensors_of(obj), strict=True):
        assert as_bytes(ours) == as_bytes(theirs), name


def test_an_object_that_torch_writes_has_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(obj: object) -> None:
        raise UnstreamableError("no memory")

    monkeypatch.setattr(torch_file, "pickle_object", refuse)
    with pytest.warns(UserWarning, match=r"written by torch\.save"):
        save = plan_torch_save({"a": torch.ones(3)}, tmp_path / "file.pt")
    assert not save.copy(allow)
    assert save.run().snapshot_refusal == "torch.save writes this object"


def test_saves_queue_and_each_has_its_own_state(tmp_path: Path, gate: Gate) -> None:
    weight = torch.zeros(MIB)
    saves: list[BackgroundSave] = []
    for number in range(3):
        weight.fill_(number)
        save = plan_torch_save({"weight": weight}, tmp_path / f"{number % 2}.pt")
        assert save.copy(allow)
        saves.append(BackgroundSave(save, after=saves[-1] if saves else None))
    weight.fill_(7)
    assert [background.held_bytes for background in saves] == [4 * MIB] * 3
    gate.is_open.set()
    saves[2].result()
    assert [background.has_ended for background in saves] == [True] * 3
    assert [background.held_bytes for background in saves] == [0] * 3
    assert [torch.load(tmp_path / f"{number}.pt")["weight"][0] for number in (0, 1)] == [2, 1]


@pytest.mark.parametrize("way", WAYS)
def test_an_error_while_writing_is_raised_and_the_memory_is_free(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, at_once, options = WAYS[way]
    at_once({"state_dict": {"old": torch.ones(1)}}, tmp_path / "file", **options)

    def write(sink: Any, buffers: Any, offset: int) -> None:
        raise OSError(28, "No space left on device")

    save = plan({"state_dict": {"weight": torch.ones(MIB)}}, tmp_path / "file", **options)
    assert save.copy(allow)
    monkeypatch.setattr(sinks.LocalSink, "write", write)
    with pytest.raises(CheckpointWriteError, match=r"file could not be saved: No space left.*untouched"):
        BackgroundSave(save).result()  # A save that fails at once fails in the first of the two calls.
    assert save.held_bytes == 0
    assert load_mapped(tmp_path / "file")[0]["state_dict"]["old"] == 1
    assert os.listdir(tmp_path) == ["file"]


def test_a_snapshot_that_is_not_written_is_freed() -> None:
    held = Snapshot([100 * MIB])
    held.write([RecordPart(0, 0, 4)], [memoryview(bytearray(b"abcd"))], [None])
    assert held.copy_of(0)[:4] == b"abcd"
    finalizer = held._close
    del held
    assert not finalizer.alive


@pytest.mark.memory
def test_memory_is_that_of_the_state_and_falls_while_it_is_written(tmp_path: Path) -> None:
    """In a fresh process: the peak is the state and a constant. After each quarter of the writes a quarter is free."""
    program = """
import torch
from lightning_memload.memory import MemoryMonitor
from lightning_memload.memory.host import read_status
from lightning_memload.save import BackgroundSave, plan_directory_save, plan_torch_save
from lightning_memload.transfer import sinks
MIB = 1 << 20
anonymous = lambda: read_status().anonymous_bytes
RESULT = []
for plan in (plan_torch_save, plan_directory_save):
    warm = plan({"warm": torch.ones(1)}, ARGS["path"])
    assert warm.copy(lambda nbytes: None)
    BackgroundSave(warm).result()
    weights = {str(number): torch.full((16 * MIB // 4 + 16,), float(number)) for number in range(40)}
    sizes, written, original = [], [0], sinks.LocalSink.write
    def write(sink, buffers, offset):
        original(sink, buffers, offset)
        written[0] += sum(map(len, buffers))
        sizes.append((written[0], anonymous() - before))
    with MemoryMonitor() as monitor:
        before = anonymous()
        save = plan(weights, ARGS["path"], num_threads=1)
        assert save.copy(lambda nbytes: None)
        copied = anonymous() - before
        sinks.LocalSink.write = write
        BackgroundSave(save).result()
        sinks.LocalSink.write = original
    RESULT.append([copied, monitor.peaks.anonymous_upper_bound_bytes - monitor.peaks.anonymous_start_bytes,
                   max(written + rise for written, rise in sizes), anonymous() - before])
"""
    result = run_fresh(program, path=tmp_path / "file").result
    state = 40 * (16 * MIB + 64)
    for copied, peak, written_and_held, left in result:
        assert state <= copied <= state + 8 * MIB
        assert peak <= state + 32 * MIB
        assert written_and_held <= state + 16 * MIB + 32 * MIB  # one chunk is not written completely
        assert left <= 8 * MIB


def test_a_forked_child_neither_waits_nor_keeps_the_memory(tmp_path: Path) -> None:
    """A data loader forks its workers while a save is written, and they live long."""
    program = """
import os, threading
import torch
torch.set_num_threads(1)
from lightning_memload.formats import load_mapped
from lightning_memload.memory.host import read_status
from lightning_memload.save import BackgroundSave, plan_directory_save, plan_torch_save
from lightning_memload.transfer import sinks
goes_on, original = threading.Event(), sinks.LocalSink.write
def write(sink, buffers, offset):
    assert goes_on.wait(60)
    original(sink, buffers, offset)
sinks.LocalSink.write = write
RESULT = []
for plan, options in ((plan_torch_save, {}), (plan_directory_save, {}), (plan_directory_save, {"safetensors": True})):
    goes_on.clear()
    path = ARGS["path"] + str(len(RESULT))
    save = plan({"state_dict": {"weight": torch.ones(50_000_000)}}, path, **options)
    assert save.copy(lambda nbytes: None)
    background = BackgroundSave(save)
    parent = read_status().anonymous_bytes
    child = os.fork()
    if not child:
        held = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
                if os.path.lexists(f"/proc/self/fd/{number}")]
        background.wait()
        background.result()
        is_smaller = read_status().anonymous_bytes < parent - 190_000_000
        os._exit(7 if is_smaller and not any(".memload-" in name for name in held) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    goes_on.set()
    background.result()
    RESULT.append([code, load_mapped(path)[0]["state_dict"]["weight"].sum().item()])
"""
    assert run_fresh(program, path=tmp_path / "file").result == [[7, 50_000_000]] * 3


def test_the_end_of_the_process_waits(tmp_path: Path) -> None:
    program = """
import torch
from lightning_memload.save import BackgroundSave, plan_torch_save
after = None
for number in range(3):
    weight = torch.full((5_000_000,), float(number))
    save = plan_torch_save({"weight": weight}, ARGS["path"] + str(number))
    assert save.copy(lambda nbytes: None)
    after = BackgroundSave(save, after=after)
    weight.zero_()
"""
    assert run_fresh(program, path=tmp_path / "file").stderr == ""
    for number in range(3):
        assert torch.load(tmp_path / f"file{number}")["weight"].sum() == number * 5_000_000
