"""One save in any format: planned first, written later, and published in one atomic step or not at all.

Planning splits the object into a pickle and the memory of its tensors. After planning only that memory must stay
unchanged. Writing may happen in another thread. A save is not a snapshot: a tensor that changes before it is written is
saved with a mix of old and new bytes.
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

from lightning_memload.collector import paused_collector
from lightning_memload.errors import CheckpointWriteError
from lightning_memload.formats.tensor_directory.manifest import foreign_names, is_tensor_directory
from lightning_memload.storage.replacement import Replacement
from lightning_memload.transfer import available_cpus
from lightning_memload.transfer.writing import WriteEngine, WriteOrder

__all__ = ["DEFAULT_BUDGET_BYTES", "CheckpointWriter", "Clock", "Save", "SaveStats", "default_save_threads", "stats_of"]

DEFAULT_BUDGET_BYTES = 128 << 20
# Most file systems let one thread at a time write to a file. The other threads copy and compute checksums meanwhile;
# more than this many would only wait.
_MAX_THREADS = 4
# A save of so few bytes is shorter than one garbage collection over very many tensors.
_SHORT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SaveStats:
    """The figures of a save.

    Attributes:
        path: The file or directory, or the name that the caller gave it.
        bytes_written: Bytes that were written.
        bytes_linked: Size of the files that were not written because they are hard links to equal files of the
            previous checkpoint.
        tensor_bytes: Bytes of the storages in the checkpoint.
        num_storages: Number of storages in the checkpoint.
        seconds: Wall time of the whole save.
        pickle_seconds: The part of it spent on pickling and planning.
        write_seconds: The part of it spent on copying from devices and writing.
        commit_seconds: The part of it spent on syncing to the disk and renaming.
        num_threads: Number of writing threads.
        staging_bytes: Host memory of the staging ring, 0 if the ring was not used.
        streamed: Whether the bytes were streamed. ``False`` if ``torch.save`` wrote the file.
        snapshot_bytes: Host memory of the snapshot that was written, 0 without one.
        snapshot_seconds: The time that it took to copy the state into the snapshot. It is a part of ``write_seconds``.
        snapshot_refusal: Why no snapshot was taken. ``None`` if one was taken, or if none was wanted.
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
    snapshot_bytes: int = 0
    snapshot_seconds: float = 0.0
    snapshot_refusal: str | None = None


class CheckpointWriter(Protocol):
    """Writes one save, in one format."""

    is_directory: bool
    streamed: bool
    bytes_linkable: int
    bytes_linked: int

    @property
    def storage_sizes(self) -> Sequence[int]:
        """Bytes of each storage in the checkpoint."""
        ...

    @property
    def records(self) -> WriteEngine | None:
        """The records. They refer to the tensors. ``None`` if the bytes are not streamed."""
        ...

    @property
    def nbytes(self) -> int | None:
        """The disk space in bytes if nothing can be linked. ``None`` if it is unknown."""
        ...

    def write(self, place: Replacement, *, durable: bool, order: WriteOrder | None) -> int:
        """Writes everything into a temporary sibling.

        Args:
            place: The temporary sibling.
            durable: Start writing to the disk at once, so that the final sync is short.
            order: What to write first. Formats that cannot do this ignore it.

        Returns:
            The bytes written.

        Raises:
            OSError: Not everything could be written.
        """
        ...

    @property
    def names(self) -> Sequence[str]:
        """The files and folders in a finished directory, see :meth:`Replacement.settle`."""
        ...

    def finish(self, place: Replacement) -> None:
        """Does the work before the commit that no longer needs the tensors."""
        ...


class Clock:
    """Records the time at the start and at the end of each phase."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def lap(self) -> None:
        """Ends a phase."""
        self.times.append(time.perf_counter())

    def seconds(self, start: int) -> float:
        """Seconds from the end of a phase (0: the start) to the last lap."""
        return self.times[-1] - self.times[start]


def _pause_of_collector() -> contextlib.AbstractContextManager[None]:
    """Pauses the collector, only in the main thread: another thread would undo what the main thread does with it."""
    is_main = threading.current_thread() is threading.main_thread()
    return paused_collector() if is_main else contextlib.nullcontext()


class Save:
    """A save to a local path: all at once by :meth:`run`, or by :meth:`write`, :meth:`publish` and :meth:`settle`.

    Call each step once, from any thread. Before these steps, :meth:`copy` may copy the tensors to host memory. A step
    that fails removes the temporary files.

    Args:
        path: The checkpoint to replace or to create.
        plan: Creates the plan. The constructor calls it.
        durable: Sync everything to the disk, so that the checkpoint survives a power failure.

    Attributes:
        path: The checkpoint to replace or to create.

    Raises:
        Exception: Planning failed. Nothing has been written.
    """

    def __init__(self, path: str, plan: Callable[[], CheckpointWriter], *, durable: bool) -> None:
        self.path = path
        self._durable = durable
        self._clock = Clock()
        with _pause_of_collector():
            self._plan: CheckpointWriter | None = plan()
        self._nbytes = self._plan.nbytes
        self._records = self._plan.records
        self._refusal: str | None = None
        self._copy_seconds = 0.0
        self._names: Sequence[str] = ()
        self._clock.lap()
        self._place: Replacement | None = None
        self._stats: SaveStats | None = None

    def run(self, *, before_commit: Callable[[], None] | None = None) -> SaveStats:
        """Writes everything, syncs it to the disk if ``durable`` is set, and then replaces the old checkpoint.

        Args:
            before_commit: Called when everything is written. If it raises, the old checkpoint stays.

        Raises:
            CheckpointWriteError: There is not enough space, or writing failed or is not allowed.
            Exception: ``torch.save`` writes the file, and pickling failed.
        """
        is_short = self._nbytes is not None and self._nbytes <= _SHORT_BYTES
        try:
            with _pause_of_collector() if is_short else contextlib.nullcontext():
                self.write()
            if before_commit is not None:
                before_commit()
            with self._cleaned_up_on_error() as place:
                place.commit(durable=self._durable, names=self._names)
            return self._end()
        except BaseException:
            self.abandon()
            raise

    @property
    def is_copied(self) -> bool:
        """Whether the tensors are copied, so that they may change before they are written."""
        return self._records is not None and self._records.snapshot is not None

    @property
    def held_bytes(self) -> int:
        """Host memory of the copies that is not freed yet."""
        snapshot = self._records.snapshot if self._records is not None else None
        return snapshot.held_bytes if snapshot is not None else 0

    def copy(self, refuse: Callable[[int], str | None]) -> bool:
        """Copies all tensors to host memory, if that is allowed. They may change after that, and are not referenced.

        Args:
            refuse: Called with the host memory that this takes, in bytes. Returns why it must not, or ``None``.

        Returns:
            Whether they are copied. The figures of the save contain the time, or the reason.

        Peak memory: what ``refuse`` gets. :meth:`write` frees it chunk by chunk, and before it returns.
        """
        started = time.perf_counter()
        if self._records is None:
            self._refusal = "torch.save writes this object"
            return False
        self._refusal = refuse(sum(self._records.copied_sizes) + self._records.staging_bytes)
        if self._refusal is None:
            try:
                self._records.copy()
            except MemoryError as error:
                self._refusal = str(error)
        self._copy_seconds = time.perf_counter() - started
        return self._refusal is None

    def write(self, order: WriteOrder | None = None) -> None:
        """Writes everything to a temporary sibling. On return the tensors are no longer needed or referenced.

        Raises:
            CheckpointWriteError: See :meth:`run`.
            Exception: See :meth:`run`.
        """
        plan, self._plan = self._plan, None
        assert plan is not None
        try:
            with self._cleaned_up_on_error():
                # A file may replace a checkpoint directory, unless the directory holds files that are not the
                # checkpoint's.
                over_directory = is_tensor_directory(self.path) and not foreign_names(self.path)
                self._place = Replacement(self.path, is_directory=plan.is_directory, over_directory=over_directory)
                _check_space(self.path, plan)
                bytes_written = plan.write(self._place, durable=self._durable, order=order)
                self._clock.lap()
                plan.finish(self._place)
                self._names = plan.names
                stats = stats_of(self.path, plan, bytes_written, self._clock)
                self._stats = replace(stats, snapshot_seconds=self._copy_seconds, snapshot_refusal=self._refusal)
        finally:
            # The traceback of an error would keep the tensors, and the copies of them.
            if self._records is not None:
                self._records.close()

    def publish(self) -> None:
        """Replaces the old checkpoint. All processes see the new one, and it survives the end of this process.

        Raises:
            CheckpointWriteError: Replacing it is not allowed.
        """
        with self._cleaned_up_on_error() as place:
            place.commit(durable=False)

    def settle(self) -> SaveStats:
        """Syncs the checkpoint to the disk if ``durable`` is set, and removes the directory that was replaced.

        Raises:
            CheckpointWriteError: The disk failed. The checkpoint is published, but may not survive a power failure.
        """
        with self._cleaned_up_on_error() as place:
            if self._durable:
                place.settle(self._names)
        return self._end()

    def abandon(self) -> None:
        """Removes what has been written, unless it is published. For interruptions between the steps."""
        if self._place is not None:
            self._place.close()

    def _end(self) -> SaveStats:
        assert self._place is not None
        assert self._stats is not None
        self._place.close()
        self._clock.lap()
        return replace(self._stats, seconds=self._clock.seconds(0), commit_seconds=self._clock.seconds(2))

    @contextlib.contextmanager
    def _cleaned_up_on_error(self) -> Iterator[Replacement]:
        """Removes the temporary sibling on an error, and turns an ``OSError`` into a :class:`CheckpointWriteError`."""
        try:
            yield self._place  # type: ignore[misc]
        except BaseException as error:
            self.abandon()
            if not isinstance(error, OSError) or isinstance(error, CheckpointWriteError):
                raise
            is_committed = self._place is not None and self._place.is_committed
            raise _failure(self.path, self._nbytes, error, is_committed=is_committed) from error


def stats_of(path: str, plan: CheckpointWriter, bytes_written: int, clock: Clock) -> SaveStats:
    """The figures of a save. The clock has two laps (planning, writing), and a third one after the commit."""
    started, pickled, written = clock.times[:3]
    ended = clock.times[-1]
    records = plan.records
    snapshot = records.snapshot if records is not None else None
    return SaveStats(
        path=path,
        bytes_written=bytes_written,
        bytes_linked=plan.bytes_linked,
        tensor_bytes=sum(plan.storage_sizes),
        num_storages=len(plan.storage_sizes),
        seconds=ended - started,
        pickle_seconds=pickled - started,
        write_seconds=written - pickled,
        commit_seconds=ended - written,
        num_threads=records.num_threads if records is not None else 1,
        staging_bytes=records.staging_bytes if records is not None else 0,
        streamed=plan.streamed,
        snapshot_bytes=snapshot.nbytes if snapshot is not None else 0,
    )


def default_save_threads() -> int:
    """Number of writing threads: the number of CPUs, at most 4."""
    return min(_MAX_THREADS, available_cpus())


def _check_space(path: str, plan: CheckpointWriter) -> None:
    free_bytes = _free_bytes(path)
    # bytes_linkable is an upper bound: a file is linked only if a comparison finds equal bytes.
    if free_bytes is not None and plan.nbytes is not None and free_bytes < plan.nbytes - plan.bytes_linkable:
        raise _failure(path, plan.nbytes, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _failure(
    path: str, needed_bytes: int | None, error: OSError, *, is_committed: bool = False
) -> CheckpointWriteError:
    free_bytes = _free_bytes(path)
    sizes = "" if needed_bytes is None else f" It takes {needed_bytes} bytes"
    if sizes and free_bytes is not None:
        sizes += f", and {free_bytes} are free in {os.path.dirname(path) or '.'}"
    outcome = (
        "The new checkpoint is in place, but may not survive a power failure"
        if is_committed
        else "What was there is untouched"
    )
    return CheckpointWriteError(
        f"{path} could not be saved: {error.strerror or error}.{sizes and sizes + '.'} {outcome}.",
        path=path,
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
        errno=error.errno,
    )


def _free_bytes(path: str) -> int | None:
    """Bytes that this process may still write in the directory of ``path``. ``None`` if it is unknown."""
    try:
        status = os.statvfs(os.path.dirname(path) or ".")
    except OSError:
        return None
    # Some file systems (FUSE, object stores) report no sizes.
    if not status.f_blocks:
        return None
    return status.f_frsize * (status.f_bfree if os.geteuid() == 0 else status.f_bavail)
