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
    if not all(name.endswith(_KNOWN) for name in _NAMES.findall(data)):
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
        if not data.startswith(_PROTOCOL):
            raise NotPlain
        position = len(_PROTOCOL)
        stack: list[Any] = []
        marked: list[list[Any]] = []
        # By the four bytes of the number.
        memo: dict[bytes, Any] = {}
        read_tensor = self._tensors.read
        push, pop = stack.append, stack.pop
        while True:
            code = data[position]
            position += 1
            if code == 0x72:  # LONG_BINPUT
                end = position + 4
                if data[position:end] in memo:
                    raise NotPlain  # Tensors that are read at once rely on it that a number never changes its object.
                memo[data[position:end]] = stack[-1]
                position = end
            elif code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                end = position + 1 if code == 0x68 else position + 4
                value = memo[data[position:end] + _SHORT if code == 0x68 else data[position:end]]
                made = read_tensor(data, end, memo) if value is REBUILD else None
                value, position = made if made is not None else (value, end)
                push(value)
            elif code == 0x58:  # BINUNICODE
                end = position + 4 + _UINT32(data, position)[0]
                if end > len(data):
                    raise NotPlain
                push(data[position + 4 : end].decode("utf-8", "surrogatepass"))
                position = end
            elif code == 0x71:  # BINPUT
                end = position + 1
                if data[position:end] + _SHORT in memo:
                    raise NotPlain
                memo[data[position:end] + _SHORT] = stack[-1]
                position = end
            elif code == 0x4B:  # BININT1
                push(data[position])
                position += 1
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
                push(self._tensors.storage(pop()))
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
                if len(items) % 2:
                    raise NotPlain
                target = _exactly(stack[-1], (dict, OrderedDict))
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[key] = value
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
                push(GLOBALS[data[position:end]])
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

    def _call(self, function: Any, arguments: Any) -> Any:
        if function is REBUILD:
            return self._tensors.tensor(arguments)
        if function is PARAMETER:
            return self._tensors.parameter(arguments)
        if function is ORDERED and arguments == ():
            return OrderedDict()
        raise NotPlain


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
