"""Reads files into the page cache of the kernel, so that a job that starts later finds them there.

The kernel may take the pages back at any time, for example when the files are larger than the free memory.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from lightning_memload.errors import CheckpointReadError, MemloadError
from lightning_memload.storage.places import is_local, path_of
from lightning_memload.transfer.threads import available_cpus, check_num_threads, run_threads

__all__ = ["PrefetchStats", "prefetch_checkpoint"]

# Each thread has one buffer of this size.
_BLOCK_BYTES = 1 << 20
# Most disks need several requests at a time. The threads wait for the disk and need no core of their own.
_MIN_THREADS, _MAX_THREADS = 4, 16
_MAX_OPEN_FILES = 512


@dataclass(frozen=True, slots=True)
class PrefetchStats:
    """The figures of a prefetch.

    Attributes:
        path: The file or directory.
        num_files: Number of files.
        bytes_read: Bytes that were read from the disk.
        bytes_cached: Bytes that were in the page cache already. Where the kernel cannot tell, they count as read.
        seconds: Wall time.
        num_threads: Number of threads that read.
    """

    path: str
    num_files: int
    bytes_read: int
    bytes_cached: int
    seconds: float
    num_threads: int


def prefetch_checkpoint(
    path: str | os.PathLike[str],
    *,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PrefetchStats:
    """Reads a checkpoint into the page cache. What is there already is not read from the disk again.

    Args:
        path: A local file, or a directory, of which all files in all folders are read. The content does not matter.
        num_threads: Number of threads that read. ``None`` means two per CPU, at least 4 and at most 16.
        progress: Called after every part with the bytes done and all bytes, one call at a time.

    Returns:
        The figures.

    Raises:
        FileNotFoundError: Nothing exists at this path.
        MemloadError: The path is not on a disk of this machine.
        CheckpointReadError: Reading failed.
        ValueError: ``num_threads`` is below 1.

    Peak memory: 1 MiB for each thread. The page cache is not memory of the process.
    """
    started = time.perf_counter()
    check_num_threads(num_threads)
    name = path_of(path)
    if not is_local(name):
        raise MemloadError(f"{name} is not on a disk of this machine, so there is nothing to prefetch.")
    files = _files_under(name)
    threads = num_threads or max(_MIN_THREADS, min(_MAX_THREADS, 2 * available_cpus()))
    bytes_read = bytes_cached = 0
    total_bytes = sum(nbytes for _, nbytes in files)
    for start in range(0, len(files), _MAX_OPEN_FILES):
        run = _Prefetch(files[start : start + _MAX_OPEN_FILES], bytes_read + bytes_cached, total_bytes, progress)
        run.read_all(threads)
        bytes_read, bytes_cached = bytes_read + run.bytes_read, bytes_cached + run.bytes_cached
    return PrefetchStats(name, len(files), bytes_read, bytes_cached, time.perf_counter() - started, threads)


def _files_under(path: str) -> list[tuple[str, int]]:
    """Path and size of each regular file. Links to files are followed, as in caches of downloads."""
    if not os.path.isdir(path):
        names = [path]
    else:
        names = [os.path.join(folder, name) for folder, _, found in os.walk(path) for name in sorted(found)]
        names = [name for name in names if os.path.isfile(name)]
    return [(name, os.stat(name).st_size) for name in names]


class _Prefetch:
    """The blocks of some files. Each thread takes the next one."""

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        done_bytes: int,
        total_bytes: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._files = files
        self._done_bytes = done_bytes
        self._total_bytes = total_bytes
        self._progress = progress
        self._lock = threading.Lock()
        self._stopped = False
        self._nowait = getattr(os, "RWF_NOWAIT", 0)
        self._descriptors: list[int] = []
        self._blocks = self._cut()
        self.bytes_read = self.bytes_cached = 0

    def read_all(self, num_threads: int) -> None:
        with ExitStack() as stack:
            for path, _ in self._files:
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                stack.callback(os.close, descriptor)
                if hasattr(os, "posix_fadvise"):
                    # No read-ahead: the blocks of the other threads would look as if they had been cached before.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                self._descriptors.append(descriptor)
            run_threads(self._work, num_threads, self._stop)

    def _cut(self) -> Iterator[tuple[int, int, int]]:
        for number, (_, nbytes) in enumerate(self._files):
            for start in range(0, nbytes, _BLOCK_BYTES):
                yield number, start, min(_BLOCK_BYTES, nbytes - start)

    def _stop(self) -> None:
        self._stopped = True

    def _work(self) -> None:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while not self._stopped:
            with self._lock:
                block = next(self._blocks, None)
            if block is None:
                return
            number, start, nbytes = block
            path, _ = self._files[number]
            try:
                cached, read = self._read(self._descriptors[number], buffer[:nbytes], start)
            except OSError as error:
                raise CheckpointReadError(
                    f"{path} cannot be read at byte {start}: {error}.",
                    path=path,
                    key=None,
                    offset=start,
                    errno=error.errno,
                ) from error
            with self._lock:
                self.bytes_cached += cached
                self.bytes_read += read
                self._done_bytes += nbytes
                if self._progress is not None:
                    self._progress(self._done_bytes, self._total_bytes)

    def _read(self, descriptor: int, buffer: memoryview, offset: int) -> tuple[int, int]:
        """Reads a block. Returns how many bytes were cached, and how many were not."""
        cached = 0
        if self._nowait:
            try:
                cached = os.preadv(descriptor, [buffer], offset, self._nowait)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                    self._nowait = 0  # Not on this file system.
                elif error.errno != errno.EAGAIN:
                    raise
        done = cached
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if not count:
                break  # The file became shorter.
            done += count
        return cached, done - cached
