"""Rewrites a pickle without the classes that ``weights_only`` refuses, so that torch loads the rest by its own rules.

The pickle is copied instruction by instruction. An object of a refused class becomes a tuple in which a
:class:`RefusedGlobal` stands for the class, so torch has nothing to call. Everything else stays unchanged, including
shared strings and references. Storages become stubs of 16 bytes. A pickle that torch refuses for another reason is
still refused.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_memload.pickles.placeholders import STORAGE_DTYPES, GlobalName
from lightning_memload.pickles.structure import STUB_BYTES, InertUnpickler, current_name

__all__ = ["ErasedPickle", "RefusedGlobal", "erase", "holds_refused"]


@dataclass(frozen=True, slots=True)
class RefusedGlobal:
    """Stands in a loaded object for a class that ``weights_only`` refused.

    Attributes:
        name: The full name of the class.
    """

    name: str


@dataclass(frozen=True, slots=True)
class ErasedPickle:
    """The result of :func:`erase`.

    Attributes:
        archive: A torch zip file with the new pickle and a stub for each storage.
        markers: For each refused name: the object that stands for it, and its name in the new pickle, in the form of
            ``torch.serialization.safe_globals``.
    """

    archive: bytes
    markers: tuple[tuple[Any, str], ...]


def erase(pickled: bytes, refused: Collection[GlobalName], byteorder: str) -> ErasedPickle:
    """Copies a pickle without refused names. No code runs.

    Args:
        pickled: The pickle.
        refused: The refused names.
        byteorder: The byte order of the file, ``"little"`` or ``"big"``.

    Raises:
        Exception: The pickle has instructions that torch cannot read either.
    """
    eraser = _Eraser(pickled, refused)
    eraser.load()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"".join(eraser.output))
        file.writestr("archive/byteorder", byteorder)
        file.writestr("archive/version", "3\n")
        for key, nbytes in eraser.storages.items():
            file.writestr(f"archive/data/{key}", bytes(nbytes))
    return ErasedPickle(archive.getvalue(), tuple(eraser.markers.values()))


def holds_refused(value: Any) -> bool:
    """Whether a value contains a refused object."""
    return next(_refused_in(value), None) is not None


def _refused_in(value: Any) -> Iterator[RefusedGlobal]:
    visited: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, RefusedGlobal):
            yield item
        if isinstance(item, (torch.Tensor, str, bytes, int, float)) or item is None or id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, dict):
            stack += [*item, *item.values(), *getattr(item, "__dict__", {}).values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item


class _Kept:
    """Stands for any object that torch may create."""


class _Refused:
    """Stands for a refused class, and for any object that contains or was created by one."""


_REFUSED = _Refused()
# Containers: torch may create them even if a refused object is among their items.
_CONTAINERS = {("collections", "OrderedDict"), ("collections", "Counter")}


class _ErasedItems(list[Any]):
    """Stands for a container, with its items."""


class _Container:
    """Stands for a class of :data:`_CONTAINERS`."""


class _Eraser(InertUnpickler):
    """Executes a pickle with stand-ins instead of objects, and writes the new pickle."""

    def __init__(self, pickled: bytes, refused: Collection[GlobalName]) -> None:
        self._input = io.BytesIO(pickled)
        super().__init__(self._input, encoding="utf-8")
        self._refused = refused
        self._number: int | None = None  # Index in the output of the last number.
        self._changed: bytes | None = None
        self._searches_left = _SEARCHES_PER_BYTE * len(pickled)
        self.output: list[bytes] = []
        self.markers: dict[GlobalName, tuple[Any, str]] = {}
        self.storages: dict[str, int] = {}

    # The loop of pickle.Unpickler, plus the copy. Frames (protocol 4) fail: torch does not read them.
    def load(self) -> Any:
        self.read, self.readline = self._input.read, self._input.readline
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        while True:
            start = self._input.tell()
            code = self._input.read(1)
            if not code:
                raise EOFError
            self._changed = None
            if code[0] in _NUMBERS:
                self._number = len(self.output)
            try:
                self.dispatch[code[0]](self)
            except pickle._Stop:  # type: ignore[attr-defined]
                self.output.append(code)
                return None
            if self._changed is not None:
                self.output.append(self._changed)
            else:
                self.output.append(self._input.getbuffer()[start : self._input.tell()].tobytes())

    def find_class(self, module: str, name: str) -> Any:
        found = current_name(module, name)
        if found in self._refused:
            alias = f"lightning_memload_refused.{len(self.markers)}"
            _, alias = self.markers.setdefault(found, (RefusedGlobal(".".join(found)), alias))
            self._changed = b"c%b\n%b\n" % tuple(alias.encode().split(b"."))
            return _REFUSED
        if found in _CONTAINERS:
            return _Container()
        if found[0].partition(".")[0] == "torch" and found[1] in STORAGE_DTYPES:
            return STORAGE_DTYPES[found[1]]
        return _Kept()

    def persistent_load(self, saved_id: Any) -> Any:
        _, dtype, key, _, numel = saved_id
        if not isinstance(dtype, torch.dtype) or not isinstance(numel, int) or self._number is None:
            raise pickle.UnpicklingError("it refers to an object that is not a storage")
        nbytes = STUB_BYTES if numel else 0
        if numel:
            number = b"J" + struct.pack("<i", STUB_BYTES // dtype.itemsize)
            self.output[self._number] = number
        self.storages.setdefault(key, nbytes)
        return _Kept()

    def _call(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if function is _REFUSED or (self._is_tainted(arguments) and not isinstance(function, _Container)):
            self._changed = pickle.TUPLE2
            self.append(_REFUSED)
        else:
            self.append(_ErasedItems([arguments]) if isinstance(function, _Container) else _Kept())

    def _is_tainted(self, value: Any) -> bool:
        """Whether an argument contains a refused object."""
        visited: set[int] = set()
        stack = [value]
        while stack:
            item = stack.pop()
            if item is _REFUSED:
                return True
            if isinstance(item, (list, tuple)) and id(item) not in visited:
                visited.add(id(item))
                stack += item
                # Without a limit, a small pickle that passes one long list to a million calls would take hours.
                self._searches_left -= len(item)
                if self._searches_left < 0:
                    raise pickle.UnpicklingError("its arguments take too long to search")
        return False

    def _build(self) -> None:
        self.stack.pop()
        if self.stack[-1] is _REFUSED:
            self._changed = pickle.TUPLE2

    def _append(self) -> None:
        self._put([self.stack.pop()], pickle.TUPLE2)

    def _appends(self) -> None:
        self._put(self.pop_mark(), pickle.TUPLE + pickle.TUPLE2)  # type: ignore[attr-defined]

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value], pickle.TUPLE2 + pickle.TUPLE2)

    def _put(self, items: list[Any], instead: bytes) -> None:
        target = self.stack[-1]
        if target is _REFUSED:
            self._changed = instead
        elif isinstance(target, list):
            target.extend(items)

    def _push_items(self) -> None:
        self.append(_ErasedItems())

    def _refuse_instruction(self) -> None:
        raise pickle.UnpicklingError("torch does not read this instruction")

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {
        **InertUnpickler.dispatch,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _appends,
        pickle.EMPTY_LIST[0]: _push_items,
        pickle.EMPTY_DICT[0]: _push_items,
        pickle.EMPTY_SET[0]: _push_items,
        **dict.fromkeys(
            (opcode[0] for opcode in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.STACK_GLOBAL, pickle.ADDITEMS)),
            _refuse_instruction,
        ),
    }


_SEARCHES_PER_BYTE = 10
_NUMBERS = frozenset(opcode[0] for opcode in (pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1))
