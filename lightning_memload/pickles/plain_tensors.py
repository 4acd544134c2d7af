"""The tensors of a plain pickle: made on a memory, or only indexed.

torch writes each tensor with the same two dozen instructions, in which numbers and names differ. One pattern reads them
all at once, in a third of the time. A tensor that is written in any other way is left to the single instructions.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch

from lightning_memload.checkpoint.index import StorageInfo, span_elements

__all__ = ["GLOBALS", "ORDERED", "PARAMETER", "PLACEHOLDERS", "REBUILD", "Arguments", "Memory", "NotPlain", "Tensors"]

# A TensorInfo without its path.
View = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int, StorageInfo, bool, tuple[()]]


class NotPlain(Exception):
    """The pickle holds something else."""


class Memory(Protocol):
    """Where the storages are. All offsets and lengths are in bytes."""

    def storage(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """A storage of at least one byte."""
        ...

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor with at least one element, which fills a storage of its own."""
        ...


class _Name:
    """A function or class that the pickle may call."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what


class _StorageClass:
    """A class of storages."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage:
    """A storage with the element type of the first reference to it."""

    __slots__ = ("dtype", "info")

    def __init__(self, info: StorageInfo, dtype: torch.dtype) -> None:
        self.info, self.dtype = info, dtype


class Arguments(tuple[Any, ...]):
    """A tuple with one of these in it, at any depth."""

    __slots__ = ()


class _Unmade:
    """Stands for a tensor that is not made. Like a tensor, it equals itself only."""

    __slots__ = ()


# They occur only in arguments, and must not reach the result.
PLACEHOLDERS = frozenset((_Name, _StorageClass, _Storage, Arguments))

REBUILD, PARAMETER, ORDERED = _Name("tensor"), _Name("parameter"), _Name("dict")
# Arguments that nothing but their own tensor uses.
_USED = _Name("arguments")
# torch (2.6 to 2.13) allows these names by default under weights_only, and loads them the same without it.
GLOBALS: dict[bytes, Any] = {
    b"collections\nOrderedDict\n": ORDERED,
    b"torch._utils\n_rebuild_tensor_v2\n": REBUILD,
    b"torch._utils\n_rebuild_parameter\n": PARAMETER,
    b"torch\nDoubleStorage\n": _StorageClass(torch.float64),
    b"torch\nFloatStorage\n": _StorageClass(torch.float32),
    b"torch\nHalfStorage\n": _StorageClass(torch.float16),
    b"torch\nBFloat16Storage\n": _StorageClass(torch.bfloat16),
    b"torch\nLongStorage\n": _StorageClass(torch.int64),
    b"torch\nIntStorage\n": _StorageClass(torch.int32),
    b"torch\nShortStorage\n": _StorageClass(torch.int16),
    b"torch\nCharStorage\n": _StorageClass(torch.int8),
    b"torch\nByteStorage\n": _StorageClass(torch.uint8),
    b"torch\nBoolStorage\n": _StorageClass(torch.bool),
}

# The instructions behind the name of the function that rebuilds a tensor: its arguments, and the call. The first byte
# of each tells how long it is, so there is one way only to read them.
_REFERENCE, _PUT, _NUMBER = rb"(?:h.|j.{4})", rb"r(.{4})", rb"(K.|M..|J.{4})"
_SIZES = rb"(\)|(?:K.|M..|J.{4}){1,3}[\x85-\x87]|\((?:K.|M..|J.{4}){4,64}t)(?:r(.{4}))?"
_TENSOR = re.compile(
    rb"\(\((" + _REFERENCE * 2 + rb")X(.)\0{3}([0-9]+)" + _PUT + rb"(" + _REFERENCE + rb")" + _NUMBER + rb"t" + _PUT
    + rb"Q" + _NUMBER + _SIZES + _SIZES + rb"([\x88\x89]" + _REFERENCE + rb")\)R" + _PUT + rb"t" + _PUT + rb"R" + _PUT,
    re.DOTALL,
)  # fmt: skip
_REFERENCES = re.compile(rb"h(.)|j(.{4})", re.DOTALL)
_NUMBERS = re.compile(rb"K(.)|M(..)|J(.{4})", re.DOTALL)
_SHORT = b"\0\0\0"  # what the address of a short reference lacks

# Shape, stride, elements from the first to the last, and whether it is contiguous.
_Layout = tuple[tuple[int, ...], tuple[int, ...], int, bool]


class Tensors:
    """Makes the tensors of one pickle.

    Args:
        find: Gives the storage of a key, of a location and a length in bytes. Called once for each key.
        memory: Where the storages are. ``None``: the tensors are only indexed, and an inert object stands for each.

    Attributes:
        storages: The storages by key, in the order in which torch meets them, each with its element type.
        views: Where each tensor is, by its identity.
    """

    def __init__(self, find: Callable[[str, str, int], StorageInfo], memory: Memory | None) -> None:
        self._find = find
        self._memory = memory
        self.storages: dict[str, tuple[StorageInfo, torch.dtype]] = {}
        self.views: dict[int, View] = {}
        self._kept: list[Any] = []  # or another object might have the identity of one of the tensors
        # What torch storage or tensor each storage has been made for, by key.
        self._owners: dict[str, torch.Tensor | torch.UntypedStorage] = {}
        # What instructions give that come with many tensors.
        self._settings: dict[bytes, tuple[torch.dtype, str, bool]] = {}
        self._layouts: dict[bytes, _Layout] = {}
        self._integers: dict[bytes, int] = {}

    def read(self, data: bytes, position: int, memo: dict[bytes, Any]) -> tuple[Any, int] | None:
        """Carries out the instructions of one tensor at once.

        Args:
            data: The pickle.
            position: The end of the instruction that names the function.
            memo: The objects of the pickle, by the four bytes of their number. A number never changes its object.

        Returns:
            The tensor, and the end of its instructions. ``None`` if they are others.

        Raises:
            Exception: The pickle is not plain.
        """
        found = _TENSOR.match(data, position)
        if found is None:
            return None
        (
            head, key_bytes, key_text, at_key, location, numel, at_reference, offset, shape, at_shape, stride,
            at_stride, tail, at_hooks, at_arguments, at_tensor,
        ) = found.groups()  # fmt: skip
        dtype, place, requires_grad = self._settings.get(head + location + tail) or self._setting(
            head, location, tail, memo
        )
        layout = self._layouts.get(shape + stride) or self._layout(shape, stride)
        key = key_text.decode()
        if len(key) != key_bytes[0]:
            raise NotPlain
        storage = self.storages.get(key) or self._storage(key, place, self._integer(numel), dtype)
        start = 0 if offset == b"K\0" else self._integer(offset)
        hooks: Any = OrderedDict()
        tensor = self._make(*storage, start, layout, requires_grad, hooks)
        count = len(memo) + 5
        memo[at_key], memo[at_reference], memo[at_arguments] = key, _USED, _USED
        memo[at_hooks], memo[at_tensor] = hooks, tensor
        if at_shape is not None:
            memo[at_shape] = layout[0]
            count += 1
        if at_stride is not None:
            memo[at_stride] = layout[1]
            count += 1
        if len(memo) != count:
            raise NotPlain  # a number has another object now
        return tensor, found.end()

    def storage(self, reference: Any) -> _Storage:
        """What stands for the storage of a persistent id."""
        word, kind, key, location, numel = reference
        sound = type(reference) is Arguments and type(kind) is _StorageClass and type(key) is type(location) is str
        if word != "storage" or not sound or type(numel) is not int:
            raise NotPlain
        return _Storage(*(self.storages.get(key) or self._storage(key, location, numel, kind.dtype)))

    def _storage(self, key: str, location: str, numel: int, dtype: torch.dtype) -> tuple[StorageInfo, torch.dtype]:
        """A new storage. Like in torch, the first reference to it gives it its type."""
        found = self.storages[key] = self._find(key, location, numel * dtype.itemsize), dtype
        return found

    def tensor(self, arguments: Any) -> Any:
        """The tensor of the arguments of torch's function."""
        storage, offset, shape, stride, requires_grad, hooks = arguments
        if type(storage) is not _Storage or hooks or type(requires_grad) is not bool:
            raise NotPlain
        if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride):
            raise NotPlain
        if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)):
            raise NotPlain
        return self._make(storage.info, storage.dtype, offset, _layout_of(shape, stride), requires_grad, hooks)

    def parameter(self, arguments: Any) -> Any:
        """The parameter of the arguments of torch's function."""
        tensor, requires_grad, hooks = arguments
        view = self.views.get(id(tensor))
        if type(arguments) is not tuple or view is None or view[-2] or hooks or type(requires_grad) is not bool:
            raise NotPlain
        parameter: Any = _Unmade()
        if self._memory is not None:
            parameter = torch.nn.Parameter(tensor, requires_grad)
            parameter._backward_hooks = hooks
        self.views[id(parameter)] = (*view[:-2], True, ())
        self._kept.append(parameter)
        return parameter

    def _make(
        self, info: StorageInfo, dtype: torch.dtype, offset: int, layout: _Layout, requires_grad: bool, hooks: Any
    ) -> Any:
        shape, stride, span, is_contiguous = layout
        span_bytes = (offset + span) * dtype.itemsize
        # Beyond the end of a storage torch refuses to set it. An empty storage it would give memory.
        if offset < 0 or (span_bytes > info.nbytes and span):
            raise NotPlain
        tensor: Any = _Unmade()
        if self._memory is not None:
            if is_contiguous and span_bytes == info.nbytes and span and not offset and info.key not in self._owners:
                tensor = self._owners[info.key] = self._memory.tensor(info.offset, shape, dtype)
            else:
                content = self._content(info, self._memory)
                tensor = torch.empty(0, dtype=dtype, device="cpu").set_(content, offset, shape, stride)
            if type(tensor) is not torch.Tensor:
                raise NotPlain  # a mode of torch's makes tensors of another kind
            # Both as torch's own function sets them.
            if requires_grad:
                tensor.requires_grad = True
            tensor._backward_hooks = hooks
        self.views[id(tensor)] = dtype, shape, stride, offset, info, False, ()
        self._kept.append(tensor)
        return tensor

    def _content(self, info: StorageInfo, memory: Memory) -> torch.UntypedStorage:
        owner = self._owners.get(info.key)
        if isinstance(owner, torch.Tensor):
            return owner.untyped_storage()
        if owner is None:
            owner = memory.storage(info.offset, info.nbytes) if info.nbytes else torch.UntypedStorage(0)
            self._owners[info.key] = owner
        return owner

    def _setting(
        self, head: bytes, location: bytes, tail: bytes, memo: dict[bytes, Any]
    ) -> tuple[torch.dtype, str, bool]:
        """The element type and the location of a storage, and whether its tensor requires a gradient."""
        codes = [*_REFERENCES.findall(head), *_REFERENCES.findall(location), *_REFERENCES.findall(tail[1:])]
        word, kind, place, ordered = (memo[short + _SHORT if short else long] for short, long in codes)
        if word != "storage" or type(kind) is not _StorageClass or type(place) is not str or ordered is not ORDERED:
            raise NotPlain
        found = self._settings[head + location + tail] = kind.dtype, place, tail[:1] == b"\x88"
        return found

    def _integer(self, code: bytes) -> int:
        """The number that an instruction pushes."""
        found = self._integers.get(code)
        if found is None:
            found = self._integers[code] = int.from_bytes(code[1:], "little", signed=code[:1] == b"J")
        return found

    def _layout(self, shape: bytes, stride: bytes) -> _Layout:
        """The layout that instructions make."""
        sizes, steps = self._tuple(shape), self._tuple(stride)
        if len(sizes) != len(steps) or min(*sizes, *steps, 0, 0) < 0:
            raise NotPlain
        layout = self._layouts[shape + stride] = _layout_of(sizes, steps)
        return layout

    def _tuple(self, code: bytes) -> tuple[int, ...]:
        """The tuple that instructions make."""
        found = tuple(self._integer(number[0]) for number in _NUMBERS.finditer(code.removeprefix(b"(")))
        if code[-1] in b"\x85\x86\x87" and code[-1] != 0x84 + len(found):
            raise NotPlain  # it uses what lies below its numbers
        return found


def _layout_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> _Layout:
    expected: list[int] = []
    step = 1
    for size in reversed(shape):
        expected.append(step)
        step *= max(size, 1)
    return shape, stride, span_elements(shape, stride), stride == tuple(reversed(expected))
