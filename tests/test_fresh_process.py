from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fresh_process import FreshProcessError, run_fresh

# The lines say what happens: written bytes are resident, so the kernel must charge them.
ALLOCATE = """
block = b"x" * ARGS["size_bytes"]
RESULT = len(block)
"""


def add(left: int, right: int) -> dict[str, int]:
    print("a line that is not part of the result")
    return {"sum": left + right, "pid": os.getpid()}


def cgroups() -> set[Path]:
    return {*Path("/sys/fs/cgroup").glob("memload-*"), *Path("/sys/fs/cgroup/memory").glob("memload-*")}


def test_program_gets_arguments_and_gives_result() -> None:
    answer = run_fresh("RESULT = {'doubled': [2 * n for n in ARGS['numbers']]}; print('hello')", numbers=[1, 2, 3])
    assert answer.result == {"doubled": [2, 4, 6]}
    assert (answer.returncode, answer.killed, answer.stdout) == (0, False, "hello\n")


def test_program_without_result_gives_none() -> None:
    assert run_fresh("pass").result is None


def test_function_by_name_runs_in_another_process() -> None:
    answer = run_fresh("tests.test_fresh_process:add", left=2, right=40)
    assert answer.result["sum"] == 42
    assert answer.result["pid"] != os.getpid()


def test_program_can_spawn_processes_of_its_own() -> None:
    program = """
import multiprocessing

def square(number):
    return number * number

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        RESULT = pool.map(square, ARGS["numbers"])
"""
    assert run_fresh(program, numbers=[3, 4]).result == [9, 16]


def test_exception_shows_stderr_with_the_failing_line() -> None:
    with pytest.raises(FreshProcessError, match=r"(?s)exit status is 1.*ValueError: 7 is out of range") as caught:
        run_fresh("number = ARGS['number']\nraise ValueError(f'{number} is out of range')", number=7)
    assert "program.py" in caught.value.stderr
    assert caught.value.returncode == 1


def test_result_that_json_cannot_hold_is_an_error() -> None:
    with pytest.raises(FreshProcessError, match="set is not JSON serializable"):
        run_fresh("RESULT = {1, 2}")


def test_timeout_ends_the_program_and_shows_what_it_said() -> None:
    program = "import sys, threading; print('waiting', file=sys.stderr, flush=True); threading.Event().wait()"
    with pytest.raises(FreshProcessError, match=r"(?s)timeout.*waiting") as caught:
        run_fresh(program, timeout_seconds=2)
    assert caught.value.returncode is None


def test_kill_without_a_limit_is_an_error() -> None:
    with pytest.raises(FreshProcessError, match="exit status is -9"):
        run_fresh("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.cgroup
@pytest.mark.memory
def test_memory_limit_kills_what_exceeds_it() -> None:
    mib = 1 << 20
    before = cgroups()
    size_bytes = 200 * mib
    assert run_fresh(ALLOCATE, size_bytes=size_bytes).result == size_bytes
    assert run_fresh(ALLOCATE, size_bytes=size_bytes, memory_limit_bytes=300 * mib).result == size_bytes
    killed = run_fresh(ALLOCATE, size_bytes=size_bytes, memory_limit_bytes=100 * mib)
    assert (killed.killed, killed.returncode, killed.result) == (True, -9, None)
    assert cgroups() == before


@pytest.mark.cgroup
def test_memory_limit_leaves_no_cgroup_behind_when_the_program_fails() -> None:
    before = cgroups()
    with pytest.raises(FreshProcessError, match="under a limit of 104857600 bytes"):
        run_fresh("1 / 0", memory_limit_bytes=100 << 20)
    assert cgroups() == before
