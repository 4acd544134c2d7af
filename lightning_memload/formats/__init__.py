"""The formats that a checkpoint may have: a wing for each, and the registry that tells them apart."""

from lightning_memload.formats.registry import (
    CheckpointFormat,
    checkpoints_in,
    find_format,
    is_checkpoint,
    load_mapped,
    open_checkpoint,
)
from lightning_memload.formats.torch_alone import explain_torch_refusal

__all__ = [
    "CheckpointFormat",
    "checkpoints_in",
    "explain_torch_refusal",
    "find_format",
    "is_checkpoint",
    "load_mapped",
    "open_checkpoint",
]
