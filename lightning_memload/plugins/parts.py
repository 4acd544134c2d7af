"""Reduces a loaded checkpoint to the parts that the Trainer is to restore, and raises if one is missing.

Lightning restores everything, or fails after it has restored some parts. Here the other parts are removed from the
checkpoint while its tensors are still in the file, so they are never read.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_memload.errors import CheckpointFormatError, IncompleteCheckpointError, UnsafeGlobalsError, listed
from lightning_memload.pickles import holds_refused
from lightning_memload.plugins.compat import package_of
from lightning_memload.restore import find_state_dict

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Part", "check_parts", "hooks_load", "keep_parts"]

Part = Literal["weights", "optimizer", "loops", "callbacks"]

_VERSION_KEY = "pytorch-lightning_version"
# The keys that Lightning (2.6) requires in a checkpoint.
_KEYS = {
    "weights": ("state_dict",),
    "optimizer": ("optimizer_states", "lr_schedulers"),
    "loops": ("loops",),
    "callbacks": ("callbacks",),
}


def check_parts(parts: Collection[str] | None) -> frozenset[str] | None:
    """Return the parts as a set, ``None`` for all.

    Args:
        parts: Names of parts, or one name. ``None``: all.

    Raises:
        ValueError: A name is unknown, or there is none.
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


def keep_parts(
    checkpoint: Any,
    parts: frozenset[str] | None,
    refusal: UnsafeGlobalsError | None,
    *,
    path: str,
    trainer: pl.Trainer,
    module: pl.LightningModule,
) -> None:
    """Reduces a loaded checkpoint, in place, to the parts that Lightning is to restore.

    Args:
        checkpoint: The loaded checkpoint. A state dict, or one under a usual key, becomes a checkpoint of weights.
        parts: The parts to restore. ``None``: all that Lightning restores.
        refusal: The error of ``weights_only`` if it refused objects in the checkpoint, else ``None``.
        path: The path, for messages.
        trainer: The Trainer.
        module: Its module.

    Raises:
        CheckpointFormatError: The checkpoint holds no weights.
        IncompleteCheckpointError: The checkpoint lacks a part to restore.
        UnsafeGlobalsError: The Trainer needs a refused object, or the checkpoint lacks something.
    """
    if refusal is None:
        _keep(checkpoint, parts, path, trainer, module)
        return
    _remove_refused(checkpoint, refusal, trainer)
    try:
        _keep(checkpoint, parts, path, trainer, module)
    except CheckpointFormatError:
        raise refusal from None


def _keep(
    checkpoint: Any, parts: frozenset[str] | None, path: str, trainer: pl.Trainer, module: pl.LightningModule
) -> None:
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
    # Old checkpoints get the keys below by migration.
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
        # The position in the data belongs to the progress of the loops. Lightning uses this key for its state.
        checkpoint.pop(type(datamodule).__qualname__, None)


def _own_weights(module: pl.LightningModule) -> dict[str, Any]:
    """Return the weights that a checkpoint of the module would have now. Loading them changes nothing.

    Hooks find the weights that they expect. ``state_dict`` is called as Lightning does when it saves, since a module
    may override it without arguments.
    """
    weights: dict[str, Any] = module.state_dict()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and value.is_meta and name in own:
            weights[name] = own[name]  # Another tensor on meta would not be recognised as it.
    return weights


def _remove_refused(checkpoint: Any, refusal: UnsafeGlobalsError, trainer: pl.Trainer) -> None:
    """Removes from a checkpoint, in place, what ``weights_only`` refused and the Trainer does not need.

    Raises:
        UnsafeGlobalsError: The Trainer needs it: it is in the weights, or in the states of callbacks or data module.
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
    """Whether an ``on_load_checkpoint`` of the module or of a user's callback may add missing parts."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = ("lightning", "pytorch_lightning", "lightning_memload")
    theirs = (callback for callback in callbacks if type(callback).__module__.partition(".")[0] not in ours)
    return _loads(module, "lightning.pytorch.LightningModule") or any(
        _loads(callback, "lightning.pytorch.Callback") for callback in theirs
    )


def _loads(thing: object, parent: str) -> bool:
    return package_of(thing).overrides("on_load_checkpoint", thing, parent)


def _find_weights(checkpoint: dict[str, Any], path: str, *, may_be_supplied: bool) -> None:
    """Moves the weights of a checkpoint that is not Lightning's to the key ``state_dict``."""
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
    # By default, Lightning also restores checkpoints without loops or callbacks.
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
        f"To restore only the parts that it holds, use MemoryEfficientRestore(restore={has!r}).",
        path=path,
        missing=tuple(missing),
    )
