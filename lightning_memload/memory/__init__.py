"""What a stretch of this process costs in memory, and what memory is left for it.

Anonymous memory (what the machine must have) and file-backed memory (what the kernel takes back under pressure) are
reported apart, in bytes, and ``None`` where the platform does not tell. This room knows nothing of checkpoints.
"""

from __future__ import annotations

from lightning_memload.memory.device import free_device_bytes
from lightning_memload.memory.host import available_host_bytes
from lightning_memload.memory.monitor import MemoryMonitor, MemoryPeaks

__all__ = ["MemoryMonitor", "MemoryPeaks", "available_host_bytes", "free_device_bytes"]
