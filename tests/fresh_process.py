"""Run Python in a fresh interpreter, on request under a real memory limit.

A peak means something only in a process that did nothing before, and "it fits" only where the kernel kills what
does not. A program gets its arguments and gives its result as JSON, through files, so it may print what it likes.
The memory limit is a cgroup of its own (v1 or v2, swap included), made for one run and removed after it: resource
limits are no substitute, since they refuse the mapping of a large file itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FreshProcessError", "FreshResult", "memory_cgroup_obstacle", "run_fresh", "run_program"]

_REPOSITORY = Path(__file__).resolve().parent.parent

_CGROUP_V1 = Path("/sys/fs/cgroup/memory")
_CGROUP_V2 = Path("/sys/fs/cgroup")

# runpy makes the program the real __main__, with a file: tracebacks show its lines, and what multiprocessing
# spawns from it can import it again. The result is written only after the program ended well.
_LAUNCHER = """\
import json, pathlib, runpy, sys
folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
sys.argv = [str(folder / "program.py")]
arguments = json.loads((folder / "arguments.json").read_text())
names = runpy.run_path(sys.argv[0], init_globals={"ARGS": arguments}, run_name="__main__")
(folder / "result.json").write_text(json.dumps(names.get("RESULT")))
"""

_CALL_FUNCTION = """\
import importlib
RESULT = getattr(importlib.import_module({module!r}), {function!r})(**ARGS)
"""


class FreshProcessError(AssertionError):
    """The program failed: it raised, exited with a status, was killed without a limit, or took too long.

    Attributes:
        returncode: Its exit status, negative for a signal, ``None`` when it ran into the timeout.
        stdout: What it printed.
        stderr: Its error output, which the message shows too.
    """

    def __init__(self, message: str, *, returncode: int | None, stdout: str, stderr: str) -> None:
        super().__init__(f"{message}\n--- stdout ---\n{stdout[-4000:]}\n--- stderr ---\n{stderr[-16000:]}")
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


@dataclass(frozen=True, slots=True)
class FreshResult:
    """The results of a program.

    Attributes:
        returncode: 0, or -9 when ``killed``.
        result: What the program assigned to ``RESULT``, ``None`` when it assigned nothing or was killed.
        stdout: What it printed.
        stderr: Its error output.
        killed: The kernel killed it at its memory limit.
    """

    returncode: int
    result: Any
    stdout: str
    stderr: str
    killed: bool


def run_fresh(
    source: str,
    *,
    timeout_seconds: float = 300,
    memory_limit_bytes: int | None = None,
    **kwargs: object,
) -> FreshResult:
    """Run ``source`` in a new interpreter of the same environment and wait for it.

    Args:
        source: The text of a program that reads the dict ``ARGS`` and assigns ``RESULT`` (both JSON), or
            ``"module:function"``, which is called with ``kwargs`` and whose return value is the result.
        timeout_seconds: After this the program and its children are killed.
        memory_limit_bytes: Run it in a memory cgroup with this limit, swap included; the interpreter itself
            (some 10 MiB) and page cache that cannot be dropped count. ``None``: no limit.
        **kwargs: What the program gets as ``ARGS``: anything that JSON can hold, and paths, which become strings.

    Returns:
        The result; ``killed`` tells that the program died at its memory limit.

    Raises:
        FreshProcessError: The program failed otherwise; the message holds its output.
        OSError: A limit was asked for where no memory cgroup can be made (see ``memory_cgroup_obstacle``).
    """
    called = re.fullmatch(r"([\w.]+):(\w+)", source)
    program = _CALL_FUNCTION.format(module=called[1], function=called[2]) if called else source
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memload-fresh-")))
        (folder / "program.py").write_text(program)
        (folder / "arguments.json").write_text(json.dumps(kwargs, default=os.fspath))
        # -X faulthandler: a crash in native code shows where it happened.
        command = [sys.executable, "-X", "faulthandler", "-c", _LAUNCHER, str(folder), str(_REPOSITORY)]
        if memory_limit_bytes is not None:
            cgroup = stack.enter_context(_memory_cgroup(memory_limit_bytes))
            # The shell enters the cgroup before the exec, so every page of the interpreter is charged there.
            enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
            command = ["/bin/sh", "-c", enter, str(cgroup), *command]
        returncode, stdout, stderr = _run(command, timeout_seconds)
        killed = memory_limit_bytes is not None and returncode == -signal.SIGKILL
        if returncode != 0 and not killed:
            reason = "it ran into its timeout" if returncode is None else f"its exit status is {returncode}"
            limit = "" if memory_limit_bytes is None else f" under a limit of {memory_limit_bytes} bytes"
            message = f"The fresh process{limit} failed: {reason} (timeout_seconds={timeout_seconds:g})."
            raise FreshProcessError(message, returncode=returncode, stdout=stdout, stderr=stderr)
        result = None if killed else json.loads((folder / "result.json").read_text())
    return FreshResult(returncode=returncode or 0, result=result, stdout=stdout, stderr=stderr, killed=killed)


def memory_cgroup_obstacle() -> str | None:
    """Say why no memory cgroup can be made here, ``None`` when one can. Makes one and removes it again."""
    try:
        with _memory_cgroup(1 << 40):
            return None
    except OSError as error:
        return f"no writable memory cgroup: {error}"


def run_program(program: Path, timeout_seconds: float = 500, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program file, which may start ranks: with this repository on its path, and one thread for each process.

    Args:
        program: The file.
        timeout_seconds: After this the program and its ranks are killed, and its status is -9. On a busy machine ranks
            take minutes to import torch.
        **environment: Further variables of its environment.
    """
    variables = {**os.environ, "PYTHONPATH": str(_REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(program)]
    returncode, stdout, stderr = _run(command, timeout_seconds, variables)
    return subprocess.CompletedProcess(command, -9 if returncode is None else returncode, stdout, stderr)


def _run(
    command: list[str], timeout_seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str, str]:
    """Run a command in a session of its own; returns its status (``None``: timed out), output and error output."""
    # A session of its own: a timeout then also ends what the program started.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    with process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            return None, stdout, stderr
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, stdout, stderr


@contextlib.contextmanager
def _memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """Make a memory cgroup with a hard limit, swap included; remove it, and kill what is left in it, at the end.

    Raises:
        OSError: There is no memory controller here, or it may not be used.
    """
    is_v1 = (_CGROUP_V1 / "memory.limit_in_bytes").exists()
    if not is_v1:
        controllers = _CGROUP_V2 / "cgroup.subtree_control"
        if "memory" not in (controllers.read_text().split() if controllers.exists() else []):
            raise OSError(f"{_CGROUP_V1} is no memory controller, and {controllers} does not name 'memory'")
    cgroup = (_CGROUP_V1 if is_v1 else _CGROUP_V2) / f"memload-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    cgroup.mkdir()
    try:
        # The order matters in v1: the limit with swap may never lie below the limit without.
        limit = "memory.limit_in_bytes" if is_v1 else "memory.max"
        (cgroup / limit).write_text(str(limit_bytes))
        swap, swap_limit_bytes = ("memory.memsw.limit_in_bytes", limit_bytes) if is_v1 else ("memory.swap.max", 0)
        if (cgroup / swap).exists():
            (cgroup / swap).write_text(str(swap_limit_bytes))
        yield cgroup
    finally:
        _remove_cgroup(cgroup)


def _remove_cgroup(cgroup: Path, *, timeout_seconds: float = 10) -> None:
    """Kill what is left in a cgroup and remove it.

    Raises:
        OSError: It could not be emptied within the timeout.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        for process_id in (cgroup / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process_id), signal.SIGKILL)
        try:
            cgroup.rmdir()
        except OSError:
            # A killed process stays in its cgroup until the kernel has torn it down.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
