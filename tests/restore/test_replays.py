"""Values that are needed while a module is built are those of an ordinary construction, and cost no more than it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memload import meta_init
from lightning_memload.restore.recipes import follow_recipes
from lightning_memload.restore.tape import Step
from tests.restore.building import raw


class Layer(nn.Linear):
    """A layer whose parameters do not depend on chance."""

    def __init__(self, size: int = 4) -> None:
        super().__init__(size, size)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))


class Runs(nn.Module):
    """A model that runs while it is built, as one does that looks for its sizes, or quantises itself."""

    def __init__(self, run: Callable[[nn.ModuleList], dict[str, Any]], depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        with torch.no_grad():
            for name, value in run(self.layers).items():
                self.register_buffer(name, value if isinstance(value, torch.Tensor) else torch.tensor(value))


def residual(layers: nn.ModuleList) -> dict[str, Any]:
    x = torch.ones(1, 4)
    for layer in layers:
        x = x + layer(x).relu()
    return {"scale": float(x.sum()), "last": x}


def watched(layers: nn.ModuleList) -> dict[str, Any]:
    """Needs a value of every layer."""
    x, largest = torch.ones(1, 4), []
    for layer in layers:
        x = layer(x).tanh()
        largest.append(x.max().item())
    return {"largest": torch.tensor(largest), "last": x}


def watched_in_place(layers: nn.ModuleList) -> dict[str, Any]:
    x, largest = layers[0].weight.clone(), []
    for layer in layers:
        x += layer(x).tanh()
        largest.append(x.max().item())
    return {"largest": torch.tensor(largest), "last": x}


def again(layers: nn.ModuleList) -> dict[str, Any]:
    """Needs the same parameter's values for every step, as an initialisation does that depends on data."""
    sums = [float(layers[0](torch.ones(1, 4) * index).sum()) for index in range(len(layers))]
    return {"sums": torch.tensor(sums)}


def overwritten(layers: nn.ModuleList) -> dict[str, Any]:
    """Reads what is written to afterwards, more than once."""
    x = layers[0].weight.clone()
    first, second = x * 2, x.t() - 1
    x.add_(first)
    third = x * second
    x.mul_(third).sub_(second)
    return {"total": float((x + first @ second).sum()), "x": x, "first": first, "second": second, "third": third}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of steps that make contents."""
    taken = [0]
    run = Step.run

    def counting(self: Step, *args: Any) -> None:
        taken[0] += 1
        run(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "run", counting)
        yield taken


@pytest.mark.parametrize("run", [residual, watched, watched_in_place, again, overwritten])
def test_a_model_that_runs_while_it_is_built(
    run: Callable[[nn.ModuleList], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = 12
    expected = dict(Runs(run, depth).named_buffers())
    with counted(monkeypatch) as taken, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "meta_init built", UserWarning)
        with meta_init():
            model = Runs(run, depth)
    actual = dict(model.named_buffers())
    assert {name: raw(value) for name, value in actual.items()} == {name: raw(v) for name, v in expected.items()}
    # A layer is made in at most five steps, run in as many, and made again a few times at most.
    assert taken[0] <= 25 * depth


def test_what_is_far_from_its_beginning() -> None:
    def build() -> nn.Module:
        module = Layer()
        x = module.weight.detach()
        for _ in range(1500):
            x = x * 0.999 + 0.001
        module.scale = float(x.sum())  # type: ignore[assignment]
        return module

    with meta_init():
        module = build()
    assert module.scale == build().scale
    assert module.weight.is_meta


def test_a_parameter_that_is_made_again_and_again_lends_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    depth = 100
    with counted(monkeypatch) as taken, meta_init():
        module = Runs(again, depth)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert raw(module.sums) == raw(Runs(again, depth).sums)  # type: ignore[arg-type]
    # A layer that is run takes four steps; to make its two parameters takes two each.
    assert taken[0] <= 5 * depth


def test_a_parameter_that_changes_after_it_lent_its_memory() -> None:
    def run(layers: nn.ModuleList) -> dict[str, Any]:
        before = again(layers)["sums"]
        layers[0].weight.mul_(2).add_(layers[0].weight.t().clone())
        return {"before": before, "after": again(layers)["sums"], "twice": layers[0].weight * 2}

    expected = Runs(run, 12)
    with meta_init():
        module = Runs(run, 12)
    assert all(parameter.is_meta for parameter in module.parameters())
    ours, theirs = dict(module.named_buffers()), dict(expected.named_buffers())
    assert {name: raw(value) for name, value in ours.items()} == {name: raw(v) for name, v in theirs.items()}
    follow_recipes(module)
    assert raw(module.layers[0].weight) == raw(expected.layers[0].weight)  # type: ignore[arg-type]
