"""Quantised, sparse and other tensors that cannot be copied into a plain parameter, against torch's ``assign=True``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memload import load_weights, meta_init
from tests.formats.files import quantised

pytestmark = [
    # torch's own quantised tensors are built so, by torch.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    # torch 2.14 says so whenever it loads a sparse tensor with weights_only=True.
    pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants"),
]


class Packed(torch.Tensor):
    """A tensor of bytes with a scale, that stands for one of floating point; plain tensors take no copy of it."""

    data_bytes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, data_bytes: torch.Tensor, scale: torch.Tensor) -> Packed:
        made: Packed = torch.Tensor._make_wrapper_subclass(cls, data_bytes.shape, dtype=torch.float32)
        made.data_bytes, made.scale = data_bytes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_bytes", "scale"], None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Packed, (self.data_bytes, self.scale)

    def values_now(self) -> torch.Tensor:
        return self.data_bytes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            return cls(args[0].data_bytes, args[0].scale)
        raise NotImplementedError(f"{func} of a packed tensor")


class Copied(torch.Tensor):
    """A subclass that torch copies into plain parameters."""


@pytest.fixture(autouse=True)
def allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([Packed, Copied]):
        yield


def packed() -> Packed:
    return Packed(torch.arange(6, dtype=torch.int8).view(2, 3), torch.tensor(0.5))


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


def saved(value: torch.Tensor, path: Path) -> dict[str, Any]:
    state = {**make().state_dict(), "0.weight": value}
    torch.save(state, path)
    return state


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("mode", ["copy", "assign"])
def test_a_subclass_takes_the_place_of_the_parameter(meta: bool, mode: Any, tmp_path: Path) -> None:
    state = saved(packed(), tmp_path / "file")
    stock = make()
    with pytest.raises(RuntimeError, match="packed tensor"):
        stock.load_state_dict(torch.load(tmp_path / "file"))
    stock.load_state_dict(torch.load(tmp_path / "file"), assign=True)
    with meta_init(enabled=meta):
        module = make()
    keys = load_weights(module, tmp_path / "file", mode=mode)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    ours, theirs = module[0].weight, stock[0].weight
    assert type(ours) is type(theirs) is Packed
    assert ours.requires_grad == theirs.requires_grad
    assert torch.equal(ours.values_now(), state["0.weight"].values_now())
    assert torch.equal(module[1].weight, state["1.weight"])  # type: ignore[arg-type]
    assert not module[1].weight.is_meta


@pytest.mark.parametrize(
    "value",
    [
        quantised(torch.ones(2, 3)),
        torch.eye(3)[:2].to_sparse(),
    ],
    ids=["quantised", "sparse"],
)
def test_special_layouts(value: torch.Tensor, tmp_path: Path) -> None:
    saved(value, tmp_path / "file")
    module = make()
    load_weights(module, tmp_path / "file")
    ours = module[0].weight
    assert (ours.dtype, ours.layout) == (value.dtype, value.layout)
    assert torch.equal(*(t.dequantize() if t.is_quantized else t.to_dense() for t in (ours.detach(), value)))


def test_what_torch_copies_is_copied(tmp_path: Path) -> None:
    saved(torch.ones(2, 3).as_subclass(Copied), tmp_path / "file")
    module = make()
    weight = module[0].weight
    load_weights(module, tmp_path / "file")
    assert module[0].weight is weight
    assert type(weight) is nn.Parameter
    assert weight.tolist() == [[1.0] * 3] * 2


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    module = make()
    module.other = nn.Linear(3, 2)
    module.other.weight = module[0].weight  # type: ignore[assignment]
    state = {**module.state_dict(), "0.weight": packed(), "other.weight": packed()}
    torch.save(state, tmp_path / "file")
    load_weights(module, tmp_path / "file")
    assert module.other.weight is module[0].weight
    assert type(module[0].weight) is Packed


def test_a_wrong_shape_changes_nothing(tmp_path: Path) -> None:
    saved(quantised(torch.ones(3, 3)), tmp_path / "file")
    module = make()
    weight = module[0].weight
    with pytest.raises(RuntimeError, match=r"0\.weight has shape"):
        load_weights(module, tmp_path / "file")
    assert module[0].weight is weight
