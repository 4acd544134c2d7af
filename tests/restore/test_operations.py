"""The kinds of operations: what each does with the values of its tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_memload.restore.operations import (
    OperationKind,
    draws,
    draws_from_user,
    empty_call,
    fits,
    kind_of_call,
    name_of,
    overwrites,
    written_in,
)

ATEN: Any = torch.ops.aten
ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("operator", "args", "kind"),
    [
        (ATEN.view.default, (ONE, [6]), OperationKind.VIEW),
        (ATEN.detach.default, (ONE,), OperationKind.VIEW),
        (ATEN.t_.default, (ONE,), OperationKind.VIEW),
        (ATEN.empty.memory_format, ([2],), OperationKind.EMPTY),
        (ATEN.empty_like.default, (ONE,), OperationKind.EMPTY),
        (ATEN.zeros.default, ([2],), OperationKind.FILLED),
        (ATEN.randn.default, ([2],), OperationKind.FILLED),
        (ATEN.zero_.default, (ONE,), OperationKind.IN_PLACE),
        (ATEN.add_.Tensor, (ONE, ONE), OperationKind.IN_PLACE),
        (ATEN.normal_.default, (ONE,), OperationKind.IN_PLACE),
        (ATEN.add.Tensor, (ONE, ONE), OperationKind.NEW),
        (ATEN.split.Tensor, (ONE, 1), OperationKind.VIEW),
        (ATEN.unbind.int, (ONE,), OperationKind.VIEW),
        (ATEN.index.Tensor, (ONE, [torch.tensor([0])]), OperationKind.NEW),
        (ATEN.index.Tensor, (ONE, [torch.tensor([True, False])]), OperationKind.OTHER),
        (ATEN.nonzero.default, (ONE,), OperationKind.OTHER),
        (ATEN._local_scalar_dense.default, (ONE[0, 0],), OperationKind.OTHER),
        (ATEN.resize_.default, (ONE, [9]), OperationKind.OTHER),
        (ATEN.equal.default, (ONE, ONE), OperationKind.OTHER),
    ],
    ids=str,
)
def test_kinds(operator: Any, args: tuple[Any, ...], kind: OperationKind) -> None:
    assert kind_of_call(operator, args, {}) is kind


@pytest.mark.parametrize("is_training", [True, False])
def test_a_batch_norm_writes_its_statistics_only_in_training(is_training: bool) -> None:
    """The schema of the operator does not say so."""
    mean, var = torch.zeros(3), torch.ones(3)
    args = (ONE, None, None, mean, var, is_training, 0.1, 1e-5)
    written = written_in(ATEN.native_batch_norm.default, args, {})
    assert [id(tensor) for tensor in written] == ([id(mean), id(var)] if is_training else [])
    kind = kind_of_call(ATEN.native_batch_norm.default, args, {})
    assert kind is (OperationKind.OTHER if is_training else OperationKind.NEW)


def test_written_tensors_are_found_by_place_and_by_name() -> None:
    out = torch.zeros(2, 3)
    assert written_in(ATEN.add.out, (ONE, ONE), {"out": out})[0] is out
    assert written_in(ATEN.add_.Tensor, (out, ONE), {})[0] is out
    assert written_in(ATEN.add.Tensor, (ONE, ONE), {}) == []


def test_random_numbers() -> None:
    assert draws(ATEN.normal_.default)
    assert draws(ATEN.bernoulli.default)
    assert not draws(ATEN.add.Tensor)
    assert draws_from_user({"generator": torch.Generator()})
    assert not draws_from_user({"generator": None})


def test_which_operations_overwrite_all_values() -> None:
    assert overwrites(ATEN.copy_.default)
    assert not overwrites(ATEN.add_.Tensor)
    assert name_of(ATEN.add_.Tensor) == "add_"


@pytest.mark.parametrize(
    ("shape", "expected"), [((2, 3), True), ((3,), True), ((1, 1), True), ((2,), False), ((1, 2, 3), False)]
)
def test_shapes_that_fit(shape: tuple[int, ...], expected: bool) -> None:
    target, other = torch.zeros(2, 3), torch.zeros(shape)
    assert fits(ATEN.add_.Tensor, target, [other]) is expected
    if not expected:
        with pytest.raises(RuntimeError):
            target.add_(other)


@pytest.mark.parametrize(
    ("operator", "args", "kwargs"),
    [
        (ATEN.zeros.default, ([2, 3],), {"dtype": torch.float64}),
        (ATEN.ones.default, ([2, 3],), {}),
        (ATEN.full.default, ([2, 3], 2.5), {}),
        (ATEN.full.default, ([2, 3], 2), {"dtype": torch.float16}),
        (ATEN.zeros_like.default, (ONE,), {}),
        (ATEN.ones_like.default, (ONE,), {"dtype": torch.int64}),
        (ATEN.full_like.default, (ONE, 7), {}),
        (ATEN.new_zeros.default, (ONE, [4]), {}),
        (ATEN.new_full.default, (ONE, [4], 3), {}),
        (ATEN.randn.default, ([2, 3],), {}),
        (ATEN.rand_like.default, (ONE,), {}),
    ],
    ids=str,
)
def test_a_call_is_split_into_memory_and_values(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.manual_seed(3)
    expected = operator(*args, **kwargs)
    split = empty_call(operator, args, kwargs)
    assert split is not None
    make, rest, how, in_place, value = split
    _, name, overload = in_place.split(".")
    torch.manual_seed(3)
    made = getattr(getattr(ATEN, name), overload)(make(*rest, **how), *value)
    assert made.dtype == expected.dtype
    assert made.equal(expected)


def test_a_type_that_depends_on_the_value_is_not_split() -> None:
    assert empty_call(ATEN.full.default, ([2], True), {}) is None
