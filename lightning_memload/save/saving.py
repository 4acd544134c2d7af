"""One save, whatever the format: planned at once, carried out then or later, in place in one step or not at all.

Planning takes the object apart into a pickle and the memory of its tensors; from then on only that memory must stay as
it is. Carrying out may happen in another thread. Not promised: a snapshot. Tensors that change before they are written
are saved with some bytes of before and some of after.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lightning_memload.checkpoint.tensor_manifest import foreign_names, is_tensor_directory
from lightning_memload.collector import paused_collector
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
# What is written in a moment: no collection is worth its while in it, which with very many tensors takes longer.
_SHORT_BYTES = 64 << 20


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

        With ``durable`` the disk begins at once, so that little is left to wait for.

        Returns:
            The bytes written.

        Raises:
            OSError: Not everything could be written.
        """
        ...

    @property
    def names(self) -> Sequence[str]:
        """What a directory holds once it is finished, see :meth:`Replacement.settle`."""
        ...

    def finish(self, place: Replacement) -> None:
        """Does what needs no tensor any more and must be done before the commit."""
        ...


class Clock:
    """Times at the start and after each phase."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def lap(self) -> None:
        """Ends a phase."""
        self.times.append(time.perf_counter())

    def seconds(self, start: int) -> float:
        """From the end of a phase, or the start (0), until the last lap."""
        return self.times[-1] - self.times[start]


class Save:
    """A save to a local path, in one go by :meth:`run`, or in steps: :meth:`write`, :meth:`publish`, :meth:`settle`.

    Each step is to be called once, by any thread. After one that failed nothing is left beside what was there.

    Args:
        path: What is replaced, or created.
        plan: Makes the plan.
        durable: Bring everything to the disk, so that it survives a power failure.

    Attributes:
        path: The same.

    Raises:
        Exception: Whatever planning raises; nothing has been written then.
    """

    def __init__(self, path: str, plan: Callable[[], Plan], *, durable: bool) -> None:
        self.path = path
        self._durable = durable
        self._clock = Clock()
        self._plan: Plan | None = plan()
        self._nbytes = self._plan.nbytes
        self._names: Sequence[str] = ()
        self._clock.lap()
        self._place: Replacement | None = None
        self._stats: SaveStats | None = None

    def run(self) -> SaveStats:
        """Writes everything, waits for the disk if it is to be durable, and only then puts it in its place.

        Raises:
            CheckpointWriteError: There is not enough space, or writing failed or is not allowed.
            Exception: Whatever pickling raises where ``torch.save`` has to write.
        """
        # Beside the main thread, what that does with the collector meanwhile would be undone.
        is_short = self._nbytes is not None and self._nbytes <= _SHORT_BYTES
        is_short = is_short and threading.current_thread() is threading.main_thread()
        try:
            with paused_collector() if is_short else contextlib.nullcontext():
                self.write()
            with self._or_nothing() as place:
                place.commit(durable=self._durable, names=self._names)
            return self._end()
        except BaseException:
            self.abandon()
            raise

    def write(self, order: Order | None = None) -> None:
        """Writes everything to a temporary sibling. No tensor is needed, or referred to, any more when it returns.

        Raises:
            CheckpointWriteError: As :meth:`run`.
            Exception: Likewise.
        """
        plan, self._plan = self._plan, None
        assert plan is not None
        with self._or_nothing():
            # A checkpoint takes the place of one of another format, unless other things in a directory would be lost.
            over_directory = is_tensor_directory(self.path) and not foreign_names(self.path)
            self._place = Replacement(self.path, is_directory=plan.is_directory, over_directory=over_directory)
            _check_space(self.path, plan)
            bytes_written = plan.write(self._place, durable=self._durable, order=order)
            self._clock.lap()
            plan.finish(self._place)
            self._names = plan.names
            self._stats = stats_of(self.path, plan, bytes_written, self._clock)

    def publish(self) -> None:
        """Puts what is written in its place: every process sees it from now on, and it survives the end of this one.

        Raises:
            CheckpointWriteError: It is not allowed.
        """
        with self._or_nothing() as place:
            place.commit(durable=False)

    def settle(self) -> SaveStats:
        """Waits for the disk, and removes the directory that was replaced.

        Raises:
            CheckpointWriteError: The disk failed. The checkpoint has its place all the same.
        """
        with self._or_nothing() as place:
            if self._durable:
                place.settle(self._names)
        return self._end()

    def abandon(self) -> None:
        """Removes what has been written, unless it has its place. For interruptions between the steps."""
        if self._place is not None:
            self._place.close()

    def _end(self) -> SaveStats:
        assert self._place is not None
        assert self._stats is not None
        self._place.close()
        self._clock.lap()
        return replace(self._stats, seconds=self._clock.seconds(0), commit_seconds=self._clock.seconds(2))

    @contextlib.contextmanager
    def _or_nothing(self) -> Iterator[Replacement]:
        """Closes the temporary sibling if something fails."""
        try:
            yield self._place  # type: ignore[misc]
        except BaseException as error:
            self.abandon()
            if not isinstance(error, OSError) or isinstance(error, CheckpointWriteError):
                raise
            is_committed = self._place is not None and self._place.is_committed
            raise _failure(self.path, self._nbytes, error, is_committed=is_committed) from error


def stats_of(path: str, plan: Plan, bytes_written: int, clock: Clock) -> SaveStats:
    """The figures of a save whose clock has two laps, or a third for the commit."""
    started, pickled, written = clock.times[:3]
    ended = clock.times[-1]
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
