"""What torch's allocators hold on a CUDA device and in pinned host memory, and what is still free.

The invariant: measuring changes nothing. A process that has not initialised CUDA gets ``None`` and stays without a
CUDA context (which alone costs hundreds of MiB on device and host, and forbids a later fork); torch itself is not
imported for an answer that can only be ``None``. Not promised: memory that other libraries took from the driver.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_memload.memory.host import available_host_bytes

if TYPE_CHECKING:
    import torch

__all__ = [
    "DeviceSample",
    "cuda_memory",
    "cuda_peaks",
    "free_device_bytes",
    "pinned_bytes",
    "reset_cuda_peaks",
    "resolve_cuda_device",
]


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """What torch's caching allocator holds on one CUDA device.

    Attributes:
        allocated_bytes: In live tensors.
        reserved_bytes: Taken from the driver: live tensors and the allocator's cache.
    """

    allocated_bytes: int
    reserved_bytes: int


def cuda_memory(device: torch.device | str) -> DeviceSample | None:
    """Read what is held on ``device`` now; ``None`` for another kind of device or before CUDA is initialised."""
    return _sample(device, "current")


def cuda_peaks(device: torch.device | str) -> DeviceSample | None:
    """Read the two peaks of ``device`` since they were last reset, each at its own time.

    Returns:
        ``None`` for another kind of device or before CUDA is initialised.
    """
    return _sample(device, "peak")


def reset_cuda_peaks(device: torch.device | str) -> bool:
    """Set the allocator's peaks of ``device`` back to what is held now, visibly for the whole process.

    Returns:
        ``False`` when there is nothing to reset: another kind of device, or CUDA is not initialised.
    """
    cuda_device = resolve_cuda_device(device)
    if cuda_device is None:
        return False
    import torch

    torch.cuda.reset_peak_memory_stats(cuda_device)
    return True


def pinned_bytes() -> int | None:
    """Read how much page-locked host memory torch's allocator owns, in use or cached.

    Torch rounds each block up to a power of two and keeps it after it is freed, so this is close to a peak.

    Returns:
        Bytes; ``None`` before CUDA is initialised and for a torch that does not count it (before 2.7).
    """
    if not _cuda_is_initialized():
        return None
    import torch

    if not hasattr(torch.cuda, "host_memory_stats"):
        return None
    stats = torch.cuda.host_memory_stats()
    # Torch 2.7 called the owned bytes "reserved" and those in use "allocated"; later "allocated" and "active".
    owned_bytes = stats.get("reserved_bytes.current", stats.get("allocated_bytes.current"))
    return None if owned_bytes is None else int(owned_bytes)


def free_device_bytes(device: torch.device | str) -> int | None:
    """Tell how much memory new tensors on ``device`` can take.

    Returns:
        For CUDA, in bytes, what the driver has free and what torch's allocator has cached; fragmentation may leave
        less for one large tensor. ``None`` before CUDA is initialised: asking would initialise it. For the CPU
        :func:`~lightning_memload.memory.available_host_bytes`. ``None`` for every other device.
    """
    import torch

    if torch.device(device).type == "cpu":
        return available_host_bytes()
    cuda_device = resolve_cuda_device(device)
    held = cuda_memory(cuda_device) if cuda_device is not None else None
    if held is None:
        return None
    driver_free_bytes, _ = torch.cuda.mem_get_info(cuda_device)
    return int(driver_free_bytes) + held.reserved_bytes - held.allocated_bytes


def resolve_cuda_device(device: torch.device | str) -> torch.device | None:
    """Return ``device`` with its index, the calling thread's current device where it had none.

    Returns:
        ``None`` for another kind of device or before CUDA is initialised.
    """
    if not _cuda_is_initialized():
        return None
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return None
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _cuda_is_initialized() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch

    # In this order: is_available() may itself load the driver, after which a forked child can no longer use CUDA.
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_available()


def _sample(device: torch.device | str, metric: str) -> DeviceSample | None:
    cuda_device = resolve_cuda_device(device)
    if cuda_device is None:
        return None
    import torch

    stats = torch.cuda.memory_stats(cuda_device)
    # An allocator that has not served the device yet has no counters for it: nothing is held.
    return DeviceSample(
        allocated_bytes=stats.get(f"allocated_bytes.all.{metric}", 0),
        reserved_bytes=stats.get(f"reserved_bytes.all.{metric}", 0),
    )
