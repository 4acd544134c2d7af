"""Host memory of this process as the kernel counts it, and the host memory that is available.

The idea: the machine must have the anonymous memory, while the kernel can take file-backed pages back. RSS is the sum
of the two, so it never replaces one of them. A figure that the platform does not report is ``None``, never 0 and never
RSS. Swapped-out pages are not included. Linux keeps the counters per CPU or per thread, so in kernels before 6.16 the
figures may lag by some pages for each core (2 MiB in total on 16 cores, more on very large hosts).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from lightning_memload.memory.cgroup import CgroupMemory

__all__ = [
    "HostMeter",
    "HostSample",
    "HostStatus",
    "IoBytes",
    "available_host_bytes",
    "major_faults",
    "read_io_bytes",
    "read_status",
    "reset_peak_rss",
]

_PROC_SELF = "/proc/self"

_STATUS_FIELDS = re.compile(rb"^(VmHWM|VmPTE|RssAnon|RssFile|RssShmem):\s*(\d+) kB", re.MULTILINE)
_IO_FIELDS = re.compile(rb"^(rchar|read_bytes): (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class HostSample:
    """One cheap sample of the memory of this process.

    Attributes:
        anonymous_bytes: Private memory without a file (RssAnon). ``None`` where the platform does not report it.
        file_backed_bytes: Mapped pages of files *and* of shared memory (RssFile + RssShmem). ``None`` where the
            platform does not report it.
        rss_bytes: All resident memory: the sum of the two.
    """

    anonymous_bytes: int | None
    file_backed_bytes: int | None
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class HostStatus:
    """The slower, more detailed figures of this process. A figure is ``None`` where the platform lacks it.

    Attributes:
        anonymous_bytes: RssAnon.
        file_bytes: RssFile, without shared memory.
        shmem_bytes: RssShmem: shared anonymous memory, tmpfs files, System V segments.
        peak_rss_bytes: VmHWM: the exact peak of RSS since the process began or since :func:`reset_peak_rss`. On
            Windows the peak working set, which cannot be reset.
        page_table_bytes: VmPTE: the page tables that the kernel keeps for the process.
    """

    anonymous_bytes: int | None = None
    file_bytes: int | None = None
    shmem_bytes: int | None = None
    peak_rss_bytes: int | None = None
    page_table_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class IoBytes:
    """The bytes that this process has read since it began.

    Attributes:
        storage_bytes: Bytes fetched from storage, by ``read`` or by a page fault. Excludes reads from the page cache.
        call_bytes: Bytes that ``read``-like calls returned, from the page cache or not. Excludes page faults.
    """

    storage_bytes: int
    call_bytes: int


class HostMeter:
    """Reads the memory of this process in two to four microseconds, through a descriptor that stays open.

    On Linux the source is ``/proc/self/statm``, whose (resident - shared) pages are exactly RssAnon. On other platforms
    psutil gives RSS only. The first read opens the descriptor, and :meth:`close` closes it. The meter can be used again
    after that. The first read is not thread-safe.
    """

    def __init__(self) -> None:
        self._fd: int | None = None
        self._pid: int | None = None
        self._process: psutil.Process | None = None
        self._page_bytes = 0

    def read(self) -> HostSample:
        """Take one sample of the calling process, also in a forked child of the process that made the meter."""
        # A descriptor of /proc/self belongs to the process that opened it: in a forked child it reads the parent.
        if self._pid != os.getpid():
            self._open()
        if self._fd is None:
            assert self._process is not None
            return HostSample(None, None, self._process.memory_info().rss)
        _, resident, shared, _ = os.pread(self._fd, 128, 0).split(b" ", 3)
        rss_bytes = int(resident) * self._page_bytes
        file_backed_bytes = int(shared) * self._page_bytes
        return HostSample(rss_bytes - file_backed_bytes, file_backed_bytes, rss_bytes)

    def close(self) -> None:
        """Close the descriptor if it is open. A later :meth:`read` opens a new one."""
        fd, self._fd, self._pid, self._process = self._fd, None, None, None
        if fd is not None:
            os.close(fd)

    def _open(self) -> None:
        # An inherited descriptor is forgotten, not closed: a daemonised child may have closed it long ago, and its
        # number may now belong to another file.
        self._fd = self._process = None
        # In sandboxed kernels (gVisor) "shared" in statm is always 0, so every page would count as anonymous. These
        # kernels have no RssAnon either, which identifies them.
        if read_status().anonymous_bytes is not None:
            try:
                self._fd = os.open(f"{_PROC_SELF}/statm", os.O_RDONLY)
                self._page_bytes = os.sysconf("SC_PAGE_SIZE")
            except OSError:
                self._fd = None
        if self._fd is None:
            self._process = psutil.Process()
        self._pid = os.getpid()


def read_status() -> HostStatus:
    """Read the detailed figures of this process, in 10 to 30 microseconds.

    Returns:
        The figures of ``/proc/self/status``. On Windows only the peak is set. On other platforms every field is
        ``None``.
    """
    content = _read_bytes(f"{_PROC_SELF}/status")
    if content is None:
        return HostStatus(peak_rss_bytes=getattr(psutil.Process().memory_info(), "peak_wset", None))
    kib = {name: int(value) for name, value in _STATUS_FIELDS.findall(content)}

    def in_bytes(name: bytes) -> int | None:
        return kib[name] * 1024 if name in kib else None

    return HostStatus(
        anonymous_bytes=in_bytes(b"RssAnon"),
        file_bytes=in_bytes(b"RssFile"),
        shmem_bytes=in_bytes(b"RssShmem"),
        peak_rss_bytes=in_bytes(b"VmHWM"),
        page_table_bytes=in_bytes(b"VmPTE"),
    )


def reset_peak_rss() -> bool:
    """Reset VmHWM of this process to its present RSS. Takes about 0.2 ms.

    The mark belongs to the whole process: every other reader of VmHWM or ``ru_maxrss`` sees the reset.

    Returns:
        ``False`` where the platform cannot reset it, or refuses to (a process that is not dumpable).
    """
    try:
        fd = os.open(f"{_PROC_SELF}/clear_refs", os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(fd, b"5")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def read_io_bytes() -> IoBytes | None:
    """Read how many bytes all threads of this process have read.

    Returns:
        ``None`` where the platform does not count them, or does not let the process read the counters.
    """
    content = _read_bytes(f"{_PROC_SELF}/io")
    counters = dict(_IO_FIELDS.findall(content)) if content is not None else {}
    if len(counters) != 2:
        return None
    return IoBytes(storage_bytes=int(counters[b"read_bytes"]), call_bytes=int(counters[b"rchar"]))


def major_faults() -> int | None:
    """Return the number of page faults of this process that waited for storage.

    Returns:
        The count since the process began; ``None`` on Windows.
    """
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def available_host_bytes(root: Path | str = "/") -> int | None:
    """Return how much host memory this process can still allocate without swapping or being killed.

    Args:
        root: The directory that contains ``proc`` and the control groups. Only tests use another one than ``/``.

    Returns:
        The smaller of the available memory of the machine and of the control groups, in bytes. File cache that the
        kernel can take back counts as available. ``None`` when neither is known.
    """
    rooms: list[int] = []
    try:
        rooms.append(psutil.virtual_memory().available)
    except (OSError, NotImplementedError):
        pass  # Some sandboxes have a /proc without meminfo. The control group may still have a limit.
    cgroup = CgroupMemory.of_this_process(root)
    cgroup_bytes = cgroup.available_bytes() if cgroup is not None else None
    if cgroup_bytes is not None:
        rooms.append(cgroup_bytes)
    return min(rooms, default=None)


def _read_bytes(path: str) -> bytes | None:
    # Unbuffered calls take half the time of open(). The sampling loop reads the status.
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return None
    finally:
        os.close(fd)
