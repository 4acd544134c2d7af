"""Messages about a restore: warnings and information on rank 0, and the error of meta tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_memload.errors import MetaTensorError, listed
from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO
from lightning_memload.report import RestoreReport

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["meta_error", "report_match", "warn_of_hyperparameters", "warn_of_ignored_options"]


def warn_of_ignored_options(
    io: StreamingCheckpointIO | None, *, saving: Mapping[str, tuple[object, object]], loading: Mapping[str, object]
) -> None:
    """Warns of options of ``MemoryEfficientRestore`` that have no effect with the CheckpointIO of the Trainer.

    Args:
        io: The CheckpointIO, ``None`` if it is not a ``StreamingCheckpointIO``.
        saving: For each option of saving: the argument of the callback, and its default. The keys are names of
            arguments of ``StreamingCheckpointIO``.
        loading: The options of loading, and whether each one is set: ``{"safe_globals=...": True}``.
    """
    for name, (value, default) in saving.items():
        if value == default or (io is not None and getattr(io, name) == value):
            continue
        option = f"{name}_save" if name == "asynchronous" else f"save_{name}"
        around = "" if name == "format" else ", without Lightning's AsyncCheckpointIO around it"
        rank_zero_warn(
            f"MemoryEfficientRestore({option}={value!r}) is ignored: the CheckpointIO that the Trainer was given, or "
            f"its strategy, controls saving. Remove that plugin, or pass StreamingCheckpointIO({name}={value!r}) to "
            f"the Trainer{around}."
        )
    for option, is_set in loading.items():
        if io is None and is_set:
            rank_zero_warn(f"MemoryEfficientRestore({option}) is ignored: it does not load the checkpoint.")


def report_match(report: RestoreReport, module: pl.LightningModule) -> None:
    """Reports which weights came from the checkpoint, if not all did."""
    match = report.match
    if match is None:
        return
    if match.is_nothing:
        rank_zero_warn(
            f"{report.path}: {match}. No weight in the file has a name of {type(module).__name__}, so the module keeps "
            "the weights that it was built with. To load weights under other names, use "
            "MemoryEfficientRestore(weights_from=WeightsSource(..., rename=..., strip_prefix=...))."
        )
    else:
        rank_zero_info(f"{report.path}: {match}")


def warn_of_hyperparameters(path: str, checkpoint: Any, module: pl.LightningModule) -> None:
    """Warns if LightningCLI ignores the hyperparameters of a checkpoint, and they differ from those of the module.

    LightningCLI (2.5, 2.6) reads the hyperparameters of a checkpoint that is a file, and not of a directory. The
    hyperparameters of a module that it builds have the key ``_instantiator``.
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
            f"LightningCLI takes no hyperparameters from {path}, since it is a directory: {listed(others)}. Pass the "
            "hyperparameters of the checkpoint as --model options, or with --config."
        )


def meta_error(
    module: pl.LightningModule, path: str | None, parameters: list[str], buffers: list[str]
) -> MetaTensorError:
    """Makes the error of a module that still has tensors on the meta device when the stage begins.

    Args:
        module: The module.
        path: The checkpoint that was loaded, ``None`` if none was.
        parameters: The names of its parameters on the meta device.
        buffers: The names of its buffers on the meta device.
    """
    names = (*parameters, *buffers)
    where = f"{type(module).__name__} is still on the meta device: {listed(names)}."
    if path is None:
        advice = (
            "It gets no values, since no checkpoint is restored. Pass ckpt_path=..., or build the module without "
            "meta_init() or torch.device('meta')."
        )
    elif parameters:
        advice = (
            f"Loading {path} gave it no values: the file has no weights with these names, or a load_state_dict of a "
            "module copied them into parameters without memory. Build these modules on a real device, or let torch "
            "report missing keys with strict loading."
        )
    else:
        advice = (
            f"The checkpoint {path} does not hold these buffers (non-persistent buffers are never saved). Build the "
            "module under lightning_memload.meta_init(), which keeps buffers real, instead of torch.device('meta')."
        )
    return MetaTensorError(f"{where} {advice}", names=names)


def _is_same(ours: Any, theirs: Any) -> bool:
    try:
        return bool(ours == theirs)
    except Exception:
        return True  # For example arrays, which compare each element.
