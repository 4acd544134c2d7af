"""Code that could read a checkpoint right after its save, or change weights between steps: known or not."""

from __future__ import annotations

from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.callbacks import ModelCheckpoint
from tests.lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import tests.lightning as L
from lightning_memload.plugins.onlookers import (
    only_lightning_reads,
    only_steps_change,
    warn_of_loggers_without_directories,
)

WEIGHT = torch.ones(1)


class WeightAveraging(L.Callback):
    """Has the name of the callback of Lightning that swaps weights."""


class Silent(torch.optim.Optimizer):
    """Skips the constructor of its base, so torch calls no hooks before its step."""

    def __init__(self) -> None:
        self.param_groups = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class Reading:
    """A logger that reads checkpoints."""

    def after_save_checkpoint(self, callback: Any) -> None:
        pass


class TestSteps:
    @pytest.mark.parametrize(
        ("callbacks", "optimizers", "expected"),
        [
            ([], [torch.optim.SGD([WEIGHT])], True),
            ([ModelCheckpoint()], [], True),
            ([WeightAveraging()], [torch.optim.SGD([WEIGHT])], False),
            ([type("Mine", (WeightAveraging,), {})()], [], False),
            ([], [Silent()], False),
            ([], [SimpleNamespace(step=None)], False),
        ],
        ids=["ordinary", "none", "averaging", "derived", "silent", "no-optimizer"],
    )
    def test_what_is_known_to_change_tensors(self, callbacks: Any, optimizers: Any, expected: bool) -> None:
        trainer = SimpleNamespace(callbacks=callbacks, optimizers=optimizers)
        assert only_steps_change(trainer) is expected


class TestLoggers:
    def test_loggers_that_read_no_checkpoint(self, recwarn: pytest.WarningsRecorder) -> None:
        warn_of_loggers_without_directories([CSVLogger("."), TensorBoardLogger(".")])
        assert [str(warning.message) for warning in recwarn] == []

    def test_loggers_that_may_upload_are_named_once(self) -> None:
        with pytest.warns(UserWarning, match=r"saved as directories, and Reading may upload files only"):
            warn_of_loggers_without_directories([Reading(), Reading(), CSVLogger(".")])

    def test_a_method_on_the_object_counts(self) -> None:
        logger = CSVLogger(".")
        logger.after_save_checkpoint = lambda callback: None
        with pytest.warns(UserWarning, match="CSVLogger may upload"):
            warn_of_loggers_without_directories([logger])


class TestReaders:
    """The frames of a save are those of a call chain, with the names of Lightning's modules."""

    def save(self, *, hook: str = "on_train_batch_end", between: str | None = None, loggers: Any = ()) -> bool:
        module = L.PYTORCH

        class Trainer:
            """Calls as Lightning does."""

        trainer: Any = Trainer()
        trainer.loggers = loggers
        answers: list[bool] = []

        def save_checkpoint(self: Any) -> None:
            answers.append(only_lightning_reads(trainer))

        def run_hook(self: Any) -> None:
            step(trainer)

        def _call_callback_hooks(self: Any) -> None:
            call(checkpoint)

        def at(function: Any, place: str, name: str | None = None) -> Any:
            code = function.__code__.replace(co_name=name or function.__name__)
            names = {**function.__globals__, "__name__": place}
            return FunctionType(code, names, code.co_name, closure=function.__closure__)

        step = at(save_checkpoint, f"{module}.trainer.trainer")
        if between is not None:
            inner = step

            def foreign(self: Any) -> None:
                inner(trainer)

            step = at(foreign, between)
        call = at(run_hook, f"{module}.callbacks.model_checkpoint", hook)
        checkpoint = ModelCheckpoint()
        at(_call_callback_hooks, f"{module}.trainer.call")(trainer)
        return answers[0]

    def test_a_save_of_model_checkpoint_in_training(self) -> None:
        assert self.save()
        assert self.save(hook="on_validation_end", loggers=[CSVLogger(".")])

    def test_other_saves(self) -> None:
        assert not self.save(hook="on_exception")
        assert not self.save(between="user_code")
        assert not self.save(loggers=[Reading()])
        assert not only_lightning_reads(SimpleNamespace(loggers=[]))
