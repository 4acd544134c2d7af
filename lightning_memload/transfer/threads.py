"""Threads that share one piece of work: how many, and that they end together.

Each takes what comes next until nothing is left. When one fails, or the caller is interrupted, the others end after
what they are at, and none outlives the call. Where no thread can be started, the calling thread does the work: an
interpreter that shuts down refuses new threads (Python 3.12 and newer; executors refuse work in every version), and a
machine may have no more of them.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections.abc import Callable, Sequence

import torch

__all__ = [
    "Latch",
    "available_cpus",
    "check_num_threads",
    "check_whole",
    "default_threads",
    "run_threads",
    "start_thread",
]

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
        TypeError: It is no number, and not ``None``.
        ValueError: It is less than 1, and not ``None``.
    """
    if num_threads is not None:
        check_whole("num_threads", num_threads, "a whole number, or None to choose")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, or None to choose, got {num_threads}.")


class Latch:
    """Something that happens once. Waiting for it is safe in a signal handler that interrupts a wait for the same.

    ``threading.Event`` takes a lock to wait, and a handler that waits meanwhile in the same thread takes it in vain.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._is_set

    def set(self) -> None:
        """Lets all waiting threads go on. To be called by one thread; twice is fine."""
        if not self._is_set:
            self._is_set = True
            self._lock.release()

    def wait(self) -> None:
        """Returns when it has happened."""
        # The lock can be had only when it has happened: a handler that finds it taken then need not wait for it.
        while not self._is_set:
            with self._lock:
                pass


def start_thread(work: Callable[[], None], name: str) -> threading.Thread | None:
    """Starts a thread, which the end of the process waits for.

    Returns:
        The thread; ``None`` if none can be started. The caller then has to do the work.
    """
    thread = threading.Thread(target=work, name=name)
    return thread if _start(thread) else None


def check_whole(name: str, value: object, words: str) -> None:
    """Refuses what is no whole number, such as the text of one.

    Raises:
        TypeError: ``value`` is none.
    """
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name} must be {words}, got {value!r}.") from error


def run_threads(
    work: Callable[[], None],
    num_threads: int,
    stop: Callable[[], object],
    *,
    meanwhile: Callable[[int], None] | None = None,
    alone: Callable[[], None] | None = None,
) -> None:
    """Does the same work in several threads and returns when all of them have ended, however often it is interrupted.

    Args:
        work: Is called once in each thread, and ends at once if ``stop`` was called before.
        num_threads: How many, or fewer where so many cannot be started.
        stop: Makes ``work`` end soon, wherever it is. Called when a thread has failed, by that thread, and at the end,
            perhaps several times. Must take no lock: an interruption may end it anywhere.
        meanwhile: Is called in this thread, with the number of threads, while they work. Must end when they do.
        alone: Does everything in this thread where no thread can be started. ``None``: ``work`` does.

    Raises:
        BaseException: What ``meanwhile`` or ``alone`` raised, or the first of the failed threads.
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
        started = next((number for number, thread in enumerate(threads) if not _start(thread)), num_threads)
        if not started:
            (alone or work)()
        elif meanwhile is not None:
            meanwhile(started)
        _join(threads)
    finally:
        _stop_and_join(threads, stop)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # or what failed would keep itself alive


def _start(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


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
