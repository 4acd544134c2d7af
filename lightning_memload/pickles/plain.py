"""Builds the object of a checkpoint that contains only containers, numbers, strings and plain tensors.

``torch.load`` takes 60 us for each tensor, most of it in an unpickler for any kind of object. The inert walk for the
index takes 25 us more. Most checkpoints have a few kinds of objects only. They are built here in a third of the time,
and the same pass gives their index. All others are left to ``torch.load`` and the inert walk: those with classes and
functions, with other protocols, and damaged ones.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_memload.checkpoint.index import KeyPath, StorageInfo, TensorInfo
from lightning_memload.pickles.values import MAX_DEPTH, children_of

__all__ = ["NotPlain", "PlainObject", "build_plain"]

# dtype, shape, stride, offset and storage as in TensorInfo, and whether it is a parameter.
_View = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int, StorageInfo, bool]


class NotPlain(Exception):
    """The pickle holds something else."""


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
    """A storage with the element type of the reference to it."""

    __slots__ = ("content", "dtype", "info")

    def __init__(self, info: StorageInfo, content: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.info, self.content, self.dtype = info, content, dtype


class _Arguments(tuple[Any, ...]):
    """A tuple with one of these in it, at any depth."""

    __slots__ = ()


# They occur only in arguments, and must not reach the result.
_PLACEHOLDERS = frozenset((_Name, _StorageClass, _Storage, _Arguments))

_REBUILD, _PARAMETER, _ORDERED = _Name("tensor"), _Name("parameter"), _Name("dict")
# torch (2.6 to 2.13) allows these names by default under weights_only, and loads them the same without it.
_GLOBALS: dict[bytes, Any] = {
    b"collections\nOrderedDict\n": _ORDERED,
    b"torch._utils\n_rebuild_tensor_v2\n": _REBUILD,
    b"torch._utils\n_rebuild_parameter\n": _PARAMETER,
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
_PROTOCOL = b"\x80\x02"
_UINT16, _INT32, _UINT32, _DOUBLE = (struct.Struct(layout).unpack_from for layout in ("<H", "<i", "<I", ">d"))


@dataclass(frozen=True, slots=True)
class PlainObject:
    """The result of :func:`build_plain`.

    Attributes:
        root: The object. Its tensors lie in the storages.
        storages: Every storage, in the order in which torch meets them.
    """

    root: Any
    storages: tuple[StorageInfo, ...]
    _views: dict[int, _View]
    _tensors: list[torch.Tensor]  # kept alive: otherwise another object could get the identity of one of them

    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor with its path, in the order in which the object holds them.

        Raises:
            NotPlain: The containers are nested too deeply.
        """
        found: list[TensorInfo] = []
        visited: set[int] = set()
        stack: list[tuple[KeyPath, Any]] = [((), self.root)]
        while stack:
            path, value = stack.pop()
            view = self._views.get(id(value))
            if view is not None:
                found.append(TensorInfo(path, *view))
            elif isinstance(value, (dict, list, tuple)) and id(value) not in visited:
                visited.add(id(value))
                if len(path) == MAX_DEPTH:
                    raise NotPlain
                stack.extend(reversed(children_of(path, value)))
        return tuple(found)


def build_plain(
    data: bytes, storage_of: Callable[[str, str, int], tuple[StorageInfo, torch.UntypedStorage]]
) -> PlainObject:
    """Builds the object of a pickle of ``torch.save``, as ``torch.load`` does with any ``weights_only``.

    Args:
        data: The pickle.
        storage_of: Returns the storage for a key, a location and a length in bytes. Called once for each key. An error
            that it raises ends the building.

    Returns:
        The object, and the places of its tensors.

    Raises:
        NotPlain: The pickle holds something else, or is damaged. Nothing that it names has been called.
    """
    try:
        return _Builder(data, storage_of).build()
    except NotPlain:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise NotPlain from error


class _Builder:
    def __init__(
        self, data: bytes, storage_of: Callable[[str, str, int], tuple[StorageInfo, torch.UntypedStorage]]
    ) -> None:
        self._data = data
        self._storage_of = storage_of
        self._storages: dict[str, _Storage] = {}
        self._views: dict[int, _View] = {}
        self._tensors: list[torch.Tensor] = []

    def build(self) -> PlainObject:
        storages = self._storages
        root = self._run()
        return PlainObject(root, tuple(item.info for item in storages.values()), self._views, self._tensors)

    def _run(self) -> Any:
        """Executes the instructions of the pickle. As in ``pickle``, values below a mark cannot be reached."""
        data = self._data
        if not data.startswith(_PROTOCOL):
            raise NotPlain
        position = len(_PROTOCOL)
        stack: list[Any] = []
        marked: list[list[Any]] = []
        memo: dict[int, Any] = {}
        push, pop = stack.append, stack.pop
        while True:
            code = data[position]
            position += 1
            if code == 0x71:  # BINPUT
                memo[data[position]] = stack[-1]
                position += 1
            elif code == 0x72:  # LONG_BINPUT
                memo[_UINT32(data, position)[0]] = stack[-1]
                position += 4
            elif code == 0x68:  # BINGET
                push(memo[data[position]])
                position += 1
            elif code == 0x4B:  # BININT1
                push(data[position])
                position += 1
            elif code == 0x58:  # BINUNICODE
                end = position + 4 + _UINT32(data, position)[0]
                if end > len(data):
                    raise NotPlain
                push(str(data[position + 4 : end], "utf-8", "surrogatepass"))
                position = end
            elif code == 0x28:  # MARK
                marked.append(stack)
                stack = []
                push, pop = stack.append, stack.pop
            elif code == 0x85:  # TUPLE1
                stack[-1] = _tuple_of((stack[-1],))
            elif code == 0x86:  # TUPLE2
                last = pop()
                stack[-1] = _tuple_of((stack[-1], last))
            elif code == 0x87:  # TUPLE3
                last, middle = pop(), pop()
                stack[-1] = _tuple_of((stack[-1], middle, last))
            elif code == 0x74:  # TUPLE
                items, stack = stack, marked.pop()
                push, pop = stack.append, stack.pop
                push(_tuple_of(tuple(items)))
            elif code == 0x51:  # BINPERSID
                push(self._storage(pop()))
            elif code == 0x52:  # REDUCE
                arguments = pop()
                stack[-1] = self._call(stack[-1], arguments)
            elif code == 0x89:  # NEWFALSE
                push(False)
            elif code == 0x88:  # NEWTRUE
                push(True)
            elif code == 0x4E:  # NONE
                push(None)
            elif code == 0x29:  # EMPTY_TUPLE
                push(())
            elif code == 0x4D:  # BININT2
                push(_UINT16(data, position)[0])
                position += 2
            elif code == 0x4A:  # BININT
                push(_INT32(data, position)[0])
                position += 4
            elif code == 0x6A:  # LONG_BINGET
                push(memo[_UINT32(data, position)[0]])
                position += 4
            elif code == 0x47:  # BINFLOAT
                push(_DOUBLE(data, position)[0])
                position += 8
            elif code == 0x8A:  # LONG1
                end = position + 1 + data[position]
                if end > len(data):
                    raise NotPlain
                push(int.from_bytes(data[position + 1 : end], "little", signed=True))
                position = end
            elif code == 0x7D:  # EMPTY_DICT
                push({})
            elif code == 0x5D:  # EMPTY_LIST
                push([])
            elif code == 0x75:  # SETITEMS
                items, stack = stack, marked.pop()
                push, pop = stack.append, stack.pop
                _require_values(items)
                target = _exactly(stack[-1], (dict, OrderedDict))
                for index in range(0, len(items), 2):
                    target[items[index]] = items[index + 1]
            elif code == 0x73:  # SETITEM
                value, key = pop(), pop()
                _require_values((key, value))
                _exactly(stack[-1], (dict, OrderedDict))[key] = value
            elif code == 0x65:  # APPENDS
                items, stack = stack, marked.pop()
                push, pop = stack.append, stack.pop
                _require_values(items)
                _exactly(stack[-1], (list,)).extend(items)
            elif code == 0x61:  # APPEND
                value = pop()
                _require_values((value,))
                _exactly(stack[-1], (list,)).append(value)
            elif code == 0x63:  # GLOBAL
                end = data.index(b"\n", data.index(b"\n", position) + 1) + 1
                push(_GLOBALS[data[position:end]])
                position = end
            elif code == 0x62:  # BUILD
                state = pop()
                # The versions of a state dict's modules.
                _exactly(stack[-1], (OrderedDict,)).__dict__.update(_exactly(state, (dict,)))
            elif code == 0x2E:  # STOP
                if marked:
                    raise NotPlain
                _require_values(stack)
                (result,) = stack
                return result
            else:
                raise NotPlain

    def _storage(self, reference: Any) -> _Storage:
        word, kind, key, location, numel = reference
        sound = type(reference) is _Arguments and type(kind) is _StorageClass and type(key) is type(location) is str
        if word != "storage" or not sound or type(numel) is not int:
            raise NotPlain
        found = self._storages.get(key)
        if found is None:
            info, content = self._storage_of(key, location, numel * kind.dtype.itemsize)
            found = self._storages[key] = _Storage(info, content, kind.dtype)
        return found  # Like torch: the first reference to a storage gives it its type.

    def _call(self, function: Any, arguments: Any) -> Any:
        if function is _REBUILD:
            storage, offset, shape, stride, requires_grad, hooks = arguments
            if type(storage) is not _Storage or hooks or type(requires_grad) is not bool:
                raise NotPlain
            if type(shape) is not tuple or type(stride) is not tuple or (stride and min(stride) < 0):
                raise NotPlain
            if not storage.info.nbytes and 0 not in shape:
                raise NotPlain  # torch would give an empty storage memory
            # Beyond the end of any other storage torch refuses to set it.
            tensor = torch.empty(0, dtype=storage.dtype, device="cpu").set_(storage.content, offset, shape, stride)
            if type(tensor) is not torch.Tensor:
                raise NotPlain  # a mode of torch's makes tensors of another kind
            # Both as torch's own function sets them.
            tensor.requires_grad = requires_grad
            tensor._backward_hooks = hooks
            self._note(tensor, (storage.dtype, shape, stride, offset, storage.info, False))
            return tensor
        if function is _PARAMETER:
            tensor, requires_grad, hooks = _exactly(arguments, (tuple,))
            if type(tensor) is not torch.Tensor or hooks or type(requires_grad) is not bool:
                raise NotPlain
            parameter = torch.nn.Parameter(tensor, requires_grad)
            parameter._backward_hooks = hooks
            self._note(parameter, (*self._views[id(tensor)][:-1], True))
            return parameter
        if function is _ORDERED and arguments == ():
            return OrderedDict()
        raise NotPlain

    def _note(self, tensor: torch.Tensor, view: _View) -> None:
        self._views[id(tensor)] = view
        self._tensors.append(tensor)


def _tuple_of(items: tuple[Any, ...]) -> tuple[Any, ...]:
    return items if _PLACEHOLDERS.isdisjoint(map(type, items)) else _Arguments(items)


def _require_values(values: Iterable[Any]) -> None:
    """Raises if a placeholder is among values, or in a tuple of them."""
    if not _PLACEHOLDERS.isdisjoint(map(type, values)):
        raise NotPlain


def _exactly(value: Any, kinds: tuple[type, ...]) -> Any:
    if type(value) not in kinds:
        raise NotPlain
    return value
