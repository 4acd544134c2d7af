"""Questions about the memory of a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_memload.restore.storages import (
    PendingBlock,
    fill_uninitialized,
    is_all_of,
    is_alone,
    reads_memory_directly,
    storage_of,
    strided_view,
    unfilled,
)
from lightning_memload.restore.tape import StridedView, view_of


def test_a_view_can_be_made_again() -> None:
    base = torch.arange(12.0)
    tensor = base.view(3, 4).t()[1:]
    view = strided_view(tensor)
    assert view == StridedView(torch.float32, (3, 3), (1, 4), 1)
    assert view_of(base.untyped_storage(), view).equal(tensor)


def test_how_a_tensor_reads_its_memory() -> None:
    values = torch.ones(2, dtype=torch.cfloat)
    assert reads_memory_directly(values.real)
    assert not reads_memory_directly(values.conj())
    assert not reads_memory_directly(values.conj().imag)  # a negative view
    assert not reads_memory_directly(values.to_sparse())


def test_tensors_without_memory_of_their_own() -> None:
    assert storage_of(torch.ones(1)) is not None
    for tensor in (torch.ones(1, device="meta"), torch.ones(1).to_sparse(), nn.LazyLinear(1).weight):
        assert storage_of(tensor) is None


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda base: base, True),
        (lambda base: base.view(3, 4).t(), True),
        (lambda base: base[:6], False),
        (lambda base: base[::2], False),
        (lambda base: base[:1].expand(12), False),
        (lambda base: base.view(torch.int16), True),
    ],
)
def test_whether_a_tensor_is_all_of_its_memory(make: object, expected: bool) -> None:
    base = torch.arange(12.0)
    tensor = make(base)
    assert is_all_of(tensor, base.untyped_storage()) is expected


def test_whether_a_tensor_is_alone() -> None:
    tensor = torch.ones(2)
    assert is_alone(tensor)
    other = tensor.detach()
    assert not is_alone(tensor)
    del other
    assert is_alone(tensor)


def test_a_block_does_not_keep_the_memory() -> None:
    tensor = torch.ones(2)
    block = PendingBlock(tensor.untyped_storage())
    found = block.get()
    assert found is not None
    assert found.data_ptr() == tensor.data_ptr()
    del found, tensor
    assert block.get() is None


def test_new_memory_is_not_filled_within_the_block() -> None:
    """With deterministic algorithms torch fills new memory with NaN: so does a replay, and once is enough."""
    with unfilled() as would_fill:
        assert not would_fill
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with unfilled() as would_fill:
            assert would_fill
            assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.utils.deterministic.fill_uninitialized_memory
        tensor = torch.zeros(3)
        fill_uninitialized(tensor)
        assert tensor.isnan().all()
    finally:
        torch.use_deterministic_algorithms(before)
