"""The plan of writes is integers: every byte of every record once, in order, within the limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_memload.transfer.write_plan import plan_writes


@given(
    sizes=st.lists(st.integers(0, 40), max_size=30),
    block_bytes=st.integers(1, 20),
    max_parts=st.integers(1, 5),
)
def test_every_byte_exactly_once_and_in_order(sizes: list[int], block_bytes: int, max_parts: int) -> None:
    writes = plan_writes(sizes, block_bytes=block_bytes, max_parts=max_parts)
    parts = [part for write in writes for part in write]
    written = [(part.record, part.start + i) for part in parts for i in range(part.nbytes)]
    assert written == [(record, i) for record, size in enumerate(sizes) for i in range(size)]
    assert [part.record for part in parts if not part.nbytes] == [n for n, size in enumerate(sizes) if not size]
    for write in writes:
        assert 1 <= len(write) <= max_parts
        assert sum(part.nbytes for part in write) <= block_bytes


def test_small_records_share_a_write_and_a_large_one_is_split() -> None:
    writes = plan_writes([3, 4, 25, 0, 2], block_bytes=10, max_parts=9)
    assert [[tuple(part) for part in write] for write in writes] == [
        [(0, 0, 3), (1, 0, 4)],
        [(2, 0, 10)],
        [(2, 10, 10)],
        [(2, 20, 5)],
        [(3, 0, 0), (4, 0, 2)],
    ]


@pytest.mark.parametrize(("block_bytes", "max_parts"), [(0, 1), (1, 0)])
def test_limits_are_positive(block_bytes: int, max_parts: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got"):
        plan_writes([1], block_bytes=block_bytes, max_parts=max_parts)
