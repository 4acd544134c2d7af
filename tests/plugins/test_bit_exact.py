"""A resume with the callback is, bit for bit, the stock one: every row once per way of building and restoring."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from tests.lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.utils import parametrizations

import tests.lightning as L
from tests.plugins.harness import (
    FEATURES,
    Case,
    Recorded,
    StockResume,
    TinyModule,
    adamw,
    callbacks_of,
    same_resume,
    stock_resume,
)

# Optimizers ---------------------------------------------------------------------------------------------------------


class Factored(torch.optim.Optimizer):
    """Has the states of third-party optimizers: row and column statistics, nested states, counters and masks."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["count"] = torch.zeros(3, dtype=torch.int64)
                    state["seen"] = torch.zeros(parameter.shape, dtype=torch.bool)
                    state["row"] = torch.zeros(parameter.shape[:-1])
                    state["nested"] = {"column": torch.zeros(parameter.shape[-1]), "step": torch.tensor(0)}
                    state["history"] = [torch.zeros_like(parameter), (torch.ones(2), 4)]
                    state["empty"] = torch.zeros(0)
                    state["transposed"] = torch.zeros(parameter.shape[::-1]).permute(*reversed(range(parameter.dim())))
                    state["none"], state["number"] = None, 1.5
                state["step"] += 1
                state["nested"]["step"] += 1
                state["count"][1] += 2
                state["seen"].logical_or_(gradient > 0)  # torch restores it as float
                state["row"] += gradient.square().mean(-1)
                column = state["nested"]["column"]
                column += gradient.square().reshape(-1, gradient.shape[-1]).mean(0)
                state["history"][0].mul_(0.9).add_(gradient)
                state["transposed"].add_(gradient)
                scale = (state["row"].unsqueeze(-1) * column + 1e-3).rsqrt() / (1 + state["nested"]["step"].item())
                parameter.sub_(group["lr"] * scale * (state["history"][0] + 0.1 * state["transposed"]))
        return loss


class SharedStep(torch.optim.Optimizer):
    """One step counter for all parameters, and momenta that are slices of one buffer."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not self.state:
            step, flat, offset = torch.tensor(0.0), torch.zeros(sum(p.numel() for p in parameters)), 0
            for parameter in parameters:
                self.state[parameter]["step"] = step
                self.state[parameter]["momentum"] = flat[offset : offset + parameter.numel()]
                offset += parameter.numel()
        self.state[parameters[0]]["step"] += 1
        for parameter in parameters:
            state = self.state[parameter]
            state["momentum"].mul_(0.9).add_(parameter.grad.flatten())
            parameter.sub_(self.defaults["lr"] / state["step"] * state["momentum"].view_as(parameter))
        return loss


def optimizer_case(make: Callable[[Any], Any], **kwargs: Any) -> Case:
    return Case(lambda: TinyModule(make), **kwargs)


def _capturable(checkpoint: dict[str, Any]) -> None:
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["capturable"] = True


def _double_step(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["step"] = state["step"].double()


def _half_states(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["exp_avg"] = state["exp_avg"].half()


def _scheduled(parameters: Any) -> Any:
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=60)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _grouped(parameters: Any) -> Any:
    first, *others = parameters
    return torch.optim.AdamW([{"params": others, "lr": 0.02}, {"params": [first], "weight_decay": 0.0}], lr=0.01)


OPTIMIZERS = {
    "sgd": optimizer_case(lambda p: torch.optim.SGD(p, lr=0.01)),
    "sgd-momentum": optimizer_case(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
    "adamw": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False)),
    "adamw-foreach": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True)),
    "adamw-fused": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)),
    "adamw-amsgrad": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True)),
    # torch refuses to step capturable optimizers on the CPU, but restores them.
    "adamw-capturable": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.01), edit=_capturable, trains=False),
    "adamw-double-step": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.01), edit=_double_step),
    "adamw-fused-double-step": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), edit=_double_step),
    "adamw-half-states": optimizer_case(lambda p: torch.optim.AdamW(p, lr=0.01), edit=_half_states),
    "adamw-tensor-lr": optimizer_case(lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False)),
    "adam": optimizer_case(lambda p: torch.optim.Adam(p, lr=0.01)),
    "adagrad": optimizer_case(lambda p: torch.optim.Adagrad(p, lr=0.01)),
    "adadelta": optimizer_case(lambda p: torch.optim.Adadelta(p, lr=0.1)),
    "adamax": optimizer_case(lambda p: torch.optim.Adamax(p, lr=0.01)),
    "asgd": optimizer_case(lambda p: torch.optim.ASGD(p, lr=0.01)),
    "nadam": optimizer_case(lambda p: torch.optim.NAdam(p, lr=0.01)),
    "radam": optimizer_case(lambda p: torch.optim.RAdam(p, lr=0.01)),
    "rmsprop": optimizer_case(lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True)),
    "rprop": optimizer_case(lambda p: torch.optim.Rprop(p, lr=0.01)),
    "lbfgs": optimizer_case(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4)),
    "adafactor": optimizer_case(lambda p: torch.optim.Adafactor(p, lr=0.01)),
    "factored": optimizer_case(Factored),
    "shared-step": optimizer_case(SharedStep),
    "scheduled": optimizer_case(_scheduled),
    "grouped": optimizer_case(_grouped),
    "unstepped": optimizer_case(lambda p: torch.optim.AdamW(p), save_after=1, trainer={"accumulate_grad_batches": 4}),
}


class Gan(Recorded):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(FEATURES, FEATURES)
        self.critic = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        of_generator, of_critic = self.optimizers()
        loss = self.critic(targets).mean() - self.critic(self.generator(inputs).detach()).mean()
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()
        if batch_idx % 2 == 0:
            loss = self.critic(self.generator(inputs)).mean()
            of_generator.zero_grad()
            self.manual_backward(loss)
            of_generator.step()
        self.losses.append(loss.detach().clone())
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.RMSprop(self.critic.parameters(), lr=0.01, momentum=0.5),
        ]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in optimizers]


class EarlyOptimizer(TinyModule):
    """Its optimizer, and a plain reference to a parameter, are older than the restore."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        self.kept = [self.first.weight]

    def configure_optimizers(self) -> Any:
        assert self.kept[0] is self.first.weight
        return self.optimizer


# Modules ------------------------------------------------------------------------------------------------------------


class Wrapped(Recorded):
    """One network, trained by AdamW."""

    def __init__(self, make_net: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01, eps=1e-4)


def net_case(make_net: Callable[[], nn.Module], **kwargs: Any) -> Case:
    return Case(lambda: Wrapped(make_net), **kwargs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(FEATURES, FEATURES)
        self.decode = nn.Linear(FEATURES, FEATURES, bias=False)
        self.decode.weight = self.encode.weight
        shared = nn.Linear(FEATURES, FEATURES)
        self.steps = nn.ModuleList([shared, nn.ReLU(), shared])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            inputs = step(inputs)
        return self.decode(self.encode(inputs))


class UntiedOnDisk(Tied):
    """Tied in memory, but its checkpoint holds two different values: the last one counts."""

    @staticmethod
    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.decode.weight"] = checkpoint["state_dict"]["net.decode.weight"] * 3


class Buffers(nn.Module):
    """Every kind of buffer and of parameter, trained or not."""

    def __init__(self, *, phases: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.register_buffer("secret", torch.arange(6.0), persistent=False)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.rand(FEATURES) > 0.5)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("transposed", torch.randn(3, 4).t())
        self.register_buffer("positions", torch.arange(5).expand(1, -1))
        self.register_buffer("absent", None)
        # torch warns when it casts a complex module to a real type.
        self.register_buffer("phases", torch.randn(3, dtype=torch.complex64) if phases else None)
        self.register_buffer("brain", torch.randn(3).bfloat16())
        self.register_buffer("doubled", torch.randn(3).double())
        self.register_buffer("eight", torch.randn(8).to(torch.float8_e4m3fn))
        self.halves = nn.Parameter(torch.randn(3).half(), requires_grad=False)
        self.nothing = nn.Parameter(torch.zeros(0))
        self.register_parameter("no_bias", None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.get_buffer("count").add_(1)
        return self.linear(inputs) * self.scale + self.mask


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layers = kind(FEATURES, FEATURES, num_layers=2, batch_first=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs.unsqueeze(1))[0].squeeze(1)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, FEATURES, (3, 1), padding=(1, 0))
        self.layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs.view(-1, 2, 3, 1)).mean((2, 3))


class Renaming(nn.Linear):
    """Reads its weight under the name it once had."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.kernel"] = checkpoint["state_dict"].pop("net.weight")


class ByHook(nn.Linear):
    """Likewise, by torch's own pre-hook; the old weight was half as large, and lay the other way round."""

    def __init__(self) -> None:
        super().__init__(FEATURES, FEATURES)
        self.register_load_state_dict_pre_hook(self.upgrade)  # type: ignore[no-untyped-call]

    @staticmethod
    def upgrade(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").t() * 2

    @staticmethod
    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.kernel"] = (checkpoint["state_dict"].pop("net.weight") / 2).t().contiguous()


class OwnLoad(Wrapped):
    """Saves and loads only its network."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.net.load_state_dict(state_dict, strict=strict, assign=assign)


class Assigning(TinyModule):
    """Loads by torch's own ``assign=True``."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=strict, assign=True)


class Measured(TinyModule):
    """Metrics as attributes, with states that are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()
        self.error.persistent(True)
        self.everything = torchmetrics.CatMetric()
        self.everything.persistent(True)

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        outputs = self(inputs)
        self.error.update(outputs.detach(), targets)
        self.everything.update(outputs.detach().mean())
        return nn.functional.mse_loss(outputs, targets)

    def further(self) -> dict[str, Any]:
        return {"error": self.error.sum_squared_error, "count": self.error.total, "everything": self.everything.value}


class Frozen(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.first.weight.requires_grad_(False)
        self.second.bias.partition = ("model", 3)
        self.second.bias.scale = torch.tensor([2.0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Configured(Recorded):
    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, FEATURES))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class ConfiguredOnMeta(Configured):
    def configure_model(self) -> None:
        from lightning_memload import meta_init

        with meta_init(enabled=self.trainer.ckpt_path is not None and self.has_callback()):
            super().configure_model()

    def has_callback(self) -> bool:
        return any(type(callback).__name__ == "MemoryEfficientRestore" for callback in callbacks_of(self.trainer))


class Small(TinyModule):
    """The old model: other names, a narrower layer, and one layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Linear(10, FEATURES)
        self.obsolete = nn.Linear(50, 50)
        del self.second

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.old(torch.tanh(self.first(inputs)))


class Migrating(TinyModule):
    """Renames, drops, slices, stacks, casts and makes weights in ``on_load_checkpoint``."""

    def __init__(self) -> None:
        super().__init__()
        self.sliced = nn.Linear(5, 3)
        self.stacked = nn.Parameter(torch.zeros(2, 10))
        self.view = nn.Parameter(torch.zeros(10, FEATURES).t())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        old = checkpoint["state_dict"]
        new = {name: value for name, value in old.items() if name.startswith("first")}
        new["second.weight"], new["second.bias"] = old["old.weight"], old["old.bias"].double()
        new["sliced.weight"], new["sliced.bias"] = old["obsolete.weight"][::20, 3:13:2], old["obsolete.bias"][7:10]
        new["stacked"] = torch.stack([old["first.bias"], old["first.bias"] * 2])
        new["view"] = old["first.weight"].t()
        checkpoint["state_dict"] = new
        checkpoint["optimizer_states"] = []
        checkpoint["lr_schedulers"] = []


class InPlace(TinyModule):
    """Changes values of the checkpoint where they lie."""

    def __init__(self) -> None:
        super().__init__(lambda p: torch.optim.AdamW(p, lr=0.01))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["first.weight"].mul_(2)
        checkpoint["state_dict"]["second.bias"].data[1] = 7.0
        checkpoint["state_dict"]["second.weight"].numpy()[0, 0] = 3.0
        checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].zero_()
        checkpoint["optimizer_states"][0]["state"][1]["step"] += 5


class NewHead(TinyModule):
    """Lacks a layer that the checkpoint has, and has one that it lacks."""

    strict_loading = False

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, FEATURES)
        del self.first
        self.first = nn.Linear(FEATURES, 10, bias=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.first.weight], lr=0.01)


class TwoNames(nn.Module):
    """Two parameters that share memory without being one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(FEATURES))
        self.other = nn.Parameter(self.one.data)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.one + self.other


class Keeping(L.Callback):
    """Keeps large and small tensors of its state by reference, as moving averages do, and uses them."""

    def __init__(self) -> None:
        self.average: dict[str, torch.Tensor] = {}
        self.large = torch.zeros(1)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for name, value in pl_module.state_dict().items():
            known = self.average.setdefault(name, torch.zeros_like(value))
            known.mul_(0.5).add_(value, alpha=0.5)
        if self.large.numel() == 1:
            self.large = torch.randn(300_000)
        self.large += 1

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "large": self.large}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self.large = state_dict["average"], state_dict["large"]


def _unchanged_edit(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"] = []
    checkpoint["lr_schedulers"] = []


def _old_head(checkpoint: dict[str, Any]) -> None:
    _unchanged_edit(checkpoint)


def _double(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {name: value.double() for name, value in checkpoint["state_dict"].items()}


def _weight_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.weight_norm(layer)


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(FEATURES), nn.LazyBatchNorm1d())


def with_adamw() -> TinyModule:
    return TinyModule(adamw)


def _weight_averaging() -> dict[str, Case]:
    """Lightning's own averaging callbacks, which came with Lightning 2.6."""
    try:
        from tests.lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
    except ImportError:
        return {}
    return {
        "weight-averaging": Case(with_adamw, callbacks=lambda: [WeightAveraging()]),
        "ema-weight-averaging": Case(with_adamw, callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    }


MODULES = {
    "gan": Case(Gan),
    "early-optimizer": Case(EarlyOptimizer),
    "batch-norm": net_case(lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES))),
    "tied": net_case(Tied),
    "untied-on-disk": net_case(Tied, edit=UntiedOnDisk.edit),
    "buffers": net_case(Buffers),
    "lstm": net_case(lambda: Recurrent(nn.LSTM)),
    "gru": net_case(lambda: Recurrent(nn.GRU)),
    "channels-last": net_case(Images),
    "weight-norm": net_case(lambda: _weight_norm(nn.Linear(FEATURES, FEATURES))),
    "parametrized-weight-norm": net_case(lambda: parametrizations.weight_norm(nn.Linear(FEATURES, FEATURES))),
    "spectral-norm": net_case(lambda: torch.nn.utils.spectral_norm(nn.Linear(FEATURES, FEATURES))),
    "lazy": net_case(_lazy, save_after=5),
    "attention": net_case(lambda: nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=True)),
    "renaming": net_case(lambda: Renaming(FEATURES, FEATURES), edit=Renaming.edit),
    "by-hook": net_case(ByHook, edit=ByHook.edit),
    "own-load": Case(lambda: OwnLoad(lambda: nn.Linear(FEATURES, FEATURES))),
    "metrics": Case(Measured),
    "frozen": Case(Frozen),
    "configured": Case(Configured),
    "configured-on-meta": Case(ConfiguredOnMeta),
    "migrating": Case(Small, rebuild=Migrating),
    "in-place": Case(InPlace),
    # What no file holds is drawn, and under meta_init from other random numbers.
    "new-head": Case(TinyModule, rebuild=NewHead, edit=_old_head, meta=False),
    "two-names": net_case(TwoNames),
    "other-dtype-on-disk": Case(TinyModule, edit=_double),
    "accumulation": Case(with_adamw, trainer={"accumulate_grad_batches": 3}),
    **_weight_averaging(),
    "keeping": Case(TinyModule, callbacks=lambda: [Keeping()]),
}

PRECISIONS = {
    "16-mixed": Case(with_adamw, plugins=lambda: [MixedPrecision("16-mixed", "cpu")]),
    **{
        precision: Case(
            lambda: Wrapped(lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Linear(8, FEATURES))),
            trainer={"precision": precision},
            # Stock rounds the restored weights to the module's own 32 bits first; on meta nothing is lost.
            meta=precision != "64-true",
        )
        for precision in ("bf16-mixed", "bf16-true", "16-true", "64-true")
    },
    "bf16-true-buffers": Case(lambda: Wrapped(lambda: Buffers(phases=False)), trainer={"precision": "bf16-true"}),
    "bf16-true-from-32": Case(
        with_adamw,
        trainer={"precision": "bf16-true"},
        edit=lambda checkpoint: checkpoint.update(
            state_dict={name: value.float() / 3 for name, value in checkpoint["state_dict"].items()}
        ),
    ),
}

CASES = {**OPTIMIZERS, **MODULES, **PRECISIONS}
BUILT_ON_META = {name: case for name, case in CASES.items() if case.meta}
# No parameter of these can be the file's pages: their values or dtypes are others, or they load in their own way.
NEVER_ASSIGNED = {"renaming", "in-place", "two-names", "other-dtype-on-disk", "64-true", "bf16-true-from-32"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], StockResume]:
    """The result of stock Lightning for a case, computed once for all ways of this package."""

    @functools.cache
    def resumed(name: str) -> StockResume:
        return stock_resume(CASES[name], tmp_path_factory.mktemp("stock"))

    return resumed


@pytest.mark.parametrize("name", CASES)
def test_copy_is_bit_exact(name: str, stock: Callable[[str], StockResume], tmp_path: Path) -> None:
    report = same_resume(CASES[name], tmp_path, expected=stock(name)).report
    assert report is not None
    assert report.mode == "copy"


@pytest.mark.parametrize("name", CASES)
def test_assign_is_bit_exact(name: str, stock: Callable[[str], StockResume], tmp_path: Path) -> None:
    report = same_resume(CASES[name], tmp_path, expected=stock(name), mode="assign").report
    assert report is not None
    assert report.mode == ("copy" if name in NEVER_ASSIGNED else "assign")
    assert (report.bytes_assigned > 0) is (report.mode == "assign")


@pytest.mark.parametrize("name", BUILT_ON_META)
# What shares memory is built in memory; averages are copies that move before anything is restored.
@pytest.mark.filterwarnings("ignore:meta_init built:UserWarning")
@pytest.mark.filterwarnings("ignore:A parameter that was built under meta_init is used:UserWarning")
def test_module_built_on_meta_is_bit_exact(name: str, stock: Callable[[str], StockResume], tmp_path: Path) -> None:
    same_resume(CASES[name], tmp_path, expected=stock(name), meta=True)


@pytest.mark.parametrize("name", [name for name in ("adamw", "weight-averaging", "keeping") if name in CASES])
def test_place_among_the_callbacks_does_not_matter(
    name: str, stock: Callable[[str], StockResume], tmp_path: Path
) -> None:
    same_resume(CASES[name], tmp_path, expected=stock(name), last=True)


def test_comparison_can_fail(tmp_path: Path) -> None:
    """The matrix proves nothing unless one changed bit shows."""

    class Off(TinyModule):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            ours = any(type(callback).__name__ == "MemoryEfficientRestore" for callback in callbacks_of(self.trainer))
            state = deepcopy(checkpoint["optimizer_states"][0]["state"])
            state[2]["momentum_buffer"].view(torch.int32)[0] ^= int(ours)
            checkpoint["optimizer_states"][0]["state"] = state

    case = Case(lambda: Off(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)))
    with pytest.raises(AssertionError, match=r"restored\.optimizers\.0\.state\.2\.momentum_buffer"):
        same_resume(case, tmp_path)
