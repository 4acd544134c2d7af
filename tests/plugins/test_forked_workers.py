"""Workers of a data loader are forks: what the process still has of a restore when they begin, they keep."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_memload import MemoryEfficientRestore
from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.restore import RestoreSession
from lightning_memload.transfer import LazyRing, RingLayout
from tests.plugins.harness import TRUSTED, Case, make_trainer, write_checkpoint
from tests.plugins.workers import HeldByWorker, Looks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ["fit", "validate"])
def test_workers_hold_nothing_of_the_checkpoint(tmp_path: Path, entry: str) -> None:
    path = write_checkpoint(Case(Looks), tmp_path)
    module = Looks()
    trainer = make_trainer(tmp_path, [MemoryEfficientRestore()], max_epochs=3)
    data = DataLoader(HeldByWorker(path), batch_size=2, num_workers=1, multiprocessing_context="fork")
    getattr(trainer, entry)(module, data, ckpt_path=path, **TRUSTED)
    assert module.held
    assert not any(module.held)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_waits_until_what_was_replaced_is_freed() -> None:
    """A worker would keep the memory of a model that was built on the host and trains on a GPU."""
    begun, goes_on = threading.Event(), threading.Event()

    class Slow(torch.Tensor):
        def set_(self) -> None:  # type: ignore[override]
            begun.set()
            assert goes_on.wait(60)

    ring = LazyRing(RingLayout(1, 2, 4096), pinned=False)
    session = RestoreSession(MappedCheckpoint.unmapped("file.pt"), device=torch.device("cpu"), ring=ring)
    session.free_at_end([torch.zeros(3).as_subclass(Slow)])
    session.close()
    assert begun.wait(60)
    (freeing,) = [thread for thread in threading.enumerate() if thread.name == "memload-free"]
    threading.Thread(target=goes_on.set).start()
    child = os.fork()
    if child == 0:
        os._exit(0)
    still_freeing = freeing.is_alive()
    assert os.waitpid(child, 0)[1] == 0
    assert not still_freeing
