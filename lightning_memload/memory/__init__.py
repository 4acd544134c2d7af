"""Measures the memory that a part of a program takes, and the memory that is still free.

Anonymous memory (the machine must have it) and file-backed memory (the kernel takes it back under pressure) are
reported separately, in bytes. A figure is ``None`` where the platform does not report it. This package does not depend
on checkpoints.
"""

from __future__ import annotations

from lightning_memload.memory.device import free_device_bytes
from lightning_memload.memory.fit import refusal
from lightning_memload.memory.host import available_host_bytes
from lightning_memload.memory.monitor import MemoryMonitor
from lightning_memload.memory.peaks import MemoryPeaks
from lightning_memload.memory.series import MemorySeries, SeriesRecorder

__all__ = [
    "MemoryMonitor",
    "MemoryPeaks",
    "MemorySeries",
    "SeriesRecorder",
    "available_host_bytes",
    "free_device_bytes",
    "refusal",
]
