"""Shadows of methods: on one object, for a time, and gone without a trace. Stand-ins take Lightning's place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel

import tests.lightning as L
from lightning_memload.plugins import seams


class Strategy:
    """Notes what Lightning would do."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.lightning_module: Any = None
        self.optimizers: list[Any] = ["an optimizer"]

    def model_to_device(self) -> None:
        self.told.append("moved")

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self.told.append(("loaded", checkpoint, strict))

    def barrier(self, name: str | None = None) -> None:
        self.told.append(f"met at {name}")

    def teardown(self) -> None:
        self.told.append(("torn down", list(self.optimizers)))
        if self.lightning_module is not None:
            self.lightning_module.cpu()


@pytest.fixture
def strategy() -> Any:
    return Strategy()


def shadows(strategy: Any) -> set[str]:
    return set(vars(strategy)) - {"told", "lightning_module", "optimizers"}


def test_before_the_move(strategy: Any) -> None:
    remove = seams.before_move(strategy, lambda: strategy.told.append("first"))
    strategy.model_to_device()
    remove()
    remove()
    strategy.model_to_device()
    assert strategy.told == ["first", "moved", "moved"]
    assert shadows(strategy) == set()


def test_around_the_load(strategy: Any) -> None:
    def load(stock: Any, checkpoint: Any, strict: bool) -> None:
        strategy.told.append("before")
        stock(checkpoint, strict=strict)

    remove = seams.around_load(strategy, load)
    strategy.load_model_state_dict({"a": 1}, strict=False)
    strategy.load_model_state_dict({"b": 1})
    remove()
    assert strategy.told == ["before", ("loaded", {"a": 1}, False), "before", ("loaded", {"b": 1}, True)]
    assert shadows(strategy) == set()


def test_at_the_barriers(strategy: Any) -> None:
    """Each function is called after every rank has come, whether the name is an argument by place or by name."""
    remove = seams.when_set_up(
        strategy, lambda: strategy.told.append("set up"), lambda: strategy.told.append("restored")
    )
    strategy.barrier("post_setup")
    strategy.barrier()
    strategy.barrier(name="run-stage")
    strategy.barrier("other")
    remove()
    strategy.barrier("post_setup")
    assert strategy.told == [
        "met at post_setup",
        "set up",
        "met at None",
        "met at run-stage",
        "restored",
        "met at other",
        "met at post_setup",
    ]


def test_a_module_on_meta_ignores_one_move() -> None:
    with torch.device("meta"):
        module = L.LightningModule()
        module.layer = nn.Linear(2, 2)
    seams.skip_next_move_to_cpu(module)
    assert module.cpu() is module
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        module.cpu()


def test_a_module_with_memory_is_left_alone() -> None:
    module = L.LightningModule()
    module.layer = nn.Linear(2, 2)
    seams.skip_next_move_to_cpu(module)
    assert "cpu" not in vars(module)


class Moved:
    def __init__(self) -> None:
        self.moves = 0

    def cpu(self) -> Moved:
        self.moves += 1
        return self


def test_one_teardown_moves_nothing(strategy: Any) -> None:
    strategy.lightning_module = module = Moved()
    seams.keep_strategy_on_device(strategy)
    seams.keep_strategy_on_device(strategy)
    strategy.teardown()
    assert (module.moves, strategy.told, strategy.optimizers) == (0, [("torn down", [])], ["an optimizer"])
    strategy.teardown()
    assert (module.moves, strategy.told[1]) == (1, ("torn down", ["an optimizer"]))
    assert shadows(strategy) == set()


def test_a_teardown_that_fails_leaves_no_shadow() -> None:
    class Failing(Strategy):
        def teardown(self) -> None:
            raise KeyError

    strategy: Any = Failing()
    strategy.lightning_module = module = Moved()
    seams.keep_strategy_on_device(strategy)
    with pytest.raises(KeyError):
        strategy.teardown()
    assert strategy.optimizers == ["an optimizer"]
    assert shadows(strategy) == set()
    assert module.cpu().moves == 1


class First(L.Callback):
    pass


def test_one_callback_of_a_kind() -> None:
    trainer: Any = SimpleNamespace(callbacks=[First(), L.Callback()])
    seams.require_one(trainer, First)
    trainer.callbacks.append(type("Second", (First,), {})())
    with pytest.raises(ValueError, match="The Trainer has 2 First callbacks"):
        seams.require_one(trainer, First)


def test_averages_begin_at_the_present_weights() -> None:
    module = L.LightningModule()
    module.layer, module.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    average = AveragedModel(module)
    nn.init.constant_(module.layer.weight, 7.0)
    nn.init.constant_(module.norm.running_mean, 3.0)
    averaging: Any = SimpleNamespace(_average_model=average)
    other: Any = SimpleNamespace(_average_model="not a model")
    seams.begin_averages(SimpleNamespace(callbacks=[averaging, other, L.Callback()]), module)  # type: ignore[arg-type]
    for name, value in module.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], value), name


def test_who_loads() -> None:
    """Of strategies that load by the CheckpointIO, those that do so on every rank, before the move."""
    plain = SingleDeviceStrategy(torch.device("cpu"))
    assert not seams.loads_by_itself(plain)
    assert seams.all_ranks_load(plain)

    class Sending(SingleDeviceStrategy):
        def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any: ...

    class Late(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    assert not seams.all_ranks_load(Sending(torch.device("cpu")))
    assert not seams.all_ranks_load(Late(torch.device("cpu")))


@pytest.mark.parametrize(
    "path",
    [
        "_accelerator_connector.checkpoint_io",
        "_checkpoint_connector._ckpt_path",
        "_checkpoint_connector._loaded_checkpoint",
        "strategy._checkpoint_io",
        "fit_loop._data_source.instance",
        "test_loop._data_source.instance",
    ],
)
def test_private_attributes_of_a_trainer_exist(path: str) -> None:
    """They are read and set in seams.py, and have no public names (Lightning 2.5, 2.6)."""
    found: Any = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    for name in path.split("."):
        assert hasattr(found, name), f"{type(found).__name__} of Lightning has no {name} any more"
        found = getattr(found, name)


def test_a_trainer_restores_from_another_checkpoint_once() -> None:
    """The public setter would set the path for later runs too."""
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.ckpt_path = "last.ckpt"
    seams.restore_from(trainer, "older.ckpt")
    assert trainer.ckpt_path == "older.ckpt"


@pytest.mark.parametrize("strict", [None, True, False])
def test_whether_a_module_sets_strict_loading(strict: bool | None) -> None:
    module = L.LightningModule()
    if strict is not None:
        module.strict_loading = strict
    assert seams.sets_strict_loading(module) is (strict is not None)
