"""The half of a ``CheckpointIO`` that saves: straight from the tensors, in one step, without a copy of them.

When a save returns, its name is there and holds a complete checkpoint. :meth:`SavingIO.save_checkpoint` says what may
go on after that, and what a user promises for it.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.collector import paused_collector
from lightning_memload.errors import CheckpointWriteError
from lightning_memload.plugins.compat import TorchCheckpointIO
from lightning_memload.plugins.pending import PendingSaves
from lightning_memload.plugins.saves import MeasuredSave, SaveObserver, register
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

__all__ = ["Asynchronous", "SaveFormat", "SavingIO", "check_asynchronous"]

SaveFormat = Literal["torch", "directory", "safetensors+state"]
Asynchronous = Literal[False, True, "until_step"]

# In a file of this name the launchers of Lightning (2.5, 2.6) that fork or spawn hand the trained weights to the main
# process, where no callback has installed anything.
_LAUNCHER_FILE = ".temp.ckpt"


class SavingIO(TorchCheckpointIO):
    """Saves checkpoints in bounded host memory. The arguments and attributes are those of ``StreamingCheckpointIO``."""

    def __init__(self, *, host_budget_mib: int, asynchronous: Asynchronous, format: SaveFormat) -> None:
        super().__init__()
        check_whole("host_budget_mib", host_budget_mib, "a whole number of MiB such as 128")
        if host_budget_mib < 1:
            raise ValueError(f"host_budget_mib must be at least 1, got {host_budget_mib}.")
        if format not in get_args(SaveFormat):
            raise ValueError(f"format must be one of {', '.join(map(repr, get_args(SaveFormat)))}, got {format!r}.")
        check_asynchronous("asynchronous", asynchronous)
        self.format = format
        self.last_save: SaveStats | None = None
        self.asynchronous = asynchronous
        self._pending = PendingSaves()
        self._changed_in_steps: Callable[[], Iterable[torch.Tensor]] = tuple
        self._after_training = False
        self._training_thread = threading.get_ident()
        self._save_observers: list[SaveObserver] = []
        self._host_budget_bytes = host_budget_mib << 20
        # The checkpoint that was saved or loaded last: what has not changed since then need not be written again.
        self._before: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process say, has no part in the saves of this one."""
        return {**self.__dict__, "_pending": PendingSaves(), "_save_observers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._training_thread = threading.get_ident()

    def observe_saves(self, observer: SaveObserver) -> Callable[[], None]:
        """Registers who is told the figures of every save that succeeds, in the thread in which it ends.

        Saves are measured only if somebody is: host memory is sampled every 5 ms meanwhile, and the process' VmHWM is
        reset, see :class:`MemoryMonitor`. The thread that registers counts as the one that trains.

        Returns:
            A function that removes it again; calling it twice is fine.
        """
        self._training_thread = threading.get_ident()
        return register(self._save_observers, observer)

    def begin_steps(self, changed_in_steps: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Begins a training. Until :meth:`end_steps`, ``asynchronous="until_step"`` is heeded.

        Args:
            changed_in_steps: Gives the tensors that nothing but an optimizer's step changes, asked at each save; none
                if something besides Lightning could look at this checkpoint before the next step.
        """
        self._changed_in_steps = changed_in_steps
        self._after_training = False
        self._training_thread = threading.get_ident()
        self._pending.begin_run()

    def end_steps(self) -> None:
        """Ends what :meth:`begin_steps` began. When it returns, every checkpoint has its place.

        Until it begins again nothing goes on that a save could delay, and none is left to the background.
        """
        self._changed_in_steps = tuple
        self._after_training = True
        self.wait_until_written()

    def wait_until_written(self) -> None:
        """Returns when every checkpoint has its place, and any tensor may change. Raises nothing."""
        self._pending.wait_until_written()

    def tell_what_changed(self) -> None:
        """Warns if tensors were changed while they were saved, against the promise of ``"until_step"``."""
        self._pending.tell_what_changed()

    def wait(self) -> None:
        """Returns when no save is going on in the background. Raises nothing: :meth:`teardown` does."""
        self._pending.finish()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves a checkpoint: a local file is replaced in one step when all of it is on the disk.

        A remote file is written in order, through fsspec, in a transaction of the file system as Lightning does it.

        With ``asynchronous=True`` all of a local checkpoint is written when this returns, and it has its name: that is
        what Lightning's own plugin does. Only the disk is not waited for. A checkpoint that is removed meanwhile loses
        its name at once, and its content when the newer one is on the disk. After training the disk is waited for.

        With ``"until_step"`` you promise two things of the training that ``MemoryEfficientRestore`` sees: nothing but
        the steps of optimizers changes their parameters and states, not through ``.data`` either (no clipping in a
        hook, no swap of averaged weights, no ``train()`` and ``eval()`` of a schedule-free optimizer); and nothing but
        Lightning looks at a new checkpoint before the next step. Then what a ``ModelCheckpoint`` saves is written while
        the next batch runs forward and backward, and the next step waits until it is. Until then its name stands for
        the checkpoint before it, by hard links, so it is complete at every moment, one save older at most. All else is
        saved as with ``True``: the first checkpoint of a run, those of other callers (``trainer.save_checkpoint``,
        signal handlers, SLURM, exceptions), and all where a logger looks at checkpoints, where Lightning averages
        weights, where an optimizer has no hooks, and where not every rank has the callback. Should a tensor change
        against the promise, its version counter tells, unless that was through ``.data``: nothing is published, a
        warning says what is on the disk, and from then on all is saved as with ``True``.

        The next save, load, and the end of the process wait for the disk. An error that comes later than this returns
        is raised by the next save when that is done, or at the end of ``fit``; while another exception is handled it is
        a warning.

        Args:
            checkpoint: What to save.
            path: Path or URL. Missing directories are made.
            storage_options: Must be ``None``, as with Lightning's own plugin.

        Raises:
            TypeError: ``storage_options`` were given.
            ValueError: The format is a directory, and the place is remote or not on Linux.
            FileExistsError: Likewise, and there is something else than a checkpoint at ``path``.
            CheckpointWriteError: There is not enough space, or writing failed; what was there before is untouched. Also
                if that happened to the save before this one, in the background, when this one is done. A file that may
                be written to but not replaced is overwritten as Lightning does it, with a warning.
            Exception: Whatever pickling the checkpoint, or a remote file system, raises.

        In a thread of Lightning's (``AsyncCheckpointIO``) an error is also printed at once: the Trainer may ask for it
        late or never.

        Peak memory: ``host_budget_mib`` if tensors are on devices, and the pickle, which holds no tensors; for a remote
        file also what its file system buffers.
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
        # Not a checkpoint for people: no figures, no other format, and a disk need not have it.
        is_launchers = os.path.basename(path) == _LAUNCHER_FILE
        format = "torch" if is_launchers else self.format
        if storage_options is not None or (sys.platform != "linux" and format == "torch"):
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        filesystem, target = url_to_fs(str(path))
        is_local = isinstance(filesystem, LocalFileSystem)
        if format != "torch" and (sys.platform != "linux" or not is_local):
            raise ValueError(
                f"StreamingCheckpointIO(format={format!r}) saves to local disks on Linux only, and was given {path}. "
                "Use format='torch'."
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
                    self._save_locally(checkpoint, target, measured)
                except CheckpointWriteError as error:
                    if format != "torch" or not _can_only_be_overwritten(target, error):
                        raise
                    measured.stop()
                    rank_zero_warn(
                        f"{error} Its directory does not let this file be replaced, so Lightning overwrites it in "
                        "place: the whole checkpoint is in host memory meanwhile, and a process that is killed then "
                        "leaves a torn file. Allow this user to replace files there, or save elsewhere."
                    )
                    super().save_checkpoint(checkpoint, target)
                return
            with filesystem.transaction, filesystem.open(target, "wb") as file:
                stats = write_torch(checkpoint, file, name=str(path), host_budget_bytes=self._host_budget_bytes)
            self._end_save(measured, stats, stats.seconds, target)
        except BaseException:
            measured.stop()
            raise

    def _save_locally(self, checkpoint: dict[str, Any], target: str, measured: MeasuredSave) -> None:
        if not self.asynchronous or self._after_training:
            stats = self._plan(checkpoint, target, self._before).run()
            self._end_save(measured, stats, stats.seconds, target)
            return

        def end(background: BackgroundSave, stats: SaveStats | None) -> None:
            if stats is None:
                measured.stop()
            else:
                self._end_save(measured, stats, stats.pickle_seconds + background.blocked_seconds, target)

        tensors = self._written_late()
        was_there = os.path.lexists(target)
        before = self._pending.reserve(target) if tensors else None
        if before is None:
            self._pending.add(target, BackgroundSave(self._plan(checkpoint, target, self._before), on_end=end))
            return
        try:
            # Lightning may remove any other checkpoint while this one is compared with it.
            save = self._plan(checkpoint, target, target)
            self._pending.add(target, BackgroundSave(save, tensors, on_end=end), before=before)
        except BaseException:
            if not was_there:
                super().remove_checkpoint(target)  # only a second name
            raise

    def _written_late(self) -> Iterable[torch.Tensor]:
        """What need not be written before the next step."""
        if self.asynchronous != "until_step" or self._pending.promise_is_broken:
            return ()
        # A subclass, and another thread, may do anything with the file. Within a step it is too late to make it wait.
        is_ours = type(self).save_checkpoint is SavingIO.save_checkpoint
        if not is_ours or threading.get_ident() != self._training_thread or is_in_step():
            return ()
        return self._changed_in_steps()

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
        if self.asynchronous == "until_step":
            self._pending.published(target)
        measured.report(stats, blocked_seconds)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a checkpoint. Its name is free when this returns.

        While the disk takes a newer checkpoint the content stays, so the last one that is on the disk never goes before
        the next one is. After a power failure it lies beside it as ``.memload-....tmp``, which the next save removes.

        Raises:
            CheckpointWriteError: The save before this failed; nothing is removed.
            OSError: It cannot be removed.
        """
        filesystem, target = url_to_fs(str(path))
        if isinstance(filesystem, LocalFileSystem) and os.path.islink(target) and os.path.exists(target):
            os.unlink(target)  # Lightning's way (2.6) fails at a link to a directory
            return
        self._pending.remove(target, lambda: super(SavingIO, self).remove_checkpoint(str(path)))

    def teardown(self) -> None:
        """Waits for a save in the background.

        Raises:
            CheckpointWriteError: It failed.
        """
        self._pending.finish()
        self._pending.tell()


def _can_only_be_overwritten(target: str, error: CheckpointWriteError) -> bool:
    """Whether this user may write to a file but not replace it: in a directory of others, or mounted by itself."""
    is_refused = error.errno in (errno.EACCES, errno.EPERM, errno.EBUSY)
    return is_refused and os.path.isfile(target) and os.access(target, os.W_OK)


def check_asynchronous(name: str, value: Any) -> None:
    """Refuses a way to save asynchronously that there is not.

    Raises:
        ValueError: With the name of the argument.
    """
    if value not in get_args(Asynchronous):
        raise ValueError(f"{name} must be one of False, True, 'until_step', got {value!r}.")
