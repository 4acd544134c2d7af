"""The staging ring: the only host memory a transfer allocates, and its hard budget.

All buffers are cut from one anonymous mapping that is made once, pinned for CUDA, and given back to the kernel when the
ring is closed. Torch's own pinned allocations would be rounded up to powers of two and stay cached in the process.
"""

from __future__ import annotations

import mmap
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from lightning_memload.transfer.cuda_context import on_device
from lightning_memload.transfer.threads import check_whole, default_threads, run_threads, start_thread

__all__ = [
    "MIN_BUDGET_BYTES",
    "LazyRing",
    "RingLayout",
    "StagingRing",
    "check_host_budget",
    "choose_layout",
    "start_ring",
]

# Beyond 16 MiB a block nothing is gained; below 4 MiB the interpreter's lock limits the transfer
# (examples/benchmarks/streaming.py, one H100 with 16 cores).
_MAX_BLOCK_BYTES = 16 << 20
# With less for each thread there are fewer of them, rather than smaller blocks.
_THREAD_BUDGET_BYTES = 2 << 20
MIN_BUDGET_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class RingLayout:
    """How a budget is divided.

    Attributes:
        num_threads: Threads that read into the ring.
        num_buffers: Buffers that they share, at least one for each.
        block_bytes: Size of a buffer, and so of the longest read.
    """

    num_threads: int
    num_buffers: int
    block_bytes: int

    @property
    def nbytes(self) -> int:
        """Host memory of the whole ring in bytes, never more than the budget it was chosen for."""
        return self.num_buffers * self.block_bytes


def check_host_budget(host_budget_mib: int) -> None:
    """Refuses a budget that is none, where a user gives it.

    Raises:
        TypeError: It is no number.
        ValueError: It is less than 1 MiB.
    """
    check_whole("host_budget_mib", host_budget_mib, "a whole number of MiB such as 128")
    if host_budget_mib < 1:
        raise ValueError(f"host_budget_mib must be at least 1 (MiB), got {host_budget_mib}.")


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
    num_threads = max(1, min(num_threads, budget_bytes // _THREAD_BUDGET_BYTES))
    # One to read into, and one that waits for its copy or is on its way.
    num_buffers = 2 * num_threads
    # Whole pages, so that reads of neighbouring blocks do not share one.
    block_bytes = min(budget_bytes // num_buffers, _MAX_BLOCK_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
    return RingLayout(num_threads, num_buffers, block_bytes)


class StagingRing:
    """Buffers between file and device.

    Args:
        layout: Number and size of the buffers. Memory is taken at once when it is pinned, otherwise as it is touched.
        pinned: Page-lock the buffers for CUDA, so that copies to a device are asynchronous. Needs CUDA. When the
            driver refuses, the ring works unpinned, slower, and a warning says so.
        device: The GPU that page-locks them, for copies to and from any. ``None``: the current one of this thread.

    Use as a context manager, or call :meth:`close`. A ring may serve several transfers, one at a time.
    """

    def __init__(self, layout: RingLayout, *, pinned: bool, device: torch.device | None = None) -> None:
        self.layout = layout
        self._memory = mmap.mmap(-1, layout.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Tensors that are made in inference mode can be written to by no thread that is not in it.
        with torch.inference_mode(False):
            whole = torch.frombuffer(memoryview(self._memory), dtype=torch.uint8)
        self._address = whole.data_ptr()
        self._device = torch.device("cuda", torch.cuda.current_device()) if pinned and device is None else device
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
            with on_device(self._device):
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
        # CUDA keeps an error for the thread in which it happened, and torch's next kernel there would fail with it.
        statuses: list[Any] = []
        run_threads(lambda: statuses.append(self._register()), 1, lambda: None)
        (status,) = statuses
        if int(status) == 0:
            return True
        reason = torch.cuda.cudart().cudaGetErrorString(status)
        warnings.warn(
            f"Could not page-lock {self.layout.nbytes >> 20} MiB of host memory ({reason}); the checkpoint is moved "
            "through ordinary memory, which is slower.",
            stacklevel=4,
        )
        return False

    def _register(self) -> Any:
        with on_device(self._device):
            return torch.cuda.cudart().cudaHostRegister(self._address, self.layout.nbytes, 0)

    def __enter__(self) -> StagingRing:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class LazyRing:
    """A staging ring that is made when it is first needed, or before that in the background.

    Args:
        layout: See :class:`StagingRing`.
        pinned: Likewise.
        device: Likewise; ``None`` means that of the thread that makes the ring, in the background the first GPU.
    """

    def __init__(self, layout: RingLayout, *, pinned: bool, device: torch.device | None = None) -> None:
        self.layout = layout
        self._pinned = pinned
        self._device = device
        self._ring: StagingRing | None = None
        self._error: BaseException | None = None
        self._maker: threading.Thread | None = None

    def prepare(self) -> None:
        """Begins to make the ring and returns. Page-locking 128 MiB takes 70 to 100 ms."""
        if self._ring is None and self._maker is None:
            # Without a thread it is made when it is needed.
            self._maker = start_thread(self._make, "memload-pin")

    def get(self) -> StagingRing:
        """The ring, always the same until it is closed.

        Raises:
            OSError: There is no memory for it.
        """
        self._wait()
        if self._ring is None:
            self._make()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        assert self._ring is not None
        return self._ring

    @property
    def missing_bytes(self) -> int:
        """Host memory that it is still going to take: none once it is made. Waits while it is being made."""
        self._wait()
        return self.layout.nbytes if self._ring is None else 0

    def close(self) -> None:
        """Frees the ring if there is one. Closing twice is fine."""
        self._wait()
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _wait(self) -> None:
        if self._maker is not None:
            self._maker.join()
            self._maker = None

    def _make(self) -> None:
        try:
            self._ring = StagingRing(self.layout, pinned=self._pinned, device=self._device)
        except BaseException as error:
            self._error = error


def start_ring(
    device: torch.device, budget_bytes: int, num_threads: int | None = None, num_processes: int = 1
) -> LazyRing:
    """The staging ring for tensors on a device, which for CUDA is made and pinned from now on, beside the caller.

    Args:
        device: Where the tensors go.
        budget_bytes: The most host memory for it.
        num_threads: Threads to read with. ``None``: :func:`default_threads`.
        num_processes: See :func:`default_threads`.

    Raises:
        ValueError: The budget is too small.
    """
    layout = choose_layout(budget_bytes, num_threads or default_threads(device, num_processes))
    ring = LazyRing(layout, pinned=device.type == "cuda", device=device)
    if device.type == "cuda":
        ring.prepare()
    return ring
