"""The memory control groups of this process: their limits and their usage.

Supports both versions of the hierarchy, also in containers, where only a part of it is visible. Limits of ancestors
apply as well. Usage includes the page cache, so a group that read a large file looks full. A figure that cannot be
read is ``None``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

__all__ = ["CgroupMemory"]

# "No limit" is a word in v2 and the largest page-aligned integer in v1, which depends on the page size.
_NO_LIMIT_BYTES = 1 << 60


class CgroupMemory:
    """The memory control groups of this process: its own group first, then the visible ancestors.

    Each call reads the current figure. Limits of ancestors apply too: the tightest limit is the one in force.

    Args:
        directories: The group's own directory, then its ancestors' up to the mount point.
        version: The hierarchy: 1 or 2.
    """

    def __init__(self, directories: Sequence[Path], version: Literal[1, 2]) -> None:
        self.directories = tuple(directories)
        self.version = version

    @classmethod
    def of_this_process(cls, root: Path | str = "/") -> CgroupMemory | None:
        """Find the groups of this process.

        Args:
            root: The directory that contains ``proc`` and the mounts. Only tests use another one than ``/``.

        Returns:
            ``None`` when the platform has no control groups or no memory controller is mounted.
        """
        root = Path(root)
        memberships = _memberships(root)
        # A hybrid system has both lines. The memory controller is in one hierarchy only, and v1 lists it by name.
        version: Literal[1, 2]
        if "memory" in memberships:
            version, path = 1, memberships["memory"]
        elif "" in memberships:
            version, path = 2, memberships[""]
        else:
            return None
        directories = _group_directories(root, version, path)
        return cls(directories, version) if directories else None

    def limit_bytes(self) -> int | None:
        """Return the tightest limit of the group and its ancestors in bytes, ``None`` when there is none."""
        return self._limit_bytes(self._in_force())

    def usage_bytes(self) -> int | None:
        """Return the usage of the group whose limit is in force, in bytes. Without any limit it is the process's group.

        Usage includes the page cache, so a group that read a large file looks full. See
        :meth:`reclaimable_file_bytes`.
        """
        return self._usage_bytes(self._in_force())

    def peak_bytes(self) -> int | None:
        """Return the highest usage of that group since its creation, in bytes, including the page cache.

        ``None`` for version 2 before Linux 5.19.
        """
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        return _read_int(self._in_force() / name)

    def reclaimable_file_bytes(self) -> int | None:
        """Return the part of that group's usage that is file cache, in bytes. The kernel takes it back on demand."""
        return self._reclaimable_file_bytes(self._in_force())

    def available_bytes(self) -> int | None:
        """Return how much memory the process can still allocate before it reaches a limit, in bytes.

        Returns:
            The minimum over all levels of limit - usage + reclaimable file cache, at least 0; ``None`` without limits.
        """
        rooms = []
        for directory in self.directories:
            limit_bytes, usage_bytes = self._limit_bytes(directory), self._usage_bytes(directory)
            if limit_bytes is not None and usage_bytes is not None:
                rooms.append(max(0, limit_bytes - usage_bytes + (self._reclaimable_file_bytes(directory) or 0)))
        return min(rooms, default=None)

    def _in_force(self) -> Path:
        limited = [(limit, place) for place in self.directories if (limit := self._limit_bytes(place)) is not None]
        # Of equal limits the ancestor's is reached first: the ancestor is charged for its other children too.
        return min(reversed(limited), key=lambda pair: pair[0])[1] if limited else self.directories[0]

    def _limit_bytes(self, directory: Path) -> int | None:
        candidates: list[int | None]
        if self.version == 2:
            candidates = [_read_int(directory / "memory.max")]
        else:
            # The second one includes the ancestors above a container's mount point. Their directories are not visible.
            hierarchical = _read_counters(directory / "memory.stat").get("hierarchical_memory_limit")
            candidates = [_read_int(directory / "memory.limit_in_bytes"), hierarchical]
        return min((limit for limit in candidates if limit is not None and limit < _NO_LIMIT_BYTES), default=None)

    def _usage_bytes(self, directory: Path) -> int | None:
        return _read_int(directory / ("memory.usage_in_bytes" if self.version == 1 else "memory.current"))

    def _reclaimable_file_bytes(self, directory: Path) -> int | None:
        counters = _read_counters(directory / "memory.stat")
        # Version 1 has two sets of counters. Only total_* includes the children, as the usage does.
        prefix = "total_" if self.version == 1 else ""
        try:
            return counters[f"{prefix}inactive_file"] + counters[f"{prefix}active_file"]
        except KeyError:
            return None


def _memberships(root: Path) -> dict[str, str]:
    """Map each controller of ``/proc/self/cgroup`` to the group's path; the version 2 hierarchy has the name ""."""
    memberships = {}
    for line in _read_lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        memberships.update(dict.fromkeys(controllers.split(","), path))
    return memberships


def _group_directories(root: Path, version: Literal[1, 2], path: str) -> list[Path]:
    """List the directories of a group and its ancestors, the group first; empty when no hierarchy is mounted."""
    mounts = [(mount_root, root / point.lstrip("/")) for mount_root, point in _cgroup_mounts(root, version)]
    if not mounts:
        default = root / ("sys/fs/cgroup/memory" if version == 1 else "sys/fs/cgroup")
        if not default.is_dir():
            return []
        mounts = [("/", default)]
    for mount_root, point in mounts:
        directory = _inside_mount(mount_root, point, path)
        if directory is not None:
            break
    else:
        # In some containers /proc/self/cgroup shows the host's path, and the mount shows the container's group only.
        # The mount point is then the directory of the group.
        point = directory = mounts[0][1]
    above = len(directory.relative_to(point).parts)
    return [directory, *directory.parents[:above]]


def _inside_mount(mount_root: str, point: Path, path: str) -> Path | None:
    """Return the directory of group ``path`` under a mount point that shows the hierarchy below ``mount_root``."""
    group = path.strip("/").split("/") if path != "/" else []
    shown = mount_root.strip("/").split("/") if mount_root != "/" else []
    # ".." is a directory outside the cgroup namespace.
    if ".." in group or ".." in shown or group[: len(shown)] != shown:
        return None
    directory = point.joinpath(*group[len(shown) :])
    return directory if directory.is_dir() else None


def _cgroup_mounts(root: Path, version: Literal[1, 2]) -> Iterator[tuple[str, str]]:
    """Yield (group shown at the mount point, mount point) of each mount of the memory hierarchy."""
    for line in _read_lines(root / "proc/self/mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        mount_fields, kind, options = mount.split(), filesystem.split()[:1], filesystem.split()[-1:]
        wanted = kind == ["cgroup2"] if version == 2 else kind == ["cgroup"] and "memory" in options[0].split(",")
        if wanted and len(mount_fields) >= 5:
            yield _unescape(mount_fields[3]), _unescape(mount_fields[4])


def _unescape(field: str) -> str:
    # mountinfo writes space, tab, newline and backslash as \040 and so on.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" (no limit) raises ValueError.
        return None


def _read_counters(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read_lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
