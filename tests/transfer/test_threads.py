"""What several threads share, and what is left where there are none."""

from __future__ import annotations

import signal
import threading

import pytest

from lightning_memload.transfer import Latch, run_threads, start_thread


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
