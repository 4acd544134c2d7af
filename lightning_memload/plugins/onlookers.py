"""Decides whether other code could read a checkpoint between its save and the next step of an optimizer.

Code counts as a reader unless it is known not to read checkpoints. Known are, for Lightning 2.5 and 2.6 under both
names: the functions that call one another when a ``ModelCheckpoint`` saves, and the loggers that do nothing after it.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.frames import callers, owner

__all__ = ["only_lightning_reads", "only_steps_change", "warn_of_loggers_without_directories"]

_PACKAGES = ("lightning", "pytorch_lightning", "lightning_memload")
# The hooks in which a ModelCheckpoint saves during training.
_HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end")
# Loggers that read checkpoints only if the user enables it.
_UPLOADING = ("loggers.wandb", "loggers.mlflow", "loggers.litlogger")
_SILENT = ("loggers.logger", "loggers.tensorboard")


def only_lightning_reads(trainer: Any) -> bool:
    """Whether a ``ModelCheckpoint`` makes the current save in one of its hooks, and no logger reads the checkpoint.

    A signal handler, a subclass, or another callback or plugin that takes part in the save may read the checkpoint as
    soon as it is saved.

    Args:
        trainer: The Trainer that saves.
    """
    return _is_made_by_model_checkpoint(trainer) and not any(map(_may_read_checkpoints, trainer.loggers))


def only_steps_change(trainer: Any) -> bool:
    """Whether, as far as is known, only optimizer steps change the tensors of optimizers, and each step calls hooks.

    Lightning's averaging callbacks swap weights in place between steps, and the version counters of torch do not count
    that. torch calls no hooks before the step of a wrapper that skips the constructor of ``Optimizer``.
    """
    names = {"WeightAveraging", "StochasticWeightAveraging"}
    averages = any(names & {kind.__name__ for kind in type(callback).__mro__} for callback in trainer.callbacks)
    # The constructor of Optimizer sets `hooked` on the step that it wraps (torch 2.6 to 2.13).
    return not averages and all(
        isinstance(optimizer, torch.optim.Optimizer) and getattr(type(optimizer).step, "hooked", False)
        for optimizer in trainer.optimizers
    )


def warn_of_loggers_without_directories(loggers: Any) -> None:
    """Warns of loggers that may upload checkpoints: Lightning's loggers ignore directories."""
    names = sorted({type(logger).__name__ for logger in loggers if _may_read_checkpoints(logger)})
    if names:
        rank_zero_warn(
            f"Checkpoints are saved as directories, and {', '.join(names)} may upload files only: Lightning's loggers "
            "ignore directories. Use save_format='torch' to upload checkpoints."
        )


def _is_made_by_model_checkpoint(trainer: Any) -> bool:
    frames = callers()
    for frame in frames:
        if not _is_known(frame):
            return False
        if frame.f_code.co_name == "save_checkpoint" and owner(frame) is trainer:
            break
    hook, outer = "", next(frames, None)
    callback = None if outer is None else owner(outer)
    if not _is_defined_in(type(callback), "callbacks.model_checkpoint"):
        return False
    while outer is not None and owner(outer) is callback and _is_known(outer):
        hook, outer = outer.f_code.co_name, next(frames, None)
    return hook in _HOOKS and outer is not None and _is_known(outer) and outer.f_code.co_name == "_call_callback_hooks"


def _may_read_checkpoints(logger: Any) -> bool:
    """Whether a logger may read saved checkpoints. ``True`` if it is not known."""
    function = getattr(type(logger), "after_save_checkpoint", None)
    if "after_save_checkpoint" in vars(logger) or function is None:
        return True
    if any(_is_defined_in(function, name) for name in _SILENT):
        return False
    is_off = getattr(logger, "_log_model", None) is False
    return not (is_off and any(_is_defined_in(function, name) for name in _UPLOADING))


def _is_known(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in (*_PACKAGES, "contextlib")


def _is_defined_in(definition: Any, module: str) -> bool:
    return definition.__module__ in {f"{package}.{module}" for package in ("lightning.pytorch", "pytorch_lightning")}
