"""Memory of torch's allocators on a CUDA device and in pinned host memory, and the device memory that is free.

The invariant: measuring changes nothing. In a process that has not initialised CUDA every figure is ``None``, and no
CUDA context is created (a context costs hundreds of MiB on device and host, and forbids a later fork). torch is not
imported where the answer can only be ``None``. Not included: memory that other libraries took from the driver.
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
    "cuda_levels",
    "cuda_memory",
    "cuda_peaks",
    "free_device_bytes",
    "pinned_bytes",
    "reset_cuda_peaks",
    "resolve_cuda_device",
]


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """Memory of torch's caching allocator on one CUDA device.

    Attributes:
        allocated_bytes: Memory of live tensors.
        reserved_bytes: Memory taken from the driver: live tensors and the allocator's cache.
    """

    allocated_bytes: int
    reserved_bytes: int


def cuda_memory(device: torch.device | str) -> DeviceSample | None:
    """Read the present figures of ``device``. ``None``: another kind of device, or CUDA is not initialised."""
    return _sample(device, "current")


def cuda_levels(device: torch.device | str) -> tuple[DeviceSample, int | None] | None:
    """Read the present figures of ``device`` and :func:`pinned_bytes`, without work that takes time.

    Meant for a thread that samples: a device without index, which each thread understands in its own way, has none.

    Returns:
        ``None`` for another kind of device, a device without index, or before CUDA is initialised.
    """
    if not _cuda_is_initialized():
        return None
    import torch

    device = torch.device(device)
    if device.type != "cuda" or device.index is None:
        return None
    # The nested figures are what torch flattens and sorts for memory_stats(), which takes ten times as long.
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    levels = (stats.get(name, {}).get("all", {}).get("current", 0) for name in ("allocated_bytes", "reserved_bytes"))
    return DeviceSample(*levels), pinned_bytes()


def cuda_peaks(device: torch.device | str) -> DeviceSample | None:
    """Read the two peaks of ``device`` since their last reset. They need not have occurred at the same time.

    Returns:
        ``None`` for another kind of device or before CUDA is initialised.
    """
    return _sample(device, "peak")


def reset_cuda_peaks(device: torch.device | str) -> bool:
    """Reset the allocator's peaks of ``device`` to the present level. The whole process sees the reset.

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

    Torch rounds each block up to a power of two and caches it after it is freed, so this figure is close to a peak.

    Returns:
        Bytes. ``None`` before CUDA is initialised, and with torch before 2.7, which does not count them.
    """
    if not _cuda_is_initialized():
        return None
    import torch

    if not hasattr(torch.cuda, "host_memory_stats"):
        return None
    stats = torch.cuda.host_memory_stats()
    # Torch 2.7 names the owned bytes "reserved" and the used ones "allocated". Later versions name them "allocated" and
    # "active".
    owned_bytes = stats.get("reserved_bytes.current", stats.get("allocated_bytes.current"))
    return None if owned_bytes is None else int(owned_bytes)


def free_device_bytes(device: torch.device | str) -> int | None:
    """Return how much memory new tensors on ``device`` can take.

    Returns:
        For CUDA: the free memory of the driver plus the cache of torch's allocator, in bytes. Fragmentation may leave
        less for one large tensor. ``None`` before CUDA is initialised, since the query would initialise it. For the
        CPU: :func:`~lightning_memload.memory.available_host_bytes`. For every other device: ``None``.
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
    """Return ``device`` with its index. A device without index is the current device of the calling thread.

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

    # is_initialized() comes first: is_available() may load the driver, and a forked child can then not use CUDA.
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_available()


def _sample(device: torch.device | str, metric: str) -> DeviceSample | None:
    cuda_device = resolve_cuda_device(device)
    if cuda_device is None:
        return None
    import torch

    stats = torch.cuda.memory_stats(cuda_device)
    # An allocator that has not served the device yet has no counters for it: it holds no memory.
    return DeviceSample(
        allocated_bytes=stats.get(f"allocated_bytes.all.{metric}", 0),
        reserved_bytes=stats.get(f"reserved_bytes.all.{metric}", 0),
    )
