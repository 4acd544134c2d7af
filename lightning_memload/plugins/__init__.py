"""The adaptors to Lightning: the Callback and the CheckpointIO. The only room that imports it."""

from lightning_memload.plugins.callback import MemoryEfficientRestore
from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO

__all__ = ["MemoryEfficientRestore", "StreamingCheckpointIO"]
