"""The saves of one CheckpointIO that still go on: their order, their names, and how their errors are told."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.save import BackgroundSave, ChangedMeanwhileError, identity, reserve

__all__ = ["Gate", "PendingSaves"]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A save that goes on.

    Attributes:
        path: Where to.
        save: The save.
        before: What had been saved before it and has its name until it is written, ``None`` if it is written.
    """

    path: str
    save: BackgroundSave
    before: str | None


class PendingSaves:
    """Keeps saves in their order. Threads and signal handlers may use it meanwhile: no lock is held while waiting.

    Attributes:
        promise_is_broken: Whether a tensor that only steps were to change was changed in another way.
    """

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()
        self._untold: deque[tuple[BaseException, _Pending]] = deque()
        # What this run has published, and the newest of it.
        self._published: dict[str, tuple[int, ...] | None] = {}
        self._newest: str | None = None
        self.promise_is_broken = False

    def begin_run(self) -> None:
        """Forgets what was published: it belongs to an earlier run."""
        self._published.clear()
        self._newest = None
        self.promise_is_broken = False

    def add(self, path: str, save: BackgroundSave, *, before: str | None = None) -> None:
        """Takes a save that goes on; ``before`` is what ``path`` stands for until it is written."""
        self._pending.append(_Pending(path, save, before))

    def published(self, path: str) -> None:
        """Notes a checkpoint of this run that is complete."""
        self._published[path] = identity(path)
        self._newest = path

    # Waiting --------------------------------------------------------------------------------------------------------

    def wait_until_written(self) -> None:
        """Returns when no tensor is needed any more, and every checkpoint has its place. Raises nothing."""
        for pending in list(self._pending):
            pending.save.wait_until_written()

    def finish(self) -> None:
        """Returns when nothing is going on any more. Raises nothing: :meth:`tell` does."""
        # Another thread, or a signal handler, may remove the same ones meanwhile.
        while pending := next(iter(tuple(self._pending)), None):
            pending.save.wait()
            with contextlib.suppress(ValueError):
                self._pending.remove(pending)
            error = pending.save.take_error()
            if error is not None:
                self._untold.append((error, pending))

    def tell(self) -> None:
        """Tells the errors of saves that have ended, once.

        While another exception is being handled, the user's own, that one goes first: these are warnings then. So are
        saves of tensors that were changed meanwhile, since training can go on.

        Raises:
            BaseException: The first of the errors.
        """
        raised: BaseException | None = None
        while self._untold:
            error, pending = self._untold.popleft()
            if isinstance(error, ChangedMeanwhileError):
                self.promise_is_broken = True
                advice = " From now on every checkpoint is written before training goes on: use asynchronous_save=True."
                rank_zero_warn(f"{error}{_what_is_there(pending)}{advice}")
            elif raised is not None or sys.exc_info()[1] is not None:
                rank_zero_warn(f"A save in the background failed: {error}{_what_is_there(pending)}")
            else:
                raised = error
                if pending.before is not None:
                    rank_zero_warn(f"A save in the background failed.{_what_is_there(pending)}")
        if raised is not None:
            raise raised

    def tell_what_changed(self) -> None:
        """Warns if a save could not be published since its tensors were changed meanwhile."""
        if any(pending.save.is_changed for pending in list(self._pending)):
            self.finish()
            self.tell()

    @contextlib.contextmanager
    def before_next(self) -> Iterator[None]:
        """Waits for the saves before, and tells their errors when the next one, which is made within, has ended."""
        self.finish()
        try:
            yield
        finally:
            # In the exception of the next save they are warnings.
            self.tell()

    # Names ----------------------------------------------------------------------------------------------------------

    def reserve(self, path: str) -> str | None:
        """Makes a name stand for a complete checkpoint of this run until a new one is written.

        Returns:
            What it stands for: the newest one, or what this run has saved under the same name. ``None`` if there is
            none, and the new one must be written at once.
        """
        if os.path.lexists(path):
            return path if self._is_ours(path) else None
        if self._newest is None or not self._is_ours(self._newest):
            return None
        try:
            reserve(path, self._newest)
        except OSError:
            return None
        return self._newest

    def _is_ours(self, path: str) -> bool:
        known = self._published.get(path)
        return known is not None and known == identity(path)

    def remove(self, path: str, remove: Callable[[], None]) -> None:
        """Removes a checkpoint: its name at once, its content when all that is newer is on the disk.

        Args:
            path: A local path.
            remove: Removes it as Lightning does.

        Raises:
            CheckpointWriteError: The save before this failed; nothing is removed.
            OSError: It cannot be removed.
        """
        newest = next(iter(tuple(self._pending)[-1:]), None)
        if newest is not None and newest.path != path and os.path.exists(path) and not os.path.islink(path):
            with contextlib.suppress(OSError):
                if newest.save.remove_at_end(path):
                    return
        if newest is not None:
            self.finish()
        if self._untold:
            self.tell()  # an error, or a warning while another one is handled
            return
        remove()


class Gate:
    """Waits before a module loads a state. In a copy or a pickle of the module there is nothing to wait for."""

    def __init__(self, wait: Callable[[], object] | None = None) -> None:
        self._wait = wait

    def __call__(self, *_: object) -> None:
        """Waits."""
        if self._wait is not None:
            self._wait()

    def __reduce__(self) -> Any:
        return Gate, ()


def _what_is_there(pending: _Pending) -> str:
    if pending.before is None:
        return ""
    if pending.before == pending.path:
        return f" {pending.path} still holds what was saved there before."
    return f" {pending.path} holds the same as {pending.before}, the checkpoint that was saved before it."
