"""Work in several threads, and in one thread if no other can be started."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from typing import Any

import pytest
import torch

from lightning_memload.transfer import Latch, run_threads, start_thread, threads


def test_a_signal_handler_may_wait_for_what_it_interrupts() -> None:
    latch, entered, waited = Latch(), threading.Event(), []

    def handler(*_: object) -> None:
        entered.set()
        latch.wait()
        waited.append(True)

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        assert entered.wait(60)
        latch.set()

    before = signal.signal(signal.SIGUSR2, handler)
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        latch.wait()
    finally:
        thread.join()
        signal.signal(signal.SIGUSR2, before)
    assert waited == [True]
    assert latch.is_set()
    latch.set()
    latch.wait()


@pytest.mark.parametrize("available", [0, 1, 3])
def test_the_calling_thread_does_what_no_thread_can(available: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start, asked = threading.Thread.start, []

    def refuse_some(thread: threading.Thread) -> None:
        asked.append(thread)
        if len(asked) > available:
            raise RuntimeError("can't start new thread")
        start(thread)

    done: list[int | None] = []
    told: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_some)
        run_threads(lambda: done.append(threading.get_ident()), 3, lambda: None, meanwhile=told.append)
        assert (start_thread(lambda: None, "one more") is None) is (available < 4)
    assert len(done) == max(1, available)
    assert (threading.get_ident() in done) is (available == 0)
    assert told == ([available] if available else [])


def test_an_error_of_the_calling_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def alone() -> None:
        raise KeyError("alone")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(KeyError, match="alone"):
        run_threads(lambda: None, 2, lambda: None, alone=alone)


@pytest.mark.parametrize(
    ("device", "cpus", "processes", "expected"),
    [
        ("cpu", 16, 1, 4),
        ("cuda", 16, 1, 12),
        ("cuda", 16, 4, 4),
        ("cpu", 2, 1, 2),
        ("cpu", 2, 8, 1),
        ("cuda", 1, 0, 1),
    ],
)
def test_the_default_number_shares_the_cpus(
    device: str, cpus: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "available_cpus", lambda: cpus)
    assert threads.default_threads(torch.device(device), processes) == expected


def test_cpus_of_this_process_alone_count() -> None:
    assert 1 <= threads.available_cpus() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("number", [None, 1, 64])
def test_numbers_of_threads_that_pass(number: int | None) -> None:
    threads.check_num_threads(number)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (0, ValueError, "num_threads must be at least 1, or None to choose, got 0"),
        (-3, ValueError, "got -3"),
        ("4", TypeError, "num_threads must be a whole number, or None to choose, got '4'"),
        (2.0, TypeError, r"got 2\.0"),
    ],
)
def test_numbers_of_threads_that_are_refused(number: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        threads.check_num_threads(number)


def test_the_first_error_is_raised_when_all_have_ended() -> None:
    stopped, running, numbers = threading.Event(), threading.Semaphore(0), itertools.count()

    def work() -> None:
        number = next(numbers)
        running.release()
        if number == 2:
            raise KeyError("the third")
        assert stopped.wait(60)

    before = threading.active_count()
    with pytest.raises(KeyError, match="the third"):
        run_threads(work, 3, stopped.set)
    assert threading.active_count() <= before  # a thread of an earlier test may end meanwhile
    assert all(running.acquire(blocking=False) for _ in range(3))


def test_an_error_meanwhile_ends_the_threads() -> None:
    stopped = threading.Event()
    ended: list[bool] = []

    def meanwhile(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_threads(lambda: ended.append(stopped.wait(60)), 2, stopped.set, meanwhile=meanwhile)
    assert ended == [True, True]
