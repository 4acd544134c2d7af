"""From tensors to disk: an ordinary checkpoint, written in bounded host memory and put in its place in one step."""

from lightning_memload.save.torch_zip import SaveStats, save_torch, write_torch

__all__ = ["SaveStats", "save_torch", "write_torch"]
