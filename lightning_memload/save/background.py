"""A save that goes on while training does, of a consistent state and in bounded memory.

Nothing is copied aside. What is saved lies where it lay, so it must not change before it is written. Tensors that only
an optimizer's step changes may be written until the next step of any optimizer, which waits; everything else is written
before the save returns. The disk then takes the bytes, and the file gets its name, while training goes on. Should such
a tensor be changed in place in another way meanwhile, its version counter tells, and the save fails instead of keeping
bytes of two states. Writes that torch does not count (through ``.data``, or a raw pointer) are not seen.
"""

from __future__ import annotations

import atexit
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_memload.errors import CheckpointWriteError
from lightning_memload.save.saving import Save, SaveStats
from lightning_memload.save.writing import Order

__all__ = ["BackgroundSave", "is_in_step", "tensors_of_optimizers"]


class BackgroundSave:
    """A save in a thread of its own. Creating it returns when all is written but what only steps change.

    The thread is no daemon: a process that ends waits for it. An error that nobody was told of until then is printed.
    In a forked child there is no such thread and no such save: it has nothing to wait for.

    Args:
        save: What to carry out. Planned in this thread, since planning reads the whole object.
        changed_in_steps: Tensors that nothing but the step of an optimizer changes.
        on_end: Called in the thread with this object and what the save did, ``None`` if it failed.

    Attributes:
        path: What is replaced, or created.
        blocked_seconds: How long the thread that trains has waited so far for bytes to be written.

    Raises:
        CheckpointWriteError: The save has failed already.
        Exception: Likewise.
    """

    def __init__(
        self,
        save: Save,
        changed_in_steps: Iterable[torch.Tensor] = (),
        *,
        on_end: Callable[[BackgroundSave, SaveStats | None], object] = lambda save, stats: None,
    ) -> None:
        self.path = save.path
        self.blocked_seconds = 0.0
        self._save: Save | None = save
        self._on_end = on_end
        self._versions = [(tensor, tensor._version) for tensor in changed_in_steps]
        self._may_wait = {tensor.untyped_storage()._cdata for tensor, _ in self._versions}
        self._pid = os.getpid()
        self._first, self._written = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._actions: list[Callable[[], object]] = []
        self._is_closed = False
        self._error: BaseException | None = None
        self._waits_since: float | None = time.perf_counter()
        self._hook: Any = register_optimizer_step_pre_hook(self._before_step) if self._versions else None
        atexit.register(self.result)
        self._thread = threading.Thread(target=self._run, name="memload-background-save")
        self._thread.start()
        self._first.wait()
        if self._error is not None:
            self.result()

    @property
    def has_failed(self) -> bool:
        """Whether there is an error that :meth:`result` is going to raise."""
        return self._error is not None

    def wait_until_written(self) -> None:
        """Returns when all bytes are written, or never will be. From then on any tensor may change. Raises nothing."""
        if self._written.is_set() or os.getpid() != self._pid:
            return
        self._waits_since = time.perf_counter()
        self._written.wait()

    def wait(self) -> None:
        """Returns when the save has ended, well or not. Raises nothing."""
        if os.getpid() == self._pid:
            self._thread.join()
            self._let_go()

    def result(self) -> None:
        """Waits for the end. The error is told once: whoever asks next gets nothing.

        Raises:
            CheckpointWriteError: The save failed, or a tensor changed outside a step before it was written.
            Exception: What else went wrong.
        """
        self.wait()
        error, self._error = self._error, None
        if error is not None and os.getpid() == self._pid:
            raise error

    def afterwards(self, action: Callable[[], object]) -> bool:
        """Has something done in the thread when the save has succeeded, and not at all if it fails.

        Returns:
            ``False`` if the save has ended, and nothing will be done.
        """
        if os.getpid() != self._pid:
            return False
        with self._lock:
            if self._is_closed:
                return False
            self._actions.append(action)
            return True

    # In the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._on_end(self, self._carry_out())
            while self._error is None and (action := self._next_action()):
                action()
        except BaseException as error:
            self._error = error
        finally:
            with self._lock:
                self._is_closed = True
            self._written.set()
            self._first.set()

    def _carry_out(self) -> SaveStats | None:
        save, self._save = self._save, None
        assert save is not None
        try:
            return save.run(Order(self._must_be_first, self._end_first, self._end_writing))
        except BaseException as error:
            self._error = error
            return None
        finally:
            self._versions.clear()

    def _end_first(self) -> None:
        self._count_waiting()
        self._first.set()

    def _count_waiting(self) -> None:
        since, self._waits_since = self._waits_since, None
        if since is not None:
            self.blocked_seconds += time.perf_counter() - since

    def _next_action(self) -> Callable[[], object] | None:
        with self._lock:
            if self._actions:
                return self._actions.pop(0)
            self._is_closed = True
            return None

    def _must_be_first(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata not in self._may_wait

    def _end_writing(self) -> None:
        changed = sum(tensor._version != version for tensor, version in self._versions)
        if changed:
            raise CheckpointWriteError(
                f"{self.path} could not be saved: {changed} parameters or optimizer states were changed in place "
                "outside an optimizer's step while they were saved in the background, so the file would hold bytes of "
                "two states. What was there is untouched. Change them before saving, or do not save asynchronously.",
                path=self.path,
                needed_bytes=None,
                free_bytes=None,
                errno=None,
            )
        self._count_waiting()
        self._written.set()

    # In the thread that trains --------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Before any optimizer's step; with a closure that torch calls before it changes anything, after that."""
        if self._written.is_set():
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

    def _let_go(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        atexit.unregister(self.result)


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
