"""Tensors move from the file to ordinary memory: they stay the same objects, and share memory as before."""

from __future__ import annotations

from typing import Any

import torch

from lightning_memload.restore.settling import Settlement, plan_settlements, settle_alone, tensors_by_storage


class Holding:
    """A checkpoint that holds some storages."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.held = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.held


def settle(settlement: Settlement) -> None:
    _, held, fresh = settlement.allocate()
    fresh.copy_(held)
    settlement.end()


def test_one_tensor_gets_new_memory_and_stays_the_same_object() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    before = tensor.data_ptr()
    settle(Settlement("state", [tensor]))
    assert tensor.data_ptr() != before
    assert tensor.equal(torch.arange(6.0).view(2, 3))


def test_tensors_of_one_storage_share_the_new_one() -> None:
    base = torch.arange(12.0)
    first, second = base[2:8].view(2, 3).t(), base.view(torch.int32)[4:6]
    expected = first.clone(), second.clone()
    settlement = Settlement("state", [first, second])
    assert settlement.nbytes == 48
    settle(settlement)
    assert (first.equal(expected[0]), second.equal(expected[1])) == (True, True)
    assert (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
    )
    assert (first.stride(), first.storage_offset(), second.storage_offset()) == ((1, 3), 2, 4)


def test_the_tensors_of_each_storage_are_found_in_nested_containers() -> None:
    held, other = torch.ones(4), torch.ones(4)
    view = held[:2]
    checkpoint: Any = Holding(held)
    found = tensors_by_storage({"a": [held, (view, held)], "b": other, "c": 3}, checkpoint)
    assert [[id(tensor) for tensor in tensors] for tensors in found.values()] in (
        [[id(held), id(view)]],
        [[id(view), id(held)]],
    )
    assert tensors_by_storage([held, view], checkpoint, {id(held)}) == {view.untyped_storage()._cdata: [view]}


def test_a_storage_moves_as_a_whole_or_not_at_all() -> None:
    held, complex_held = torch.ones(4), torch.ones(4, dtype=torch.cfloat)
    view, conjugate = held[:2], complex_held.conj()
    checkpoint: Any = Holding(held, complex_held)
    owners = tensors_by_storage([held, view, complex_held, conjugate], checkpoint)
    settlements = plan_settlements({"a": held, "b": view, "c": complex_held}, owners)
    assert [{id(tensor) for tensor in settlement.tensors} for settlement in settlements] == [{id(held), id(view)}]


def test_tensors_that_share_nothing_are_settled_alone() -> None:
    alone, shared = torch.ones(4), torch.ones(4)
    other = shared[:2]
    settlements = settle_alone({"a": alone, "again": alone, "b": shared, "c": other})
    assert [settlement.tensors for settlement in settlements] == [[alone]]
