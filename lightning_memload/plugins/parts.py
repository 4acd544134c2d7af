"""Which parts of a checkpoint a Trainer restores, and what it says when one is not there.

Lightning restores all or fails half-way. Here the checkpoint, while its tensors still lie in the file, is cut down to
the parts that are asked for; what is left out is never read.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_memload.checkpoint import holds_refused
from lightning_memload.errors import CheckpointFormatError, IncompleteCheckpointError, UnsafeGlobalsError, listed
from lightning_memload.plugins.compat import package_of
from lightning_memload.restore import find_state_dict

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Part", "check_parts", "hooks_load", "leave_out_refused", "take_parts"]

Part = Literal["weights", "optimizer", "loops", "callbacks"]

_VERSION_KEY = "pytorch-lightning_version"
# What Lightning (2.6) asks a checkpoint for, and fails without.
_KEYS = {
    "weights": ("state_dict",),
    "optimizer": ("optimizer_states", "lr_schedulers"),
    "loops": ("loops",),
    "callbacks": ("callbacks",),
}


def check_parts(parts: Collection[str] | None) -> frozenset[str] | None:
    """The parts, unless one of them is unknown or there is none.

    Args:
        parts: Some of them, or the name of one.

    Raises:
        ValueError: They are not.
    """
    if parts is None:
        return None
    known = get_args(Part)
    if isinstance(parts, str):
        parts = [parts]
    if not parts or not set(parts) <= set(known):
        names = ", ".join(map(repr, known))
        raise ValueError(f"restore must be some of {names}, or None for all, got {parts!r}.")
    return frozenset(parts)


def take_parts(
    checkpoint: Any, parts: frozenset[str] | None, *, path: str, trainer: pl.Trainer, module: pl.LightningModule
) -> None:
    """Makes of a loaded checkpoint, in place, what Lightning shall restore.

    Args:
        checkpoint: As it was loaded. A bare state dict, or one under a usual key, becomes a checkpoint of weights.
        parts: What to restore. ``None``: all that Lightning restores.
        path: What to call it in messages.
        trainer: The Trainer.
        module: Its module.

    Raises:
        CheckpointFormatError: It holds no weights at all.
        IncompleteCheckpointError: It lacks a part that is asked for.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointFormatError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint.", path=path)
    may_be_supplied = hooks_load(trainer, module)
    if "state_dict" not in checkpoint and (parts is None or "weights" in parts):
        _find_weights(checkpoint, path, may_be_supplied=may_be_supplied)
    if trainer.state.fn != "fit":
        checkpoint.setdefault(_VERSION_KEY, package_of(trainer).version)
        return
    if parts is not None or not may_be_supplied:
        _require(checkpoint, parts, path, trainer)
    checkpoint.setdefault(_VERSION_KEY, package_of(trainer).version)
    if parts is None:
        return
    # Old checkpoints first become what the keys below are about.
    package_of(trainer).migrate(checkpoint, path)
    if "weights" not in parts:
        checkpoint["state_dict"] = _own_weights(module)
    if "optimizer" not in parts:
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
        checkpoint.pop(type(trainer.precision_plugin).__qualname__, None)
        checkpoint.pop("native_amp_scaling_state", None)
    for part in ("loops", "callbacks"):
        if part not in parts:
            checkpoint.pop(part, None)
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if "loops" not in parts and datamodule is not None:
        # Where the data goes on is a matter of how far the loops are. Lightning's name for its state.
        checkpoint.pop(type(datamodule).__qualname__, None)


def _own_weights(module: pl.LightningModule) -> dict[str, Any]:
    """What a checkpoint of the module as it is would have: loading it changes nothing, and hooks find what they expect.

    Asked for as Lightning does when it saves, since a module may have a ``state_dict`` without arguments.
    """
    weights: dict[str, Any] = module.state_dict()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and value.is_meta and name in own:
            weights[name] = own[name]  # Nobody can tell that another tensor on meta is this one.
    return weights


def leave_out_refused(checkpoint: Any, refusal: UnsafeGlobalsError, trainer: pl.Trainer) -> None:
    """Takes out of a checkpoint, in place, what ``weights_only`` refused, if the Trainer does not need it.

    Raises:
        UnsafeGlobalsError: It needs it: weights, or states of callbacks or of the data module.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    needed = {"state_dict", "callbacks", type(datamodule).__qualname__}
    refused = (
        [key for key, value in checkpoint.items() if holds_refused((key, value))]
        if isinstance(checkpoint, dict)
        else []
    )
    if not refused or needed & set(refused):
        raise refusal
    for key in refused:
        del checkpoint[key]
    rank_zero_info(
        f"Not loaded from {refusal.path}: {listed(map(str, refused))}. weights_only=True refuses classes in it "
        f"({listed(refusal.places)}), and only weights are needed."
    )


def hooks_load(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether somebody's ``on_load_checkpoint`` may yet supply what a checkpoint lacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = ("lightning", "pytorch_lightning", "lightning_memload")
    theirs = (callback for callback in callbacks if type(callback).__module__.partition(".")[0] not in ours)
    return _loads(module, "lightning.pytorch.LightningModule") or any(
        _loads(callback, "lightning.pytorch.Callback") for callback in theirs
    )


def _loads(thing: object, parent: str) -> bool:
    return package_of(thing).overrides("on_load_checkpoint", thing, parent)


def _find_weights(checkpoint: dict[str, Any], path: str, *, may_be_supplied: bool) -> None:
    """Gives the weights of a checkpoint that is not Lightning's the name that Lightning asks for."""
    try:
        weights = find_state_dict(checkpoint, path)
    except CheckpointFormatError:
        if may_be_supplied:
            return
        raise
    if weights is checkpoint:
        weights = copy.copy(weights)
        checkpoint.clear()
    checkpoint["state_dict"] = weights


def _require(checkpoint: dict[str, Any], parts: frozenset[str] | None, path: str, trainer: pl.Trainer) -> None:
    # Without being asked for by name, Lightning goes on without these two.
    wanted = parts if parts is not None else {"weights", "optimizer"}
    if not trainer.strategy.lightning_restore_optimizer:
        wanted = wanted - {"optimizer"}
    missing = {part: [key for key in _KEYS[part] if key not in checkpoint] for part in get_args(Part) if part in wanted}
    missing = {part: keys for part, keys in missing.items() if keys}
    if not missing:
        return
    has = [part for part, keys in _KEYS.items() if all(key in checkpoint for key in keys)]
    lacks = "; ".join(f"{part} ({', '.join(keys)})" for part, keys in missing.items())
    raise IncompleteCheckpointError(
        f"{path} holds {', '.join(has) or 'nothing that Lightning restores'}, but not: {lacks}. Nothing was changed. "
        f"To start from what it holds, use MemoryEfficientRestore(restore={has!r}).",
        path=path,
        missing=tuple(missing),
    )
