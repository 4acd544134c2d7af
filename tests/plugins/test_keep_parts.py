"""The parts of a loaded checkpoint that Lightning restores. A stand-in takes the place of the Trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tests.lightning as L
from lightning_memload.errors import CheckpointFormatError, IncompleteCheckpointError, UnsafeGlobalsError
from lightning_memload.pickles import holds_refused
from lightning_memload.plugins import parts
from lightning_memload.plugins.parts import _remove_refused, check_parts, hooks_load, keep_parts


class Data(L.LightningDataModule):
    pass


class Precision:
    pass


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Supplying(Module):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...


def make_trainer(stage: str = "fit", *callbacks: Any, restores_optimizer: bool = True) -> Any:
    return SimpleNamespace(
        state=SimpleNamespace(fn=stage),
        callbacks=list(callbacks),
        strategy=SimpleNamespace(lightning_restore_optimizer=restores_optimizer),
        precision_plugin=Precision(),
        datamodule=Data(),
    )


def checkpoint(**others: Any) -> dict[str, Any]:
    return {
        "pytorch-lightning_version": L.pytorch.__version__,
        "epoch": 1,
        "global_step": 2,
        "state_dict": {"layer.weight": torch.ones(2, 2), "layer.bias": torch.ones(2)},
        "optimizer_states": [{"state": {}}],
        "lr_schedulers": [{}],
        "loops": {"fit_loop": {}},
        "callbacks": {"Counter": {}},
        "Data": {"position": 3},
        "Precision": {"scale": 4},
        **others,
    }


def kept(value: Any, wanted: Any = None, trainer: Any = None, module: Any = None) -> Any:
    trainer, module = trainer or make_trainer(), module or Module()
    keep_parts(value, check_parts(wanted), None, path="last.ckpt", trainer=trainer, module=module)
    return value


def test_all_parts_stay_as_they_are() -> None:
    expected = checkpoint()
    value = {**expected}
    assert list(kept(value)) == list(expected)
    assert all(value[key] is expected[key] for key in expected)


@pytest.mark.parametrize(
    ("wanted", "gone"),
    [
        ("weights", {"loops", "callbacks", "Data", "Precision"}),
        (["weights", "optimizer"], {"loops", "callbacks", "Data"}),
        (["optimizer", "loops"], {"callbacks"}),
        (["weights", "loops", "callbacks"], {"Precision"}),
    ],
)
def test_other_parts_are_removed(wanted: Any, gone: set[str]) -> None:
    value = kept(checkpoint(), wanted)
    assert set(checkpoint()) - set(value) == gone
    assert bool(value["optimizer_states"]) is ("optimizer" in wanted)
    assert bool(value["lr_schedulers"]) is ("optimizer" in wanted)


def test_without_weights_the_module_loads_its_own() -> None:
    module = Module()
    value = kept(checkpoint(), ["loops"], module=module)
    assert value["state_dict"]["layer.weight"].data_ptr() == module.layer.weight.data_ptr()


def test_a_state_dict_becomes_a_checkpoint_of_weights() -> None:
    weights = {"layer.weight": torch.ones(2, 2)}
    value = kept({**weights}, ["weights"])
    assert value["state_dict"]["layer.weight"] is weights["layer.weight"]
    assert "layer.weight" not in value
    assert kept({"model": weights}, ["weights"])["state_dict"] is weights


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_needs_weights_alone(stage: str) -> None:
    value = kept({"state_dict": {}}, trainer=make_trainer(stage))
    assert value == {"state_dict": {}, "pytorch-lightning_version": L.pytorch.__version__}


def test_a_part_that_is_missing_is_named() -> None:
    value = checkpoint()
    del value["lr_schedulers"], value["loops"]
    with pytest.raises(IncompleteCheckpointError, match=r"but not: optimizer \(lr_schedulers\)\. Nothing") as caught:
        kept(value)
    assert caught.value.missing == ("optimizer",)
    assert "MemoryEfficientRestore(restore=['weights', 'callbacks'])" in str(caught.value)
    with pytest.raises(IncompleteCheckpointError, match=r"optimizer \(lr_schedulers\); loops \(loops\)"):
        kept(value, ["optimizer", "loops"])
    kept(value, ["weights", "callbacks"])


def test_a_strategy_that_restores_no_optimizer_needs_none() -> None:
    value = checkpoint()
    del value["optimizer_states"]
    kept(value, trainer=make_trainer(restores_optimizer=False))


def test_a_hook_may_supply_what_is_missing() -> None:
    class Callback(L.Callback):
        def on_load_checkpoint(self, *_: Any) -> None: ...

    for trainer, module in ((make_trainer(), Supplying()), (make_trainer("fit", Callback()), Module())):
        assert hooks_load(trainer, module)
        assert "state_dict" not in kept({"epoch": 1}, trainer=trainer, module=module)
    assert not hooks_load(make_trainer("fit", L.Callback()), Module())


@pytest.mark.parametrize("value", [[], torch.ones(1), None])
def test_what_is_no_checkpoint(value: Any) -> None:
    with pytest.raises(CheckpointFormatError, match=r"last\.ckpt holds a \w+, not a checkpoint"):
        kept(value)


class TestRefused:
    @pytest.fixture
    def refusal(self, monkeypatch: pytest.MonkeyPatch) -> UnsafeGlobalsError:
        """A value of ``"refused"`` is one that weights_only refuses."""
        assert not holds_refused("refused")
        monkeypatch.setattr(parts, "holds_refused", lambda item: item[1] == "refused")
        error = UnsafeGlobalsError.__new__(UnsafeGlobalsError)
        error.path, error.places = "last.ckpt", {}
        return error

    def test_what_is_not_needed_is_removed(self, refusal: UnsafeGlobalsError) -> None:
        value = checkpoint(hyper_parameters="refused", own="refused")
        _remove_refused(value, refusal, make_trainer())
        assert value.keys() == checkpoint().keys()

    @pytest.mark.parametrize("key", ["state_dict", "callbacks", "Data"])
    def test_what_is_needed_is_refused(self, key: str, refusal: UnsafeGlobalsError) -> None:
        value = checkpoint(**{key: "refused"}, own="refused")
        with pytest.raises(UnsafeGlobalsError) as caught:
            _remove_refused(value, refusal, make_trainer())
        assert caught.value is refusal
        assert value["own"] == "refused"

    def test_a_refusal_without_a_place_stands(self, refusal: UnsafeGlobalsError) -> None:
        with pytest.raises(UnsafeGlobalsError):
            _remove_refused(checkpoint(), refusal, make_trainer())
        with pytest.raises(UnsafeGlobalsError):
            _remove_refused(["refused"], refusal, make_trainer())
