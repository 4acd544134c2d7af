"""Compares the tensors of two checkpoints, value by value and bit by bit, in bounded memory."""

from lightning_memload.diff.checkpoints import DiffReport, diff_checkpoints
from lightning_memload.diff.values import TensorDiff

__all__ = ["DiffReport", "TensorDiff", "diff_checkpoints"]
