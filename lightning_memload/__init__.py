"""Resume PyTorch Lightning training from an ordinary checkpoint at no more memory than training itself.

Every public name can be imported from here. All names except the errors are imported on first use (PEP 562), so
``import lightning_memload`` is cheap. Lightning is imported on the first use of ``MemoryEfficientRestore``,
``StreamingCheckpointIO`` or ``load_from_checkpoint``. The modules below this one never import from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_memload.errors import (
    CheckpointFormatError,
    CheckpointReadError,
    CheckpointWriteError,
    ChecksumError,
    IncompatibleWeightsError,
    IncompleteCheckpointError,
    InsufficientMemoryError,
    MemloadError,
    MetaTensorError,
    OptimizerMismatchError,
    UnmappableCheckpointError,
    UnsafeGlobalsError,
)

__all__ = [
    "Checkpoint",
    "CheckpointFormatError",
    "CheckpointReadError",
    "CheckpointWriteError",
    "ChecksumError",
    "ConvertStats",
    "DiffReport",
    "IncompatibleWeightsError",
    "IncompleteCheckpointError",
    "InsufficientMemoryError",
    "MemloadError",
    "MemoryEfficientRestore",
    "MemoryMonitor",
    "MemoryPeaks",
    "MemorySeries",
    "MetaTensorError",
    "OptimizerMismatchError",
    "PlannedWay",
    "PrefetchStats",
    "RestoreReport",
    "ResumePlan",
    "StreamingCheckpointIO",
    "TensorDiff",
    "UnmappableCheckpointError",
    "UnsafeGlobalsError",
    "VerifyReport",
    "WeightsSource",
    "__version__",
    "compare_plots",
    "convert_checkpoint",
    "diff_checkpoints",
    "load_from_checkpoint",
    "load_weights",
    "meta_init",
    "open_checkpoint",
    "plan_resume",
    "prefetch_checkpoint",
    "save_directory",
    "verify_checkpoint",
]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_memload.checkpoint import Checkpoint
    from lightning_memload.convert import ConvertStats, convert_checkpoint
    from lightning_memload.diff import DiffReport, TensorDiff, diff_checkpoints
    from lightning_memload.forecast import PlannedWay, ResumePlan, plan_resume
    from lightning_memload.formats import open_checkpoint
    from lightning_memload.memory import MemoryMonitor, MemoryPeaks, MemorySeries
    from lightning_memload.plugins import MemoryEfficientRestore, StreamingCheckpointIO, load_from_checkpoint
    from lightning_memload.report import RestoreReport, compare_plots
    from lightning_memload.restore import WeightsSource, load_weights, meta_init
    from lightning_memload.save import save_directory
    from lightning_memload.transfer.prefetch import PrefetchStats, prefetch_checkpoint
    from lightning_memload.verify import VerifyReport, verify_checkpoint
else:
    # Only at run time: with a module-level __getattr__ a type checker accepts every misspelt name.
    _HOMES = {
        "Checkpoint": "lightning_memload.checkpoint",
        "ConvertStats": "lightning_memload.convert",
        "DiffReport": "lightning_memload.diff",
        "MemoryEfficientRestore": "lightning_memload.plugins",
        "MemoryMonitor": "lightning_memload.memory",
        "MemoryPeaks": "lightning_memload.memory",
        "MemorySeries": "lightning_memload.memory",
        "PlannedWay": "lightning_memload.forecast",
        "PrefetchStats": "lightning_memload.transfer.prefetch",
        "RestoreReport": "lightning_memload.report",
        "ResumePlan": "lightning_memload.forecast",
        "StreamingCheckpointIO": "lightning_memload.plugins",
        "TensorDiff": "lightning_memload.diff",
        "VerifyReport": "lightning_memload.verify",
        "WeightsSource": "lightning_memload.restore",
        "compare_plots": "lightning_memload.report",
        "convert_checkpoint": "lightning_memload.convert",
        "diff_checkpoints": "lightning_memload.diff",
        "load_from_checkpoint": "lightning_memload.plugins",
        "load_weights": "lightning_memload.restore",
        "meta_init": "lightning_memload.restore",
        "open_checkpoint": "lightning_memload.formats",
        "plan_resume": "lightning_memload.forecast",
        "prefetch_checkpoint": "lightning_memload.transfer.prefetch",
        "save_directory": "lightning_memload.save",
        "verify_checkpoint": "lightning_memload.verify",
    }

    def __getattr__(name: str) -> object:
        """Import a public name from its package, and keep it here for the next use."""
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(home), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """All public names, including those that have not been imported yet."""
        return sorted({*globals(), *__all__})
