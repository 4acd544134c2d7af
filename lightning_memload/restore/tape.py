"""The recorded operations that make the contents of a block of memory, as a chain of steps that can be replayed.

A step is one operation of torch on one block of memory: an initialiser, an arithmetic operation, a copy from a
:class:`Constant`. A step refers to other memory by the last step of that memory at that time. So the chain of a
parameter holds only what the parameter depends on. Every replay of a chain gives the same values: a step that draws
random numbers has its own seed. This file knows nothing of modules.
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
from lightning_memload.torch_private import (
    has_dispatch_modes,
    without_dispatch_modes,
    without_functorch,
    without_overrides_and_modes,
)

__all__ = [
    "Constant",
    "Contents",
    "Made",
    "Recipe",
    "Step",
    "StridedView",
    "constants_of",
    "holds_data",
    "in_order",
    "undisturbed",
    "view_of",
]

# Memory with contents that steps read, by the key of these contents.
Made = dict[int, torch.UntypedStorage]


class Constant:
    """An ordinary tensor that a step reads. Its values do not change as long as a step refers to it.

    Copies of a module share their constants, so the deep copy of a constant is the constant itself.

    Attributes:
        tensor: The values.
        file: The file that is mapped into the tensor's memory; ``None`` for other memory.
    """

    __slots__ = ("__weakref__", "file", "tensor")

    def __init__(self, tensor: torch.Tensor, file: MappedFile | None = None) -> None:
        self.tensor = tensor
        self.file = file

    def read(self) -> torch.Tensor:
        """The values, as they were when the step was recorded.

        Raises:
            MetaTensorError: The file has been written to in place.
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
        """Copies the values, before other code changes them."""
        self.tensor, self.file = self.read().clone(), None

    def __deepcopy__(self, memo: dict[int, Any]) -> Constant:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Constant, (self.read(),)


@dataclass(frozen=True, slots=True)
class StridedView:
    """A view of the memory that a step writes."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a block of memory after a step.

    Attributes:
        nbytes: Size of the memory in bytes.
        device: Device of the memory.
        last: The step; ``None`` for memory that has not been written.
    """

    nbytes: int
    device: torch.device
    last: Step | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Contents:
        return self

    @property
    def key(self) -> int:
        """An identity: equal contents have the same key."""
        return id(self) if self.last is None else id(self.last)

    def make(self) -> torch.UntypedStorage:
        """Allocates memory and writes these contents to it.

        Peak memory: the contents, and the memory that remaining steps read.
        """
        storage = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device).untyped_storage()
        self.write_to(storage)
        return storage

    def write_to(self, storage: torch.UntypedStorage, others: Made | None = None, known: Made | None = None) -> None:
        """Writes these contents to memory of the same size and device.

        Args:
            storage: The memory.
            others: Other memory that gets its contents in the same replay, by the keys of the contents.
            known: Memory that already has its contents, by the keys of the contents. It is only read, except if it is
                ``storage``.
        """
        if self.last is not None:
            with undisturbed():
                _replay(self, storage, others or {}, known or {})

    def needs(self) -> list[Contents]:
        """The contents that the last step reads."""
        step = self.last
        if step is None:
            return []
        before = [] if step.previous is None else [Contents(self.nbytes, self.device, step.previous)]
        return [*before, *(recipe.contents for recipe in _recipes_in((step.args, step.kwargs)))]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A view of contents."""

    contents: Contents
    view: StridedView

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self

    def make(self) -> torch.Tensor:
        """Makes a tensor in new memory with these values, strides, dtype and device."""
        return view_of(self.contents.make(), self.view)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operation on one block of memory.

    Attributes:
        call: A function, or the name of an operator of torch (operators cannot be pickled).
        args: Positional arguments, with a :class:`StridedView`, :class:`Recipe` or :class:`Constant` for each tensor.
        kwargs: Keyword arguments, likewise.
        previous: The previous step on the same memory; ``None`` if this step overwrites all of it, or is the first.
        target: The view to which the result is copied; ``None`` if the operation writes in place.
        index: Index of the result, if the operation has several.
        seed: Seed of the device's random numbers; ``None`` if the operation draws none.
    """

    call: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    previous: Step | None
    target: StridedView | None = None
    index: int = 0
    seed: int | None = None

    def run(self, storage: torch.UntypedStorage, device: torch.device, made: Made) -> None:
        """Runs the operation on memory that has the contents of the previous step."""
        args, kwargs = _filled(self.args, storage, made), _filled(self.kwargs, storage, made)
        call = _operator(self.call) if isinstance(self.call, str) else self.call
        with _seeded(self.seed, device):
            result = call(*args, **kwargs)
        if self.target is not None:
            result = result[self.index] if isinstance(result, (tuple, list)) else result
            view_of(storage, self.target).copy_(result)


def view_of(storage: torch.UntypedStorage, view: StridedView) -> torch.Tensor:
    """Makes a tensor in a storage."""
    return torch.empty(0, dtype=view.dtype, device=storage.device).set_(storage, view.offset, view.size, view.stride)


def constants_of(contents: Contents) -> Iterator[Constant]:
    """All constants that contents depend on, each once."""
    seen: set[int] = set()
    left: list[Any] = [contents]
    while left:
        item = left.pop()
        if isinstance(item, (tuple, list)):
            left.extend(item)
        elif isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, Recipe):
            left.append(item.contents.last)
        elif isinstance(item, Contents):
            left.append(item.last)
        elif isinstance(item, (Step, Constant)) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, Constant):
                yield item
            else:
                left.extend((item.previous, item.args, item.kwargs))


def holds_data(contents: Contents) -> bool:
    """Whether contents depend on a constant, and not only on initialisers and numbers in the code."""
    return next(constants_of(contents), None) is not None


def in_order(contents: Contents, known: Collection[int] = ()) -> list[Contents]:
    """All contents that must be made for the given contents, each once and after the contents that it needs.

    Args:
        contents: The contents. They are the last entry of the result.
        known: Keys of contents that exist already.
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
    """Runs every step that contents need once, and frees memory that no remaining step reads."""
    order = in_order(contents, known)
    uses = Counter(need.key for item in order for need in item.needs())
    trunk = _first_step(contents)
    made = dict(known)
    for key, memory in known.items():
        if memory._cdata == storage._cdata and uses[key] > 1:
            made[key] = memory.clone()  # A step may write to the storage before another step reads its old contents.
    for item in order:
        step = item.last
        if step is not None and step.previous is not None:
            before = id(step.previous)
            memory = made[before]
            if before in known and memory._cdata != storage._cdata:
                memory = memory.clone()
            elif uses[before] > 1:  # Other steps read the contents from before this step.
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


def _recipes_in(value: Any) -> Iterator[Recipe]:
    if isinstance(value, Recipe):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _recipes_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _recipes_in(item)


def _filled(value: Any, storage: torch.UntypedStorage, made: Made) -> Any:
    """Replaces the terms in arguments by tensors."""
    if isinstance(value, StridedView):
        return view_of(storage, value)
    if isinstance(value, Constant):
        return value.read()
    if isinstance(value, Recipe):
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
def undisturbed() -> Iterator[None]:
    """Runs steps as they were recorded, without the modes and the function transforms of the caller."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_overrides_and_modes())
        stack.enter_context(without_functorch())
        if has_dispatch_modes():
            stack.enter_context(without_dispatch_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds the device's random number generator within the block, and restores its state at the end."""
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
