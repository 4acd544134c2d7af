"""Between ``meta_init`` and the restore: what refers to the memory of a parameter goes on doing so, as always."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memload import load_weights, meta_init
from lightning_memload.restore import follow_recipes
from tests.restore.building import raw

pytestmark = pytest.mark.filterwarnings("ignore:A parameter that was built under meta_init is used:UserWarning")


def build() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3))
    for index, parameter in enumerate(module.parameters()):
        nn.init.constant_(parameter, index + 1)
        parameter.no_decay = True
    module[1].bias = module[0].bias
    return module


def tied_by_data(module: Any) -> None:
    module[0].weight.data = module[1].weight.data
    module[0].weight.data[0] = 7


def copied_into(module: Any) -> None:
    module[0].weight.data.copy_(torch.full((3, 2), 8.0))
    module[1].weight.detach().copy_(module[0].weight)


def resized(module: Any) -> None:
    old = module[0].weight.data
    module[0].weight.data = torch.zeros(5, 2)
    module[0].weight.data[:3] = old


def exchanged(module: Any) -> None:
    before = module.state_dict()
    for name in ("weight", "bias"):
        getattr(module[0], name).data = getattr(module[1], name).data + 1
    module.before = nn.ParameterList(before.values())


def converted(module: Any) -> None:
    before, other = module[0].weight.detach(), module[0].weight.data
    module.double()
    before.fill_(9)
    module.other = nn.Parameter(other)


def used_and_exchanged(module: Any) -> None:
    before = module[0].weight.data
    with torch.no_grad():
        module[0].weight.mul_(5)
    module[0].weight.data = torch.ones(3, 2)
    module.before = nn.Parameter(before)


def parameter_of_a_parameter(module: Any) -> None:
    module.twin = nn.Parameter(module[0].weight)
    module.frozen = nn.Parameter(module[1].weight, requires_grad=False)
    module.embedding = nn.Embedding.from_pretrained(module[1].weight)
    module.twin.data[0] = 8


def parameter_of_data(module: Any) -> None:
    module.twin = nn.Parameter(module[0].weight.data)
    module.other = nn.Parameter(module[1].weight.detach(), requires_grad=False)
    module.twin.data[0] = 8


def parameter_of_a_conversion(module: Any) -> None:
    half = module[0].weight.detach().half()
    module.half_precision = nn.Parameter(half)
    half[0] = 8


def buffers(module: Any) -> None:
    module.register_buffer("alias", module[0].weight.data)
    module.register_buffer("other", module[1].weight.detach().double())
    module[0].weight.data = module[0].weight.data + 1


def emptied(module: Any) -> None:
    parameters = list(module.parameters())
    module.to_empty(device="cpu")
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
    for index, parameter in enumerate(parameters):
        parameter.data.fill_(index + 10)


def described(module: nn.Module) -> list[tuple[Any, ...]]:
    """Everything of a module's tensors, and which lie in the same memory."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return [
        (
            name, type(tensor), tensor.dtype, tuple(tensor.shape), tensor.requires_grad, raw(tensor),
            first.setdefault(tensor.data_ptr(), name), getattr(tensor, "no_decay", None),
        )
        for name, tensor in tensors
    ]  # fmt: skip


USES = [
    tied_by_data, copied_into, resized, exchanged, converted, used_and_exchanged, parameter_of_a_parameter,
    parameter_of_data, parameter_of_a_conversion, buffers, emptied,
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_as_an_ordinary_module(use: Callable[[Any], None]) -> None:
    expected = build()
    with meta_init():
        module = build()
    use(expected)
    use(module)
    follow_recipes(module)
    assert described(module) == described(expected)


@pytest.mark.parametrize("use", USES)
def test_restored(use: Callable[[Any], None], tmp_path: Path) -> None:
    expected = build()
    with meta_init():
        module = build()
    use(expected)
    use(module)
    values = {name: torch.full_like(value, 3) for name, value in expected.state_dict().items() if name[0] == "1"}
    torch.save(values, tmp_path / "part.pt")
    load_weights(module, tmp_path / "part.pt", strict=False)
    expected.load_state_dict(values, strict=False)
    assert described(module) == described(expected)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_keeps_attributes_and_a_copy_does_not(protocol: int) -> None:
    expected = build()
    with meta_init():
        module = build()
    _ = module.state_dict()
    saved = io.BytesIO()
    torch.save(module, saved, pickle_protocol=protocol)
    saved.seek(0)
    results = [
        pickle.loads(pickle.dumps(module, protocol)), torch.load(saved, weights_only=False), copy.deepcopy(module)
    ]  # fmt: skip
    for result in results:
        follow_recipes(result)
    pickled = described(pickle.loads(pickle.dumps(expected, protocol)))
    assert [described(result) for result in results] == [pickled, pickled, described(copy.deepcopy(expected))]
