"""Builds the object of a checkpoint that contains only containers, numbers, strings and plain tensors.

``torch.load`` takes 60 us for each tensor, most of it in an unpickler for any kind of object. The inert walk for the
index takes 25 us more. Most checkpoints have a few kinds of objects only. They are built here in a fifth of the time,
and the same pass gives their index. All others are left to ``torch.load`` and the inert walk: those with classes and
functions, with other protocols, and damaged ones.
"""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_memload.checkpoint.index import KeyPath, StorageInfo, TensorInfo
from lightning_memload.pickles.plain_tensors import (
    GLOBALS,
    ORDERED,
    PARAMETER,
    PLACEHOLDERS,
    REBUILD,
    Arguments,
    Memory,
    NotPlain,
    Tensors,
)
from lightning_memload.pickles.values import MAX_DEPTH, path_key

__all__ = ["NotPlain", "PlainObject", "build_plain", "index_plain"]

_ROOT = object()
_NAMES = re.compile(rb"c[\w.]+\n[\w.]+\n")
_KNOWN = tuple(b"c" + name for name in GLOBALS)
_PROTOCOL = b"\x80\x02"
_SHORT = b"\0\0\0"  # what the number of a short reference lacks
_UINT8, _UINT16, _INT32, _UINT32, _DOUBLE = (
    struct.Struct(layout).unpack_from for layout in ("<B", "<H", "<i", "<I", ">d")
)


@dataclass(frozen=True, slots=True)
class PlainObject:
    """The result of :func:`build_plain`.

    Attributes:
        root: The object. Its tensors lie in the storages.
        storages: Every storage, in the order in which torch meets them.
    """

    root: Any
    storages: tuple[StorageInfo, ...]
    _made: Tensors

    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor with its path, in the order in which the object holds them.

        Raises:
            NotPlain: The containers are nested too deeply.
        """
        found: list[TensorInfo] = []
        view_of, note, new = self._made.views.get, found.append, tuple.__new__
        visited: set[int] = set()
        # The containers around the present place, each with what is left of it.
        stack: list[tuple[KeyPath, Iterator[tuple[Any, Any]]]] = [((), iter([(_ROOT, self.root)]))]
        while stack:
            path, items = stack[-1]
            for key, value in items:
                view = view_of(id(value))
                if view is None and (not isinstance(value, (dict, list, tuple)) or id(value) in visited):
                    continue
                place = () if key is _ROOT else (*path, key if type(key) is str else path_key(key))
                if view is not None:
                    note(new(TensorInfo, (place, *view)))
                    continue
                visited.add(id(value))
                if len(place) == MAX_DEPTH:
                    raise NotPlain
                # By its class: the pickle can give an OrderedDict an attribute of this name.
                stack.append((place, iter(type(value).items(value) if isinstance(value, dict) else enumerate(value))))
                break
            else:
                stack.pop()
        return tuple(found)


def build_plain(data: bytes, find: Callable[[str, str, int], StorageInfo], memory: Memory) -> PlainObject:
    """Builds the object of a pickle of ``torch.save``, as ``torch.load`` does with any ``weights_only``.

    Args:
        data: The pickle.
        find: Gives the storage of a key, of a location and a length in bytes. Called once for each key. What it
            raises ends the building.
        memory: Where the storages are.

    Returns:
        The object, and the places of its tensors.

    Raises:
        NotPlain: The pickle holds something else, or is damaged. Nothing that it names has been called.
    """
    return _carry_out(data, find, memory)


def index_plain(
    data: bytes, find: Callable[[str, str, int], StorageInfo]
) -> tuple[tuple[TensorInfo, ...], tuple[StorageInfo, ...]]:
    """The index of a pickle that :func:`build_plain` builds, without its object.

    Args:
        data: The pickle.
        find: As for :func:`build_plain`.

    Returns:
        The tensors and the storages.

    Raises:
        NotPlain: The pickle holds something else, or is damaged.
    """
    plain = _carry_out(data, find, None)
    return plain.tensors(), plain.storages


def _carry_out(data: bytes, find: Callable[[str, str, int], StorageInfo], memory: Memory | None) -> PlainObject:
    if not data.startswith(_PROTOCOL) or not all(name.endswith(_KNOWN) for name in _NAMES.findall(data)):
        raise NotPlain  # It names something else, or a text looks like it. Most others end here, before time is lost.
    made = Tensors(find, memory)
    try:
        root = _Builder(data, made)._run()
        return PlainObject(root, tuple(info for info, _ in made.storages.values()), made)
    except NotPlain:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise NotPlain from error


class _Builder:
    def __init__(self, data: bytes, tensors: Tensors) -> None:
        self._data = data
        self._tensors = tensors

    def _run(self) -> Any:
        """Executes the instructions of the pickle. As in ``pickle``, values below a mark cannot be reached."""
        data = self._data
        position = len(_PROTOCOL)
        stack: list[Any] = []
        marked: list[list[Any]] = []
        # By the four bytes of the number.
        memo: dict[bytes, Any] = {}
        read_tensor = self._tensors.read
        while True:
            code = data[position]
            position += 1
            if code == 0x72 or code == 0x71:  # LONG_BINPUT, BINPUT
                end = position + 4 if code == 0x72 else position + 1
                number = data[position:end] + _SHORT[: 4 - end + position]
                if number in memo:
                    raise NotPlain  # Tensors that are read at once rely on it that a number never changes its object.
                memo[number], position = stack[-1], end
            elif code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                end = position + 4 if code == 0x6A else position + 1
                value = memo[data[position:end] + _SHORT[: 4 - end + position]]
                made = read_tensor(data, end, memo) if value is REBUILD else None
                value, position = made if made is not None else (value, end)
                stack.append(value)
            elif code == 0x58 or code == 0x8A:  # BINUNICODE, LONG1
                start = position + 4 if code == 0x58 else position + 1
                end = start + (_UINT32(data, position)[0] if code == 0x58 else data[position])
                if end > len(data):
                    raise NotPlain
                value = data[start:end]
                stack.append(_text(value) if code == 0x58 else int.from_bytes(value, "little", signed=True))
                position = end
            elif code in _NUMBERS:
                unpack, nbytes = _NUMBERS[code]
                stack.append(unpack(data, position)[0])
                position += nbytes
            elif code == 0x28:  # MARK
                marked.append(stack)
                stack = []
            elif code in _COLLECTING:
                items, stack = stack, marked.pop()
                _COLLECTING[code](stack, items)
            elif code in _SIMPLE:
                _SIMPLE[code](stack)
            elif code == 0x51:  # BINPERSID
                stack.append(self._tensors.storage(stack.pop()))
            elif code == 0x52:  # REDUCE
                arguments = stack.pop()
                stack[-1] = self._call(stack[-1], arguments)
            elif code == 0x63:  # GLOBAL
                end = data.index(b"\n", data.index(b"\n", position) + 1) + 1
                stack.append(GLOBALS[data[position:end]])
                position = end
            elif code == 0x2E and not marked:  # STOP
                _require_values(stack)
                (result,) = stack
                return result
            else:
                raise NotPlain

    def _call(self, function: Any, arguments: Any) -> Any:
        if function is REBUILD:
            return self._tensors.tensor(arguments)
        if function is PARAMETER:
            return self._tensors.parameter(arguments)
        if function is ORDERED and arguments == ():
            return OrderedDict()
        raise NotPlain


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _tuple_of(items: tuple[Any, ...]) -> tuple[Any, ...]:
    return items if PLACEHOLDERS.isdisjoint(map(type, items)) else Arguments(items)


def _require_values(values: Iterable[Any]) -> None:
    """Raises if a placeholder is among values, or in a tuple of them."""
    if not PLACEHOLDERS.isdisjoint(map(type, values)):
        raise NotPlain


def _exactly(value: Any, kinds: tuple[type, ...]) -> Any:
    if type(value) not in kinds:
        raise NotPlain
    return value


def _tuple_of_last(count: int) -> Callable[[list[Any]], None]:
    def make(stack: list[Any]) -> None:
        if len(stack) < count:
            raise NotPlain
        stack[-count:] = (_tuple_of(tuple(stack[-count:])),)

    return make


def _push_tuple(stack: list[Any], items: list[Any]) -> None:
    stack.append(_tuple_of(tuple(items)))


def _set_items(stack: list[Any], items: list[Any]) -> None:
    _require_values(items)
    if len(items) % 2:
        raise NotPlain
    target = _exactly(stack[-1], (dict, OrderedDict))
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key] = value


def _append_items(stack: list[Any], items: list[Any]) -> None:
    _require_values(items)
    _exactly(stack[-1], (list,)).extend(items)


def _set_item(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _set_items(stack, [key, value])


def _append_item(stack: list[Any]) -> None:
    _append_items(stack, [stack.pop()])


def _set_versions(stack: list[Any]) -> None:
    """Gives an ``OrderedDict`` its attributes: the versions of a state dict's modules."""
    state = stack.pop()
    _exactly(stack[-1], (OrderedDict,)).__dict__.update(_exactly(state, (dict,)))


# Instructions with a number of fixed length: BININT1, BININT2, BININT, BINFLOAT.
_NUMBERS = {0x4B: (_UINT8, 1), 0x4D: (_UINT16, 2), 0x4A: (_INT32, 4), 0x47: (_DOUBLE, 8)}
# Instructions that use all values down to the mark: TUPLE, SETITEMS, APPENDS.
_COLLECTING = {0x74: _push_tuple, 0x75: _set_items, 0x65: _append_items}
# Instructions that use the stack only.
_SIMPLE: dict[int, Callable[[list[Any]], None]] = {
    0x85: _tuple_of_last(1),  # TUPLE1
    0x86: _tuple_of_last(2),  # TUPLE2
    0x87: _tuple_of_last(3),  # TUPLE3
    0x73: _set_item,  # SETITEM
    0x61: _append_item,  # APPEND
    0x62: _set_versions,  # BUILD
    0x89: lambda stack: stack.append(False),  # NEWFALSE
    0x88: lambda stack: stack.append(True),  # NEWTRUE
    0x4E: lambda stack: stack.append(None),  # NONE
    0x29: lambda stack: stack.append(()),  # EMPTY_TUPLE
    0x7D: lambda stack: stack.append({}),  # EMPTY_DICT
    0x5D: lambda stack: stack.append([]),  # EMPTY_LIST
}
