"""What made the contents of a stretch of memory, as a chain of steps that can be taken again at any time.

A step is one operation of torch on one stretch of memory: an initialiser, an arithmetic operation, a copy from a
:class:`Source`. Steps refer to other memory by the step that was its last at that time, so the chain of one parameter
holds what it depends on and nothing else, and the end of a chain gives the same values whenever it is replayed: a step
that draws random numbers has a seed of its own. Nothing here knows modules.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lightning_memload.errors import MetaTensorError
from lightning_memload.storage.pages import MappedFile

__all__ = ["Contents", "Made", "Own", "Read", "Source", "Step", "holds_data", "in_order", "sources_of", "view_of"]

# Memory with the contents that steps read, by what identifies these contents.
Made = dict[int, torch.UntypedStorage]


class Source:
    """A real tensor that a step copies or computes from. Its values do not change as long as a step refers to it.

    Copies of a module share their sources, so a deep copy of one is itself.

    Attributes:
        tensor: The values.
        file: The file whose pages they are, ``None`` for other memory.
    """

    __slots__ = ("__weakref__", "file", "tensor")

    def __init__(self, tensor: torch.Tensor, file: MappedFile | None = None) -> None:
        self.tensor = tensor
        self.file = file

    def read(self) -> torch.Tensor:
        """The values, as they were.

        Raises:
            MetaTensorError: Their file has been written to in place.
        """
        if self.file is not None and self.file.has_changed:
            raise MetaTensorError(
                f"{self.file.path} has been written to in place since a constructor loaded parameters from it under "
                "meta_init, before a restore needed their values. Build the module again, load that file without "
                "mmap=True, or replace it by a new file instead.",
                names=(),
            )
        return self.tensor

    def keep(self) -> None:
        """Copies the values, before somebody else changes them."""
        self.tensor, self.file = self.read().clone(), None

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (self.read(),)


@dataclass(frozen=True, slots=True)
class Own:
    """A view of the memory that a step writes."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents that a stretch of memory has after a step.

    Attributes:
        nbytes: Its length.
        device: Where it is.
        last: The step, ``None`` for memory that has not been written.
    """

    nbytes: int
    device: torch.device
    last: Step | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Contents:
        return self

    @property
    def key(self) -> int:
        """What contents have in common that are the same."""
        return id(self) if self.last is None else id(self.last)

    def make(self) -> torch.UntypedStorage:
        """New memory with these contents.

        Peak memory: itself, and what steps read that are not taken yet.
        """
        storage = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device).untyped_storage()
        self.write_to(storage)
        return storage

    def write_to(self, storage: torch.UntypedStorage, others: Made | None = None, known: Made | None = None) -> None:
        """Gives memory of the same length and device these contents.

        Args:
            storage: The memory.
            others: Other memory that gets its contents on the way, by their keys.
            known: Memory that has contents already, likewise. It is read only, but may be ``storage``.
        """
        if self.last is not None:
            with _undisturbed():
                _replay(self, storage, others or {}, known or {})

    def needs(self) -> list[Contents]:
        """The contents from which the last step makes these."""
        step = self.last
        if step is None:
            return []
        before = [] if step.previous is None else [Contents(self.nbytes, self.device, step.previous)]
        return [*before, *(read.contents for read in _reads_in((step.args, step.kwargs)))]


@dataclass(frozen=True, slots=True)
class Read:
    """A view of contents."""

    contents: Contents
    view: Own

    def __deepcopy__(self, memo: dict[int, Any]) -> Read:
        return self

    def make(self) -> torch.Tensor:
        """A tensor with memory of its own, with these values, strides, dtype and device."""
        return view_of(self.contents.make(), self.view)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operation on one stretch of memory.

    Attributes:
        call: A function, or the name of an operator of torch (operators cannot be pickled).
        args: Its arguments, with an :class:`Own`, :class:`Read` or :class:`Source` in place of each tensor.
        kwargs: Likewise.
        previous: The step before on the same memory, ``None`` if this one overwrites all of it, or is the first.
        target: Where the result goes; ``None`` if the operation writes in place.
        index: Which of several results.
        seed: For the device's random numbers; ``None`` if it draws none.
    """

    call: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    previous: Step | None
    target: Own | None = None
    index: int = 0
    seed: int | None = None

    def run(self, storage: torch.UntypedStorage, device: torch.device, made: Made) -> None:
        """Takes the step on memory that has the contents before it."""
        args, kwargs = _filled(self.args, storage, made), _filled(self.kwargs, storage, made)
        call = _operator(self.call) if isinstance(self.call, str) else self.call
        with _seeded(self.seed, device):
            result = call(*args, **kwargs)
        if self.target is not None:
            result = result[self.index] if isinstance(result, (tuple, list)) else result
            view_of(storage, self.target).copy_(result)


def view_of(storage: torch.UntypedStorage, view: Own) -> torch.Tensor:
    """A tensor on a storage."""
    return torch.empty(0, dtype=view.dtype, device=storage.device).set_(storage, view.offset, view.size, view.stride)


def sources_of(contents: Contents) -> Iterator[Source]:
    """Everything real that contents depend on, each once."""
    seen: set[int] = set()
    left: list[Any] = [contents]
    while left:
        item = left.pop()
        if isinstance(item, (tuple, list)):
            left.extend(item)
        elif isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, Read):
            left.append(item.contents.last)
        elif isinstance(item, Contents):
            left.append(item.last)
        elif isinstance(item, (Step, Source)) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, Source):
                yield item
            else:
                left.extend((item.previous, item.args, item.kwargs))


def holds_data(contents: Contents) -> bool:
    """Whether contents depend on more than initialisers and numbers that stand in the code."""
    return next(sources_of(contents), None) is not None


def in_order(contents: Contents, known: Collection[int] = ()) -> list[Contents]:
    """Everything that is made on the way to contents, each once, after what it needs. They are the last.

    Args:
        contents: The contents.
        known: Keys of what need not be made.
    """
    order: list[Contents] = []
    seen: set[int] = set(known)
    left = [(contents, False)]
    while left:
        item, has_needs = left.pop()
        if has_needs:
            order.append(item)
        elif item.key not in seen:
            seen.add(item.key)
            left.append((item, True))
            left.extend((need, False) for need in reversed(item.needs()))
    return order


def _replay(contents: Contents, storage: torch.UntypedStorage, others: Made, known: Made) -> None:
    """Takes every step on the way to contents once, and lets go of memory when no further step reads it."""
    order = in_order(contents, known)
    uses = Counter(need.key for item in order for need in item.needs())
    trunk = _first_step(contents)
    made = dict(known)
    for key, memory in known.items():
        if memory._cdata == storage._cdata and uses[key] > 1:
            made[key] = memory.clone()  # Steps begin to write to it before others read what is in it.
    for item in order:
        step = item.last
        if step is not None and step.previous is not None:
            before = id(step.previous)
            memory = made[before]
            if before in known and memory._cdata != storage._cdata:
                memory = memory.clone()
            elif uses[before] > 1:  # Others read it as it was.
                made[before] = memory.clone()
        elif step is trunk and all(memory._cdata != storage._cdata for memory in made.values()):
            memory = storage
        else:
            memory = torch.empty(item.nbytes, dtype=torch.uint8, device=item.device).untyped_storage()
        made[item.key] = memory
        if step is not None:
            step.run(memory, item.device, made)
        for need in item.needs():
            uses[need.key] -= 1
            if not uses[need.key]:
                made.pop(need.key, None)
        if item.key in others:
            others[item.key].copy_(memory)
    if made[contents.key]._cdata != storage._cdata:
        storage.copy_(made[contents.key])


def _first_step(contents: Contents) -> Step | None:
    step = contents.last
    while step is not None and step.previous is not None:
        step = step.previous
    return step


def _reads_in(value: Any) -> Iterator[Read]:
    if isinstance(value, Read):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _reads_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _reads_in(item)


def _filled(value: Any, storage: torch.UntypedStorage, made: Made) -> Any:
    """Arguments with tensors."""
    if isinstance(value, Own):
        return view_of(storage, value)
    if isinstance(value, Source):
        return value.read()
    if isinstance(value, Read):
        return view_of(made[value.contents.key], value.view)
    if isinstance(value, dict):
        return {key: _filled(item, storage, made) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_filled(item, storage, made) for item in value)
    return value


@functools.cache
def _operator(name: str) -> Callable[..., Any]:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Takes steps as they were taken down, whatever the caller is in the middle of."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws random numbers of the device from a seed, and leaves its generator as it was."""
    if seed is None:
        yield
        return
    if device.type == "cpu":
        generator = torch.default_generator
    elif device.type == "cuda":
        torch.cuda.init()
        generator = torch.cuda.default_generators[device.index or 0]
    else:
        yield
        return
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
