"""What people are told of a restore beside its cost: once, on rank 0, and only where there is something to tell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_memload.errors import listed
from lightning_memload.report import RestoreReport

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["tell_match", "warn_of_hyperparameters"]


def tell_match(report: RestoreReport, module: pl.LightningModule) -> None:
    """Says which of the weights came out of the checkpoint, if not all did."""
    match = report.match
    if match is None:
        return
    if match.is_nothing:
        rank_zero_warn(
            f"{report.path}: {match}. No name in the file is one of {type(module).__name__}'s, so it keeps the weights "
            "that it was built with. To load them under other names, use "
            "MemoryEfficientRestore(weights_from=WeightsSource(..., rename=..., strip_prefix=...))."
        )
    else:
        rank_zero_info(f"{report.path}: {match}")


def warn_of_hyperparameters(path: str, checkpoint: Any, module: pl.LightningModule) -> None:
    """Warns where LightningCLI takes no hyperparameters from a checkpoint, and would have taken others.

    It takes those of a file (2.5, 2.6). What it builds has the key ``_instantiator`` in its hyperparameters.
    """
    saved = checkpoint.get(type(module).CHECKPOINT_HYPER_PARAMS_KEY) if isinstance(checkpoint, dict) else None
    has = getattr(module, "hparams", {})
    if not os.path.isdir(path) or not isinstance(saved, Mapping) or "_instantiator" not in has:
        return
    others = [
        f"{name} is {has[name]!r} in the module and {value!r} in the checkpoint"
        for name, value in saved.items()
        if not str(name).startswith("_") and name in has and not _is_same(has[name], value)
    ]
    if others:
        rank_zero_warn(
            f"LightningCLI takes no hyperparameters from {path}, since it is a directory: {listed(others)}. Give the "
            "checkpoint's as --model options, or by --config."
        )


def _is_same(ours: Any, theirs: Any) -> bool:
    try:
        return bool(ours == theirs)
    except Exception:
        return True  # such as arrays, which say it for each element
