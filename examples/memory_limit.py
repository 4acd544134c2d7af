"""Runs a command under a real memory limit: in a new control group (version 1 or 2), with swap included in the limit.

This needs permission to create control groups. Resource limits (``ulimit -v``) cannot replace it: they count address
space, so they already refuse to map a large file.
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
    """Return the reason why no limit can be set here, ``None`` if one can be set.

    To find out, it creates a control group and removes it again.
    """
    try:
        with control_group(1 << 40):
            return None
    except OSError as error:
        return str(error)


def run_limited(command: Sequence[str], limit_bytes: int) -> int:
    """Run a command with at most ``limit_bytes`` of memory, including swap.

    Returns:
        The exit status of the command, -9 if the kernel killed it at the limit.

    Raises:
        OSError: No limit can be set here.
    """
    with control_group(limit_bytes) as group:
        # The shell enters the group before exec replaces it by the command, so that every page of the command counts.
        enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return subprocess.run(["/bin/sh", "-c", enter, str(group), *command]).returncode


@contextlib.contextmanager
def control_group(limit_bytes: int) -> Iterator[Path]:
    """Create a control group with a memory limit, yield its directory, and remove it at the end.

    Raises:
        OSError: There is no memory controller, or this process may not use it.
    """
    is_v1 = (V1 / "memory.limit_in_bytes").exists()
    if not is_v1 and "memory" not in (V2 / "cgroup.subtree_control").read_text().split():
        raise OSError(f"{V2 / 'cgroup.subtree_control'} does not list the controller 'memory'")
    group = (V1 if is_v1 else V2) / f"memload-example-{os.getpid()}"
    group.mkdir()
    try:
        # In version 1 the limit with swap must never be below the limit without, so it is written second.
        memory, swap = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        if not is_v1:
            memory, swap = ("memory.max", "memory.swap.max")
        (group / memory).write_text(str(limit_bytes))
        if (group / swap).exists():  # A kernel that does not account for swap has no such file.
            (group / swap).write_text(str(limit_bytes if is_v1 else 0))
        yield group
    finally:
        remove(group)


def remove(group: Path, timeout_seconds: float = 10) -> None:
    """Remove a control group. Waits until the kernel has cleaned up the processes that were killed in it.

    Raises:
        OSError: The group still cannot be removed after ``timeout_seconds``.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
