"""The tensors that a load fills: those that torch would copy, in torch's order, and none that other code loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_memload.restore.targets import find_targets, overrides_load


class Own(nn.Linear):
    """Sees the values before torch copies them."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)


def keys(module: nn.Module, state_dict: dict[str, Any] | None = None, prefix: str = "") -> list[str]:
    state_dict = module.state_dict(prefix=prefix) if state_dict is None else state_dict
    return [target.key for target in find_targets(module, state_dict, prefix)]


def test_all_that_torch_would_copy_in_its_order() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)), nn.Embedding(2, 2))
    assert keys(module) == list(module.state_dict())
    assert keys(module, prefix="model.") == [f"model.{name}" for name in module.state_dict()]


def test_values_and_tensors_belong_together() -> None:
    module, state_dict = nn.Linear(2, 2), nn.Linear(2, 2).state_dict()
    targets = list(find_targets(module, dict(state_dict), ""))
    assert [target.tensor for target in targets] == [module.weight, module.bias]
    assert all(target.value is state_dict[target.key] for target in targets)


def test_what_torch_refuses_or_ignores_is_left_to_it() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("forgotten", torch.zeros(2), persistent=False)
    given = {
        "weight": torch.zeros(3),  # another shape
        "bias": "no tensor",
        "running_mean": torch.zeros(2).to_sparse(),
        "running_var": torch.ones(2),
        "forgotten": torch.zeros(2),
        "other": torch.zeros(2),
    }
    assert keys(module, given) == ["running_var"]


def test_submodules_with_their_own_code_are_skipped() -> None:
    module = nn.Sequential(nn.Linear(2, 2), Own(2, 2), nn.Linear(2, 2))
    module[2].register_load_state_dict_pre_hook(lambda *_: None)
    assert keys(module) == ["0.weight", "0.bias"]
    assert keys(module[1]) == ["weight", "bias"]


def test_a_module_with_its_own_code_decides_for_its_children() -> None:
    class Outer(nn.Sequential):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_state_dict(*args, **kwargs)

    assert overrides_load(Outer())
    assert not overrides_load(nn.BatchNorm1d(1))
    assert keys(Outer(nn.Linear(2, 2))) == []


def test_tensors_that_are_tied_to_skipped_ones_are_skipped() -> None:
    module = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    module[1].weight = module[0].weight
    assert keys(module) == ["0.bias"]
    module = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    module[1].weight.data = module[0].weight.detach()
    assert keys(module) == ["0.bias"]
