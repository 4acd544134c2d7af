"""The request for a restore: the options of the callback, the Trainer, its module and the stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.pickles import SafeGlobal
from lightning_memload.plugins.checkpoint_io import Allowance
from lightning_memload.plugins.compat import classes
from lightning_memload.plugins.meter import PhaseMeter
from lightning_memload.plugins.mode import Mode
from lightning_memload.plugins.parts import hooks_load
from lightning_memload.plugins.progress import RestoreBar
from lightning_memload.plugins.reading import Read

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Request", "RestoreOptions"]

_TRUE_PRECISIONS = (
    "lightning.pytorch.plugins.precision.HalfPrecision",
    "lightning.pytorch.plugins.precision.DoublePrecision",
)
_TRUE_PRECISION_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """The arguments of ``MemoryEfficientRestore`` that concern a restore."""

    mode: Mode
    host_budget_bytes: int
    num_threads: int | None
    verify: bool
    check_fit: bool
    progress_bar: bool
    parts: frozenset[str] | None = None
    replaces_damaged: bool = False
    safe_globals: tuple[SafeGlobal, ...] = ()
    overlaps: bool = False
    read: Read = "auto"


@dataclass(frozen=True, slots=True)
class Request:
    """One restore as all its phases know it.

    Attributes:
        options: The arguments of the callback.
        trainer: The Trainer.
        module: Its module.
        stage: The stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        device: The device of the module.
        meter: Measures the phases.
    """

    options: RestoreOptions
    trainer: pl.Trainer
    module: pl.LightningModule
    stage: str
    device: torch.device
    meter: PhaseMeter

    def allowance(self) -> Allowance:
        """Allows to skip refused objects if only weights are restored and no hook of a user receives the rest."""
        weights_alone = self.stage != "fit" or self.options.parts == frozenset(("weights",))
        erases = weights_alone and not hooks_load(self.trainer, self.module)
        return Allowance(self.options.safe_globals, erases)

    def true_precision(self) -> torch.dtype | None:
        """The dtype to which the precision plugin converts the module, ``None`` if the plugin does anything else."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, classes(*_TRUE_PRECISIONS)):
            return _TRUE_PRECISION_DTYPES.get(str(plugin.precision))
        return None

    def dtypes_of_parameters(self) -> frozenset[torch.dtype]:
        """The floating-point types that the trained parameters will have when the optimizers load their states."""
        dtype = self.true_precision()
        trained = (parameter for parameter in self.module.parameters() if parameter.requires_grad)
        return frozenset({dtype} if dtype else {p.dtype for p in trained if p.is_floating_point()})

    def make_bar(self, mapped: MappedCheckpoint, num_readers: int = 1) -> RestoreBar | None:
        """The progress bar of one of several readers, ``None`` if it is not wanted or on another rank than 0."""
        shown = self.trainer.progress_bar_callback
        is_shown = shown is not None and not getattr(shown, "is_disabled", False)
        if self.options.progress_bar and is_shown and self.trainer.is_global_zero:
            return RestoreBar(mapped, self.stage, num_readers)
        return None
