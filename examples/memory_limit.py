"""Run a command under a real memory limit: a control group of its own (v1 or v2, swap included), where that is allowed.

Resource limits (``ulimit -v``) are no substitute: they count addresses, and refuse the mapping of a large file itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


def obstacle() -> str | None:
    """Say why no limit can be set here, ``None`` if one can. Makes a control group and removes it again."""
    try:
        with control_group(1 << 40):
            return None
    except OSError as error:
        return str(error)


def run_limited(command: Sequence[str], limit_bytes: int) -> int:
    """Run a command that gets no more than ``limit_bytes`` of memory, swap included.

    Returns:
        Its exit status, -9 if the kernel killed it at the limit.

    Raises:
        OSError: No limit can be set here.
    """
    with control_group(limit_bytes) as group:
        # The shell enters the group before it becomes the command, so that every page counts.
        enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return subprocess.run(["/bin/sh", "-c", enter, str(group), *command]).returncode


@contextlib.contextmanager
def control_group(limit_bytes: int) -> Iterator[Path]:
    """Make a control group with a memory limit, and remove it at the end.

    Raises:
        OSError: There is no memory controller, or it may not be used.
    """
    is_v1 = (V1 / "memory.limit_in_bytes").exists()
    if not is_v1 and "memory" not in (V2 / "cgroup.subtree_control").read_text().split():
        raise OSError(f"{V2 / 'cgroup.subtree_control'} does not name 'memory'")
    group = (V1 if is_v1 else V2) / f"memload-example-{os.getpid()}"
    group.mkdir()
    try:
        # Of v1's two limits the one with swap may never be the lower one, so it comes second.
        memory, swap = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        if not is_v1:
            memory, swap = ("memory.max", "memory.swap.max")
        (group / memory).write_text(str(limit_bytes))
        if (group / swap).exists():  # A kernel without accounting of swap has no such file.
            (group / swap).write_text(str(limit_bytes if is_v1 else 0))
        yield group
    finally:
        remove(group)


def remove(group: Path, timeout_seconds: float = 10) -> None:
    """Remove a control group as soon as the kernel has torn down what was killed in it."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
