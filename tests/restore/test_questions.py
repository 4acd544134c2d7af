"""Calls that need no values: which conversions are known from the recipe, and which copies overwrite everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_memload.restore.questions import (
    ABOUT_DEVICE,
    CONVERSIONS,
    LIKE_FIRST,
    WITHOUT_VALUES,
    converted,
    is_copyable,
)
from lightning_memload.restore.storages import strided_view
from lightning_memload.restore.tape import Contents, Recipe, Step

CPU = torch.device("cpu")


def recipe_of(tensor: torch.Tensor) -> Recipe:
    nbytes = tensor.untyped_storage().nbytes()
    view = strided_view(tensor)
    return Recipe(Contents(nbytes, CPU, Step("aten.fill_.Scalar", (view, 2.5), {}, None)), view)


@pytest.mark.parametrize(
    ("target", "source", "expected"),
    [
        ((2, 3), (2, 3), True),
        ((2, 3), (3,), True),
        ((2, 3), (1, 1), True),
        ((2, 3), (2,), False),
        ((3,), (1, 3), False),
    ],
)
def test_a_copy_that_overwrites_everything(target: tuple[int, ...], source: tuple[int, ...], expected: bool) -> None:
    into, values = torch.zeros(target), torch.ones(source)
    assert is_copyable(into, values) is expected
    if expected:
        assert into.copy_(values).equal(torch.ones(target))
    elif source == (2,):
        with pytest.raises(RuntimeError):
            into.copy_(values)


def test_copies_that_are_no_plain_ones() -> None:
    target = torch.zeros(2, requires_grad=True)
    assert not is_copyable(target, torch.ones(2))  # torch refuses it
    with torch.no_grad():
        assert is_copyable(target, torch.ones(2))
    for source in (torch.ones(2, device="meta"), torch.ones(2).to_sparse(), 3, None):
        assert not is_copyable(torch.zeros(2), source)


@pytest.mark.parametrize(
    ("func", "rest", "kwargs"),
    [
        (torch.Tensor.half, (), {}),
        (torch.Tensor.double, (), {}),
        (torch.Tensor.to, (torch.bfloat16,), {}),
        (torch.Tensor.to, (), {"dtype": torch.int64, "copy": True}),
        (torch.Tensor.to, (torch.float32,), {"copy": True}),
        (torch.Tensor.type, (torch.float64,), {}),
    ],
)
def test_a_conversion_is_a_step_of_the_recipe(func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensor = torch.full((2, 3), 2.5).t()
    result = converted(func, tensor, recipe_of(tensor), rest, kwargs)
    assert isinstance(result, Recipe)
    made, expected = result.make(), func(tensor, *rest, **kwargs)
    assert (made.dtype, made.stride()) == (expected.dtype, expected.stride())
    assert made.equal(expected)


def test_a_conversion_to_the_same_type_is_the_tensor_itself() -> None:
    tensor = torch.full((2,), 2.5)
    recipe = recipe_of(tensor)
    assert converted(torch.Tensor.float, tensor, recipe, (), {}) is recipe
    assert converted(torch.Tensor.to, tensor, recipe, (torch.float32,), {}) is recipe


def test_conversions_that_need_values() -> None:
    tensor = torch.full((2,), 2.5, requires_grad=True)
    assert converted(torch.Tensor.half, tensor, recipe_of(tensor), (), {}) is None
    assert converted(torch.Tensor.type, tensor.detach(), recipe_of(tensor), (), {}) is None  # a name: a string


def test_a_conversion_to_meta_is_a_tensor() -> None:
    tensor = torch.full((2,), 2.5)
    result = converted(torch.Tensor.to, tensor, recipe_of(tensor), ("meta",), {})
    assert isinstance(result, torch.Tensor)
    assert result.is_meta


def test_no_call_is_in_two_tables() -> None:
    tables = [WITHOUT_VALUES, ABOUT_DEVICE, CONVERSIONS, LIKE_FIRST]
    assert len(set().union(*tables)) == sum(map(len, tables))
