"""Errors of Lightning name the objects of another package. Real mixed runs: tests/plugins/test_packages.py."""

from __future__ import annotations

from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

import tests.lightning as L
from lightning_memload.plugins import mixed_imports
from lightning_memload.plugins.mixed_imports import name_mixed_imports


class Foreign:
    """Stands for a class of the other package."""


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(mixed_imports, "classes", lambda *names: (Foreign, L.LightningModule))
    loops = {f"{stage}_loop": SimpleNamespace() for stage in ("fit", "validate", "test", "predict")}
    return SimpleNamespace(datamodule=None, callbacks=[], loggers=[], **loops)


def raised(kind: type[Exception], module: str) -> Exception:
    def fail() -> None:
        raise kind("Expected a parent.")

    as_if_there = FunctionType(fail.__code__, {"__name__": module}, "fail", closure=fail.__closure__)
    with pytest.raises(kind) as caught:
        as_if_there()
    return caught.value


def name(error: Exception, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    home = SimpleNamespace(pytorch="lightning.pytorch", find=lambda kind: L.LightningModule)
    other = SimpleNamespace(pytorch="pytorch_lightning")
    monkeypatch.setattr(mixed_imports, "package_of", lambda thing: other if isinstance(thing, Foreign) else home)
    name_mixed_imports(error, trainer, L.LightningModule())
    return str(error)


def test_objects_of_the_other_package_are_named_once(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.callbacks = [Foreign(), Foreign()]
    told = name(raised(TypeError, "lightning.pytorch.trainer"), trainer, monkeypatch)
    assert told.startswith("Expected a parent. The Trainer comes from lightning.pytorch, and these objects do not: ")
    assert told.count("Foreign from pytorch_lightning") == 1


def test_a_data_module_that_was_taken_for_a_loader_is_found(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.test_loop._data_source = SimpleNamespace(instance=Foreign())
    assert "Foreign" in name(raised(ValueError, "lightning_utilities.core"), trainer, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "module", "callbacks"),
    [
        (TypeError, "user_code", [Foreign()]),
        (RuntimeError, "lightning.pytorch.trainer", [Foreign()]),
        (TypeError, "lightning.pytorch.trainer", []),
    ],
    ids=["of-other-code", "of-another-kind", "nothing-foreign"],
)
def test_other_errors_stay(
    kind: type[Exception], module: str, callbacks: list[Any], trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.callbacks = callbacks
    assert name(raised(kind, module), trainer, monkeypatch) == "Expected a parent."
