"""Saving: writes a checkpoint in bounded host memory and replaces the old one in one atomic step."""

from lightning_memload.save.background import BackgroundSave, is_in_step, tensors_of_optimizers
from lightning_memload.save.directory import plan_directory_save, save_directory
from lightning_memload.save.reserving import identity, reserve
from lightning_memload.save.saving import Save, SaveStats
from lightning_memload.save.torch_file import plan_torch_save, save_torch, write_torch

__all__ = [
    "BackgroundSave",
    "Save",
    "SaveStats",
    "identity",
    "is_in_step",
    "plan_directory_save",
    "plan_torch_save",
    "reserve",
    "save_directory",
    "save_torch",
    "tensors_of_optimizers",
    "write_torch",
]
