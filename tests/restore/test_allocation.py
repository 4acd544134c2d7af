"""Memory for tensors that have none: strides, types, and initial values of parameters that a checkpoint lacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_memload.errors import MetaTensorError
from lightning_memload.restore.allocation import empty_on, materialize, meta_names, replace_data, tensors_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "like",
    [
        torch.empty(2, 3),
        torch.empty(2, 3).t(),
        torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.empty(4, dtype=torch.int32)[::2],
        torch.empty(0),
        torch.empty(()),
    ],
    ids=["contiguous", "transposed", "channels-last", "gaps", "empty", "scalar"],
)
def test_memory_has_the_strides_that_torch_would_choose(like: torch.Tensor) -> None:
    meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    made = empty_on(meta, CPU, None)
    assert (made.device, made.dtype, made.stride()) == (CPU, like.dtype, torch.empty_like(like).stride())


def test_only_floating_point_tensors_change_their_type() -> None:
    assert empty_on(torch.empty(2, device="meta"), CPU, torch.float16).dtype == torch.float16
    assert empty_on(torch.empty(2, dtype=torch.int64, device="meta"), CPU, torch.float16).dtype == torch.int64


def test_a_parameter_stays_the_same_object() -> None:
    parameter = nn.Parameter(torch.empty(2, device="meta"), requires_grad=False)
    module = nn.Module()
    module.register_parameter("weight", parameter)
    old = replace_data(parameter, torch.ones(2), name="weight")
    assert old.is_meta
    assert module.get_parameter("weight") is parameter
    assert not parameter.requires_grad
    assert parameter.tolist() == [1, 1]


def test_missing_parameters_get_the_values_of_their_module_and_others_keep_theirs() -> None:
    module = nn.Sequential(nn.Linear(2, 3, device="meta"), nn.LayerNorm(3, device="meta"))
    replace_data(module[1].get_parameter("weight"), torch.full((3,), 5.0), name="1.weight")
    materialize(module, ["0.weight", "0.bias", "1.bias", "1.weight"], CPU, torch.float64)
    assert meta_names(module) == ([], [])
    assert module[0].weight.dtype == torch.float64
    assert module[0].weight.abs().max() <= 1 / 2**0.5
    assert module[1].bias.tolist() == [0, 0, 0]
    assert module[1].weight.tolist() == [5, 5, 5]


def test_a_module_that_cannot_initialise_is_named() -> None:
    module = nn.Sequential(nn.Module())
    module[0].register_parameter("weight", nn.Parameter(torch.empty(2, device="meta")))
    with pytest.raises(MetaTensorError, match=r"The checkpoint lacks 0\.weight, and Module has no reset_parameters"):
        materialize(module, ["0.weight"], CPU, None)


def test_names_on_meta() -> None:
    module = nn.BatchNorm1d(2)
    assert meta_names(module) == ([], [])
    module.weight = nn.Parameter(torch.empty(2, device="meta"))
    module.running_mean = torch.empty(2, device="meta")
    assert meta_names(module) == (["weight"], ["running_mean"])
    assert len(list(tensors_of(module))) == 5
