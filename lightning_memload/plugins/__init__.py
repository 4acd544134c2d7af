"""The adaptors to Lightning: the Callback and the CheckpointIO. No other part of the package imports Lightning."""

from lightning_memload.plugins.callback import MemoryEfficientRestore
from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO
from lightning_memload.plugins.load_from_checkpoint import load_from_checkpoint

__all__ = ["MemoryEfficientRestore", "StreamingCheckpointIO", "load_from_checkpoint"]
