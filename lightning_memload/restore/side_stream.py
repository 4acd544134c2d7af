"""Streams values of the checkpoint in a thread, while the restoring thread does something else."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from lightning_memload.restore.session import Move, RestoreSession
from lightning_memload.transfer import Latch, TransferStats, start_thread
from lightning_memload.transfer.cuda_context import on_stream

__all__ = ["SideStream"]


class _Stopped(Exception):
    """Ends the transfer of a stream that was stopped."""


class SideStream:
    """Streams values to their destinations in a thread. A fork waits until it has ended.

    An error in the thread is not raised. The caller streams the same values with :meth:`RestoreSession.move`, which
    raises the error in the thread that needs them, or succeeds.

    Args:
        session: The restore.
        allocate: Called in the thread. Returns the moves, all of values that lie in the file.

    Attributes:
        is_complete: Whether all values have arrived. It is final after :meth:`join`.
    """

    _running: ClassVar[set[SideStream]] = set()

    def __init__(self, session: RestoreSession, allocate: Callable[[], Sequence[Move]]) -> None:
        self.is_complete = False
        self._session = session
        self._allocate: Callable[[], Sequence[Move]] | None = allocate
        # Memory is allocated for the stream that the restoring thread uses.
        on_cuda = session.device.type == "cuda"
        self._cuda_stream = torch.cuda.current_stream(session.device) if on_cuda else None
        self._is_stopped = False
        self._has_memory = False
        self._stats: TransferStats | None = None
        self._allocated, self._ended = Latch(), Latch()
        self._running.add(self)
        self._thread = start_thread(self._run, "memload-states")
        if self._thread is None:
            self._end()

    def wait_for_memory(self) -> bool:
        """Waits until the memory is allocated, or allocating it has failed. Returns whether it is allocated."""
        self._allocated.wait()
        return self._has_memory

    def join(self) -> None:
        """Waits for the end of the thread, and adds what it has read to the session's counters."""
        self._ended.wait()
        if self._thread is not None:
            # It is about to end. The timeout is for a signal handler that interrupts a join in the same thread.
            self._thread.join(timeout=1)
        stats, self._stats = self._stats, None
        if stats is not None:
            self._session.stats += stats

    def stop(self) -> None:
        """Ends the thread, if need be in the middle. A second call does nothing."""
        self._is_stopped = True
        self.join()

    @classmethod
    def before_fork(cls) -> None:
        """Waits for all streams: a child would inherit the file and the buffers."""
        for stream in list(cls._running):
            if stream._thread is not threading.current_thread():
                stream._ended.wait()

    def _run(self) -> None:
        try:
            with on_stream(self._cuda_stream):
                assert self._allocate is not None
                moves = self._allocate()
                self._has_memory = True
                self._allocated.set()
                self._stats, self.is_complete = self._session.stream_beside(moves, self._check)
        except Exception:
            # Also out of memory. The ordinary way meets the same error where the values are needed, and raises it.
            self.is_complete = False
        finally:
            self._end()

    def _end(self) -> None:
        self._allocate = None
        self._running.discard(self)
        self._allocated.set()
        self._ended.set()

    def _check(self, nbytes: int) -> None:
        if self._is_stopped:
            raise _Stopped


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=SideStream.before_fork)
