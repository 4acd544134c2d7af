"""From tensors to disk: a checkpoint, written in bounded host memory and put in its place in one step."""

from lightning_memload.save.saving import Order, Save, SaveStats
from lightning_memload.save.tensor_directory import plan_directory_save, save_directory
from lightning_memload.save.torch_zip import plan_torch_save, save_torch, write_torch

__all__ = [
    "Order",
    "Save",
    "SaveStats",
    "plan_directory_save",
    "plan_torch_save",
    "save_directory",
    "save_torch",
    "write_torch",
]
