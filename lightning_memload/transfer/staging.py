"""The staging ring: the buffers between the file and a device, with a hard budget.

Beside it, a transfer allocates host memory only for gaps between the tensors of a read into CPU memory (``engine.py``),
and for the buffers of a comparison of checksums, 1 MiB per thread (``compare.py``).

All buffers are parts of one anonymous mapping. It is created once, pinned for CUDA, and returned to the kernel when the
ring is closed. Pinned allocations of torch are not used: torch rounds them up to powers of two and keeps them cached.
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

# Blocks of more than 16 MiB are not faster. With blocks below 4 MiB, the interpreter's lock limits the transfer
# (examples/benchmarks/streaming.py, one H100 with 16 cores).
_MAX_BLOCK_BYTES = 16 << 20
# If a thread would get less than this, the number of threads is reduced, not the size of the blocks.
_THREAD_BUDGET_BYTES = 2 << 20
MIN_BUDGET_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class RingLayout:
    """The division of a budget into threads and buffers.

    Attributes:
        num_threads: Number of threads that read into the ring.
        num_buffers: Number of buffers that the threads share, at least one per thread.
        block_bytes: Size of one buffer, and so the maximum length of one read.
    """

    num_threads: int
    num_buffers: int
    block_bytes: int

    @property
    def nbytes(self) -> int:
        """Host memory of the whole ring in bytes, at most the budget that the layout was chosen for."""
        return self.num_buffers * self.block_bytes


def check_host_budget(host_budget_mib: int) -> None:
    """Validates the argument ``host_budget_mib`` of a user.

    Raises:
        TypeError: The argument is not an integer.
        ValueError: The argument is less than 1 MiB.
    """
    check_whole("host_budget_mib", host_budget_mib, "a whole number of MiB such as 128")
    if host_budget_mib < 1:
        raise ValueError(f"host_budget_mib must be at least 1 (MiB), got {host_budget_mib}.")


def choose_layout(budget_bytes: int, num_threads: int) -> RingLayout:
    """Divides a budget between threads. Uses fewer threads if their buffers would become too small.

    Args:
        budget_bytes: Maximum host memory of the ring.
        num_threads: Desired number of threads, at least 1.

    Returns:
        The layout.

    Raises:
        ValueError: The budget is below ``MIN_BUDGET_BYTES`` (512 KiB), or ``num_threads`` is less than 1.
    """
    if budget_bytes < MIN_BUDGET_BYTES:
        raise ValueError(f"The host budget is {budget_bytes} bytes; at least {MIN_BUDGET_BYTES} bytes are needed.")
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}.")
    num_threads = max(1, min(num_threads, budget_bytes // _THREAD_BUDGET_BYTES))
    # Per thread: one buffer to read into, and one whose copy is queued or in progress.
    num_buffers = 2 * num_threads
    # Whole pages, so that adjacent buffers do not share a page.
    block_bytes = min(budget_bytes // num_buffers, _MAX_BLOCK_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
    return RingLayout(num_threads, num_buffers, block_bytes)


class StagingRing:
    """Buffers between file and device.

    Args:
        layout: Number and size of the buffers. Pinned memory is allocated at once, other memory when it is touched.
        pinned: Page-lock the buffers for CUDA, so that copies to a device are asynchronous. Requires CUDA. If the
            driver refuses, the ring is not pinned, transfers are slower, and a warning is given.
        device: The GPU that page-locks the buffers. Copies to and from any GPU can use them. ``None`` means the
            current GPU of this thread.

    Use the ring as a context manager, or call :meth:`close`. Several transfers may use a ring, one at a time.
    """

    def __init__(self, layout: RingLayout, *, pinned: bool, device: torch.device | None = None) -> None:
        self.layout = layout
        self._memory = mmap.mmap(-1, layout.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A tensor created in inference mode can only be written by threads that are in inference mode too.
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
        """Bytes of the ring that are currently page-locked."""
        return self.nbytes if self.pinned else 0

    def close(self) -> None:
        """Unpins and frees the buffers. All copies from them must have ended. May be called twice."""
        if self.pinned:
            # Before the unmapping: a region that is unmapped while registered breaks later pinning in this process.
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
            # Another reference (a traceback) still holds a buffer. This frees the pages now, the addresses later.
            self._memory.madvise(mmap.MADV_DONTNEED)

    def _pin(self) -> bool:
        # CUDA keeps an error per thread, and torch's next kernel in that thread fails with it. So a new thread is used.
        statuses: list[Any] = []
        run_threads(lambda: statuses.append(self._register()), 1, lambda: None)
        (status,) = statuses
        if int(status) == 0:
            return True
        reason = torch.cuda.cudart().cudaGetErrorString(status)
        warnings.warn(
            f"Could not page-lock {self.layout.nbytes >> 20} MiB of host memory ({reason}). The checkpoint is copied "
            "through memory that is not page-locked, which is slower.",
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
    """A staging ring that is created when it is first needed, or earlier in the background.

    Args:
        layout: See :class:`StagingRing`.
        pinned: See :class:`StagingRing`.
        device: See :class:`StagingRing`. ``None`` means the current GPU of the thread that creates the ring. In the
            background, this is the first GPU.
    """

    def __init__(self, layout: RingLayout, *, pinned: bool, device: torch.device | None = None) -> None:
        self.layout = layout
        self._pinned = pinned
        self._device = device
        self._ring: StagingRing | None = None
        self._error: BaseException | None = None
        self._maker: threading.Thread | None = None

    def prepare(self) -> None:
        """Starts to create the ring in the background. Page-locking 128 MiB takes 70 to 100 ms."""
        if self._ring is None and self._maker is None:
            # If no thread can be started, the ring is created when it is needed.
            self._maker = start_thread(self._make, "memload-pin")

    def get(self) -> StagingRing:
        """Returns the ring, always the same one until it is closed.

        Raises:
            OSError: There is not enough memory for the ring.
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
        """Host memory in bytes that is not allocated yet: 0 after the creation. Waits for a creation in progress."""
        self._wait()
        return self.layout.nbytes if self._ring is None else 0

    def close(self) -> None:
        """Frees the ring if it was created. May be called twice."""
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
    device: torch.device,
    budget_bytes: int,
    num_threads: int | None = None,
    num_processes: int = 1,
    *,
    is_remote: bool = False,
) -> LazyRing:
    """Returns a staging ring for tensors on a device. For CUDA, its creation and pinning start in the background.

    Args:
        device: Device of the tensors.
        budget_bytes: Maximum host memory of the ring.
        num_threads: Number of threads that read. ``None`` means :func:`default_threads`.
        num_processes: See :func:`default_threads`.
        is_remote: See :func:`default_threads`.

    Raises:
        ValueError: The budget is too small.
    """
    threads = num_threads or default_threads(device, num_processes, is_remote=is_remote)
    layout = choose_layout(budget_bytes, threads)
    ring = LazyRing(layout, pinned=device.type == "cuda", device=device)
    if device.type == "cuda":
        ring.prepare()
    return ring
