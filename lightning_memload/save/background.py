"""Finishes a save in a background thread while training goes on. The state is consistent, the memory bounded.

By default the calling thread writes and publishes everything: all processes see the checkpoint, and it survives the end
of this process at any moment. Only the work for the disk is left to the background: the sync that makes it survive a
power failure, and the removal of the checkpoint that it replaces.

Tensors that only optimizer.step() modifies may be written in the background too. The next step of any optimizer then
waits until they are written. No tensor is copied. If other code modifies such a tensor in place before it is written,
its version counter shows it: the save fails and publishes nothing, because the file would mix two states. Modifications
that torch does not count (through ``.data``, or a raw pointer) are not detected.

If the save has copied the tensors to host memory, all of it is written in the background, and any tensor may change.
Such saves may wait for one another, each with its own copies.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_memload.errors import ChangedMeanwhileError
from lightning_memload.frames import callers, owner
from lightning_memload.save.saving import Save, SaveStats
from lightning_memload.storage.replacement import SetAside
from lightning_memload.transfer import Latch, start_thread
from lightning_memload.transfer.writing import WriteOrder

__all__ = ["BackgroundSave", "is_in_step", "tensors_of_optimizers"]


class BackgroundSave:
    """Runs a save and finishes it in a background thread.

    The constructor blocks until every tensor that code outside optimizer.step() may modify has been written. Without
    ``changed_in_steps`` the calling thread writes and publishes everything before the constructor returns. If the
    save has copied the tensors, the constructor only starts the thread.

    The background thread is not a daemon: the process waits for it at exit. If no thread can be started, the
    constructor does all the work. An error that no call has raised is printed at exit. A forked child has neither the
    thread nor the save, and all waits return at once there. A fork waits until tensors that are not copied are written.

    Args:
        save: The planned save. Plan it in the calling thread: planning reads the whole object.
        changed_in_steps: Tensors that only optimizer.step() modifies. None if the save has copied the tensors.
        after: The save before this one. This one begins to write when that one has ended. Only for a save that has
            copied the tensors.
        on_end: Called in the thread in which the save ends, with this object and the figures of the save (``None`` if
            it failed).

    Attributes:
        path: The checkpoint to replace or to create.
        blocked_seconds: How long the training thread has waited so far for bytes to be written.

    Raises:
        CheckpointWriteError: The save has failed already.
        Exception: The save has failed already, for another reason.
    """

    _unwritten: ClassVar[set[BackgroundSave]] = set()

    def __init__(
        self,
        save: Save,
        changed_in_steps: Iterable[torch.Tensor] = (),
        *,
        after: BackgroundSave | None = None,
        on_end: Callable[[BackgroundSave, SaveStats | None], object] = lambda save, stats: None,
    ) -> None:
        self.path = save.path
        self.blocked_seconds = 0.0
        self._save = save
        self._is_copied = save.is_copied
        self._after = after
        self._on_end = on_end
        self._versions = [(tensor, tensor._version) for tensor in changed_in_steps]
        self._deferred_storages = {tensor.untyped_storage()._cdata for tensor, _ in self._versions}
        self._pid = os.getpid()
        self._first, self._published, self._ended = Latch(), Latch(), Latch()
        # A deque needs no lock. With a lock, a signal handler that interrupts remove_at_end() and waits for the thread
        # would be a deadlock.
        self._set_aside: deque[SetAside] = deque()
        self._removes: bool | None = None  # None until the save has ended
        self._error: BaseException | None = None
        self._waits_since: float | None = time.perf_counter()
        self._hook: Any = None
        self._ident: int | None = None
        if self._is_copied:
            assert not self._versions
        elif self._versions:
            self._hook = register_optimizer_step_pre_hook(self._before_step)
            self._unwritten.add(self)
        else:
            self._write(None)
        # Raises, at exit, an error that no call has raised. The interpreter prints it.
        atexit.register(self.result)
        self._thread = start_thread(self._run, "memload-background-save")
        if self._thread is None:
            self._run()
        try:
            self._first.wait()
        except BaseException:
            self.wait()  # the interrupted caller gets no object that it could wait for
            raise
        if self._error is not None:
            self.result()

    @property
    def is_changed(self) -> bool:
        """Whether the save failed because a tensor was modified, and this error has not been raised yet."""
        return isinstance(self._error, ChangedMeanwhileError)

    @property
    def has_ended(self) -> bool:
        """Whether the save has ended, with or without an error."""
        return self._ended.is_set()

    @property
    def held_bytes(self) -> int:
        """Host memory of the copied tensors that is not freed yet."""
        return self._save.held_bytes

    def wait_for_tensors(self) -> None:
        """Waits until the save does not need the tensors, so that any of them may change. Never raises."""
        if not self._is_copied:
            self.wait_until_written()

    def wait_until_written(self) -> None:
        """Waits until the save is published or has failed. Never raises."""
        if self._published.is_set() or os.getpid() != self._pid:
            return
        self._waits_since = time.perf_counter()
        self._published.wait()

    def wait(self) -> None:
        """Waits until the save has ended, with or without an error. Never raises."""
        if os.getpid() != self._pid:
            return
        self._ended.wait()
        if self._thread is not None:
            # The thread is about to end. The timeout is for a signal handler that interrupts a join: without it, its
            # own join might never return.
            self._thread.join(timeout=1)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        atexit.unregister(self.result)

    def result(self) -> None:
        """Waits until the save has ended and raises its error. The error is raised once: the next call returns.

        Raises:
            ChangedMeanwhileError: A tensor was modified outside a step before it was written. Nothing was published.
            CheckpointWriteError: The save failed.
            Exception: The save failed for another reason.
        """
        self.wait()
        error = self.take_error()
        if error is not None:
            raise error

    def take_error(self) -> BaseException | None:
        """Returns the error and forgets it, for a caller that reports it. ``None`` if there is none."""
        error, self._error = self._error, None
        return error if os.getpid() == self._pid else None

    def remove_at_end(self, path: str) -> bool:
        """Renames another checkpoint away at once, and removes it when this save is on the disk.

        If this save fails, the other checkpoint is renamed back, unless its name is in use again.

        Returns:
            ``False`` if this save has ended already. Nothing is done then.

        Raises:
            OSError: The checkpoint cannot be renamed.
        """
        if os.getpid() != self._pid or self._removes is not None:
            return False
        self._set_aside.append(SetAside(path))
        if self._removes is not None:
            # The thread may have emptied the queue before this entry was added.
            self._end_removals(removes=self._removes)
        return True

    # In the background thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        self._ident = threading.get_ident()
        stats: SaveStats | None = None
        after, self._after = self._after, None  # otherwise each save would keep all saves before it
        try:
            if after is not None:
                self._end_first()
                after._ended.wait()
            if not self._published.is_set():
                self._write(WriteOrder(self._is_written_first, self._end_first))
            stats = self._save.settle()
        except BaseException as error:
            self._error = error
        try:
            self._end_removals(removes=stats is not None)
            self._on_end(self, stats)
        except BaseException as error:
            self._error = self._error or error
        finally:
            for latch in (self._published, self._first, self._ended):
                latch.set()

    def _write(self, order: WriteOrder | None) -> None:
        """Writes and publishes everything. After an error nothing is published."""
        try:
            self._save.write(order)
            changed = sum(tensor._version != version for tensor, version in self._versions)
            if changed:
                raise _changed(self.path, changed)
            self._save.publish()
        except BaseException:
            self._save.abandon()
            raise
        finally:
            self._versions.clear()
            self._unwritten.discard(self)
        self._add_blocked_time()
        self._published.set()
        self._first.set()

    def _end_first(self) -> None:
        if self._first.is_set():
            return
        self._add_blocked_time()
        self._first.set()

    def _add_blocked_time(self) -> None:
        since, self._waits_since = self._waits_since, None
        if since is not None:
            self.blocked_seconds += time.perf_counter() - since

    def _end_removals(self, *, removes: bool) -> None:
        self._removes = removes
        while True:
            try:
                other = self._set_aside.popleft()
            except IndexError:
                return
            if removes:
                other.remove()
            else:
                other.give_back()

    def _is_written_first(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata not in self._deferred_storages

    # In the training thread --------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Runs before every optimizer step, and waits there or, if possible, after the step's closure."""
        if self._published.is_set():
            return None
        # Lightning runs forward and backward in the closure, so waiting after it is shorter. Only torch's own
        # optimizers are known to call the closure before they modify a tensor.
        closure = kwargs.get("closure")
        if closure is None or not type(optimizer).__module__.startswith("torch.optim."):
            self.wait_until_written()
            return None

        def closure_and_wait() -> Any:
            result = closure()
            self.wait_until_written()
            return result

        return args, {**kwargs, "closure": closure_and_wait}

    @classmethod
    def before_fork(cls) -> None:
        """Waits until everything is written: a child would inherit the open files."""
        for save in list(cls._unwritten):
            if save._ident != threading.get_ident():
                save.wait_until_written()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=BackgroundSave.before_fork)


def _changed(path: str, count: int) -> ChangedMeanwhileError:
    return ChangedMeanwhileError(
        f"{path} could not be saved: {count} parameters or optimizer states were changed in place outside an "
        "optimizer's step while they were saved in the background, so the file would hold bytes of two states. "
        "Nothing was published.",
        path=path,
        needed_bytes=None,
        free_bytes=None,
        errno=None,
    )


def is_in_step() -> bool:
    """Whether this thread is inside an optimizer's step, which modifies tensors when its closure has ended.

    Lightning runs ``training_step``, backward and the hooks around them in the closure. A save that starts there is too
    late to make this step wait: the hook before the step has already run.
    """
    steps = (frame for frame in callers() if frame.f_code.co_name == "step")
    return any(isinstance(owner(frame), torch.optim.Optimizer) for frame in steps)


def tensors_of_optimizers(optimizers: Iterable[Any], modules: Iterable[torch.nn.Module] = ()) -> list[torch.Tensor]:
    """The parameters and optimizer states that only a step modifies, for :class:`BackgroundSave`.

    Args:
        optimizers: The optimizers. Ignored are optimizers for which torch runs no step hooks (other classes, and
            wrappers that never call ``Optimizer.__init__``), tensor subclasses and frozen parameters: it is not known
            which code modifies these, and when.
        modules: All modules. Tensors that a forward pass modifies are excluded: tensors that share memory with a
            buffer, and embeddings with a ``max_norm``.
    """
    changing = {tensor.untyped_storage()._cdata for tensor in _changed_by_forward(modules) if _is_plain(tensor)}
    found: list[torch.Tensor] = []
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer) or not getattr(type(optimizer).step, "hooked", False):
            continue
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        # No step modifies a frozen parameter, so other code may: for example the moving average of a teacher model.
        found += [parameter for parameter in parameters if parameter.requires_grad]
        for state in optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, torch.Tensor)] if state else []
    return [tensor for tensor in found if _is_plain(tensor) and tensor.untyped_storage()._cdata not in changing]


def _changed_by_forward(modules: Iterable[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from module.buffers(recurse=False)
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.max_norm is not None:
            yield module.weight


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_inference()
