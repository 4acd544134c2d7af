"""Ranks that wait for the one that writes, and for no other one."""

from __future__ import annotations

import threading

import pytest
import torch.distributed
from torch.distributed import HashStore

from lightning_memload.distributed import WriterRank, writer


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    store = HashStore()
    monkeypatch.setattr(writer, "_store", lambda: store)
    return store


def make(rank: int, world_size: int = 2) -> WriterRank:
    return WriterRank(world_size, is_here=rank == 0)


def run_once() -> None:
    first, other = make(0), make(1)
    first.arrive()
    assert not first.knows_all_ranks()
    other.arrive()
    assert first.knows_all_ranks()
    first.begin()
    first.begin()
    released = threading.Event()
    thread = threading.Thread(target=lambda: (other.wait(), released.set()))
    thread.start()
    assert not released.wait(0.05)
    first.wait()
    thread.join(60)
    assert released.is_set()
    for each in (first, other, other):
        each.leave()
    assert not first.knows_all_ranks()


@pytest.mark.usefixtures("store")
def test_others_wait_until_all_is_written() -> None:
    run_once()
    run_once()


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("present", [0, 1])
def test_nobody_waits_for_a_rank_without_the_callback(present: int) -> None:
    only = make(present)
    only.arrive()
    assert not only.knows_all_ranks()
    only.wait()
    only.leave()


@pytest.mark.usefixtures("store")
def test_a_writer_that_fails_lets_the_others_go() -> None:
    first, other = make(0), make(1)
    first.arrive(), other.arrive()
    first.begin()
    first.leave()
    other.wait()


def test_without_a_process_group_there_is_nothing_to_know() -> None:
    assert make(0, world_size=1).knows_all_ranks()
    alone = make(0)
    alone.arrive()
    assert not alone.knows_all_ranks()
    alone.begin()
    alone.wait()
    alone.leave()


def test_the_store_of_torch_is_found() -> None:
    """Its name is not public: this fails when torch gives it another one, and saves are then never late."""
    if torch.distributed.is_initialized():
        pytest.skip("something else has made a process group")
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        assert writer._store() is not None
    finally:
        torch.distributed.destroy_process_group()
