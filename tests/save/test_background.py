"""A save in the background holds the state at the time of the call, and reports its errors.

The disk is slow at will: what may be written late is held back by an event, not by time.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_memload import CheckpointWriteError
from lightning_memload.errors import ChangedMeanwhileError
from lightning_memload.formats import load_mapped
from lightning_memload.pickles.pickling import SavedStorage
from lightning_memload.save import BackgroundSave, plan_directory_save, plan_torch_save, tensors_of_optimizers
from lightning_memload.storage import descriptors
from lightning_memload.transfer import sinks, writing
from lightning_memload.transfer.writing import WriteEngine, WriteOrder
from tests.fresh_process import run_fresh

BLOCK_BYTES = 1024


class Disk:
    """Writes of a whole block wait for the event ``goes_on``."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.failure: OSError | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = sinks.LocalSink.write

        def write(sink: Any, buffers: Sequence[Any], offset: int) -> None:
            if any(len(buffer) == BLOCK_BYTES for buffer in buffers):
                assert self.goes_on.wait(60)
                if self.failure is not None:
                    raise self.failure
            original(sink, buffers, offset)

        monkeypatch.setattr(writing, "_DIRECT_BLOCK_BYTES", BLOCK_BYTES)
        monkeypatch.setattr(sinks.LocalSink, "write", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    disk.install(monkeypatch)
    yield disk
    disk.goes_on.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save({"old": 1}, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def make_optimizer(kind: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> tuple[torch.Tensor, Any]:
    weight = torch.nn.Parameter(torch.arange(5000.0))
    return weight, kind([weight], lr=0.5)


def begin(path: Path, weight: torch.Tensor, optimizer: Any, **more: Any) -> BackgroundSave:
    plan = plan_torch_save({"weight": weight.detach(), **more}, path)
    return BackgroundSave(plan, tensors_of_optimizers([optimizer]))


def step(weight: torch.Tensor, optimizer: Any, seen: list[float], closure: bool = False) -> None:
    """A step; what the first weight is when forward runs goes to ``seen``."""

    def backward() -> Any:
        seen.append(weight[1].item())
        weight.grad = torch.ones_like(weight)
        return weight.sum()

    if not closure:
        backward()
    optimizer.step(**({"closure": backward} if closure else {}))


def open_when_waited_for(save: BackgroundSave, disk: Disk, look: Callable[[], object]) -> None:
    original = save._published.wait

    def wait() -> None:
        look()
        disk.goes_on.set()
        original()

    save._published.wait = wait  # type: ignore[method-assign]


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_waits_until_its_tensors_are_written(path: Path, disk: Disk, closure: bool) -> None:
    weight, optimizer = make_optimizer()
    buffer = torch.zeros(1500)
    save = begin(path, weight, optimizer, buffer=buffer[:200])
    assert torch.load(path) == {"old": 1}
    buffer.fill_(9)  # no optimizer's, so it is written
    before: list[float] = []
    forwards: list[float] = []
    open_when_waited_for(save, disk, lambda: before.append(weight[1].item()))
    step(weight, optimizer, forwards, closure)
    assert (before, forwards) == ([1.0], [1.0])
    assert weight[1] == 0.5
    assert save._published.is_set()
    save.result()
    loaded = torch.load(path)
    assert torch.equal(loaded["weight"], torch.arange(5000.0))
    assert not loaded["buffer"].any()
    assert save.blocked_seconds > 0


class Perturbing(torch.optim.SGD):
    """Changes its parameters before it calls the closure, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        return super().step(closure)


def test_an_optimizer_that_changes_before_the_closure_waits_before_it(path: Path, disk: Disk) -> None:
    weight, optimizer = make_optimizer(Perturbing)
    save = begin(path, weight, optimizer)
    open_when_waited_for(save, disk, lambda: None)
    step(weight, optimizer, [], closure=True)
    save.result()
    assert torch.equal(torch.load(path)["weight"], torch.arange(5000.0))


def optimizers_of_torch() -> list[Any]:
    kinds = [getattr(torch.optim, name) for name in dir(torch.optim)]
    return sorted(
        {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
        - {torch.optim.Optimizer, torch.optim.SparseAdam},
        key=lambda kind: kind.__name__,
    )


@pytest.mark.parametrize("kind", optimizers_of_torch())
def test_torchs_own_call_the_closure_first(kind: Any) -> None:
    """The wait after the closure relies on this."""
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = kind([weight], lr=0.5)
    versions: list[int] = []

    def closure() -> torch.Tensor:
        versions.append(weight._version)
        weight.grad = torch.ones_like(weight)
        return weight.sum()

    before = weight._version
    optimizer.step(closure=closure)
    assert versions[0] == before < weight._version


def test_any_optimizer_in_the_process_waits(path: Path, disk: Disk) -> None:
    """An optimizer that is not known to the save may have the same parameters."""
    weight, optimizer = make_optimizer()
    save = begin(path, weight, optimizer)
    open_when_waited_for(save, disk, lambda: None)
    step(weight, torch.optim.SGD([weight], lr=0.5), [])
    save.result()
    assert torch.equal(torch.load(path)["weight"], torch.arange(5000.0))


def test_without_owners_everything_is_written_at_once(path: Path, disk: Disk) -> None:
    disk.goes_on.set()
    weight = torch.arange(5000.0)
    save = BackgroundSave(plan_torch_save({"weight": weight}, path))
    weight.zero_()
    assert torch.equal(torch.load(path)["weight"], torch.arange(5000.0))
    save.result()


@pytest.mark.parametrize("plan", [plan_torch_save, plan_directory_save])
def test_what_is_written_has_its_name_before_the_disk_has_it(
    tmp_path: Path, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, goes_on, fsync = [0], threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert goes_on.wait(60)
        synced[0] += 1
        fsync(descriptor)

    plan({"weight": torch.zeros(5)}, tmp_path / "a").run()
    monkeypatch.setattr(os, "fsync", slow)
    memory = np.ones(5)
    owner = weakref.ref(memory)
    save = BackgroundSave(plan({"weight": torch.from_numpy(memory)}, tmp_path / "a"))
    del memory
    gc.collect()
    assert owner() is None  # nothing keeps the tensors while the disk is waited for
    assert load_mapped(tmp_path / "a")[0]["weight"].tolist() == [1] * 5
    assert save.remove_at_end(str(tmp_path / "a"))  # Lightning may do so at once: its name is free
    assert synced == [0]
    goes_on.set()
    save.result()
    assert synced[0] >= 2  # content and name
    assert os.listdir(tmp_path) == []


def test_what_shares_memory_with_a_buffer_or_is_not_torchs_is_nobodys() -> None:
    weight, optimizer = make_optimizer(torch.optim.Adam)
    step(weight, optimizer, [])
    assert len(tensors_of_optimizers([optimizer, object()])) == 4
    module = torch.nn.Module()
    module.register_buffer("view", weight.detach()[5:])
    assert len(tensors_of_optimizers([optimizer], [module])) == 3


def test_what_no_step_changes_or_a_forward_pass_does_is_nobodys() -> None:
    student, teacher = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False)
    bounded, free = torch.nn.Embedding(4, 3, max_norm=1.0), torch.nn.Embedding(4, 3)
    modules = [student, teacher, bounded, free]
    optimizer = torch.optim.SGD([parameter for module in modules for parameter in module.parameters()])
    found = tensors_of_optimizers([optimizer], modules)
    assert {*map(id, found)} == {*map(id, (student.weight, student.bias, free.weight))}


def test_a_change_outside_a_step_is_no_checkpoint(path: Path, disk: Disk) -> None:
    weight, optimizer = make_optimizer()
    save = begin(path, weight, optimizer)
    with torch.no_grad():
        weight.clamp_(-1, 1)
    disk.goes_on.set()
    save.wait_until_written()
    with pytest.raises(
        ChangedMeanwhileError, match=r"file\.pt could not be saved: 1 parameters .* outside an optimizer's"
    ):
        save.result()
    save.result()  # told once
    assert torch.load(path) == {"old": 1}
    assert os.listdir(path.parent) == ["file.pt"]


def test_a_full_disk_is_told_at_the_end(path: Path, disk: Disk) -> None:
    weight, optimizer = make_optimizer()
    disk.failure = OSError(28, "No space left on device")
    save = begin(path, weight, optimizer)
    disk.goes_on.set()
    step(weight, optimizer, [])  # a step does not fail for it
    save.wait()
    with pytest.raises(CheckpointWriteError, match=r"file\.pt could not be saved: No space left.*untouched"):
        save.result()
    assert torch.load(path) == {"old": 1}


def test_what_fails_at_once_is_told_at_once(tmp_path: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(CheckpointWriteError, match="could not be saved: No such file"):
        BackgroundSave(plan_torch_save({"a": torch.ones(3)}, tmp_path / "missing" / "file.pt"))
    assert threading.active_count() <= threads  # a thread of an earlier test may end meanwhile


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_removed_meanwhile_loses_its_name_at_once(path: Path, disk: Disk, fails: bool) -> None:
    weight, optimizer = make_optimizer()
    disk.failure = OSError(5, "Input/output error") if fails else None
    torch.save({"other": 1}, path.with_name("other.pt"))
    save = begin(path, weight, optimizer)
    assert save.remove_at_end(str(path.with_name("other.pt")))
    assert not path.with_name("other.pt").exists()
    assert torch.load(save._set_aside[0]._temporary_path) == {"other": 1}
    disk.goes_on.set()
    save.wait()
    assert sorted(os.listdir(path.parent)) == (["file.pt", "other.pt"] if fails else ["file.pt"])
    assert not save.remove_at_end(str(path))
    if fails:
        assert torch.load(path.with_name("other.pt")) == {"other": 1}
        with pytest.raises(CheckpointWriteError):
            save.result()


@pytest.mark.parametrize("call", ["rename", "open"])
def test_a_signal_handler_that_interrupts_a_removal_may_wait_for_the_save(
    path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The thread of the save needs nothing that the interrupted thread holds."""
    monkeypatch.setattr(descriptors, "_LONGEST_SECONDS", 0.1)
    weight, optimizer = make_optimizer()
    torch.save({"other": 1}, path.with_name("other.pt"))
    save = begin(path, weight, optimizer)
    original = getattr(os, call)

    def interrupted(name: str, *args: Any, **kwargs: Any) -> Any:
        result = original(name, *args, **kwargs)
        if threading.current_thread() is removal and not disk.goes_on.is_set():
            disk.goes_on.set()
            save.wait()
        return result

    removal = threading.Thread(target=save.remove_at_end, args=(str(path.with_name("other.pt")),), daemon=True)
    monkeypatch.setattr(os, call, interrupted)
    removal.start()
    removal.join(timeout=60)
    assert not removal.is_alive()
    assert os.listdir(path.parent) == ["file.pt"]
    assert "weight" in torch.load(path)


def test_without_a_thread_all_is_done_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while the interpreter shuts down, from Python 3.12 on."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    weight, optimizer = make_optimizer()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        save = begin(path, weight, optimizer)
        assert torch.equal(torch.load(path)["weight"], torch.arange(5000.0))
        save.result()
    assert os.listdir(path.parent) == ["file.pt"]


def test_a_directory_in_the_background(tmp_path: Path, disk: Disk) -> None:
    from lightning_memload.formats import load_mapped

    weight, optimizer = make_optimizer()
    save = BackgroundSave(
        plan_directory_save({"weight": weight.detach()}, tmp_path / "folder"), tensors_of_optimizers([optimizer])
    )
    open_when_waited_for(save, disk, lambda: None)
    step(weight, optimizer, [])
    save.result()
    assert torch.equal(load_mapped(tmp_path / "folder")[0]["weight"], torch.arange(5000.0))


def test_threads_descriptors_and_hooks_are_flat(path: Path) -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    def levels() -> tuple[int, int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd")), len(_global_optimizer_pre_hooks)

    weight, optimizer = make_optimizer(torch.optim.Adam)
    before = levels()
    for _ in range(5):
        save = begin(path, weight, optimizer)
        step(weight, optimizer, [])
        save.result()
    assert levels() == before


def test_the_order_of_writes() -> None:
    """First what must be first, then the rest; told when the first part is done."""
    contents = [torch.full((1 << 19,), float(number)).untyped_storage() for number in range(4)]
    stretches = [SavedStorage(storage, 0, storage.nbytes()) for storage in contents]
    written: list[Any] = []

    class Target:
        def write(self, pieces: Any, data: Any, crc32s: Any) -> None:
            written.extend(piece.record for piece in pieces)

    records = WriteEngine(stretches, 1 << 20, 1)
    told: list[int] = []
    urgent = [contents[1]._cdata, contents[3]._cdata]
    records.write(Target(), WriteOrder(lambda s: s._cdata in urgent, lambda: told.append(len(written))))
    assert written == [1, 1, 3, 3, 0, 0, 2, 2]
    (count,) = told
    assert count >= 4


ENDING = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from lightning_memload.save import BackgroundSave, plan_directory_save, plan_torch_save, tensors_of_optimizers
weight = torch.nn.Parameter(torch.ones(10_000_000))
optimizer = torch.optim.SGD([weight], lr=0.1)
plan = plan_torch_save({"weight": weight}, sys.argv[1])
save = BackgroundSave(plan, tensors_of_optimizers([optimizer]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="saves in the background on Linux only")
@pytest.mark.first("options")
@pytest.mark.parametrize("options", [None, "", ", safetensors=True"], ids=["file", "directory", "safetensors"])
def test_the_end_of_the_process_waits(tmp_path: Path, options: str | None) -> None:
    """The interpreter refuses new threads while it ends, so all must have started before training goes on."""
    repository = str(Path(__file__).resolve().parents[2])
    program = ENDING
    if options is not None:
        program = program.replace("plan_torch_save(", "plan_directory_save(").replace("[1])", f"[1]{options})")
    command = [sys.executable, "-c", program, str(tmp_path / "new"), repository]
    ended = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert ended.stderr == ""
    assert load_mapped(tmp_path / "new")[0]["weight"].sum() == 10_000_000


def test_an_error_that_was_not_told_is_printed(path: Path) -> None:
    repository = str(Path(__file__).resolve().parents[2])
    program = ENDING.replace(
        "weight = ", "import os\ndef fail(descriptor):\n    raise OSError(5, 'the disk')\nos.fsync = fail\nweight = "
    )
    command = [sys.executable, "-c", program, str(path), repository]
    ended = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert "file.pt could not be saved: the disk" in ended.stderr
    assert "weight" in torch.load(path)  # in memory, and perhaps not on the disk


def test_a_forked_child_has_no_part_in_a_save(tmp_path: Path) -> None:
    """It holds no descriptor and no lock, and waits for nothing; a fork waits for what is being written."""
    program = """
import fcntl, os, threading
import torch
torch.set_num_threads(1)
from lightning_memload.save import BackgroundSave, plan_directory_save, plan_torch_save, tensors_of_optimizers
from lightning_memload.transfer import sinks
written, goes_on, real, original = threading.Event(), threading.Event(), os.fsync, sinks.LocalSink.write
def write(sink, buffers, offset):
    if any(len(buffer) > 100_000 for buffer in buffers):
        assert not written.wait(0.05)
    original(sink, buffers, offset)
def fsync(descriptor):
    written.set()
    goes_on.wait(60)
    real(descriptor)
sinks.LocalSink.write, os.fsync = write, fsync
RESULT = []
for plan in (plan_torch_save, plan_directory_save):
    written.clear(), goes_on.clear()
    weight = torch.nn.Parameter(torch.ones(1_000_000))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    path = ARGS["path"] + plan.__name__
    save = BackgroundSave(plan({"weight": weight, "buffer": torch.ones(3)}, path), tensors_of_optimizers([optimizer]))
    child = os.fork()
    if not child:
        held = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if number != "x"
                and os.path.lexists(f"/proc/self/fd/{number}")]
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        save.wait()
        save.result()
        os._exit(7 if not any(ARGS["path"] in name for name in held) and os.path.lexists(path) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    goes_on.set()
    save.result()
    from lightning_memload.formats import load_mapped
    RESULT.append([code, load_mapped(path)[0]["weight"].sum().item()])
"""
    assert run_fresh(program, path=tmp_path / "file").result == [[7, 1_000_000], [7, 1_000_000]]
