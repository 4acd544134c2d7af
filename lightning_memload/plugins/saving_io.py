"""The saving part of the ``CheckpointIO``: writes checkpoints straight from the tensors, without copying them.

When a save returns, its path exists and holds a complete checkpoint. :meth:`SavingIO.save_checkpoint` describes the
work that may continue in the background, and its conditions.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.collector import paused_collector
from lightning_memload.errors import CheckpointWriteError
from lightning_memload.plugins.choices import SnapshotSize, check_choice, check_snapshot
from lightning_memload.plugins.compat import TorchCheckpointIO
from lightning_memload.plugins.pending import PendingSaves
from lightning_memload.plugins.save_log import MeasuredSave, SaveObserver, register
from lightning_memload.save import (
    BackgroundSave,
    Save,
    SaveStats,
    is_in_step,
    plan_directory_save,
    plan_torch_save,
    save_torch,
    write_torch,
)
from lightning_memload.transfer import check_whole

__all__ = ["Asynchronous", "SaveFormat", "SavingIO"]

SaveFormat = Literal["torch", "directory", "safetensors+state"]
Asynchronous = Literal[False, True, "until_step"]

# The launchers of Lightning (2.5, 2.6) that fork or spawn pass the trained weights to the main process in a file of
# this name. In the main process no callback has installed this CheckpointIO.
_LAUNCHER_FILE = ".temp.ckpt"


class SavingIO(TorchCheckpointIO):
    """Saves checkpoints in bounded host memory. The arguments and attributes are those of ``StreamingCheckpointIO``."""

    def __init__(
        self, *, host_budget_mib: int, asynchronous: Asynchronous, format: SaveFormat, snapshot: SnapshotSize
    ) -> None:
        super().__init__()
        check_whole("host_budget_mib", host_budget_mib, "a whole number of MiB such as 128")
        if host_budget_mib < 1:
            raise ValueError(f"host_budget_mib must be at least 1, got {host_budget_mib}.")
        check_choice("format", format, SaveFormat)
        check_choice("asynchronous", asynchronous, Asynchronous)
        self.format = format
        self.last_save: SaveStats | None = None
        self.asynchronous = asynchronous
        self.snapshot = snapshot
        check_snapshot("snapshot", snapshot, "asynchronous", asynchronous)
        self._pending = PendingSaves()
        self._changed_in_steps: Callable[[], Iterable[torch.Tensor]] = tuple
        self._only_lightning_reads: Callable[[], bool] = bool
        self._after_training = False
        self._training_thread = threading.get_ident()
        self._save_observers: list[SaveObserver] = []
        self._host_budget_bytes = host_budget_mib << 20
        # The checkpoint that was saved or loaded last: unchanged storages of it need not be written again.
        self._before: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, for example in another process, has none of the saves of this object."""
        return {**self.__dict__, "_pending": PendingSaves(), "_save_observers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._training_thread = threading.get_ident()

    def observe_saves(self, observer: SaveObserver) -> Callable[[], None]:
        """Registers a function that receives the figures of every successful save, in the thread where the save ends.

        Saves are measured only if there is an observer: host memory is then sampled every 5 ms during a save, and
        VmHWM of the process is reset, see :class:`MemoryMonitor`. The calling thread counts as the training thread.

        Returns:
            A function that removes the observer. A second call does nothing.
        """
        self._training_thread = threading.get_ident()
        return register(self._save_observers, observer)

    @property
    def _snapshot_limit(self) -> int | None:
        """The most memory of all snapshots in bytes, 0 for no snapshots, ``None`` for no limit."""
        return check_snapshot("snapshot", self.snapshot, "asynchronous", self.asynchronous)

    @property
    def writes_late(self) -> bool:
        """Whether a save of a training may return before the checkpoint is written."""
        return self.asynchronous == "until_step" or self._snapshot_limit != 0

    def begin_steps(
        self,
        only_lightning_reads: Callable[[], bool] = bool,
        changed_in_steps: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> None:
        """Begins a training. Saves may return before the checkpoint is written until :meth:`end_steps`.

        Args:
            only_lightning_reads: Called at each save. Returns whether no code other than Lightning could read this
                checkpoint before it is written.
            changed_in_steps: Called at a save that only Lightning reads. Returns the tensors that only optimizer steps
                change.
        """
        self._only_lightning_reads = only_lightning_reads
        self._changed_in_steps = changed_in_steps
        self._after_training = False
        self._training_thread = threading.get_ident()
        self._pending.begin_run()

    def end_steps(self) -> None:
        """Ends the training and waits until every checkpoint is written.

        Until the next :meth:`begin_steps` saves do not run in the background, since there is no training to delay.
        """
        self._only_lightning_reads = bool
        self._changed_in_steps = tuple
        self._after_training = True
        self.wait_until_written()

    def wait_for_tensors(self) -> None:
        """Waits until no save needs the tensors, so that any of them may change. Never raises."""
        self._pending.wait_for_tensors()

    def wait_until_written(self) -> None:
        """Waits until every checkpoint is written and has its name. Never raises."""
        self._pending.wait_until_written()

    def tell_what_changed(self) -> None:
        """Warns if tensors changed before they were written, against the conditions of ``"until_step"``."""
        self._pending.tell_what_changed()

    def wait(self) -> None:
        """Waits until no save runs in the background. Never raises: :meth:`teardown` raises the errors."""
        self._pending.finish()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves a checkpoint: a local file is replaced in one step when all of it is on the disk.

        A remote file is written sequentially with fsspec, in a transaction of the file system, as Lightning does.

        With ``asynchronous=True`` a local checkpoint is completely written and has its name when this method returns,
        as with Lightning's own plugin. It is not yet synced to the disk. A checkpoint that is removed in the meantime
        loses its name immediately, and its content when the newer checkpoint is on the disk. Saves after the training
        wait for the disk.

        ``"until_step"`` has two conditions for a training with ``MemoryEfficientRestore``. First: only optimizer steps
        change the parameters and states of optimizers, also not through ``.data`` (no clipping in a hook, no swap of
        averaged weights, no ``train()`` and ``eval()`` of a schedule-free optimizer). Second: only Lightning reads a
        new checkpoint before the next step. A checkpoint of a ``ModelCheckpoint`` is then written during the forward
        and backward pass of the next batch, and the next step waits until it is written. Until then its name stands for
        the previous checkpoint, by hard links. So it is complete at every moment, and at most one save older. All other
        checkpoints are saved as with ``True``: the first one of a run, those of other callers
        (``trainer.save_checkpoint``, signal handlers, SLURM, exceptions), and all checkpoints if a logger reads them,
        if Lightning averages weights, if an optimizer has no hooks, or if a rank lacks the callback. The version
        counter of a tensor detects a change against the first condition, except through ``.data``: the checkpoint is
        then not published, a warning says what is on the disk, and all further saves are as with ``True``.

        With ``snapshot`` the same checkpoints are copied into free host memory and written from there. No step waits,
        and any code may change any tensor: the first condition does not apply. The second one is: only Lightning reads
        a new checkpoint before it is written. :meth:`wait_until_written` and the end of ``fit`` wait for this. The next
        save waits too, unless it saves the same step, so a name stands for a checkpoint that is at most one save older.
        If the state does not fit into three quarters of the free memory (of the machine and of its control groups), or
        into the given size, ``asynchronous`` applies. ``last_save`` contains the reason.

        The next save, the next load and the end of the process wait for the disk. An error after this method has
        returned is raised by the next save, when that one is done, or at the end of ``fit``. While another exception is
        being handled it is a warning.

        Args:
            checkpoint: The checkpoint.
            path: Path or URL. Missing directories are created.
            storage_options: Must be ``None``, as with Lightning's own plugin.

        Raises:
            TypeError: ``storage_options`` is not ``None``.
            ValueError: The format is a directory, and the path is remote or the system is not Linux.
            FileExistsError: The format is a directory, and ``path`` exists and is not a checkpoint.
            CheckpointWriteError: There is not enough space, or writing failed. A previous checkpoint is unchanged.
                Also raised, when this save is done, if the previous save failed in the background. A file that can be
                written to but not replaced is overwritten as Lightning does, with a warning.
            Exception: Any error of pickling the checkpoint, or of a remote file system.

        In a thread of Lightning (``AsyncCheckpointIO``) an error is also printed immediately: the Trainer may raise it
        late or never.

        Peak memory: ``host_budget_mib`` if tensors are on devices, and the pickle, which holds no tensors. With a
        snapshot also the state, which is freed in blocks of 16 MiB while it is written. For a remote file also the
        buffers of its file system.
        """
        try:
            with self._pending.before_next():
                self._save(checkpoint, path, storage_options)
        except BaseException:
            if threading.get_ident() != self._training_thread:
                print(f"{path} could not be saved:", file=sys.stderr)
                traceback.print_exc()
            raise

    def _save(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any) -> None:
        # A temporary file of Lightning: it needs no figures, no other format, and no sync to the disk.
        is_launchers = os.path.basename(path) == _LAUNCHER_FILE
        format = "torch" if is_launchers else self.format
        if storage_options is not None or (sys.platform != "linux" and format == "torch"):
            self._pending.finish()
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        filesystem, target = url_to_fs(str(path))
        is_local = isinstance(filesystem, LocalFileSystem)
        is_late = is_local and not is_launchers and self._may_be_late()
        # Snapshots of one step are written one after the other. A crash then costs the saves of one step at most.
        step = _step_of(checkpoint) if is_late and self._snapshot_limit != 0 else None
        started = time.perf_counter()
        self._pending.finish(except_of=step)
        waited_seconds = time.perf_counter() - started if step is not None else 0.0
        if format != "torch" and (sys.platform != "linux" or not is_local):
            raise ValueError(
                f"StreamingCheckpointIO(format={format!r}) saves to local disks on Linux only, got {path}. Use "
                "format='torch'."
            )
        filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        if is_launchers and is_local:
            save_torch(checkpoint, target, host_budget_bytes=self._host_budget_bytes, durable=False)
            return
        blocks = self._training_thread == threading.get_ident()
        measured = MeasuredSave(checkpoint, tuple(self._save_observers), blocks=blocks)
        try:
            if is_local:
                try:
                    self._save_locally(checkpoint, target, measured, is_late, waited_seconds)
                except CheckpointWriteError as error:
                    if format != "torch" or not _can_only_be_overwritten(target, error):
                        raise
                    measured.stop()
                    rank_zero_warn(
                        f"{error} This file cannot be replaced in its directory, so Lightning overwrites it in place. "
                        "This takes the memory of the whole checkpoint on the host, and if the process is killed "
                        "meanwhile, the file is incomplete. Allow this user to replace files there, or save elsewhere."
                    )
                    super().save_checkpoint(checkpoint, target)
                return
            with filesystem.transaction, filesystem.open(target, "wb") as file:
                stats = write_torch(checkpoint, file, name=str(path), host_budget_bytes=self._host_budget_bytes)
            self._end_save(measured, stats, stats.seconds, target)
        except BaseException:
            measured.stop()
            raise

    def _save_locally(
        self, checkpoint: dict[str, Any], target: str, measured: MeasuredSave, is_late: bool, waited_seconds: float
    ) -> None:
        if not self.asynchronous or self._after_training:
            stats = self._plan(checkpoint, target, self._before).run()
            self._end_save(measured, stats, stats.seconds, target)
            return
        started = time.perf_counter()
        tensors = self._written_late() if is_late else ()
        is_snapshot = is_late and self._snapshot_limit != 0
        was_there = os.path.lexists(target)
        before = self._pending.reserve(target) if tensors or is_snapshot else None
        is_reserved = before is not None
        try:
            # Compared with the target itself: Lightning may remove any other checkpoint during the comparison.
            save = self._plan(checkpoint, target, self._before if before is None else target)
            if self._snapshot_limit != 0:
                reason = self._reason_against_snapshot(is_late=is_late, before=before)
                is_snapshot = self._pending.copy(save, self._snapshot_limit, reason)
            if is_snapshot or before is None:
                tensors = ()
            prepared_seconds = waited_seconds + time.perf_counter() - started

            def end(background: BackgroundSave, stats: SaveStats | None) -> None:
                if stats is None:
                    measured.stop()
                else:
                    self._end_save(measured, stats, prepared_seconds + background.blocked_seconds, target)

            after = self._pending.newest if is_snapshot else None
            background = BackgroundSave(save, tensors, after=after, on_end=end)
            before = before if tensors or is_snapshot else None
            self._pending.add(target, background, before=before, step=_step_of(checkpoint))
        except BaseException:
            if is_reserved and not was_there:
                super().remove_checkpoint(target)  # It is only a second name of another checkpoint.
            raise

    def _may_be_late(self) -> bool:
        """Whether no code other than Lightning could read a checkpoint of this call before it is written."""
        # A subclass, or another thread, may read the file at once.
        is_ours = type(self).save_checkpoint is SavingIO.save_checkpoint
        if not is_ours or not self.writes_late or threading.get_ident() != self._training_thread:
            return False
        return not self._after_training and self._only_lightning_reads()

    def _written_late(self) -> Iterable[torch.Tensor]:
        """Return the tensors that need not be written before the next step."""
        # A step that is running cannot wait any more.
        if self.asynchronous != "until_step" or self._pending.promise_is_broken or is_in_step():
            return ()
        return self._changed_in_steps()

    @staticmethod
    def _reason_against_snapshot(*, is_late: bool, before: str | None) -> str | None:
        if not is_late:
            return "other code could read the checkpoint at once"
        return None if before is not None else "the run has no earlier checkpoint that the name could stand for"

    def _plan(self, checkpoint: dict[str, Any], target: str, before: str | None) -> Save:
        with paused_collector():
            if self.format == "torch":
                return plan_torch_save(checkpoint, target, host_budget_bytes=self._host_budget_bytes)
            return plan_directory_save(
                checkpoint,
                target,
                host_budget_bytes=self._host_budget_bytes,
                link_unchanged_from=before,
                safetensors=self.format == "safetensors+state",
            )

    def _end_save(self, measured: MeasuredSave, stats: SaveStats, blocked_seconds: float, target: str) -> None:
        self.last_save, self._before = stats, stats.path
        if self.writes_late:
            self._pending.published(target)
        measured.report(stats, blocked_seconds)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a checkpoint. Its name is free when this method returns.

        Its content is kept until a newer checkpoint that is being synced is on the disk, so the disk always holds a
        complete checkpoint. After a power failure the content remains as ``.memload-....tmp`` in the same directory.
        The next save removes it.

        Raises:
            CheckpointWriteError: The previous save failed. Nothing is removed.
            OSError: The checkpoint cannot be removed.
        """
        filesystem, target = url_to_fs(str(path))
        if isinstance(filesystem, LocalFileSystem) and os.path.islink(target) and os.path.exists(target):
            os.unlink(target)  # Lightning (2.6) fails at a link to a directory.
            return
        self._pending.remove(target, lambda: super(SavingIO, self).remove_checkpoint(str(path)))

    def teardown(self) -> None:
        """Waits for saves in the background.

        Raises:
            CheckpointWriteError: A save failed.
        """
        self._pending.finish()
        self._pending.tell()


def _step_of(checkpoint: Any) -> int | None:
    step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
    return step if isinstance(step, int) else None


def _can_only_be_overwritten(target: str, error: CheckpointWriteError) -> bool:
    """Whether this user may write to a file but not replace it, such as a mount point or in another user's folder."""
    is_refused = error.errno in (errno.EACCES, errno.EPERM, errno.EBUSY)
    return is_refused and os.path.isfile(target) and os.access(target, os.W_OK)
