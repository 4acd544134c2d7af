"""Chooses whether the weights of a restore are copied or assigned, and gives the reason.

``"copy"`` streams every tensor into memory of its own. ``"assign"`` makes CPU parameters pages of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_memload.restore import RestoreSession, meta_names
from lightning_memload.storage import FileSet

__all__ = ["ChosenMode", "Mode", "choose_mode"]

Mode = Literal["auto", "assign", "copy"]


@dataclass(frozen=True, slots=True)
class ChosenMode:
    """The mode of one restore.

    Attributes:
        name: ``"assign"``, ``"copy"``, or ``"default"`` if Lightning loads the checkpoint.
        reason: The reason for it, for the report.
        exposed_files: Files whose pages become parameters, and which Linux does not watch for changes. ``None`` if
            there are none.
    """

    name: Literal["assign", "copy", "default"]
    reason: str
    exposed_files: FileSet | None = None


def choose_mode(
    wanted: Mode, session: RestoreSession, *, path: str, device: torch.device, stage: str, module: nn.Module
) -> ChosenMode:
    """Chooses the mode of a restore. A warning says why if ``"assign"`` is asked for and not possible.

    Args:
        wanted: The mode that the user asks for.
        session: The session of the restore. If the weights are assigned, its pages are watched for changes from now on.
        path: The checkpoint, for the warning.
        device: The device of the module.
        stage: The stage of the Trainer, such as ``"fit"``.
        module: The module. Parameters on the meta device have no memory yet.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and session.checkpoint.is_chunked:
        if wanted == "assign":
            rank_zero_warn(
                f"MemoryEfficientRestore(mode='assign') is ignored: {path} stores its tensors in parts, or is not a "
                "local file. A parameter can only be one contiguous part of a local file. The weights are copied."
            )
        return ChosenMode("copy", "the checkpoint stores its tensors in parts, or is not local")
    if wanted == "assign" and not on_cpu:
        rank_zero_warn(
            f"MemoryEfficientRestore(mode='assign') is ignored: the parameters are on {device}, and only parameters on "
            "the CPU can be pages of a file. The weights are copied."
        )
        return ChosenMode("copy", f"parameters live on {device}")
    if wanted == "assign":
        refusal = session.watch_pages()
        if refusal is None:
            return ChosenMode("assign", "as configured")
        reason = f"as configured, but in-place changes of the file cannot be detected: {refusal}"
        return ChosenMode("assign", reason, session.checkpoint.source)
    if wanted == "copy":
        return ChosenMode("copy", "as configured")
    if not on_cpu:
        return ChosenMode("copy", f"parameters live on {device}")
    if stage == "fit":
        return ChosenMode("copy", "training writes to the weights")
    if not meta_names(module)[0]:
        return ChosenMode("copy", "the parameters have memory")
    refusal = session.watch_pages()
    if refusal is not None:
        return ChosenMode("copy", f"in-place changes of the file could not be detected: {refusal}")
    return ChosenMode("assign", "evaluation on the CPU only reads the weights")
