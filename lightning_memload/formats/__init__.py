"""The formats that a checkpoint may have: a wing for each, and the registry that tells them apart."""

from lightning_memload.formats.registry import (
    CheckpointFormat,
    checkpoints_in,
    find_format,
    is_checkpoint,
    load_mapped,
    open_checkpoint,
)

__all__ = [
    "CheckpointFormat",
    "checkpoints_in",
    "find_format",
    "is_checkpoint",
    "load_mapped",
    "open_checkpoint",
]
