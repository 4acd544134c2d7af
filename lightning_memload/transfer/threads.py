"""Threads that share one task: their number, their start and their end.

Each thread takes the next item until no item is left. If one thread fails, or the caller is interrupted, the others
end after their current item. No thread outlives the call. If no thread can be started, the calling thread does the
work: an interpreter that shuts down refuses new threads (Python 3.12 and newer; executors refuse work in every
version), and the machine may have reached its limit of threads.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections.abc import Callable, Sequence

import torch

__all__ = [
    "MAX_THREADS_REMOTE",
    "Latch",
    "available_cpus",
    "check_num_threads",
    "check_whole",
    "default_threads",
    "run_threads",
    "start_thread",
]

# Measured on one H100 with 16 cores (examples/benchmarks/streaming.py). For CPU memory, more than 4 are not faster.
_MAX_THREADS_DEVICE = 12
_MAX_THREADS_CPU = 4
# Connections of one host. They wait for the network most of the time, so they may be more than the CPUs.
MAX_THREADS_REMOTE = 16


def available_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(device: torch.device, num_processes: int = 1, *, is_remote: bool = False) -> int:
    """Returns the default number of threads that read.

    Args:
        device: Device of the tensors.
        num_processes: Number of processes on this host that do the same at the same time and share its CPUs.
        is_remote: Whether the bytes come over a network.
    """
    if is_remote:
        return max(1, MAX_THREADS_REMOTE // max(1, num_processes))
    most = _MAX_THREADS_CPU if device.type == "cpu" else _MAX_THREADS_DEVICE
    return max(1, min(most, available_cpus() // max(1, num_processes)))


def check_num_threads(num_threads: int | None) -> None:
    """Validates the argument ``num_threads`` of a user. ``None`` is valid.

    Raises:
        TypeError: The argument is not an integer.
        ValueError: The argument is less than 1.
    """
    if num_threads is not None:
        check_whole("num_threads", num_threads, "a whole number, or None to choose")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, or None to choose, got {num_threads}.")


class Latch:
    """A flag that is set once. A signal handler may wait for it, even if it interrupts a wait for the same flag.

    ``threading.Event`` is not safe for this: its ``wait`` takes a lock, and a handler in the same thread that waits for
    the same event blocks forever on that lock.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether the flag is set."""
        return self._is_set

    def set(self) -> None:
        """Sets the flag and wakes all waiting threads. Only one thread may call this. It may do so twice."""
        if not self._is_set:
            self._is_set = True
            self._lock.release()

    def wait(self) -> None:
        """Blocks until the flag is set."""
        # The lock is free only after the flag is set. If the interrupted thread holds the lock, the handler sees that
        # the flag is set and does not wait for the lock.
        while not self._is_set:
            with self._lock:
                pass


def start_thread(work: Callable[[], None], name: str) -> threading.Thread | None:
    """Starts a thread that is not a daemon: the process ends only after the thread.

    Returns:
        The thread, or ``None`` if no thread can be started. The caller must then do the work.
    """
    thread = threading.Thread(target=work, name=name)
    return thread if _start(thread) else None


def check_whole(name: str, value: object, words: str) -> None:
    """Refuses a value that is not an integer, such as the string "4".

    Args:
        name: Name of the argument, for the message.
        value: Value of the argument.
        words: Description of a valid value, for the message.

    Raises:
        TypeError: ``value`` is not an integer.
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
    """Does the same work in several threads. Returns only after all of them have ended, even if it is interrupted.

    Args:
        work: Called once in each thread. Must return at once if ``stop`` was called before.
        num_threads: Number of threads. Fewer are used if so many cannot be started.
        stop: Makes ``work`` return soon, at any point. A thread that fails calls it, and this function calls it at the
            end, possibly several times. It must not take a lock: an interruption may end it anywhere.
        meanwhile: Called in the calling thread while the threads work, with the number of threads. Must return when
            the threads have ended.
        alone: Called in the calling thread if no thread can be started. It does all the work. ``None`` means ``work``.

    Raises:
        BaseException: The exception of ``meanwhile`` or ``alone``, or of the first thread that failed.
    """
    errors: list[BaseException] = []

    def work_or_stop() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
            stop()

    # Not an executor: its locks stay locked if it is interrupted while it starts a thread.
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
            errors.clear()  # else the exception and its traceback keep each other alive


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
        # A thread that was not started cannot be joined. A thread whose start was interrupted sees the stop flag.
        with contextlib.suppress(RuntimeError):
            thread.join()
