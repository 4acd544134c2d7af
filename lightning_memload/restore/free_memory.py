"""Compares the memory that a restore needs with the free memory of the devices and the host."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from lightning_memload.errors import InsufficientMemoryError
from lightning_memload.memory import free_device_bytes
from lightning_memload.units import format_bytes

__all__ = ["has_room", "require_room"]

# A fraction of the free memory. A restore that needs more is announced: the first step of training needs memory too.
_TIGHT_FRACTION = 0.9


def require_room(path: str, needed_bytes: Mapping[torch.device, int]) -> None:
    """Refuses a restore that cannot fit. Warns if little memory will be left.

    Args:
        path: The checkpoint, for messages.
        needed_bytes: The bytes that are going to be allocated on each device.

    Raises:
        InsufficientMemoryError: A device, or the host, has less free memory.
    """
    for device, needed in needed_bytes.items():
        if needed == 0:
            continue
        if device.type == "cuda":
            # The thread that page-locks the ring may not have initialised CUDA yet. Before that nothing is known.
            torch.cuda.init()
        free = free_device_bytes(device)
        if free is None:
            continue
        place = "host memory" if device.type == "cpu" else f"memory on {device}"
        if needed > free:
            raise InsufficientMemoryError(
                f"Restoring {path} needs {format_bytes(needed)} of {place}, but only {format_bytes(free)} are free. "
                "Nothing was changed. Free memory or restore on a larger machine; if you know that the estimate is "
                "wrong, pass check_fit=False.",
                device=str(device),
                needed_bytes=needed,
                free_bytes=free,
            )
        if needed > _TIGHT_FRACTION * free:
            warnings.warn(
                f"Restoring {path} takes {format_bytes(needed)} of {format_bytes(free)} free {place}: little is left "
                "for training.",
                stacklevel=3,
            )


def has_room(needed_bytes: Mapping[torch.device, int]) -> bool:
    """Whether memory for something that is not needed yet can be allocated, and some is left for everything else.

    Args:
        needed_bytes: The bytes on each device.
    """
    free = {device: free_device_bytes(device) for device in needed_bytes}
    return all(known is None or needed_bytes[device] <= _TIGHT_FRACTION * known for device, known in free.items())
