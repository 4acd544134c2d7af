"""Building the object of a checkpoint that holds nothing but containers, numbers, strings and plain tensors.

``torch.load`` takes 60 us for each tensor, most of it in an unpickler that asks at each step what else it might be.
Most checkpoints are of a few kinds only, and are built here in a third of that. All others are left to ``torch.load``,
which judges everything else: classes and functions, other protocols, and damage.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["NotPlain", "build_plain"]


class NotPlain(Exception):
    """The pickle holds something else."""


class _Name:
    """A function or class that the pickle may call."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what


class _Kind:
    """A class of storages."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage:
    """A storage with the element type of the reference to it."""

    __slots__ = ("content", "dtype")

    def __init__(self, content: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.content, self.dtype = content, dtype


# They stand for something in arguments, and must not reach the result.
_PLACEHOLDERS = frozenset((_Name, _Kind, _Storage))

_REBUILD, _PARAMETER, _ORDERED = _Name("tensor"), _Name("parameter"), _Name("dict")
# What torch (2.6 to 2.13) allows by default under weights_only, and loads the same without it.
_GLOBALS: dict[bytes, Any] = {
    b"collections\nOrderedDict\n": _ORDERED,
    b"torch._utils\n_rebuild_tensor_v2\n": _REBUILD,
    b"torch._utils\n_rebuild_parameter\n": _PARAMETER,
    b"torch\nDoubleStorage\n": _Kind(torch.float64),
    b"torch\nFloatStorage\n": _Kind(torch.float32),
    b"torch\nHalfStorage\n": _Kind(torch.float16),
    b"torch\nBFloat16Storage\n": _Kind(torch.bfloat16),
    b"torch\nLongStorage\n": _Kind(torch.int64),
    b"torch\nIntStorage\n": _Kind(torch.int32),
    b"torch\nShortStorage\n": _Kind(torch.int16),
    b"torch\nCharStorage\n": _Kind(torch.int8),
    b"torch\nByteStorage\n": _Kind(torch.uint8),
    b"torch\nBoolStorage\n": _Kind(torch.bool),
}
_PROTOCOL = b"\x80\x02"
_UINT16, _INT32, _UINT32, _DOUBLE = (struct.Struct(layout).unpack_from for layout in ("<H", "<i", "<I", ">d"))


def build_plain(data: bytes, storage_of: Callable[[str, str, int], torch.UntypedStorage]) -> Any:
    """Builds the object of a pickle of ``torch.save``, as ``torch.load`` does with any ``weights_only``.

    Args:
        data: The pickle.
        storage_of: Gives the storage of a key, of a location and a length in bytes. Called once for each key. What it
            raises ends the building.

    Returns:
        The object. Its tensors lie in the storages.

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
    def __init__(self, data: bytes, storage_of: Callable[[str, str, int], torch.UntypedStorage]) -> None:
        self._data = data
        self._storage_of = storage_of
        self._storages: dict[str, _Storage] = {}

    def build(self) -> Any:
        data = self._data
        if not data.startswith(_PROTOCOL):
            raise NotPlain
        position = len(_PROTOCOL)
        stack: list[Any] = []
        marks: list[int] = []
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
                marks.append(len(stack))
            elif code == 0x85:  # TUPLE1
                stack[-1:] = [(stack[-1],)]
            elif code == 0x86:  # TUPLE2
                stack[-2:] = [(stack[-2], stack[-1])]
            elif code == 0x87:  # TUPLE3
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            elif code == 0x74:  # TUPLE
                start = marks.pop()
                stack[start:] = [tuple(stack[start:])]
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
                start = marks.pop()
                _require_values(stack[start:])
                target = _exactly(stack[start - 1], (dict, OrderedDict))
                for index in range(start, len(stack), 2):
                    target[stack[index]] = stack[index + 1]
                del stack[start:]
            elif code == 0x73:  # SETITEM
                value, key = pop(), pop()
                _require_values((key, value))
                _exactly(stack[-1], (dict, OrderedDict))[key] = value
            elif code == 0x65:  # APPENDS
                start = marks.pop()
                _require_values(stack[start:])
                _exactly(stack[start - 1], (list,)).extend(stack[start:])
                del stack[start:]
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
                _require_values(stack)
                (result,) = stack
                return result
            else:
                raise NotPlain

    def _storage(self, reference: Any) -> _Storage:
        word, kind, key, location, numel = reference
        if word != "storage" or type(kind) is not _Kind:
            raise NotPlain
        found = self._storages.get(key)
        if found is None:
            content = self._storage_of(key, location, numel * kind.dtype.itemsize)
            found = self._storages[key] = _Storage(content, kind.dtype)
        return found  # Like torch: the first reference to a storage gives it its type.

    def _call(self, function: Any, arguments: Any) -> Any:
        if function is _REBUILD:
            storage, offset, shape, stride, requires_grad, hooks = arguments
            if type(storage) is not _Storage or hooks or type(requires_grad) is not bool:
                raise NotPlain
            tensor = torch.empty(0, dtype=storage.dtype, device="cpu").set_(storage.content, offset, shape, stride)
            if type(tensor) is not torch.Tensor:
                raise NotPlain  # a mode of torch's makes tensors of another kind
            # Both as torch's own function sets them.
            tensor.requires_grad = requires_grad
            tensor._backward_hooks = hooks
            return tensor
        if function is _PARAMETER:
            tensor, requires_grad, hooks = arguments
            if type(tensor) is not torch.Tensor or hooks or type(requires_grad) is not bool:
                raise NotPlain
            parameter = torch.nn.Parameter(tensor, requires_grad)
            parameter._backward_hooks = hooks
            return parameter
        if function is _ORDERED and arguments == ():
            return OrderedDict()
        raise NotPlain


def _require_values(values: Sequence[Any]) -> None:
    """Raises if a placeholder is among values, or in a tuple of them."""
    for value in values:
        kind = type(value)
        if kind in _PLACEHOLDERS:
            raise NotPlain
        if kind is tuple:
            _require_values(value)


def _exactly(value: Any, kinds: tuple[type, ...]) -> Any:
    if type(value) not in kinds:
        raise NotPlain
    return value
