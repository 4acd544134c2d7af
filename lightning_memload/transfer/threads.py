"""Threads that share one piece of work: how many, and that they end together.

Each takes what comes next until nothing is left. When one fails, or the caller is interrupted, the others end after
what they are at, and none outlives the call.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence

import torch

__all__ = ["available_cpus", "check_num_threads", "default_threads", "run_threads"]

# Measured on one H100 with 16 cores (examples/benchmarks/streaming.py). Into CPU memory more than 4 gain nothing.
_MAX_THREADS_DEVICE = 12
_MAX_THREADS_CPU = 4


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(device: torch.device, num_processes: int = 1) -> int:
    """How many threads to read with.

    Args:
        device: Where the tensors go.
        num_processes: Processes of this host that do the same, and share its CPUs.
    """
    most = _MAX_THREADS_CPU if device.type == "cpu" else _MAX_THREADS_DEVICE
    return max(1, min(most, available_cpus() // max(1, num_processes)))


def check_num_threads(num_threads: int | None) -> None:
    """Refuses a number of threads that is none, where a user gives it.

    Raises:
        ValueError: It is less than 1, and not ``None``.
    """
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, or None to choose, got {num_threads}.")


def run_threads(
    work: Callable[[], None],
    num_threads: int,
    stop: Callable[[], object],
    *,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Does the same work in several threads and returns when all of them have ended, however often it is interrupted.

    Args:
        work: Is called once in each thread, and ends at once if ``stop`` was called before.
        num_threads: How many.
        stop: Makes ``work`` end soon, wherever it is. Called when a thread has failed, by that thread, and at the end,
            perhaps several times. Must take no lock: an interruption may end it anywhere.
        meanwhile: Is called in this thread while the others work. Must end when they do.

    Raises:
        BaseException: What ``meanwhile`` raised, or the first of the failed threads.
    """
    errors: list[BaseException] = []

    def work_or_stop() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
            stop()

    # Not an executor: its locks stay taken when it is interrupted while it starts a thread.
    threads = [threading.Thread(target=work_or_stop, name=f"memload_{number}") for number in range(num_threads)]
    try:
        for thread in threads:
            thread.start()
        if meanwhile is not None:
            meanwhile()
        _join(threads)
    finally:
        _stop_and_join(threads, stop)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # or what failed would keep itself alive


def _stop_and_join(threads: Sequence[threading.Thread], stop: Callable[[], object]) -> None:
    interruption: BaseException | None = None
    while True:
        try:
            stop()
            _join(threads)
            break
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        # One that was not started cannot be joined. One whose start was interrupted finds that it is to stop.
        with contextlib.suppress(RuntimeError):
            thread.join()
