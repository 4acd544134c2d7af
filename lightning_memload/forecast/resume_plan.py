"""Computes the memory of a resume from the index of the checkpoint. No tensor is read, and no module is built.

The module is assumed to have the weights of the checkpoint in the dtypes of the checkpoint. Memory that does not depend
on the checkpoint is not included: Python, torch and Lightning themselves, the CUDA context, and what training needs on
top (gradients, activations).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_memload.checkpoint import Checkpoint
from lightning_memload.formats import open_checkpoint
from lightning_memload.memory.host import available_host_bytes

__all__ = ["PlannedWay", "ResumePlan", "plan_resume"]

_MIB = 1 << 20
# A checkpoint of so many storages and at most so many bytes is read into host memory as a whole (restore/whole.py), if
# the module is on the CPU and has memory.
_MANY_STORAGES, _WHOLE_BYTES = 1000, 64 * _MIB
# Lightning alone reads files of torch.save only.
_STOCK_FORMAT = "torch"


@dataclass(frozen=True, slots=True)
class PlannedWay:
    """The memory of one way to resume, in bytes above the process before the module was built.

    Attributes:
        name: ``"stock"``: Lightning alone. ``"copy"`` and ``"assign"``: the mode of ``MemoryEfficientRestore``.
        meta_init: Whether the module is built under ``meta_init()``.
        host_bytes: Peak of anonymous host memory, staging buffers included.
        kept_bytes: What of it stays when everything is restored.
        file_bytes: Pages of the file that are the memory of weights. The kernel may drop and read them again.
        device_bytes: Peak of GPU memory, 0 on the CPU.
        fits: Whether both fit into what is free. ``None`` if that is unknown.
    """

    name: Literal["stock", "copy", "assign"]
    meta_init: bool
    host_bytes: int
    kept_bytes: int
    file_bytes: int
    device_bytes: int
    fits: bool | None


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """What a resume will need, and what is free.

    Attributes:
        path: The checkpoint.
        device: ``"cpu"`` or ``"cuda"``.
        stage: ``"fit"`` or ``"validate"``.
        weight_bytes: Bytes of the weights. Tied weights count once.
        optimizer_bytes: Bytes of the optimizer states.
        tensor_bytes: Bytes of all tensors in the checkpoint.
        free_host_bytes: Host memory that this process can still allocate, under the limits of its control group.
            ``None`` if it is unknown.
        free_device_bytes: Free memory of the current GPU. ``None`` if there is none, or on the CPU.
        ways: The ways to resume. Stock is not among them if Lightning alone cannot read the format.
    """

    path: str
    device: Literal["cpu", "cuda"]
    stage: Literal["fit", "validate"]
    weight_bytes: int
    optimizer_bytes: int
    tensor_bytes: int
    free_host_bytes: int | None
    free_device_bytes: int | None
    ways: tuple[PlannedWay, ...]


def plan_resume(
    path: str | os.PathLike[str],
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    stage: Literal["fit", "validate"] = "fit",
    host_budget_mib: int = 128,
) -> ResumePlan:
    """Computes what a resume in one process will need, with Lightning alone and in each mode of this package.

    Args:
        path: A checkpoint of any format that ``open_checkpoint`` reads.
        device: The device of the training.
        stage: ``"fit"`` restores optimizer states too. ``"validate"`` stands for ``test`` and ``predict`` as well.
        host_budget_mib: As for ``MemoryEfficientRestore``.

    Returns:
        The plan. It compares with the memory that is free now on this machine.

    Raises:
        FileNotFoundError: The path does not exist.
        CheckpointFormatError: It is not a checkpoint, or it is damaged.
        ValueError: ``device`` or ``stage`` is none of the values above.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}.")
    if stage not in ("fit", "validate"):
        raise ValueError(f"stage must be 'fit' or 'validate', got {stage!r}.")
    index = open_checkpoint(path)
    sizes = _Sizes.of(index)
    free_host = available_host_bytes()
    free_device = torch.cuda.mem_get_info()[0] if device == "cuda" and torch.cuda.is_available() else None
    on_gpu = device == "cuda"
    budget_bytes = host_budget_mib * _MIB

    def way(name: Literal["stock", "copy", "assign"], meta_init: bool, host: int, kept: int, file: int) -> PlannedWay:
        on_device = sizes.weights + (sizes.optimizers if stage == "fit" else 0) if on_gpu else 0
        fits = None if free_host is None else host <= free_host
        if on_gpu and fits is not False:
            fits = None if free_device is None or fits is None else on_device <= free_device
        return PlannedWay(name, meta_init, host, kept, file, on_device, fits)

    rest = sizes.others + (0 if on_gpu else sizes.optimizers) if stage == "fit" else 0
    kept = rest + (0 if on_gpu else sizes.weights)
    ways = []
    if index.format == _STOCK_FORMAT:
        # The whole checkpoint beside a module that is in host memory first, on a GPU too.
        ways.append(way("stock", False, sizes.weights + sizes.stored, kept, 0))
    staging = min(budget_bytes, sizes.weights + sizes.optimizers) if on_gpu else 0
    is_whole = len(index.storages) >= _MANY_STORAGES and index.file_size <= min(_WHOLE_BYTES, budget_bytes)
    whole = index.file_size if is_whole and not on_gpu else 0
    ways.append(way("copy", False, sizes.weights + rest + staging + whole, kept, 0))
    ways.append(way("copy", True, kept + staging, kept, 0))
    if stage == "validate" and not on_gpu and not any(tensor.chunks for tensor in index):
        ways.append(way("assign", True, 0, 0, sizes.weights))
    return ResumePlan(
        index.path, device, stage, sizes.weights, sizes.optimizers, sizes.stored, free_host, free_device, tuple(ways)
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of the parts of a checkpoint.

    Attributes:
        weights: The weights, tied ones once.
        optimizers: The optimizer states.
        others: All other tensors, such as those of callbacks.
        stored: All storages.
    """

    weights: int
    optimizers: int
    others: int
    stored: int

    @classmethod
    def of(cls, index: Checkpoint) -> _Sizes:
        sizes = {"weights": 0, "optimizer": 0, "others": 0}
        for group in index.sections:
            kind = group.name.split()[0]
            sizes[kind if kind in sizes else "others"] += group.nbytes
        return cls(sizes["weights"], sizes["optimizer"], sizes["others"], index.nbytes)
