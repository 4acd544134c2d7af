"""Placeholders for the objects and names of a pickle that is read without running it. They accept all and do nothing.

Tensors and storages become records of this package, containers become plain containers, and everything else becomes an
:class:`Opaque`. No name is imported and no code of the file runs.
"""

from __future__ import annotations

import collections
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from lightning_memload.checkpoint.index import StorageInfo, TensorInfo

__all__ = [
    "KNOWN_GLOBALS",
    "STORAGE_DTYPES",
    "DefaultDict",
    "GlobalName",
    "Opaque",
    "SpecialValue",
    "TensorValue",
    "TypedStorage",
]

_MAX_PARTS = 1000

# Module and qualified name.
GlobalName = tuple[str, str]


class Opaque:
    """Stands for any object of the pickle that is neither a container nor a tensor. Accepts all, does nothing.

    Attributes:
        global_name: The class or function that made it. ``None`` if the placeholder stands for something else.
        holds_items: Whether the pickle puts items into it and the ``weights_only`` of this torch cannot. It may depend
            on whether the class derives dict or list.
    """

    global_name: ClassVar[GlobalName | None] = None
    holds_items: bool
    parts: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        """Keeps the arguments."""
        self = super().__new__(cls)
        self.parts = [*args, *kwargs.values()]
        self.holds_items = False
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def named(cls, module: str, name: str) -> type[Opaque]:
        """A placeholder class for one name of the pickle."""
        return type(name, (cls,), {"__module__": module, "global_name": (module, name)})

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.holds_items |= not _fills(_DictItems)
        self.parts.append((key, value))

    def append(self, value: Any) -> None:
        """Keeps an item."""
        self.extend([value])

    def extend(self, values: Any) -> None:
        """Keeps items."""
        self.holds_items |= self.global_name == ("collections", "deque") or not _fills(_ListItems)
        self.parts.extend(values)

    def add(self, value: Any) -> None:
        """Keeps an item."""
        self.holds_items = True
        self.parts.append(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Opaque:
        """Returns a placeholder for the result of the call."""
        return Opaque(self, *args, *kwargs.values())

    def __hash__(self) -> int:
        return id(self)


class DefaultDict(dict[Any, Any]):
    """Stands for a ``collections.defaultdict``, which torch's ``weights_only`` does not know."""

    def __init__(self, default_factory: Any = None) -> None:
        super().__init__()
        self.default_factory = default_factory

    @property
    def holds_items(self) -> bool:
        """See :class:`Opaque`."""
        return bool(self) and not _fills(_DictItems)


class _DictItems(dict[Any, Any]):
    """A class that derives dict."""


class _ListItems(list[Any]):
    """A class that derives list."""


@functools.cache
def _fills(kind: type[_DictItems] | type[_ListItems]) -> bool:
    """Whether ``weights_only`` puts items into objects of an allowed class. Asks torch, since versions differ.

    torch 2.6 puts items into dicts, and 2.10 does not. torch 2.14 puts items into lists, and 2.13 does not.
    """
    file = io.BytesIO()
    torch.save(kind([(1, 2)]), file)
    file.seek(0)
    try:
        with torch.serialization.safe_globals([kind]):
            torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


class _Sealed:
    """An object that a pickle cannot change. Otherwise BUILD of pickle could set attributes of any named object."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it sets the state of a {type(self).__name__.lower()}")


class TypedStorage(_Sealed):
    """A storage with the element type that its reference in the pickle gives it."""

    __slots__ = ("dtype", "storage")

    def __init__(self, storage: StorageInfo, dtype: torch.dtype) -> None:
        self.storage = storage
        self.dtype = dtype


class TensorValue(_Sealed):
    """A tensor that is one strided view of a storage.

    Attributes:
        info: Its place in the file.
        is_parameter: Whether it was saved as an ``nn.Parameter``.
        kind: The placeholder of its class, ``None`` for a plain tensor.
        state: Other values from the pickle, such as attributes.
    """

    __slots__ = ("info", "is_parameter", "kind", "state")

    def __init__(self, info: TensorInfo, is_parameter: bool = False, kind: Any = None, state: Any = None) -> None:
        self.info = info
        self.is_parameter = is_parameter
        self.kind = kind
        self.state = state


class SpecialValue(Opaque):
    """A tensor whose values are not simply the bytes of one storage: quantised, sparse, meta, of a subclass.

    Attributes:
        kind: One word for it, or the full name of its class.
        dtype: Its element type, ``None`` if it is unknown.
        shape: Its sizes, ``None`` if they are unknown.
    """

    kind: str
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None

    @classmethod
    def of(cls, kind: str, dtype: Any, shape: Any, parts: tuple[Any, ...]) -> SpecialValue:
        """Makes one from its parts, with the element type and the sizes that the pickle gives."""
        self = cls(*parts)
        assert isinstance(self, SpecialValue)
        self.kind = kind
        self.dtype = dtype if isinstance(dtype, torch.dtype) else None
        self.shape = _sizes(shape)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the storages and tensors that it is made of."""
        total = 0
        visited: set[int] = set()
        stack: list[Any] = [self.parts]
        # A tensor has few parts. In a hostile file a million tensors may have the same million parts.
        while stack and len(visited) < _MAX_PARTS:
            value = stack.pop()
            if id(value) in visited:
                continue
            visited.add(id(value))
            if isinstance(value, TypedStorage):
                total += value.storage.nbytes
            elif isinstance(value, TensorValue):
                total += value.info.nbytes
            elif isinstance(value, Opaque):
                stack.append(value.parts)
            elif isinstance(value, dict):
                stack.extend(value.values())
            elif isinstance(value, (list, tuple)):
                stack.extend(value)
        return total


class _Function(_Sealed):
    """A function of this package under the name of one that the pickle calls."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def _sizes(shape: Any) -> tuple[int, ...] | None:
    if isinstance(shape, Opaque) and shape.parts:  # torch.Size
        shape = shape.parts[0]
    sound = isinstance(shape, (tuple, list)) and all(isinstance(size, int) for size in shape)
    return tuple(shape) if sound else None


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    """Mirrors ``torch._utils._rebuild_tensor``, ``_v2`` and ``_v3`` (which gives the dtype as its sixth argument)."""
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None)
    if not isinstance(storage, TypedStorage):
        return Opaque(storage, offset, shape, stride, *rest)
    info = TensorInfo((), dtype or storage.dtype, tuple(shape), tuple(stride), offset, storage.storage)
    return TensorValue(info)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    if isinstance(data, TensorValue):
        return TensorValue(data.info, is_parameter=True, kind=data.kind, state=(data.state, *rest))
    return data if isinstance(data, SpecialValue) else Opaque(data, *rest)


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Mirrors ``torch._tensor._rebuild_from_type_v2``: a tensor that carries attributes, or of a subclass."""
    made = function(*args) if isinstance(function, _Function) else None
    name = getattr(kind, "global_name", None)
    if isinstance(made, TensorValue):
        plain = name in (None, ("torch", "Tensor"), ("torch.nn.parameter", "Parameter"))
        return TensorValue(made.info, made.is_parameter, None if plain else kind, state)
    if name is None:
        return Opaque(function, kind, args, state)
    dtype, shape = (made.dtype, made.shape) if isinstance(made, SpecialValue) else (None, None)
    return SpecialValue.of(".".join(name), dtype, shape, (function, kind, args, state))


def _rebuild_quantized(storage: Any, offset: Any, shape: Any, *rest: Any) -> Any:
    dtype = storage.dtype if isinstance(storage, TypedStorage) else None
    return SpecialValue.of("quantized", dtype, shape, (storage, offset, shape, *rest))


def _rebuild_sparse(layout: Any, data: Any) -> Any:
    word = next((part for part in getattr(layout, "parts", ()) if isinstance(part, str)), "sparse")
    tensors = [part for part in data if isinstance(part, TensorValue)] if isinstance(data, tuple) else []
    shape = next((size for part in data if (size := _sizes(part)) is not None), None) if tensors else None
    # The values come last, after the indices.
    dtype = tensors[-1].info.dtype if tensors else None
    return SpecialValue.of(word.removeprefix("torch."), dtype, shape, (layout, data))


def _rebuild_nested(buffer: Any, *rest: Any) -> Any:
    return SpecialValue.of("nested", getattr(getattr(buffer, "info", None), "dtype", None), None, (buffer, *rest))


def _rebuild_meta(dtype: Any, shape: Any, *rest: Any) -> Any:
    return SpecialValue.of("meta", dtype, shape, (dtype, shape, *rest))


def _rebuild_wrapper(kind: Any, dtype: Any, shape: Any, *rest: Any) -> Any:
    name = getattr(kind, "global_name", None) or ("a tensor", "subclass")
    return SpecialValue.of(".".join(name), dtype, shape, (kind, dtype, shape, *rest))


# All other names become an Opaque. These build plain containers or records of this package.
KNOWN_GLOBALS: dict[GlobalName, Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _Function(lambda *args: DefaultDict(*args[:1])),
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_rebuild_parameter),
    ("torch._utils", "_rebuild_qtensor"): _Function(_rebuild_quantized),
    ("torch._utils", "_rebuild_sparse_tensor"): _Function(_rebuild_sparse),
    ("torch._utils", "_rebuild_nested_tensor"): _Function(_rebuild_nested),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _Function(_rebuild_meta),
    ("torch._utils", "_rebuild_wrapper_subclass"): _Function(_rebuild_wrapper),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function(_rebuild_from_type),
}

# Storage classes as torch's pickles name them, see torch.storage.
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QUInt8Storage": torch.quint8,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
    "UntypedStorage": torch.uint8,
}
