"""One save, whatever the format: planned at once, carried out then or later, in place in one step or not at all.

Planning takes the object apart into a pickle and the memory of its tensors; from then on only that memory must stay as
it is. Carrying out may happen in another thread. Not promised: a snapshot. Tensors that change before they are written
are saved with some bytes of before and some of after.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_memload.checkpoint.tensor_manifest import foreign_names, is_tensor_directory
from lightning_memload.errors import CheckpointWriteError
from lightning_memload.save.pickling import Stretch
from lightning_memload.save.replacement import Replacement
from lightning_memload.save.writing import Order
from lightning_memload.transfer import available_cpus

__all__ = ["DEFAULT_BUDGET_BYTES", "Clock", "Plan", "Save", "SaveStats", "default_save_threads", "stats_of"]

DEFAULT_BUDGET_BYTES = 128 << 20
# A file takes one writer at a time on most file systems: more threads than it takes to copy and sum up meanwhile only
# wait for one another.
_MAX_THREADS = 4


@dataclass(frozen=True, slots=True)
class SaveStats:
    """What a save did.

    Attributes:
        path: The file or directory, or what the caller calls it.
        bytes_written: Size of what was written.
        bytes_linked: Size of the files that were not, since they are hard links to the same of the checkpoint before.
        tensor_bytes: Bytes of storages in it.
        num_storages: Storages in it.
        seconds: Wall time of everything.
        pickle_seconds: Part of it until the pickle and the plan were there.
        write_seconds: Part of it in which bytes were brought and written.
        commit_seconds: Part of it for the disk to take them, and for the file to get its name.
        num_threads: Threads that wrote.
        staging_bytes: Host memory of the staging ring, 0 when no byte went through it.
        streamed: Whether the bytes were streamed; ``False`` when ``torch.save`` wrote the file.
    """

    path: str
    bytes_written: int
    bytes_linked: int
    tensor_bytes: int
    num_storages: int
    seconds: float
    pickle_seconds: float
    write_seconds: float
    commit_seconds: float
    num_threads: int
    staging_bytes: int
    streamed: bool


class Plan(Protocol):
    """What is to be written, in one format."""

    is_directory: bool
    streamed: bool
    num_threads: int
    staging_bytes: int
    bytes_linkable: int
    bytes_linked: int

    @property
    def stretches(self) -> Sequence[Stretch]:
        """The memory that has to stay as it is until it is written."""
        ...

    @property
    def nbytes(self) -> int | None:
        """The disk space it takes if nothing can be linked; ``None`` if nobody knows."""
        ...

    def write(self, place: Replacement, *, durable: bool, order: Order | None) -> int:
        """Writes everything into a temporary sibling, and calls ``order.on_first``, if the format knows how to.

        Returns:
            The bytes written.

        Raises:
            OSError: Not everything could be written.
        """
        ...

    def finish(self, place: Replacement, *, durable: bool) -> None:
        """Does what needs no tensor any more and must be done before the commit."""
        ...


class Clock:
    """Times at the start and after each phase."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def lap(self) -> None:
        """Ends a phase."""
        self.times.append(time.perf_counter())


class Save:
    """A save to a local path.

    Args:
        path: What is replaced, or created.
        plan: Makes the plan.
        durable: Return from :meth:`run` only when everything is on the disk, so that it survives a power failure.

    Attributes:
        path: The same.

    Raises:
        Exception: Whatever planning raises; nothing has been written then.
    """

    def __init__(self, path: str, plan: Callable[[], Plan], *, durable: bool) -> None:
        self.path = path
        self._durable = durable
        self._clock = Clock()
        self._plan = plan()
        self._clock.lap()

    def run(self, order: Order | None = None) -> SaveStats:
        """Writes everything and puts it in its place. To be called once, by any thread.

        Raises:
            CheckpointWriteError: There is not enough space, or writing failed or is not allowed.
            Exception: Whatever pickling raises where ``torch.save`` has to write.
        """
        plan, place = self._plan, None
        try:
            # A checkpoint takes the place of one of another format, unless other things in a directory would be lost.
            over_directory = is_tensor_directory(self.path) and not foreign_names(self.path)
            with Replacement(self.path, is_directory=plan.is_directory, over_directory=over_directory) as place:
                _check_space(self.path, plan)
                bytes_written = plan.write(place, durable=self._durable, order=order)
                self._clock.lap()
                if order is not None:
                    order.on_written()
                plan.finish(place, durable=self._durable)
                place.commit(durable=self._durable)
        except OSError as error:
            if isinstance(error, CheckpointWriteError):
                raise
            is_committed = place is not None and place.is_committed
            raise _failure(self.path, plan.nbytes, error, is_committed=is_committed) from error
        self._clock.lap()
        return stats_of(self.path, plan, bytes_written, self._clock)


def stats_of(path: str, plan: Plan, bytes_written: int, clock: Clock) -> SaveStats:
    """The figures of a save whose clock has three laps."""
    started, pickled, written, ended = clock.times
    return SaveStats(
        path=path,
        bytes_written=bytes_written,
        bytes_linked=plan.bytes_linked,
        tensor_bytes=sum(stretch.nbytes for stretch in plan.stretches),
        num_storages=len(plan.stretches),
        seconds=ended - started,
        pickle_seconds=pickled - started,
        write_seconds=written - pickled,
        commit_seconds=ended - written,
        num_threads=plan.num_threads,
        staging_bytes=plan.staging_bytes,
        streamed=plan.streamed,
    )


def default_save_threads() -> int:
    """Threads to write with: up to 4, as many as there are CPUs."""
    return min(_MAX_THREADS, available_cpus())


def _check_space(path: str, plan: Plan) -> None:
    free_bytes = _free_bytes(path)
    # What can be linked is known only when it is compared.
    if free_bytes is not None and plan.nbytes is not None and free_bytes < plan.nbytes - plan.bytes_linkable:
        raise _failure(path, plan.nbytes, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _failure(
    path: str, needed_bytes: int | None, error: OSError, *, is_committed: bool = False
) -> CheckpointWriteError:
    free_bytes = _free_bytes(path)
    sizes = "" if needed_bytes is None else f" It takes {needed_bytes} bytes"
    if sizes and free_bytes is not None:
        sizes += f", and {free_bytes} are free in {os.path.dirname(path) or '.'}"
    outcome = "It has its place, but may not survive a power failure" if is_committed else "What was there is untouched"
    return CheckpointWriteError(
        f"{path} could not be saved: {error.strerror or error}.{sizes and sizes + '.'} {outcome}.",
        path=path,
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
        errno=error.errno,
    )


def _free_bytes(path: str) -> int | None:
    """What this process may still write beside ``path``; ``None`` if nobody knows."""
    try:
        status = os.statvfs(os.path.dirname(path) or ".")
    except OSError:
        return None
    # Some file systems (FUSE, object stores) count nothing.
    if not status.f_blocks:
        return None
    return status.f_frsize * (status.f_bfree if os.geteuid() == 0 else status.f_bavail)
