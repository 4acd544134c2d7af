"""A session refuses restores before anything is allocated, and ends in order."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_memload import InsufficientMemoryError
from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.restore import RestoreSession
from lightning_memload.transfer import LazyRing, RingLayout

GPU = torch.device("cuda", 0)
RING = RingLayout(1, 2, 4096)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The free memory of each type of device. That of a GPU is known when CUDA is initialised."""
    free = {"cuda": 1000, "cpu": 10000}
    initialised: list[bool] = []

    def free_device_bytes(device: torch.device) -> int | None:
        return free[device.type] if initialised or device.type == "cpu" else None

    monkeypatch.setattr(torch.cuda, "init", lambda: initialised.append(True))
    monkeypatch.setattr("lightning_memload.restore.free_memory.free_device_bytes", free_device_bytes)
    return free


@pytest.fixture
def ring() -> LazyRing:
    return LazyRing(RING, pinned=False)


@pytest.fixture
def session(ring: LazyRing) -> RestoreSession:
    return RestoreSession(MappedCheckpoint.unmapped("file.pt"), device=GPU, ring=ring)


def test_the_first_to_use_a_gpu_is_checked_too(session: RestoreSession, free: dict[str, int]) -> None:
    with pytest.raises(InsufficientMemoryError, match=re.escape("of memory on cuda:0")) as caught:
        session.require({GPU: 1001})
    assert (caught.value.device, caught.value.needed_bytes, caught.value.free_bytes) == ("cuda:0", 1001, 1000)
    session.require({GPU: 900})


def test_a_ring_needs_memory_until_it_is_made(session: RestoreSession, ring: LazyRing, free: dict[str, int]) -> None:
    free["cpu"] = RING.nbytes - 1
    with pytest.raises(InsufficientMemoryError, match="of host memory") as caught:
        session.require({GPU: 1})
    assert caught.value.needed_bytes == RING.nbytes
    ring.get()
    session.require({GPU: 1})
    ring.close()


def test_an_interrupted_end_makes_all_of_its_steps(
    session: RestoreSession, ring: LazyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[torch.Tensor] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ring, "close", interrupted)
    monkeypatch.setattr("lightning_memload.restore.session.free_in_background", freed.extend)
    session.free_at_end([torch.ones(1)])
    with pytest.raises(KeyboardInterrupt):
        session.close()
    assert len(freed) == 1
