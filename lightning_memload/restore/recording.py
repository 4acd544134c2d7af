"""Initialisation that waits: while a module is built, memory is made as always, but nobody writes to it.

A large allocation of untouched memory costs addresses, not memory. So every tensor is the ordinary one, with its
device, its views and its address, while :class:`Recorder` takes down what was done to its contents instead of doing it.
Whatever needs values (a number, an array, an address, an operation whose result cannot wait) makes them *at that
moment*, and from then on that memory is ordinary. What the recorder does not know is never taken down: it happens.

Two modes of torch see the calls (:mod:`watching`): one below autograd sees every operation of the dispatcher, the other
one what reads memory past the dispatcher. Other threads, and extensions that take a tensor's address without either
(``torch.utils.dlpack.to_dlpack``, not ``torch.from_dlpack``), are not seen.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_memload.checkpoint import span_bytes
from lightning_memload.restore.operations import (
    Kind,
    draws,
    draws_from_user,
    empty_call,
    kind_of_call,
    make_like_result,
    name_of,
    overwrites,
    tensors_in,
    written_in,
)
from lightning_memload.restore.storages import (
    Pending,
    Realised,
    count_alone,
    fill_uninitialized,
    is_all_of,
    is_plain,
    own_view,
    storage_of,
    unfilled,
    use_count,
)
from lightning_memload.restore.tape import Contents, Made, Read, Source, Step, in_order, sources_of
from lightning_memload.storage.pages import file_under

__all__ = ["Recorder", "claim", "set_active", "unrecorded"]

# A source of this size is copied at once: that is cheaper than to watch over it.
_COPIED_BYTES = 64 << 10
# Of a longer chain the steps are taken.
_MOST_STEPS = 100
# What has been made so often is kept until the construction ends: a model must not initialise itself for every value.
_MOST_MADE = 4
# A source that lies in memory much larger than itself would keep all of that.
_MOST_AROUND = 4


class _Active(threading.local):
    """The recorder that is at work in this thread."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None


_ACTIVE = _Active()


def set_active(recorder: Recorder | None) -> None:
    """Says which recorder is at work in this thread."""
    _ACTIVE.recorder = recorder


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Lets this package's own operations happen, within ``meta_init`` too."""
    recorder = _ACTIVE.recorder
    with contextlib.nullcontext() if recorder is None else recorder.paused():
        yield


def claim(tensors: Iterable[torch.Tensor]) -> None:
    """Says that code which is not seen is going to write every value of tensors: they are data from now on."""
    recorder = _ACTIVE.recorder
    if recorder is not None:
        with recorder.paused():
            for tensor in tensors:
                recorder.expose(tensor, overwritten=True)


class Recorder:
    """What is known about the memory of tensors while modules are built in this thread."""

    def __init__(self) -> None:
        self.realised: list[Realised] = []
        self._pending: dict[int, Pending] = {}
        # Memory that operations made within, so that nothing but tensors refers to it.
        self._known: dict[int, StorageWeakRef] = {}
        self._sources: dict[int, list[weakref.ref[Source]]] = {}
        self._seeds: random.Random | None = None
        self.is_paused = False

    def give_up(self, reason: str) -> None:
        """Makes all memory ordinary, and takes nothing down any more."""
        self.is_paused = True
        for pending in self.alive():
            self.realise(pending, reason)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes nothing down for a while."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def find(self, tensor: torch.Tensor) -> Pending | None:
        """What waits in the memory of a tensor."""
        storage = storage_of(tensor)
        return None if storage is None else self._pending.get(storage._cdata)

    def alive(self) -> list[Pending]:
        """All memory with contents that wait and that somebody refers to."""
        return [pending for pending in self._pending.values() if not pending.storage.expired()]

    def realise(self, pending: Pending, reason: str | None = None) -> None:
        """Gives memory its contents. It is ordinary from now on.

        Args:
            pending: The memory.
            reason: What needs them; ``None`` if that is nothing to tell a user.
        """
        self.forget(pending)
        storage = pending.get()
        if storage is None:
            return
        if pending.owner is not None and reason is not None:
            self.realised.append(Realised(pending.owner, reason, storage.nbytes(), pending.storage))
        known, others = self._on_the_way(pending)
        pending.contents.write_to(storage, others, known)

    def _on_the_way(self, root: Pending) -> tuple[Made, Made]:
        """The memory that has contents already from which others are made, and the memory that gets its own as well.

        The latter is what a model computes while it runs: all layers so far would be run again for every value.
        Parameters that have been made several times lend their memory: they still move to meta in the end.
        """
        known: Made = {}
        own = root.get()
        if root.made is not None and own is not None:
            known[root.made.key] = own
        others: Made = {}
        if not root.contents.needs():
            return known, others
        needed = {item.key for item in in_order(root.contents)}
        for pending in list(self._pending.values()):
            key, made = pending.contents.key, pending.made
            storage = pending.get() if key in needed or (made is not None and made.key in needed) else None
            if storage is None:
                continue
            if made is not None and made.key in needed:
                known[made.key] = storage
            if key not in needed or key in known:
                continue
            pending.num_made += 1
            if pending.owner is None and pending.is_derived:
                self.forget(pending)
                others[key] = storage
            elif pending.owner is not None and made is None and pending.num_made >= _MOST_MADE:
                pending.made = pending.contents
                others[key] = storage
        return known, others

    def expose(self, tensor: torch.Tensor, reason: str | None = None, *, overwritten: bool = False) -> None:
        """Makes the memory of a tensor ordinary, since code that is not seen is going to read or write it.

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
        self._keep_sources(storage)

    def kept(self) -> list[Realised]:
        """Of what was realised, what is still there."""
        if any(not item.storage.expired() for item in self.realised):
            gc.collect()  # torch.save (2.6) leaves what it has saved in a circle of references.
        self.realised = [item for item in self.realised if not item.storage.expired()]
        return self.realised

    def own_sources(self, contents: Iterable[Contents]) -> None:
        """Copies what others could still change of what contents depend on, when the construction ends."""
        sources = {id(source): source for item in contents for source in sources_of(item)}
        mine: dict[int, list[Source]] = {}
        for source in sources.values():
            mine.setdefault(source.tensor.untyped_storage()._cdata, []).append(source)
        for group in mine.values():
            if use_count(group[0].tensor) >= count_alone() + len(group):
                for source in group:
                    source.keep()

    def forget(self, pending: Pending) -> None:
        """Takes nothing down any more for memory that is overwritten, or that a recipe stands for."""
        self._pending.pop(pending.storage.cdata, None)

    def _adopt(self, tensor: torch.Tensor, *, is_derived: bool = False) -> Pending | None:
        storage = storage_of(tensor)
        if storage is None or not storage.nbytes():
            return None
        pending = self._pending[storage._cdata] = Pending(storage, is_derived=is_derived)
        return pending

    def _keep_sources(self, storage: torch.UntypedStorage) -> None:
        for reference in self._sources.pop(storage._cdata, ()):
            source = reference()
            if source is not None:
                source.keep()

    def on_operation(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes an operation down, or lets it happen."""
        kind = kind_of_call(operator, args, kwargs)
        if kind is Kind.VIEW:
            result = operator(*args, **kwargs)
            if name_of(operator) == "set_":
                self._note_loaded(args)
            return result
        if kind is Kind.EMPTY:
            with unfilled() as is_filled:
                result = operator(*args, **kwargs)
            pending = self._adopt(result)
            if pending is not None and is_filled:
                self._add(pending, fill_uninitialized, (own_view(result),), {}, False, overwriting=True)
            return result
        if kind is Kind.FILLED and not draws_from_user(kwargs):
            call = empty_call(operator, args, kwargs)
            if call is not None:
                make, rest, how, in_place, value = call
                with unfilled():
                    result = make(*rest, **how)
                pending = self._adopt(result)
                if pending is not None:
                    drawn = in_place.startswith(("aten.normal_", "aten.uniform_"))
                    self._add(pending, in_place, (own_view(result), *value), {}, drawn, overwriting=True)
                    return result
                if result.is_meta or not result.numel():
                    return result
        if kind is Kind.IN_PLACE:
            target = kwargs["out"] if "out" in kwargs else args[0]
            if self._record_in_place(operator, target, args, kwargs):
                return target
        if kind is Kind.NEW:
            waiting = self._record_new(operator, args, kwargs)
            if waiting is not None:
                return waiting
        return self._happen(operator, kind, args, kwargs)

    def on_initialiser(self, tensor: torch.Tensor, frame: Any) -> bool:
        """Takes down the function of ``torch.nn.init`` that asks, on its first line, whether there is anything to do.

        Returns:
            Whether it shall be told that there is nothing.
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
        self._add(pending, call, (own_view(tensor),), rest, True, overwriting=covers)
        return True

    def _record_in_place(
        self, operator: Any, target: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        pending = self.find(target)
        if pending is None or not is_plain(target) or draws_from_user(kwargs):
            return False
        if name_of(operator) == "eye" and tuple(target.shape) != (args[0], args[-1]):
            return False  # It would resize it.
        overwriting = overwrites(operator) and is_all_of(target, target.untyped_storage())
        rest = tensors_in((args[1:], kwargs))
        others = [self.find(tensor) for tensor in rest if tensor is not kwargs.get("out")]  # Others, or itself.
        terms = self._terms((args, kwargs), pending) if rest else ((own_view(target), *args[1:]), kwargs)
        if terms is None:
            # Data that may change: copied now, as always. What it replaces need not be made before.
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
                target = own_view(result)
                if name_of(operator) in ("clone", "_to_copy"):
                    self._add(pending, "aten.copy_.default", (target, terms[0][0]), {}, False, overwriting=True)
                else:
                    step = Step(str(operator), terms[0], terms[1], None, target, index, seed)
                    pending.contents = Contents(pending.contents.nbytes, pending.contents.device, step)
        if len(operator._schema.returns) > 1:
            return tuple(results)
        return results[0] if str(operator._schema.returns[0].type) == "Tensor" else results

    def _happen(self, operator: Any, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reason = f"{name_of(operator).strip('_')}() needs its values"
        if name_of(operator) == "_local_scalar_dense":
            reason = "its value becomes a number"
        for tensor in tensors_in((args, kwargs)):
            pending = self.find(tensor)
            if pending is not None:
                self.realise(pending, reason)
        for tensor in written_in(operator, args, kwargs):
            storage = storage_of(tensor)
            if storage is not None and self._sources:
                self._keep_sources(storage)
        result = operator(*args, **kwargs)
        if kind in (Kind.NEW, Kind.FILLED):
            for tensor in tensors_in(result):
                storage = storage_of(tensor)
                if storage is not None and storage.nbytes() > _COPIED_BYTES:
                    self._known[storage._cdata] = StorageWeakRef(storage)
        return result

    def _note_loaded(self, args: tuple[Any, ...]) -> None:
        """A tensor got a storage. If torch.load has just read it, nothing but tensors refers to it."""
        if len(args) < 2 or not isinstance(args[1], (torch.UntypedStorage, torch.Tensor)):
            return
        storage = args[1] if isinstance(args[1], torch.UntypedStorage) else args[1].untyped_storage()
        if storage.nbytes() <= _COPIED_BYTES or storage._cdata in self._pending:
            return
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code is not torch.load.__code__:
            frame = frame.f_back
        if frame is not None and not frame.f_locals.get("mmap"):
            self._known[storage._cdata] = StorageWeakRef(storage)

    def _add(
        self,
        pending: Pending,
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

    def _terms(self, value: Any, target: Pending | None) -> Any:
        """Arguments with what stands for their tensors; ``None`` if one may change behind torch's back."""
        if isinstance(value, torch.Tensor):
            if not is_plain(value):
                return None
            pending = self.find(value)
            if pending is None:
                return self._source(value)
            return own_view(value) if pending is target else Read(pending.contents, own_view(value))
        if isinstance(value, dict):
            items = {key: self._terms(item, target) for key, item in value.items()}
            return None if any(items[key] is None and value[key] is not None for key in value) else items
        if type(value) in (tuple, list):
            terms = [self._terms(item, target) for item in value]
            if any(term is None and item is not None for term, item in zip(terms, value, strict=True)):
                return None
            return type(value)(terms)
        return value

    def _source(self, tensor: torch.Tensor) -> Source | None:
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes <= _COPIED_BYTES:
            return Source(tensor.detach().clone())
        storage, file = tensor.untyped_storage(), None
        if storage._cdata not in self._known:
            file = file_under(tensor.data_ptr(), span_bytes(tensor)) if tensor.is_cpu else None
            if file is None:
                return None
        elif storage.nbytes() > _MOST_AROUND * nbytes:
            return None
        source = Source(tensor.detach(), file)
        self._sources.setdefault(storage._cdata, []).append(weakref.ref(source))
        return source

    def _seed(self) -> int:
        """A seed for one step, of a generator that is seeded by the user's."""
        if self._seeds is None:
            self._seeds = random.Random(int(torch.empty((), dtype=torch.int64, device="cpu").random_().item()))
        return self._seeds.getrandbits(63)
