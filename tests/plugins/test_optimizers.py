"""Optimizers that wrap others, lack torch's hooks, or keep what they load: resumed bit for bit as stock does it."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, open_checkpoint
from lightning_memload.save import tensors_of_optimizers
from tests.plugins.harness import Case, TinyModule, adamw, assert_same, resume, same_resume, write_checkpoint


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class Slow(torch.optim.Optimizer):
    """Slow weights beside another optimizer. A subclass that never calls ``Optimizer.__init__``."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults
        self.state: Any = defaultdict(dict)
        self._optimizer_step_pre_hooks: Any = {}
        self._optimizer_step_post_hooks: Any = {}
        self._patch_step_function()
        for parameter in self.parameters():
            self.state[parameter]["slow"] = parameter.detach().clone()

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    def parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        for parameter in self.parameters():
            slow = self.state[parameter]["slow"]
            slow.lerp_(parameter, 0.5)
            parameter.lerp_(slow, 0.2)
        return loss

    def state_dict(self) -> Any:
        return {"slow": [self.state[p]["slow"] for p in self.parameters()], "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        for parameter, slow in zip(self.parameters(), state_dict["slow"], strict=True):
            self.state[parameter] = {"slow": slow.to(parameter.device, parameter.dtype)}


class Averaged(torch.optim.Optimizer):
    """Keeps a dict of averages by reference, and neither a state nor hooks of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults
        self.averages: dict[int, torch.Tensor] = {}

    param_groups = property(lambda self: self.inner.param_groups, lambda self, value: None)
    state = property(lambda self: self.inner.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        for number, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            self.averages.setdefault(number, parameter.detach().clone()).lerp_(parameter.detach(), 0.1)
        return loss

    def state_dict(self) -> Any:
        return {"inner": self.inner.state_dict(), "averages": dict(self.averages)}

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        self.averages = dict(state_dict["averages"])


class Several:
    """Several optimizers as one, and no subclass of torch's."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        self.inner = {"all": list(inner)}
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> Any:
        return [group for optimizer in self.inner["all"] for group in optimizer.param_groups]

    @property
    def state(self) -> Any:
        return {key: value for optimizer in self.inner["all"] for key, value in optimizer.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.inner["all"]:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for optimizer in self.inner["all"]:
            optimizer.step()
        return loss

    def state_dict(self) -> Any:
        return {"state": {n: optimizer.state_dict() for n, optimizer in enumerate(self.inner["all"])}}

    def load_state_dict(self, state_dict: Any) -> None:
        for number, optimizer in enumerate(self.inner["all"]):
            optimizer.load_state_dict(state_dict["state"][number])


class Forwarding:
    """Passes unknown attributes on to the optimizer inside."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class Climbing(torch.optim.Optimizer):
    """Climbs before it steps down. It shares the groups of the optimizer within, and has states of its own beside."""

    def __init__(self, params: Any, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base = make(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            self.state[parameter]["climbed"] = 0.05 * parameter.grad
            parameter.add_(self.state[parameter]["climbed"])
        with torch.enable_grad():
            closure()
        for parameter in parameters:
            parameter.sub_(self.state[parameter]["climbed"])
        self.base.step()
        return loss

    def state_dict(self) -> Any:
        return {**super().state_dict(), "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        state_dict = dict(state_dict)
        self.base.load_state_dict(state_dict.pop("base"))
        super().load_state_dict(state_dict)
        self.base.param_groups = self.param_groups


class Watching(Averaged):
    """Reports one of the states of the optimizer within, which it keeps by reference."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            if not self.averages.get(-1, torch.zeros(0)).numel():
                self.averages[-1] = next(iter(self.inner.state.values()))["momentum_buffer"]
            # The very memory of the state: what is done here is done there.
            self.averages[-1].mul_(0.5)
        return loss


class Flat(torch.optim.Optimizer):
    """All momenta lie in one buffer, which is a state as well and is scaled as a whole."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if "flat" not in self.state:
            flat = self.state["flat"] = torch.zeros(sum(parameter.numel() for parameter in parameters))
            for parameter, momentum in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                self.state[parameter]["momentum"] = momentum.view_as(parameter)
        self.state["flat"].mul_(0.9)
        for parameter in parameters:
            parameter.sub_(self.state[parameter]["momentum"].add_(parameter.grad), alpha=0.01)
        return loss


class FullPrecision(torch.optim.SGD):
    """Its states stay float32 beside bfloat16 parameters, although torch's loading would convert them."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, state in state_dict["state"].items():
            self.state[parameters[number]] = {key: value.to(torch.float32) for key, value in state.items()}


def halves(parameters: Any) -> list[list[Any]]:
    parameters = list(parameters)
    return [parameters[:2], parameters[2:]]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "slow-sgd": lambda p: Slow(sgd(p)),
    "slow-adamw": lambda p: Slow(adamw(p)),
    "averaged": lambda p: Averaged(adamw(p)),
    "averaged-slow": lambda p: Averaged(Slow(adamw(p))),
    "several": lambda p: Several(*map(adamw, halves(p))),
    "several-wrapped": lambda p: Several(*(Slow(sgd(half)) for half in halves(p))),
    "forwarding": lambda p: Forwarding(adamw(p)),
    "climbing": lambda p: Climbing(p, adamw),
    "watching": lambda p: Watching(sgd(p)),
    "flat": Flat,
}
if sys.version_info >= (3, 12):
    del WRAPPERS["forwarding"]  # Lightning takes none: protocols ask for attributes without __getattr__ there


class Mapped(L.Callback):
    """Notes whether the process maps the checkpoint of a folder, or has it open, while it trains."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "case.ckpt")
        self.found: list[str] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.found += [line for line in Path("/proc/self/maps").read_text().splitlines() if self.path in line]
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                self.found += [str(link)] if self.path in str(link.readlink()) else []


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_resumed_as_stock_does(name: str, meta: bool, tmp_path: Path) -> None:
    mapped = Mapped(tmp_path)
    same_resume(Case(lambda: TinyModule(WRAPPERS[name]), callbacks=lambda: [mapped]), tmp_path, meta=meta)
    assert not mapped.found


def test_states_that_stay_in_full_precision(tmp_path: Path) -> None:
    case = Case(
        lambda: TinyModule(lambda p: FullPrecision(p, lr=0.01, momentum=0.9)), trainer={"precision": "bf16-true"}
    )
    same_resume(case, tmp_path)


class Wide(TinyModule):
    """So large that what is read over between tensors does not count."""

    def __init__(self) -> None:
        super().__init__(lambda p: Slow(adamw(p)))
        self.wide = nn.Linear(300, 300)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + self.wide(torch.ones(300)).mean()


def test_what_a_wrapper_hands_to_a_torch_optimizer_is_streamed_and_the_rest_is_kept(tmp_path: Path) -> None:
    report = same_resume(Case(Wide), tmp_path).report
    assert report is not None
    sizes = {"state_dict": 0, "inner": 0, "slow": 0}
    for tensor in open_checkpoint(tmp_path / "case.ckpt"):
        part = tensor.path[2] if tensor.path[0] == "optimizer_states" else tensor.path[0]
        sizes[part] += tensor.nbytes
    streamed = sizes["state_dict"] + sizes["inner"]
    assert streamed <= report.total.bytes_read < streamed + sizes["slow"] // 2
    assert sizes["slow"] <= report.bytes_kept < sizes["slow"] + 32768


class Late(TinyModule):
    """Registers a hook that looks at the saved states when the optimizers are about to be restored."""

    def on_fit_start(self) -> None:
        def hook(optimizer: Any, state_dict: Any) -> Any:
            state = {
                number: {**state, "exp_avg": state["exp_avg"] * 2, "itemsize": state["exp_avg"].itemsize}
                for number, state in state_dict["state"].items()
            }
            return {**state_dict, "state": state}

        self.trainer.optimizers[0].register_load_state_dict_pre_hook(hook)


def test_hooks_that_come_later_see_what_was_saved(tmp_path: Path) -> None:
    """The module is float32 here and bfloat16 when it resumes, so that states are converted."""
    case = Case(lambda: Late(adamw))
    path = write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path)
    half = replace(case, trainer={"precision": "bf16-true"})
    _, stock = resume(half, path, tmp_path, None)
    with pytest.warns(UserWarning, match=r"^optimizer_states\[0\] has load_state_dict pre-hooks .* so \d+ bytes"):
        _, ours = resume(half, path, tmp_path, MemoryEfficientRestore())
    assert_same(stock.ended, ours.ended, "ended")
    assert ours.restored["optimizers"][0]["state"][0]["itemsize"] == 4


@pytest.mark.parametrize("make", [Averaged, Forwarding], ids=lambda make: make.__name__)
def test_only_a_step_that_torch_announces_may_be_waited_for(make: Any) -> None:
    """With wrappers, changes of tensors before the step of the inner optimizer would not be noticed."""
    module = nn.Linear(2, 2)
    optimizer = adamw(module.parameters())
    assert len(tensors_of_optimizers([optimizer])) == 2
    assert len(tensors_of_optimizers([Slow(optimizer)])) == 4
    assert not tensors_of_optimizers([make(optimizer)])
