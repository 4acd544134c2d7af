"""The ring: never above its budget, and gone when it is closed."""

from __future__ import annotations

import mmap
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_memload.memory.host import read_status
from lightning_memload.transfer import MIN_BUDGET_BYTES, RingLayout, StagingRing, choose_layout, start_ring

MIB = 1 << 20


@given(budget=st.integers(MIN_BUDGET_BYTES, 1 << 36), threads=st.integers(1, 4096))
def test_never_above_the_budget(budget: int, threads: int) -> None:
    layout = choose_layout(budget, threads)
    assert 0 < layout.nbytes <= budget
    assert 1 <= layout.num_threads <= threads
    assert layout.block_bytes % mmap.PAGESIZE == 0
    assert layout.num_buffers * layout.block_bytes == layout.nbytes
    assert layout.num_buffers == 2 * layout.num_threads
    assert layout.nbytes > budget // 2 or layout.block_bytes == 16 * MIB


@pytest.mark.parametrize(
    ("budget", "threads", "message"),
    [(MIN_BUDGET_BYTES - 1, 4, "524287 bytes; at least 524288"), (MIB, 0, "num_threads")],
)
def test_what_cannot_work_is_refused(budget: int, threads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_layout(budget, threads)


def test_defaults() -> None:
    layout = choose_layout(128 * MIB, 12)
    assert (layout.num_threads, layout.num_buffers) == (12, 24)
    assert layout.nbytes > 127 * MIB
    assert choose_layout(8 * MIB, 12) == RingLayout(4, 8, MIB)  # fewer threads before blocks get small
    assert choose_layout(MIN_BUDGET_BYTES, 8) == RingLayout(1, 2, MIN_BUDGET_BYTES // 2)


def test_buffers_are_apart_and_shared_with_their_views() -> None:
    with StagingRing(RingLayout(3, 6, 4096), pinned=False) as ring:
        assert len(ring.tensors) == len(ring.views) == 6
        for number, tensor in enumerate(ring.tensors):
            assert tensor.data_ptr() % mmap.PAGESIZE == 0
            tensor.fill_(number)
        assert [set(view) for view in ring.views] == [{number} for number in range(6)]
        assert (ring.nbytes, ring.pinned_bytes) == (24576, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("held", [False, True])
def test_memory_goes_back_even_if_somebody_holds_a_buffer(held: bool) -> None:
    def anonymous() -> int:
        bytes_now = read_status().anonymous_bytes
        assert bytes_now is not None
        return bytes_now

    before = anonymous()
    ring = StagingRing(RingLayout(2, 4, 8 * MIB), pinned=False)
    for tensor in ring.tensors:
        tensor.fill_(1)
    kept = [ring.tensors[0], ring.views[1][:10]] if held else []
    del tensor
    assert anonymous() - before > 31 * MIB
    ring.close()
    ring.close()
    assert anonymous() - before < 2 * MIB
    assert torch.equal(kept[0], torch.zeros(8 * MIB, dtype=torch.uint8)) if held else True


class Driver:
    """Stands for the CUDA runtime: what is page-locked, for whom, and which errors a thread still has to hear of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
        self.status = status
        self.calls: list[tuple[str, str | None]] = []
        self.threads: set[int] = set()
        self._current = threading.local()
        driver = self

        class OnDevice:
            def __init__(self, device: torch.device) -> None:
                self.device = device

            def __enter__(self) -> None:
                self.before = getattr(driver._current, "device", None)
                driver._current.device = str(self.device)

            def __exit__(self, *_: object) -> None:
                driver._current.device = self.before

        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", OnDevice)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.threads.add(threading.get_ident())
        self.calls.append(("register", getattr(self._current, "device", None)))
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", getattr(self._current, "device", None)))
        return 0

    def cudaGetErrorString(self, status: int) -> str:
        return "out of memory"


@pytest.mark.parametrize("device", [torch.device("cuda", 1), None])
def test_pinned_for_the_gpu_that_is_used(monkeypatch: pytest.MonkeyPatch, device: torch.device | None) -> None:
    """A new thread's current GPU is the first one, which would get a context of 500 MiB."""
    driver = Driver(monkeypatch)
    with StagingRing(RingLayout(1, 2, 4096), pinned=True, device=device) as ring:
        assert ring.pinned_bytes == 8192
    expected = "cuda:3" if device is None else "cuda:1"
    assert driver.calls == [("register", expected), ("unregister", expected)]


def test_pinned_in_the_background_for_the_gpu_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    ring = start_ring(torch.device("cuda", 1), MIB, 1)
    assert ring.get().pinned_bytes == ring.layout.nbytes
    ring.close()
    assert driver.calls == [("register", "cuda:1"), ("unregister", "cuda:1")]


def test_a_refusal_to_pin_is_told_and_stays_with_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would tell of it again at the next kernel of the thread in which it happened."""
    driver = Driver(monkeypatch, status=2)
    with pytest.warns(UserWarning, match=r"Could not page-lock 1 MiB .*out of memory"):
        ring = StagingRing(RingLayout(1, 2, MIB // 2), pinned=True)
    assert ring.pinned_bytes == 0
    ring.views[0][:1] = b"x"
    ring.close()
    assert driver.threads
    assert driver.threads.isdisjoint(thread.ident for thread in threading.enumerate())
    assert driver.calls == [("register", "cuda:3")]


def test_any_thread_may_write_to_a_ring_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode(), StagingRing(RingLayout(1, 2, 4096), pinned=False) as ring:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(ring.tensors[1].fill_, 7).result()
        assert set(ring.views[1]) == {7}
