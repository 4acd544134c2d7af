"""From tensors to disk: a checkpoint, written in bounded host memory and put in its place in one step."""

from lightning_memload.save.tensor_directory import save_directory
from lightning_memload.save.torch_zip import SaveStats, save_torch, write_torch

__all__ = ["SaveStats", "save_directory", "save_torch", "write_torch"]
