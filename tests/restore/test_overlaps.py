"""Tensors that share memory: found without reading or writing them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_memload.restore.overlaps import (
    Sharing,
    has_memory,
    is_alias,
    is_plain_tensor,
    memory_of,
    overlapping_ids,
    overlaps_itself,
)

BASE = torch.arange(12.0)


class TestOverlapping:
    def test_neighbours_do_not_overlap(self) -> None:
        assert overlapping_ids([BASE[:4], BASE[4:8], BASE[8:]]) == set()

    def test_all_that_overlap_are_named(self) -> None:
        first, inner, last, alone = BASE[:6], BASE[2:4], BASE[5:8], BASE[8:]
        assert overlapping_ids([alone, last, inner, first]) == {id(first), id(inner), id(last)}

    def test_what_has_no_memory_overlaps_with_nothing(self) -> None:
        nothing, meta = BASE[:0], torch.empty(3, device="meta")
        assert overlapping_ids([nothing, BASE[:0], meta, torch.empty(3, device="meta")]) == set()


class TestSharing:
    def test_two_parameters_in_one_storage(self) -> None:
        module = nn.Module()
        module.register_parameter("one", nn.Parameter(BASE[:6]))
        module.register_parameter("two", nn.Parameter(BASE[6:]))
        module.register_buffer("alone", torch.zeros(1))
        sharing = Sharing(module)
        assert sharing.shares(module.get_parameter("one"))
        assert not sharing.shares(module.get_buffer("alone"))

    def test_one_object_under_two_names_shares_with_nothing(self) -> None:
        module = nn.Module()
        module.register_parameter("one", nn.Parameter(torch.zeros(2)))
        module.register_parameter("two", module.get_parameter("one"))
        assert not Sharing(module).shares(module.get_parameter("one"))

    def test_new_memory_is_noted(self) -> None:
        module = nn.Linear(2, 2)
        sharing = Sharing(module)
        module.weight.data = torch.zeros(2, 2)
        module.bias.data = module.weight.detach()[0]
        assert not sharing.shares(module.weight)
        sharing.note(module)
        assert sharing.shares(module.weight)


@pytest.mark.parametrize(
    ("value", "tensor", "expected"),
    [
        (BASE.view(12), BASE, True),
        (BASE, BASE, False),
        (BASE.clone(), BASE, False),
        (BASE.view(3, 4), BASE, False),
        (BASE.view(torch.int32), BASE, False),
        (BASE[:0], BASE[:0], False),
        ("weight", BASE, False),
        (torch.ones(2, dtype=torch.cfloat).conj(), torch.ones(2, dtype=torch.cfloat), False),
    ],
)
def test_alias(value: object, tensor: torch.Tensor, expected: bool) -> None:
    assert is_alias(value, tensor) is expected


def test_a_conjugate_view_is_no_alias() -> None:
    """It has the same memory, dtype, shape and strides, and other values."""
    values = torch.ones(2, dtype=torch.cfloat)
    assert is_alias(values.view(2), values)
    assert not is_alias(values.conj(), values)


def test_elements_that_share_a_place() -> None:
    assert overlaps_itself(torch.ones(1).expand(3))
    assert not overlaps_itself(torch.ones(3, 4).t())
    assert not overlaps_itself(torch.ones(1, 3).expand(1, 3))


@pytest.mark.filterwarnings("ignore::UserWarning")  # quantised tensors are deprecated (torch 2.13)
def test_plain_tensors() -> None:
    class Own(torch.Tensor):
        pass

    plain = [BASE, nn.Parameter(BASE), BASE[:0], torch.empty(1, device="meta")]
    special = [BASE.to_sparse(), torch.quantize_per_tensor(BASE, 1.0, 0, torch.qint8), BASE.as_subclass(Own), 3, None]
    assert all(map(is_plain_tensor, plain))
    assert not any(map(is_plain_tensor, special))
    assert [has_memory(tensor) for tensor in plain] == [True, True, False, False]
    assert memory_of(BASE[3:]) == memory_of(BASE)
