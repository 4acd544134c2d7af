"""The monitor against known allocations, in fresh processes where an old heap would blur the figures."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_memload.memory import MemoryMonitor, MemoryPeaks, host, monitor
from lightning_memload.memory.cgroup import CgroupMemory
from tests.fresh_process import run_fresh

MIB = 1 << 20
SLACK = 2 * MIB
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Straight from the kernel: malloc would keep freed memory, or hand out what the process already had.
PRELUDE = """
import ctypes, gc, mmap, os, threading, time
from lightning_memload.memory import MemoryMonitor

MIB = 1 << 20

def touched(memory):
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    ctypes.memset(view, 1, len(memory))
    del view
    return memory

def anonymous(num_bytes):
    return touched(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

def shared(num_bytes):
    return touched(mmap.mmap(-1, num_bytes))
"""


def fresh(program: str, **arguments: Any) -> Any:
    return run_fresh(PRELUDE + program, **arguments).result


def peaks_of(program: str, **arguments: Any) -> MemoryPeaks:
    return MemoryPeaks(**fresh(program, **arguments))


def known(figure: int | None) -> int:
    assert figure is not None
    return figure


@linux
@pytest.mark.memory
class TestCalibration:
    @pytest.mark.parametrize("num_mib", [0, 64, 200])
    def test_a_tick_at_the_maximum_needs_no_sampler(self, num_mib: int) -> None:
        peaks = peaks_of(
            """
with MemoryMonitor(interval_seconds=10) as monitor:
    if ARGS["num_mib"]:
        memory = anonymous(ARGS["num_mib"] * MIB)
        monitor.tick()
        memory.close()
RESULT = monitor.peaks.as_dict()
""",
            num_mib=num_mib,
        )
        assert abs(known(peaks.anonymous_above_start_bytes) - num_mib * MIB) < SLACK
        assert abs(known(peaks.anonymous_end_bytes) - known(peaks.anonymous_start_bytes)) < SLACK
        assert known(peaks.anonymous_upper_bound_bytes) - known(peaks.anonymous_peak_bytes) < SLACK
        assert known(peaks.file_backed_peak_bytes) < 64 * MIB
        # Start, tick, end: the 10 s of the sampler never passed.
        assert peaks.num_samples == (3 if num_mib else 2)

    def test_without_a_tick_the_rss_peak_and_the_bound_still_know(self) -> None:
        peaks = peaks_of(
            """
with MemoryMonitor(interval_seconds=10) as monitor:
    anonymous(64 * MIB).close()
RESULT = monitor.peaks.as_dict()
"""
        )
        # The very reason for ticks, for the sampler and for the bound.
        assert known(peaks.anonymous_above_start_bytes) < SLACK
        assert peaks.rss_peak_is_exact
        assert abs(peaks.rss_peak_bytes - peaks.rss_start_bytes - 64 * MIB) < SLACK
        bound_above_start = known(peaks.anonymous_upper_bound_bytes) - known(peaks.anonymous_start_bytes)
        assert abs(bound_above_start - 64 * MIB) < SLACK

    def test_a_spike_before_the_start_does_not_count(self) -> None:
        peaks = peaks_of(
            """
anonymous(128 * MIB).close()
with MemoryMonitor() as monitor:
    pass
RESULT = monitor.peaks.as_dict()
"""
        )
        assert peaks.rss_peak_bytes - peaks.rss_start_bytes < SLACK
        assert known(peaks.anonymous_upper_bound_bytes) - known(peaks.anonymous_start_bytes) < SLACK

    def test_the_sampler_sees_a_short_spike(self) -> None:
        # 40 ms are eight intervals. On a machine too busy to run the sampler for so long, the monitor must say so;
        # such runs prove nothing and are repeated.
        spikes = fresh(
            """
RESULT = []
for _ in range(50):
    with MemoryMonitor() as monitor:
        memory = anonymous(64 * MIB)
        time.sleep(0.040)
        memory.close()
    peaks = monitor.peaks
    if peaks.longest_gap_seconds < 0.035:
        RESULT.append(peaks.anonymous_above_start_bytes)
    if len(RESULT) == 5:
        break
"""
        )
        if not spikes:
            pytest.skip("the machine is too busy: no run had all its samples within 35 ms")
        assert min(spikes) > 62 * MIB
        assert max(spikes) < 66 * MIB

    def test_a_mapped_file_is_not_anonymous(self, tmp_path: Path) -> None:
        path = tmp_path / "mapped"
        path.write_bytes(b"x" * (64 * MIB))
        peaks = peaks_of(
            """
with open(ARGS["path"], "rb") as file, MemoryMonitor(interval_seconds=10) as monitor:
    memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset]
    monitor.tick()
    memory.close()
RESULT = monitor.peaks.as_dict()
""",
            path=path,
        )
        assert known(peaks.anonymous_above_start_bytes) < SLACK
        assert known(peaks.file_backed_peak_bytes) > 64 * MIB
        assert known(peaks.shmem_peak_bytes) == known(peaks.shmem_start_bytes)
        # Plain RSS calls the file memory, and the bound cannot tell; the estimate can.
        assert abs(peaks.rss_peak_bytes - peaks.rss_start_bytes - 64 * MIB) < SLACK
        assert known(peaks.anonymous_upper_bound_bytes) > known(peaks.anonymous_peak_bytes) + 60 * MIB
        assert known(peaks.required_bytes) < peaks.rss_start_bytes + 4 * MIB

    def test_shared_memory_is_counted_apart(self) -> None:
        peaks = peaks_of(
            """
with MemoryMonitor(interval_seconds=10) as monitor:
    memory = shared(32 * MIB)
    monitor.tick()
    memory.close()
RESULT = monitor.peaks.as_dict()
"""
        )
        assert known(peaks.shmem_peak_bytes) - known(peaks.shmem_start_bytes) == 32 * MIB
        assert known(peaks.anonymous_above_start_bytes) < SLACK
        assert known(peaks.file_backed_peak_bytes) < 32 * MIB
        assert abs(known(peaks.host_above_start_bytes) - 32 * MIB) < SLACK
        assert known(peaks.required_bytes) - peaks.rss_start_bytes > 30 * MIB

    def test_required_is_the_sum_of_what_cannot_be_dropped(self) -> None:
        start_file_bytes, figures = fresh(
            """
from lightning_memload.memory.host import read_status
with MemoryMonitor(interval_seconds=10) as monitor:
    memory = anonymous(16 * MIB)
    monitor.tick()
RESULT = [read_status().file_bytes, monitor.peaks.as_dict()]
"""
        )
        peaks = MemoryPeaks(**figures)
        kept = known(peaks.anonymous_peak_bytes) + known(peaks.shmem_peak_bytes) + known(peaks.page_table_bytes)
        assert abs(known(peaks.required_bytes) - kept - start_file_bytes) < SLACK
        assert known(peaks.page_table_bytes) > 0


@linux
@pytest.mark.memory
class TestSeveralWindows:
    def test_nested_windows_each_have_their_own_figures(self) -> None:
        outer, middle, inner = (
            MemoryPeaks(**figures)
            for figures in fresh(
                """
outer, inner = MemoryMonitor(interval_seconds=10), MemoryMonitor(interval_seconds=10)
with outer:
    memory = anonymous(96 * MIB)
    outer.tick()
    memory.close()
    with inner:
        memory = anonymous(32 * MIB)
        inner.tick()
        middle = outer.peaks
        memory.close()
RESULT = [outer.peaks.as_dict(), middle.as_dict(), inner.peaks.as_dict()]
"""
            )
        )
        assert abs(known(inner.anonymous_above_start_bytes) - 32 * MIB) < SLACK
        assert inner.rss_peak_is_exact
        assert abs(inner.rss_peak_bytes - inner.rss_start_bytes - 32 * MIB) < SLACK
        for peaks in (outer, middle):
            assert abs(known(peaks.anonymous_above_start_bytes) - 96 * MIB) < SLACK
            assert peaks.rss_peak_is_exact
            assert abs(peaks.rss_peak_bytes - peaks.rss_start_bytes - 96 * MIB) < SLACK

    def test_the_rss_mark_of_the_outer_window_survives_without_any_sample(self) -> None:
        # No sample has the spike: only the mark had it, and the inner window reset the mark.
        outer, inner = (
            MemoryPeaks(**figures)
            for figures in fresh(
                """
outer, inner = MemoryMonitor(interval_seconds=10), MemoryMonitor(interval_seconds=10)
with outer:
    anonymous(64 * MIB).close()
    with inner:
        pass
RESULT = [outer.peaks.as_dict(), inner.peaks.as_dict()]
"""
            )
        )
        assert abs(outer.rss_peak_bytes - outer.rss_start_bytes - 64 * MIB) < SLACK
        assert known(outer.anonymous_upper_bound_bytes) - known(outer.anonymous_start_bytes) > 62 * MIB
        assert inner.rss_peak_bytes - inner.rss_start_bytes < SLACK

    def test_windows_of_two_threads_may_overlap_in_any_order(self) -> None:
        # first:  |----64----|        ends while the second still runs
        # second:        |------32----|
        first, second = (
            MemoryPeaks(**figures)
            for figures in fresh(
                """
first, second = MemoryMonitor(interval_seconds=10), MemoryMonitor(interval_seconds=10)
second_began, first_ended = threading.Event(), threading.Event()

def run_second():
    with second:
        second_began.set()
        first_ended.wait()
        memory = anonymous(32 * MIB)
        second.tick()
        memory.close()

with first:
    memory = anonymous(64 * MIB)
    first.tick()
    memory.close()
    thread = threading.Thread(target=run_second)
    thread.start()
    second_began.wait()
first_ended.set()
thread.join()
RESULT = [first.peaks.as_dict(), second.peaks.as_dict()]
"""
            )
        )
        assert abs(known(first.anonymous_above_start_bytes) - 64 * MIB) < SLACK
        assert abs(known(second.anonymous_above_start_bytes) - 32 * MIB) < SLACK
        assert abs(first.rss_peak_bytes - first.rss_start_bytes - 64 * MIB) < SLACK
        assert abs(second.rss_peak_bytes - second.rss_start_bytes - 32 * MIB) < SLACK

    def test_a_monitor_can_be_used_again(self) -> None:
        first, second = (
            MemoryPeaks(**figures)
            for figures in fresh(
                """
monitor = MemoryMonitor(interval_seconds=10)
RESULT = []
for num_mib in (64, 16):
    with monitor:
        memory = anonymous(num_mib * MIB)
        monitor.tick()
        memory.close()
    RESULT.append(monitor.peaks.as_dict())
"""
            )
        )
        assert abs(known(first.anonymous_above_start_bytes) - 64 * MIB) < SLACK
        assert abs(known(second.anonymous_above_start_bytes) - 16 * MIB) < SLACK


@linux
class TestFork:
    def test_in_the_child_old_monitors_are_inert_and_new_ones_work(self) -> None:
        answer = fresh(
            """
import json
ballast = anonymous(64 * MIB)
outer = MemoryMonitor()
outer.start()
outer.tick()
num_threads, num_descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
read_end, write_end = os.pipe()
pid = os.fork()
if pid == 0:
    try:
        before = outer.peaks
        samples = outer.peaks.num_samples
        ballast.close()
        outer.tick()
        stopped = outer.stop()
        with MemoryMonitor(interval_seconds=0.001) as inner:
            memory = anonymous(32 * MIB)
            while inner.peaks.num_samples < 20:
                time.sleep(0.002)
            memory.close()
        outer.start()
        outer.tick()
        report = {
            "inert": [before.num_samples, stopped.num_samples],
            "parents_anonymous": before.anonymous_peak_bytes,
            "inner": inner.peaks.as_dict(),
            "again": outer.stop().as_dict(),
            "threads": threading.active_count(),
        }
        os.write(write_end, json.dumps(report).encode())
    finally:
        os._exit(0)
os.close(write_end)
with os.fdopen(read_end, "rb") as pipe:
    child = json.loads(pipe.read())
os.waitpid(pid, 0)
samples = outer.peaks.num_samples
outer.tick()
RESULT = {"child": child, "parent": outer.stop().as_dict(), "threads": num_threads, "still": outer.is_running}
"""
        )
        child = answer["child"]
        inert_before, inert_after = child["inert"]
        assert inert_before == inert_after
        assert child["parents_anonymous"] > 64 * MIB
        inner, again = MemoryPeaks(**child["inner"]), MemoryPeaks(**child["again"])
        assert abs(known(inner.anonymous_above_start_bytes) - 32 * MIB) < SLACK
        # The child gave the ballast back: a meter that still read the parent would see it.
        assert known(inner.anonymous_start_bytes) < 64 * MIB
        assert known(again.anonymous_peak_bytes) < 64 * MIB
        assert child["threads"] == 1
        assert answer["threads"] == 2
        assert known(MemoryPeaks(**answer["parent"]).anonymous_peak_bytes) > 64 * MIB
        assert answer["still"] is False

    def test_a_fork_while_the_lock_is_held_does_not_block_the_child(self) -> None:
        answer = fresh(
            """
from lightning_memload.memory import monitor as module
held, release = threading.Event(), threading.Event()

def hold():
    with module._PROCESS._lock:
        held.set()
        release.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
pid = os.fork()
if pid == 0:
    with MemoryMonitor() as monitor:
        monitor.tick()
    os._exit(7 if monitor.peaks.num_samples >= 3 else 8)
release.set()
thread.join()
RESULT = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
""",
            timeout_seconds=60,
        )
        assert answer == 7


class TestLifeCycle:
    @linux
    def test_no_thread_and_no_descriptor_is_left(self) -> None:
        gc.collect()
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            with MemoryMonitor(interval_seconds=0.001) as outer, MemoryMonitor() as inner:
                inner.tick()
                assert threading.active_count() == threads + 1
            assert outer.peaks.num_samples >= inner.peaks.num_samples
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) == descriptors

    def test_stopped_by_an_exception_too(self) -> None:
        memory_monitor = MemoryMonitor()
        with pytest.raises(KeyError), memory_monitor:
            raise KeyError("the user's own")
        assert not memory_monitor.is_running
        assert memory_monitor.peaks.num_samples >= 2

    def test_without_a_thread_the_ends_are_sampled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        memory_monitor = MemoryMonitor()
        with monkeypatch.context() as patch:
            patch.setattr(monitor._Sampler, "start", refuse)
            with memory_monitor:
                assert monitor._PROCESS._sampler is None
        assert memory_monitor.peaks.num_samples >= 2
        with memory_monitor:
            assert monitor._PROCESS._sampler is not None
        assert monitor._PROCESS._sampler is None

    def test_the_shortest_interval_serves_all(self) -> None:
        # The outer window alone would wait for an hour; the inner one must wake the thread that waits.
        with MemoryMonitor(interval_seconds=3600) as outer:
            with MemoryMonitor(interval_seconds=0.001) as inner:
                sampler = monitor._PROCESS._sampler
                assert sampler is not None
                assert sampler.interval_seconds == 0.001
                enough, window = threading.Event(), outer._window
                assert window is not None
                while window.num_samples < 20:
                    enough.wait(0.001)
            assert sampler.interval_seconds == 3600
        assert outer.peaks.num_samples > inner.peaks.num_samples >= 19
        assert not sampler.is_alive()

    def test_ticks_of_many_threads(self) -> None:
        num_threads, num_ticks = 8, 200

        def tick_often() -> None:
            for pinned_bytes in range(num_ticks):
                memory_monitor.tick(pinned_bytes)

        with MemoryMonitor(interval_seconds=3600) as memory_monitor:
            threads = [threading.Thread(target=tick_often) for _ in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        peaks = memory_monitor.peaks
        assert peaks.num_samples == num_threads * num_ticks + 2
        assert peaks.pinned_peak_bytes == num_ticks - 1

    @pytest.mark.slow
    def test_windows_of_many_threads(self) -> None:
        failures: list[BaseException] = []

        def cycle() -> None:
            try:
                for _ in range(30):
                    with MemoryMonitor(interval_seconds=0.001) as memory_monitor:
                        memory_monitor.tick()
                    assert memory_monitor.peaks.num_samples >= 3
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=cycle) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert monitor._PROCESS._windows == []
        assert monitor._PROCESS._sampler is None

    def test_tick_of_a_monitor_that_does_not_run_is_nothing(self) -> None:
        memory_monitor = MemoryMonitor(interval_seconds=3600)
        memory_monitor.tick(pinned_bytes=1)
        with memory_monitor:
            pass
        before = memory_monitor.peaks
        memory_monitor.tick(pinned_bytes=1)
        assert memory_monitor.peaks == before
        assert memory_monitor.stop() == before
        assert before.num_samples == 2
        assert before.pinned_peak_bytes is None

    def test_misuse_is_told(self) -> None:
        memory_monitor = MemoryMonitor()
        with pytest.raises(RuntimeError, match="never started"):
            _ = memory_monitor.peaks
        with pytest.raises(RuntimeError, match="never started"):
            memory_monitor.stop()
        with memory_monitor, pytest.raises(RuntimeError, match="already running"):
            memory_monitor.start()

    @pytest.mark.parametrize("interval_seconds", [0, -1, float("nan")])
    def test_the_interval_is_positive(self, interval_seconds: float) -> None:
        with pytest.raises(ValueError, match="interval_seconds must be positive"):
            MemoryMonitor(interval_seconds=interval_seconds)


class TestFigures:
    def test_json_and_back(self) -> None:
        with MemoryMonitor("cpu") as memory_monitor:
            pass
        figures = memory_monitor.peaks.as_dict()
        assert MemoryPeaks(**json.loads(json.dumps(figures))) == memory_monitor.peaks
        assert figures["cuda_allocated_peak_bytes"] is None

    @linux
    def test_peaks_so_far_and_final(self) -> None:
        with MemoryMonitor(interval_seconds=3600) as memory_monitor:
            so_far = memory_monitor.peaks
            memory_monitor.tick()
        final = memory_monitor.peaks
        assert 0 < so_far.seconds < final.seconds
        assert so_far.num_samples == 2
        assert final.num_samples == 4
        assert 0 < final.longest_gap_seconds <= final.seconds
        assert final == memory_monitor.peaks
        # These relations always hold, also after other work of this process.
        assert known(final.anonymous_start_bytes) <= known(final.anonymous_peak_bytes)
        assert known(final.anonymous_end_bytes) <= known(final.anonymous_peak_bytes)
        assert known(final.anonymous_peak_bytes) <= known(final.anonymous_upper_bound_bytes) <= final.rss_peak_bytes
        assert final.rss_start_bytes <= final.rss_peak_bytes

    @linux
    def test_a_mark_that_cannot_be_reset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mark_bytes = 40_000 * MIB
        monkeypatch.setattr(monitor, "reset_peak_rss", lambda: False)
        monkeypatch.setattr(monitor, "read_status", lambda: host.HostStatus(1, 2, 0, peak_rss_bytes=mark_bytes))
        with MemoryMonitor(interval_seconds=3600) as old:
            pass
        # The mark is from before the start: no peak of this window, but still a bound.
        assert not old.peaks.rss_peak_is_exact
        assert old.peaks.rss_peak_bytes < mark_bytes
        assert known(old.peaks.anonymous_peak_bytes) < known(old.peaks.anonymous_upper_bound_bytes) < mark_bytes
        with MemoryMonitor(interval_seconds=3600) as risen:
            mark_bytes = 50_000 * MIB
        # It rose inside the window, so it is this window's peak.
        assert risen.peaks.rss_peak_is_exact
        assert risen.peaks.rss_peak_bytes == mark_bytes

    def test_without_proc_only_rss_is_given(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(host, "_PROC_SELF", str(tmp_path / "nothing"))
        monkeypatch.setattr(CgroupMemory, "of_this_process", lambda: None)
        monkeypatch.setitem(sys.modules, "resource", None)
        with MemoryMonitor() as memory_monitor:
            memory_monitor.tick()
        figures = memory_monitor.peaks.as_dict()
        assert {name for name, figure in figures.items() if figure is not None} == {
            "seconds",
            "rss_start_bytes",
            "rss_peak_bytes",
            "rss_peak_is_exact",
            "num_samples",
            "longest_gap_seconds",
        }
        assert figures["rss_peak_is_exact"] is False
        assert memory_monitor.peaks.anonymous_above_start_bytes is None
        assert memory_monitor.peaks.host_above_start_bytes is None

    @linux
    @pytest.mark.memory
    @pytest.mark.cgroup
    def test_the_limit_in_force_is_reported(self) -> None:
        program = PRELUDE + "\nwith MemoryMonitor() as monitor:\n    pass\nRESULT = monitor.peaks.as_dict()"
        peaks = MemoryPeaks(**run_fresh(program, memory_limit_bytes=300 * MIB).result)
        assert peaks.cgroup_limit_bytes == 300 * MIB
        assert 0 < known(peaks.cgroup_peak_bytes) <= 300 * MIB

    @linux
    @pytest.mark.memory
    @pytest.mark.cgroup
    def test_required_bytes_is_what_a_limit_must_grant(self) -> None:
        # The claim of the headline: what is estimated survives, and what lies well below is killed.
        program = (
            PRELUDE
            + """
with MemoryMonitor(interval_seconds=10) as monitor:
    memory = anonymous(128 * MIB)
    monitor.tick()
RESULT = monitor.peaks.as_dict()
"""
        )
        required_bytes = known(MemoryPeaks(**run_fresh(program).result).required_bytes)
        assert run_fresh(program, memory_limit_bytes=required_bytes - 32 * MIB).killed
        assert not run_fresh(program, memory_limit_bytes=required_bytes + 32 * MIB).killed


class TestInterrupted:
    """A signal handler runs in the middle of a monitor's start, whose thread has the lock, and measures as well."""

    def test_a_monitor_within_the_start_of_another_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def handler() -> None:
            with MemoryMonitor(interval_seconds=1e-4):
                time.sleep(0.05)  # the sampling thread wants a sample by now

        _run_interrupted(monkeypatch, handler)

    def test_another_thread_that_the_handler_waits_for_ends_its_monitor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(monitor, "_LONGEST_TURN_SECONDS", 0.05)
        of_save = MemoryMonitor()
        of_save.start()

        def handler() -> None:
            thread = threading.Thread(target=of_save.stop)
            thread.start()
            thread.join()

        _run_interrupted(monkeypatch, handler)
        assert not of_save.is_running
        assert of_save.peaks.anonymous_peak_bytes


def _run_interrupted(monkeypatch: pytest.MonkeyPatch, handler: Callable[[], None]) -> None:
    """Starts a monitor, which calls the handler in the middle of that; fails if this does not end."""
    num_threads = threading.active_count()
    of_this_process = CgroupMemory.of_this_process

    def interrupted() -> Any:
        monkeypatch.setattr(CgroupMemory, "of_this_process", of_this_process)
        handler()
        return of_this_process()

    monkeypatch.setattr(CgroupMemory, "of_this_process", interrupted)
    outer = MemoryMonitor()

    def measure() -> None:
        with outer:
            pass

    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert outer.peaks.num_samples >= 2
    assert threading.active_count() <= num_threads
