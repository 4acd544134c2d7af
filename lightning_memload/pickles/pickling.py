"""Pickles an object as ``torch.save`` does: returns the bytes of ``data.pkl`` and the memory range of each storage.

The pickle is byte for byte that of ``torch.save``, with one exception: if the saved tensors use only a part of a
storage, the pickle refers to that part only, and the tensors' offsets count from its start. The used parts are known
only after pickling, so such an object is pickled twice. No tensor is copied: tensors must not change until their bytes
have been written.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch

from lightning_memload.checkpoint import span_elements
from lightning_memload.errors import UnstreamableError
from lightning_memload.pickles.structure import STUB_BYTES
from lightning_memload.torch_private import REBUILD_FROM_TYPE, REBUILD_TENSOR

__all__ = ["Pickled", "SavedStorage", "pickle_object"]

# The default of torch.save, which all supported versions read.
_PROTOCOL = 2
# Windows start at multiples of this, so that every element type keeps its alignment.
_WINDOW_ALIGNMENT_BYTES = 64
# Most objects that pickle asks about have one of these types. They are no storages.
_NO_STORAGES = frozenset(
    (
        *(str, int, bool, float, type(None), tuple, list, dict, OrderedDict, FunctionType, type),
        *(torch.Tensor, torch.nn.Parameter, torch.Size, type(torch.FloatStorage)),
    )
)


class SavedStorage(NamedTuple):
    """The part of a storage that is saved: ``nbytes`` bytes from byte ``start``. Keeps the storage alive."""

    storage: torch.UntypedStorage
    start: int
    nbytes: int

    @property
    def is_in_host_memory(self) -> bool:
        """Whether the bytes can be read without a copy from a device."""
        return self.storage.device.type == "cpu"


@dataclass(frozen=True, slots=True)
class Pickled:
    """A pickled object.

    Attributes:
        data: The pickle.
        saved_storages: The bytes of each storage. Their keys in the pickle are "0", "1" and so on.
    """

    data: bytes
    saved_storages: tuple[SavedStorage, ...]


def pickle_object(obj: object, *, stubs: Callable[[torch.UntypedStorage], bool] | None = None) -> Pickled:
    """Pickles an object as ``torch.save`` does, without the bytes of its storages.

    An object is pickled twice if its tensors use only a part of a storage.

    Args:
        obj: Anything that ``torch.save`` takes.
        stubs: Whether the bytes of a storage will be in another file. The pickle then gives the storage the size of a
            stub, unless it is empty. ``None``: no storage is.

    Returns:
        The pickle and the saved_storages. The saved_storages refer to the tensors' own memory.

    Raises:
        UnstreamableError: A storage has no memory to read its bytes from.
        RuntimeError: Tensors of different dtypes share a storage, which torch cannot save.

    Peak memory: twice the size of the pickle.
    """
    whole = _Pickler({}, stubs)
    pickled = whole.pickle(obj)
    windows = whole.windows()
    if windows:
        # ``whole`` keeps its storages alive, so no new storage can have the same identity.
        narrowed = _Pickler(windows, stubs)
        smaller = narrowed.pickle(obj)
        # An object that gives other tensors on the second pickling is saved with whole storages, as torch does.
        if narrowed.fits():
            return smaller
    return pickled


@dataclass(slots=True)
class _Use:
    """The byte range of one storage that the object uses."""

    storage: torch.UntypedStorage
    key: str
    nbytes: int
    start: int
    end: int = 0
    is_whole: bool = False


class _Reference:
    """Stands for a tensor's storage in its pickle. A storage that is saved by itself is not wrapped in one."""

    __slots__ = ("words",)

    def __init__(self, words: tuple[Any, ...]) -> None:
        self.words = words


class _Pickler(pickle.Pickler):
    """Pickles an object once.

    Args:
        windows: The first byte to save and the end of the last, by identity of the storage. Other storages are saved
            whole.
        stubs: See :func:`pickle_object`.
    """

    def __init__(
        self, windows: Mapping[int, tuple[int, int]], stubs: Callable[[torch.UntypedStorage], bool] | None
    ) -> None:
        self._stream = io.BytesIO()
        super().__init__(self._stream, protocol=_PROTOCOL)
        self._windows = windows
        self._stubs = stubs
        self._uses: dict[int, _Use] = {}
        self._dtypes: dict[int, torch.dtype] = {}
        self._kinds: dict[torch.dtype, Any] = {}

    def pickle(self, obj: object) -> Pickled:
        self.dump(obj)
        saved_storages = []
        for identity, use in self._uses.items():
            start, end = self._windows.get(identity, (0, use.storage.nbytes()))
            saved_storages.append(SavedStorage(use.storage, start, end - start))
        return Pickled(self._stream.getvalue(), tuple(saved_storages))

    def windows(self) -> dict[int, tuple[int, int]]:
        """The used byte range of each storage of which only a part is used, by identity of the storage."""
        found = {}
        for identity, use in self._uses.items():
            start = min(use.start, use.end) // _WINDOW_ALIGNMENT_BYTES * _WINDOW_ALIGNMENT_BYTES
            if not use.is_whole and use.end - start < use.storage.nbytes():
                found[identity] = (start, use.end)
        return found

    def fits(self) -> bool:
        """Whether every use of a storage is within its window."""
        for identity, (start, end) in self._windows.items():
            use = self._uses.get(identity)
            if use is not None and (use.is_whole or use.end > end or min(use.start, use.end) < start):
                return False
        return True

    # Hooks of pickle -----------------------------------------------------------------------------------------------

    def reducer_override(self, obj: Any) -> Any:
        """Reduces a tensor with torch's own method, records the use of its storage, and adapts the offset."""
        kind = type(obj)
        if kind in copyreg.dispatch_table:
            return NotImplemented
        if kind is OrderedDict and not obj and not vars(obj):
            return kind, ()  # Each tensor holds one, for its hooks. The bytes are the same as without these lines.
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        reduced = obj.__reduce_ex__(_PROTOCOL)
        if not isinstance(reduced, tuple) or len(reduced) != 2:
            return reduced
        function, arguments = reduced
        if function is REBUILD_FROM_TYPE:
            # A tensor with attributes, or of a subclass: the first argument is the function that rebuilds the tensor.
            inner, kind, inner_arguments, state = arguments
            return function, (inner, kind, self._narrow(inner, inner_arguments), state)
        return function, self._narrow(function, arguments)

    def persistent_id(self, obj: Any) -> Any:
        """The persistent id of a storage. pickle calls this for every object, about twenty times for each tensor."""
        kind = type(obj)
        if kind in _NO_STORAGES:
            return None
        if kind is _Reference:
            return obj.words
        if isinstance(obj, (torch.storage.TypedStorage, torch.UntypedStorage)):
            use, words, _ = self._refer_to(obj)
            use.is_whole = True
            return words
        return None

    # --------------------------------------------------------------------------------------------------------------

    def _narrow(self, function: Any, arguments: Any) -> Any:
        """The arguments that rebuild a strided tensor, with the offset in its window. Others are unchanged."""
        if function not in REBUILD_TENSOR:
            return arguments
        storage, offset, shape, stride, *rest = arguments
        use, words, itemsize = self._refer_to(storage)
        if not isinstance(storage, torch.storage.TypedStorage):
            itemsize = rest[2].itemsize
        span = span_elements(shape, stride)
        if span:
            start, end = offset * itemsize, (offset + span) * itemsize
            use.start = start if start < use.start else use.start
            use.end = end if end > use.end else use.end
            # A storage that was freed while its tensor lives has fewer bytes than the tensor spans.
            use.is_whole = use.is_whole or end > use.nbytes
        window = self._windows.get(use.storage._cdata) if self._windows else None
        if window is not None:
            offset = max(0, offset - window[0] // itemsize)
        return (_Reference(words), offset, shape, stride, *rest)

    def _refer_to(self, storage: Any) -> tuple[_Use, tuple[Any, ...], int]:
        """The use of a storage, its persistent id in torch's form, and the bytes of an element."""
        # Mirrors torch.serialization._save (torch 2.6 to 2.13).
        if isinstance(storage, torch.storage.TypedStorage):
            untyped, dtype = storage._untyped_storage, storage.dtype
            kind = self._kinds.get(dtype)
            if kind is None:
                kind = self._kinds[dtype] = getattr(torch, storage._pickle_storage_type())
        else:
            untyped, dtype, kind = storage, torch.uint8, torch.UntypedStorage
        itemsize = dtype.itemsize
        location = torch.serialization.location_tag(untyped)
        identity = untyped._cdata
        nbytes = untyped.nbytes()
        if nbytes:
            address = 0 if location == "meta" else untyped.data_ptr()
            if not address:
                raise UnstreamableError(f"a storage of {nbytes} bytes on {untyped.device} has no memory")
            # Loading cannot view one storage as two types, so torch refuses to save it.
            if self._dtypes.setdefault(address, dtype) is not dtype:
                raise RuntimeError(
                    "Cannot save multiple tensors or storages that view the same data as different types"
                )
        use = self._uses.get(identity)
        if use is None:
            use = self._uses[identity] = _Use(untyped, str(len(self._uses)), nbytes, nbytes)
        use.nbytes = nbytes
        numel = nbytes // itemsize
        window = self._windows.get(identity)
        if window is not None:
            numel = (window[1] - window[0]) // itemsize
        if numel and self._stubs is not None and self._stubs(untyped):
            numel = STUB_BYTES // itemsize
        return use, ("storage", kind, use.key, location, numel), itemsize
