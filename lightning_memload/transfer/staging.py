"""The staging ring: the only host memory a transfer allocates, and its hard budget.

All buffers are cut from one anonymous mapping that is made once, pinned for CUDA, and given back to the kernel when the
ring is closed. Torch's own pinned allocations would be rounded up to powers of two and stay cached in the process.
"""

from __future__ import annotations

import mmap
import warnings
from dataclasses import dataclass

import torch

__all__ = ["MIN_BUDGET_BYTES", "RingLayout", "StagingRing", "choose_layout"]

# Measured on one H100 with 16 cores: below 8 MiB a block the interpreter's lock limits the transfer, not the disk;
# beyond 16 MiB nothing is gained.
_MAX_BLOCK_BYTES = 16 << 20
_MIN_BLOCK_BYTES = 256 << 10
_BUFFERS_PER_THREAD = 2
MIN_BUDGET_BYTES = _BUFFERS_PER_THREAD * _MIN_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class RingLayout:
    """How a budget is divided: ``num_threads`` threads with two buffers of ``block_bytes`` each."""

    num_threads: int
    block_bytes: int

    @property
    def num_buffers(self) -> int:
        """Buffers of the whole ring."""
        return self.num_threads * _BUFFERS_PER_THREAD

    @property
    def nbytes(self) -> int:
        """Host memory of the whole ring in bytes, never more than the budget it was chosen for."""
        return self.num_buffers * self.block_bytes


def choose_layout(budget_bytes: int, num_threads: int) -> RingLayout:
    """Divides a budget between threads, with fewer threads when their buffers would become too small.

    Args:
        budget_bytes: The most host memory that the ring may take.
        num_threads: Threads that are wanted, at least 1.

    Returns:
        The layout.

    Raises:
        ValueError: The budget is below ``MIN_BUDGET_BYTES`` (512 KiB), or there is no thread.
    """
    if budget_bytes < MIN_BUDGET_BYTES:
        raise ValueError(f"The host budget is {budget_bytes} bytes; at least {MIN_BUDGET_BYTES} bytes are needed.")
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}.")
    num_threads = min(num_threads, budget_bytes // MIN_BUDGET_BYTES)
    block_bytes = min(budget_bytes // (_BUFFERS_PER_THREAD * num_threads), _MAX_BLOCK_BYTES)
    # Whole pages, so that reads of neighbouring blocks do not share one.
    return RingLayout(num_threads, block_bytes // mmap.PAGESIZE * mmap.PAGESIZE)


class StagingRing:
    """Buffers between file and device.

    Args:
        layout: Number and size of the buffers. Memory is taken at once when it is pinned, otherwise as it is touched.
        pinned: Page-lock the buffers for CUDA, so that copies to a device are asynchronous. Needs CUDA. When the
            driver refuses, the ring works unpinned, slower, and a warning says so.

    Use as a context manager, or call :meth:`close`. A ring may serve several transfers, one at a time.
    """

    def __init__(self, layout: RingLayout, *, pinned: bool) -> None:
        self.layout = layout
        self._memory = mmap.mmap(-1, layout.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(memoryview(self._memory), dtype=torch.uint8)
        self._address = whole.data_ptr()
        self.pinned = pinned and self._pin()
        self.tensors = list(whole.split(layout.block_bytes))
        self.views = [
            memoryview(self._memory)[start : start + layout.block_bytes]
            for start in range(0, layout.nbytes, layout.block_bytes)
        ]

    @property
    def nbytes(self) -> int:
        """Size of the ring in bytes."""
        return self.layout.nbytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the ring that are page-locked now."""
        return self.nbytes if self.pinned else 0

    def close(self) -> None:
        """Unpins and frees the buffers. Copies from them must have ended. Closing twice is fine."""
        if self.pinned:
            # Before the memory goes: a region that is unmapped while registered poisons later pinning in this process.
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self.pinned = False
        self.tensors.clear()
        for view in self.views:
            view.release()
        self.views.clear()
        try:
            self._memory.close()
        except BufferError:
            # Somebody (a traceback) still holds a buffer. The kernel takes the pages now, the addresses go later.
            self._memory.madvise(mmap.MADV_DONTNEED)

    def _pin(self) -> bool:
        status = torch.cuda.cudart().cudaHostRegister(self._address, self.layout.nbytes, 0)
        if int(status) == 0:
            return True
        warnings.warn(
            f"Could not page-lock {self.layout.nbytes >> 20} MiB of host memory ({status}); the checkpoint is restored "
            "through ordinary memory, which is slower.",
            stacklevel=4,
        )
        return False

    def __enter__(self) -> StagingRing:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
