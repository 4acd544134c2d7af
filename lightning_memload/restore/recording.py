"""Deferred initialisation: while a module is built, its memory is allocated, but operations on it are only recorded.

A large allocation of untouched memory costs addresses, not memory. So every tensor is an ordinary one, with its device,
its views and its address, while :class:`Recorder` records the operations on its contents instead of running them. If a
value is needed (a number, an array, an address, an operation that cannot be recorded), the recorded operations run *at
that moment*, and the memory is ordinary from then on. An operation that the recorder does not know runs at once.

Two modes of torch see the calls (:mod:`watching`). One is below autograd and sees every operation of the dispatcher.
The other sees the calls that read memory without the dispatcher. Not seen: other threads, and extensions that take a
tensor's address in another way (``torch.utils.dlpack.to_dlpack``; ``torch.from_dlpack`` is seen).
"""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_memload.checkpoint import span_bytes
from lightning_memload.frames import callers
from lightning_memload.restore.operations import (
    OperationKind,
    draws,
    draws_from_user,
    empty_call,
    fits,
    kind_of_call,
    make_like_result,
    name_of,
    overwrites,
    tensors_in,
    written_in,
)
from lightning_memload.restore.pending_memory import PendingMemory
from lightning_memload.restore.storages import (
    PendingBlock,
    count_alone,
    fill_uninitialized,
    is_all_of,
    reads_memory_directly,
    storage_of,
    strided_view,
    unfilled,
    use_count,
)
from lightning_memload.restore.tape import Constant, Contents, Recipe, Step, constants_of
from lightning_memload.storage.pages import file_under

__all__ = ["Recorder", "claim", "set_active", "unrecorded"]

# A constant of at most this size is copied at once. That is cheaper than watching it for changes.
_COPIED_BYTES = 64 << 10
# A chain of more steps is not recorded further: its steps run.
_MOST_STEPS = 100
# A constant in a storage more than this many times its own size is refused: it would keep the whole storage alive.
_MOST_AROUND = 4


class _ActiveRecorder(threading.local):
    """The active recorder of this thread."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None


_ACTIVE = _ActiveRecorder()


def set_active(recorder: Recorder | None) -> None:
    """Sets the active recorder of this thread; ``None`` for none."""
    _ACTIVE.recorder = recorder


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Runs this package's own operations unrecorded, also within ``meta_init``."""
    recorder = _ACTIVE.recorder
    with contextlib.nullcontext() if recorder is None else recorder.paused():
        yield


def claim(tensors: Iterable[torch.Tensor]) -> None:
    """Marks tensors whose values are about to be overwritten by code that is not recorded: they are data from now on.

    Args:
        tensors: The tensors. Every value of each of them is going to be written.
    """
    recorder = _ACTIVE.recorder
    if recorder is not None:
        with recorder.paused():
            for tensor in tensors:
                recorder.expose(tensor, overwritten=True)


class Recorder(PendingMemory):
    """Records what happens to the memory of tensors while modules are built in this thread."""

    def __init__(self) -> None:
        super().__init__()
        # Memory that operations allocated during the construction. Only tensors refer to it.
        self._known: dict[int, StorageWeakRef] = {}
        self._constants: dict[int, list[weakref.ref[Constant]]] = {}
        self._seeds: random.Random | None = None

    def expose(self, tensor: torch.Tensor, reason: str | None = None, *, overwritten: bool = False) -> None:
        """Makes the memory of a tensor ordinary, before code that is not recorded reads or writes it.

        Args:
            tensor: The tensor.
            reason: See :meth:`realise`.
            overwritten: Whether every value of the tensor is replaced before it is read.
        """
        storage = storage_of(tensor)
        if storage is None:
            return
        pending = self._pending.get(storage._cdata)
        if pending is not None:
            if overwritten and is_all_of(tensor, storage):
                self.forget(pending)
            else:
                self.realise(pending, reason)
        self._known.pop(storage._cdata, None)
        self._copy_constants(storage)

    def keep_constants(self, contents: Iterable[Contents]) -> None:
        """Copies, at the end of the construction, the constants of contents that other code can still change."""
        constants = {id(constant): constant for item in contents for constant in constants_of(item)}
        mine: dict[int, list[Constant]] = {}
        for constant in constants.values():
            mine.setdefault(constant.tensor.untyped_storage()._cdata, []).append(constant)
        for group in mine.values():
            if use_count(group[0].tensor) >= count_alone() + len(group):
                for constant in group:
                    constant.keep()

    def _copy_constants(self, storage: torch.UntypedStorage) -> None:
        for reference in self._constants.pop(storage._cdata, ()):
            constant = reference()
            if constant is not None:
                constant.keep()

    def on_operation(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records an operation, or runs it, and returns its result."""
        kind = kind_of_call(operator, args, kwargs)
        if kind is OperationKind.VIEW:
            result = operator(*args, **kwargs)
            if name_of(operator) == "set_":
                self._note_loaded(args)
            return result
        if kind is OperationKind.EMPTY:
            with unfilled() as is_filled:
                result = operator(*args, **kwargs)
            pending = self._adopt(result)
            if pending is not None and is_filled:
                self._add(pending, fill_uninitialized, (strided_view(result),), {}, False, overwriting=True)
            return result
        if kind is OperationKind.FILLED and not draws_from_user(kwargs):
            call = empty_call(operator, args, kwargs)
            if call is not None:
                make, rest, how, in_place, value = call
                with unfilled():
                    result = make(*rest, **how)
                pending = self._adopt(result)
                if pending is not None:
                    drawn = in_place.startswith(("aten.normal_", "aten.uniform_"))
                    self._add(pending, in_place, (strided_view(result), *value), {}, drawn, overwriting=True)
                    return result
                if result.is_meta or not result.numel():
                    return result
        if kind is OperationKind.IN_PLACE:
            target = kwargs["out"] if "out" in kwargs else args[0]
            if self._record_in_place(operator, target, args, kwargs):
                return target
        if kind is OperationKind.NEW:
            waiting = self._record_new(operator, args, kwargs)
            if waiting is not None:
                return waiting
        return self.run(operator, args, kwargs, kind)

    def on_initialiser(self, tensor: torch.Tensor, frame: Any) -> bool:
        """Records a whole function of ``torch.nn.init``, which asks on its first line whether there is anything to do.

        Args:
            tensor: The tensor that it initialises.
            frame: The frame of the function.

        Returns:
            Whether it was recorded. If so, the answer to the function must be that there is nothing to do.
        """
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        call = frame.f_globals.get(code.co_name)
        pending = self.find(tensor)
        arguments = {name: frame.f_locals.get(name) for name in names}
        if pending is None or not callable(call) or arguments.get(names[0]) is not tensor:
            return False
        if any(isinstance(value, (torch.Generator, torch.Tensor)) for value in list(arguments.values())[1:]):
            return False
        rest = {name: value for name, value in arguments.items() if name != names[0]}
        covers = is_all_of(tensor, tensor.untyped_storage())
        self._add(pending, call, (strided_view(tensor),), rest, True, overwriting=covers)
        return True

    def _record_in_place(
        self, operator: Any, target: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        pending = self.find(target)
        if pending is None or not reads_memory_directly(target) or draws_from_user(kwargs):
            return False
        if name_of(operator) == "eye" and tuple(target.shape) != (args[0], args[-1]):
            return False  # eye() would resize its output.
        rest = tensors_in((args[1:], kwargs))
        if not fits(operator, target, rest):
            return False  # It fails, and leaves the contents as they are.
        overwriting = overwrites(operator) and is_all_of(target, target.untyped_storage())
        others = [self.find(tensor) for tensor in rest if tensor is not kwargs.get("out")]  # may contain the target
        terms = self._terms((args, kwargs), pending) if rest else ((strided_view(target), *args[1:]), kwargs)
        if terms is None:
            # The arguments may change later, so the operation runs now. Overwritten contents need not be made first.
            if overwriting and pending not in others:
                self.forget(pending)
            else:
                self.realise(pending)
            return False
        if pending.num_steps >= _MOST_STEPS and not overwriting:
            self.realise(pending, f"it is written in more than {_MOST_STEPS} steps")
            return False
        drawn = draws(operator)
        pending.is_derived |= any(other is not None and other.is_derived for other in others)
        self._add(pending, str(operator), terms[0], terms[1], drawn, overwriting=overwriting and pending not in others)
        return True

    def _record_new(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = [self.find(tensor) for tensor in tensors_in((args, kwargs))]
        waiting = [pending for pending in inputs if pending is not None]
        if not waiting or draws_from_user(kwargs) or kwargs.get("device") == torch.device("meta"):
            return None
        derived = any(pending.is_derived for pending in waiting)
        with unfilled():
            results = make_like_result(operator, args, kwargs, infer=derived)
        terms = None if results is None else self._terms((args, kwargs), None)
        if results is None or terms is None:
            return None
        seed = self._seed() if draws(operator) else None
        for index, result in enumerate(results):
            pending = self._adopt(result, is_derived=derived)
            if pending is not None:
                target = strided_view(result)
                if name_of(operator) in ("clone", "_to_copy"):
                    self._add(pending, "aten.copy_.default", (target, terms[0][0]), {}, False, overwriting=True)
                else:
                    step = Step(str(operator), terms[0], terms[1], None, target, index, seed)
                    pending.contents = Contents(pending.contents.nbytes, pending.contents.device, step)
        if len(operator._schema.returns) > 1:
            return tuple(results)
        return results[0] if str(operator._schema.returns[0].type) == "Tensor" else results

    def run(
        self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: OperationKind = OperationKind.OTHER
    ) -> Any:
        """Runs an operation, after making the contents that it reads."""
        reason = f"{name_of(operator).strip('_')}() needs its values"
        if name_of(operator) == "_local_scalar_dense":
            reason = "its value becomes a number"
        for tensor in tensors_in((args, kwargs)):
            pending = self.find(tensor)
            if pending is not None:
                self.realise(pending, reason)
        for tensor in written_in(operator, args, kwargs):
            storage = storage_of(tensor)
            if storage is not None and self._constants:
                self._copy_constants(storage)
        result = operator(*args, **kwargs)
        if kind in (OperationKind.NEW, OperationKind.FILLED):
            for tensor in tensors_in(result):
                storage = storage_of(tensor)
                if storage is not None and storage.nbytes() > _COPIED_BYTES:
                    self._known[storage._cdata] = StorageWeakRef(storage)
        return result

    def _note_loaded(self, args: tuple[Any, ...]) -> None:
        """Notes a storage that ``set_`` gave to a tensor, if ``torch.load`` read it: only tensors refer to it."""
        if len(args) < 2 or not isinstance(args[1], (torch.UntypedStorage, torch.Tensor)):
            return
        storage = args[1] if isinstance(args[1], torch.UntypedStorage) else args[1].untyped_storage()
        if storage.nbytes() <= _COPIED_BYTES or storage._cdata in self._pending:
            return
        load: Any = torch.load
        frame = next((frame for frame in callers() if frame.f_code is load.__code__), None)
        if frame is not None and not frame.f_locals.get("mmap"):
            self._known[storage._cdata] = StorageWeakRef(storage)

    def _add(
        self,
        pending: PendingBlock,
        call: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        drawn: bool,
        *,
        overwriting: bool,
    ) -> None:
        before = None if overwriting else pending.contents.last
        step = Step(call, args, kwargs, before, seed=self._seed() if drawn else None)
        pending.contents = Contents(pending.contents.nbytes, pending.contents.device, step)
        pending.num_steps = 1 if overwriting else pending.num_steps + 1

    def _terms(self, value: Any, target: PendingBlock | None) -> Any:
        """Arguments with a term for each tensor; ``None`` if a tensor may change without a call that is seen."""
        if isinstance(value, torch.Tensor):
            if not reads_memory_directly(value):
                return None
            pending = self.find(value)
            if pending is None:
                return self._constant(value)
            return strided_view(value) if pending is target else Recipe(pending.contents, strided_view(value))
        if isinstance(value, dict):
            items = {key: self._terms(item, target) for key, item in value.items()}
            return None if any(items[key] is None and value[key] is not None for key in value) else items
        if type(value) in (tuple, list):
            terms = [self._terms(item, target) for item in value]
            if any(term is None and item is not None for term, item in zip(terms, value, strict=True)):
                return None
            return type(value)(terms)
        return value

    def _constant(self, tensor: torch.Tensor) -> Constant | None:
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes <= _COPIED_BYTES:
            return Constant(tensor.detach().clone())
        storage, file = tensor.untyped_storage(), None
        if storage._cdata not in self._known:
            file = file_under(tensor.data_ptr(), span_bytes(tensor)) if tensor.is_cpu else None
            if file is None:
                return None
        elif storage.nbytes() > _MOST_AROUND * nbytes:
            return None
        constant = Constant(tensor.detach(), file)
        self._constants.setdefault(storage._cdata, []).append(weakref.ref(constant))
        return constant

    def _seed(self) -> int:
        """A seed for one step, from a generator that is seeded from torch's default generator."""
        if self._seeds is None:
            self._seeds = random.Random(int(torch.empty((), dtype=torch.int64, device="cpu").random_().item()))
        return self._seeds.getrandbits(63)
