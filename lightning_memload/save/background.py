"""A save whose end training does not wait for, of a consistent state and in bounded memory.

By default everything is written, and has its name, before the save returns: every process sees it, and it survives the
end of this one at any moment. What goes on is what only the disk needs: bringing it there, so that it survives a power
failure, and removing what it takes the place of.

Tensors that only an optimizer's step changes may be written later, until the next step of any optimizer, which waits.
Nothing is copied aside. Should such a tensor be changed in place in another way meanwhile, its version counter tells,
and nothing is published, instead of bytes of two states. Writes that torch does not count (through ``.data``, or a raw
pointer) are not seen.
"""

from __future__ import annotations

import atexit
import inspect
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_memload.errors import CheckpointWriteError
from lightning_memload.save.replacement import SetAside
from lightning_memload.save.saving import Save, SaveStats
from lightning_memload.save.writing import Order
from lightning_memload.transfer import Latch, start_thread

__all__ = ["BackgroundSave", "ChangedMeanwhileError", "is_in_step", "tensors_of_optimizers"]


class ChangedMeanwhileError(CheckpointWriteError):
    """A tensor changed outside an optimizer's step before it was written, so nothing was published."""


class BackgroundSave:
    """A save that ends in a thread of its own. Creating it returns when all is written but what only steps change.

    Without such tensors everything is written by the calling thread, and has its name when this returns. The thread is
    no daemon: a process that ends waits for it. Where no thread can be started, everything is done before this returns.
    An error that was not told until the end of the process is printed then. In a forked child there is no such thread
    and no such save: it has nothing to wait for. A fork waits until everything is written.

    Args:
        save: What to carry out. Planned in this thread, since planning reads the whole object.
        changed_in_steps: Tensors that nothing but the step of an optimizer changes.
        on_end: Called with this object and what the save did, ``None`` if it failed, in the thread in which it ends.

    Attributes:
        path: What is replaced, or created.
        blocked_seconds: How long the thread that trains has waited so far for bytes to be written.

    Raises:
        CheckpointWriteError: The save has failed already.
        Exception: Likewise.
    """

    _unwritten: ClassVar[set[BackgroundSave]] = set()

    def __init__(
        self,
        save: Save,
        changed_in_steps: Iterable[torch.Tensor] = (),
        *,
        on_end: Callable[[BackgroundSave, SaveStats | None], object] = lambda save, stats: None,
    ) -> None:
        self.path = save.path
        self.blocked_seconds = 0.0
        self._save = save
        self._on_end = on_end
        self._versions = [(tensor, tensor._version) for tensor in changed_in_steps]
        self._may_wait = {tensor.untyped_storage()._cdata for tensor, _ in self._versions}
        self._pid = os.getpid()
        self._first, self._published, self._ended = Latch(), Latch(), Latch()
        # No lock: a signal handler that interrupts remove_at_end may wait for the thread that takes these out.
        self._set_aside: deque[SetAside] = deque()
        self._removes: bool | None = None  # not known before the end
        self._error: BaseException | None = None
        self._waits_since: float | None = time.perf_counter()
        self._hook: Any = None
        self._ident: int | None = None
        if self._versions:
            self._hook = register_optimizer_step_pre_hook(self._before_step)
            self._unwritten.add(self)
        else:
            self._write(None)
        # Tells, at the end of the process, of an error that was not told before.
        atexit.register(self.result)
        self._thread = start_thread(self._run, "memload-background-save")
        if self._thread is None:
            self._run()
        try:
            self._first.wait()
        except BaseException:
            self.wait()  # or the caller, who is interrupted, would not know of it
            raise
        if self._error is not None:
            self.result()

    @property
    def is_changed(self) -> bool:
        """Whether it is known that nothing was published since a tensor changed, and that was not told yet."""
        return isinstance(self._error, ChangedMeanwhileError)

    def wait_until_written(self) -> None:
        """Returns when it has its place, or failed. From then on any tensor may change. Raises nothing."""
        if self._published.is_set() or os.getpid() != self._pid:
            return
        self._waits_since = time.perf_counter()
        self._published.wait()

    def wait(self) -> None:
        """Returns when the save has ended, well or not. Raises nothing."""
        if os.getpid() != self._pid:
            return
        self._ended.wait()
        if self._thread is not None:
            # It is at its last instruction. A signal handler that interrupts a join must not join for ever.
            self._thread.join(timeout=1)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        atexit.unregister(self.result)

    def result(self) -> None:
        """Waits for the end. The error is told once: the next call raises nothing.

        Raises:
            ChangedMeanwhileError: A tensor changed outside a step before it was written. Nothing was published.
            CheckpointWriteError: The save failed.
            Exception: What else went wrong.
        """
        self.wait()
        error = self.take_error()
        if error is not None:
            raise error

    def take_error(self) -> BaseException | None:
        """Gives the error to a caller that tells it."""
        error, self._error = self._error, None
        return error if os.getpid() == self._pid else None

    def remove_at_end(self, path: str) -> bool:
        """Takes the name from another checkpoint at once, and removes it when this save is on the disk.

        If this save fails, the other checkpoint gets its name back, if that is free.

        Returns:
            ``False`` if the save has ended, and nothing is done.

        Raises:
            OSError: The checkpoint cannot be renamed.
        """
        if os.getpid() != self._pid or self._removes is not None:
            return False
        self._set_aside.append(SetAside(path))
        if self._removes is not None:
            self._end_removals(removes=self._removes)  # the thread may have looked before this one came
        return True

    # In the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._ident = threading.get_ident()
        stats: SaveStats | None = None
        try:
            if not self._published.is_set():
                self._write(Order(self._must_be_first, self._end_first))
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

    def _write(self, order: Order | None) -> None:
        """Writes everything and publishes it, or nothing."""
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
        self._count_waiting()
        self._published.set()
        self._first.set()

    def _end_first(self) -> None:
        self._count_waiting()
        self._first.set()

    def _count_waiting(self) -> None:
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

    def _must_be_first(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata not in self._may_wait

    # In the thread that trains --------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Before any optimizer's step; with a closure that torch calls before it changes anything, after that."""
        if self._published.is_set():
            return None
        # Lightning runs forward and backward in the closure. Only torch's own steps are known to begin with it.
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
        """Waits until everything is written: a child would hold the files that are open for it."""
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
    """Whether this thread is within an optimizer's step, in its closure that is: it changes tensors when that ends.

    Lightning runs ``training_step``, backward and the hooks around them in there. A save that begins then has missed
    the moment before the step in which it could have made it wait.
    """
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_name == "step" and code.co_argcount else None
        if isinstance(owner, torch.optim.Optimizer):
            return True
        frame = frame.f_back
    return False


def tensors_of_optimizers(optimizers: Iterable[Any], modules: Iterable[torch.nn.Module] = ()) -> list[torch.Tensor]:
    """The parameters and states of optimizers, for :class:`BackgroundSave`.

    Args:
        optimizers: Those whose steps torch does not announce are ignored (other classes, and wrappers that never call
            ``Optimizer.__init__``), and so are tensors of subclasses and frozen parameters: what changes these, and
            when, is not known.
        modules: All modules. What they change in a forward pass is left out: what shares memory with a buffer, and
            embeddings with a ``max_norm``.
    """
    changing = {tensor.untyped_storage()._cdata for tensor in _changed_by_forward(modules) if _is_plain(tensor)}
    found: list[torch.Tensor] = []
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer) or not getattr(type(optimizer).step, "hooked", False):
            continue
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        # No step changes a frozen one, so somebody else does: the teacher of a student that it follows.
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
