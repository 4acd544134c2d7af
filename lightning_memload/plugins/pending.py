"""The background saves of one CheckpointIO: keeps their order, reserves their names, and reports their errors."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.errors import ChangedMeanwhileError
from lightning_memload.memory import available_host_bytes, refusal
from lightning_memload.save import BackgroundSave, Save, identity, reserve

__all__ = ["Gate", "PendingSaves"]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A save in the background.

    Attributes:
        path: The path of the new checkpoint.
        save: The save.
        before: The checkpoint that ``path`` stands for until the new one is written, ``None`` if it is written.
        step: The step of the saved state, ``None`` if it is unknown.
    """

    path: str
    save: BackgroundSave
    before: str | None
    step: int | None


class PendingSaves:
    """The saves in the background, in their order. Threads and signal handlers may use it: no wait holds a lock.

    Attributes:
        promise_is_broken: Whether other code than an optimizer step has changed a tensor that only steps may change.
    """

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()
        self._unreported: deque[tuple[BaseException, _Pending]] = deque()
        # The checkpoints that this run has published, with their identities, and the newest one.
        self._published: dict[str, tuple[int, ...] | None] = {}
        self._newest: str | None = None
        self.promise_is_broken = False

    def begin_run(self) -> None:
        """Forgets the published checkpoints: they belong to an earlier run."""
        self._published.clear()
        self._newest = None
        self.promise_is_broken = False

    def add(self, path: str, save: BackgroundSave, *, before: str | None = None, step: int | None = None) -> None:
        """Adds a save.

        Args:
            path: The path of the new checkpoint.
            save: The save.
            before: The checkpoint that ``path`` stands for until the new one is written, ``None`` if it is written.
            step: The step of the saved state, ``None`` if it is unknown.
        """
        self._pending.append(_Pending(path, save, before, step))

    def published(self, path: str) -> None:
        """Records a complete checkpoint of this run."""
        self._published[path] = identity(path)
        self._newest = path

    # Waiting --------------------------------------------------------------------------------------------------------

    def wait_for_tensors(self) -> None:
        """Waits until no save needs the tensors, so that any of them may change. Never raises."""
        for pending in list(self._pending):
            pending.save.wait_for_tensors()

    def wait_until_written(self) -> None:
        """Waits until every checkpoint is written and has its name. Never raises."""
        for pending in list(self._pending):
            pending.save.wait_until_written()

    def finish(self, *, except_of: int | None = None) -> None:
        """Waits until every save has ended. Never raises: :meth:`tell` raises the errors.

        Args:
            except_of: Do not wait for saves of this step. ``None``: wait for all.
        """
        # Another thread, or a signal handler, may remove the same saves at the same time.
        while pending := next(iter(tuple(self._pending)), None):
            if except_of is not None and pending.step == except_of and not pending.save.has_ended:
                return
            pending.save.wait()
            with contextlib.suppress(ValueError):
                self._pending.remove(pending)
            error = pending.save.take_error()
            if error is not None:
                self._unreported.append((error, pending))

    def tell(self) -> None:
        """Reports the errors of saves that have ended, each one once.

        While another exception is being handled, errors become warnings, so that they do not replace the user's own
        exception. A save whose tensors changed before they were written is also only a warning: training can go on.

        Raises:
            BaseException: The first of the errors.
        """
        raised: BaseException | None = None
        while self._unreported:
            error, pending = self._unreported.popleft()
            if isinstance(error, ChangedMeanwhileError):
                self.promise_is_broken = True
                rank_zero_warn(
                    f"{error}{_content_at(pending)} From now on every checkpoint is written before training "
                    "continues. To avoid this warning, use asynchronous_save=True."
                )
            elif raised is not None or sys.exc_info()[1] is not None:
                rank_zero_warn(f"A save in the background failed: {error}{_content_at(pending)}")
            else:
                raised = error
                if pending.before is not None:
                    rank_zero_warn(f"A save in the background failed.{_content_at(pending)}")
        if raised is not None:
            raise raised

    def tell_what_changed(self) -> None:
        """Warns of a save that could not be published, since its tensors changed before they were written."""
        if any(pending.save.is_changed for pending in list(self._pending)):
            self.finish()
            self.tell()

    @property
    def newest(self) -> BackgroundSave | None:
        """The save that began last, if it has not ended."""
        pending = next(iter(tuple(self._pending)[-1:]), None)
        return None if pending is None else pending.save

    def copy(self, save: Save, limit_bytes: int | None, reason: str | None) -> bool:
        """Copies the tensors of a new save to host memory if they fit, otherwise once more when all saves have ended.

        Args:
            save: The new save.
            limit_bytes: The most memory of all saves together, ``None`` for no limit.
            reason: Why the tensors must not be copied, ``None`` if they may.

        Returns:
            Whether they are copied. If not, all saves have ended.
        """

        def refuse(needed_bytes: int) -> str | None:
            held_bytes = sum(pending.save.held_bytes for pending in list(self._pending))
            free_bytes = available_host_bytes()
            return reason or refusal(needed_bytes, free_bytes, limit_bytes=limit_bytes, held_bytes=held_bytes)

        is_copied = save.copy(refuse)
        if not is_copied and self._pending:
            self.finish()
            is_copied = save.copy(refuse)
        return is_copied

    @contextlib.contextmanager
    def before_next(self) -> Iterator[None]:
        """Reports the errors of previous saves after the ``with`` block, which makes the next save."""
        try:
            yield
        finally:
            # If the next save raises, the errors become warnings.
            self.tell()

    # Names ----------------------------------------------------------------------------------------------------------

    def reserve(self, path: str) -> str | None:
        """Makes a name stand for a complete checkpoint of this run until a new one is written.

        If there is none yet, but a save is writing one, it waits for that save.

        Returns:
            The checkpoint that the name stands for: the one that this run has saved under this name, otherwise the
            newest one. ``None`` if there is none. The new checkpoint must then be written immediately.
        """
        before = self._reserve(path)
        if before is None and self._pending:
            self.finish()
            before = self._reserve(path)
        return before

    def _reserve(self, path: str) -> str | None:
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
        """Removes the name of a checkpoint immediately, and its content once every newer checkpoint is on the disk.

        Args:
            path: A local path.
            remove: A function that removes it as Lightning does.

        Raises:
            CheckpointWriteError: The previous save failed. Nothing is removed.
            OSError: The checkpoint cannot be removed.
        """
        *others, newest = tuple(self._pending) or (None,)
        for pending in others:
            if pending is not None and pending.path == path:
                pending.save.wait()  # Otherwise it would be published under this name after the removal.
        if newest is not None and newest.path != path and os.path.exists(path) and not os.path.islink(path):
            with contextlib.suppress(OSError):
                if newest.save.remove_at_end(path):
                    return
        if newest is not None:
            self.finish()
        if self._unreported:
            self.tell()  # It raises, or warns while another exception is being handled.
            return
        remove()


class Gate:
    """A hook of a module that waits before a state is loaded. In a copy or a pickle of the module it does nothing."""

    def __init__(self, wait: Callable[[], object] | None = None) -> None:
        self._wait = wait

    def __call__(self, *_: object) -> None:
        """Waits for the saves."""
        if self._wait is not None:
            self._wait()

    def __reduce__(self) -> Any:
        return Gate, ()


def _content_at(pending: _Pending) -> str:
    if pending.before is None:
        return ""
    if pending.before == pending.path:
        return f" {pending.path} still holds the checkpoint that was saved there before."
    return f" {pending.path} holds the same as {pending.before}, the checkpoint that was saved before it."
