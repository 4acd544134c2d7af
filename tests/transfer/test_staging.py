"""The ring: never above its budget, and gone when it is closed."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_memload.memory.host import read_status
from lightning_memload.transfer import MIN_BUDGET_BYTES, RingLayout, StagingRing, choose_layout

MIB = 1 << 20


@given(budget=st.integers(MIN_BUDGET_BYTES, 1 << 36), threads=st.integers(1, 4096))
def test_never_above_the_budget(budget: int, threads: int) -> None:
    layout = choose_layout(budget, threads)
    assert 0 < layout.nbytes <= budget
    assert 1 <= layout.num_threads <= threads
    assert layout.block_bytes % mmap.PAGESIZE == 0
    assert layout.num_buffers * layout.block_bytes == layout.nbytes
    assert layout.num_buffers >= max(2, layout.num_threads)
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
    assert layout.num_threads == layout.num_buffers == 12
    assert layout.nbytes > 127 * MIB
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
