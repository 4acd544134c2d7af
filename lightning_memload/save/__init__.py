"""From an object with tensors on any device to a checkpoint on disk, in little host memory."""

from lightning_memload.save.tensor_directory import save_directory

__all__ = ["save_directory"]
