"""An object as torch pickles it: the bytes of ``data.pkl``, and the stretch of memory behind each storage it names.

The pickle is byte for byte the one of ``torch.save``, except for storages of which the saved tensors span only a part:
there only that part is named, and the tensors' offsets count from it. What is needed is known only at the end, so such
an object is pickled twice. Nothing is copied: tensors must stay as they are until their bytes have been written.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lightning_memload.checkpoint import span_elements
from lightning_memload.checkpoint.torch_pickle import STUB_BYTES

__all__ = ["Pickled", "Stretch", "UnstreamableError", "pickle_object"]

# torch.save's default, which all supported versions read.
_PROTOCOL = 2
# Windows start at whole multiples, so that every element type is aligned in them as it is in memory.
_WINDOW_ALIGNMENT_BYTES = 64
# What nearly every question of pickle is about, told apart by one look at its type.
_NO_STORAGES = frozenset((str, int, bool, float, type(None), tuple, list, dict, OrderedDict))


class UnstreamableError(NotImplementedError):
    """The object holds a storage whose bytes cannot be taken from memory; ``torch.save`` has to decide what to do."""


class Stretch(NamedTuple):
    """The part of a storage that is saved: ``nbytes`` from ``start`` on. Keeps the storage alive."""

    storage: torch.UntypedStorage
    start: int
    nbytes: int

    @property
    def is_in_host_memory(self) -> bool:
        """Whether the bytes can be read where they are."""
        return self.storage.device.type == "cpu"


@dataclass(frozen=True, slots=True)
class Pickled:
    """A pickled object.

    Attributes:
        data: The pickle.
        stretches: The bytes of each storage; the pickle calls them "0", "1" and so on.
    """

    data: bytes
    stretches: tuple[Stretch, ...]


def pickle_object(obj: object, *, stubs: Callable[[torch.UntypedStorage], bool] | None = None) -> Pickled:
    """Pickles an object as ``torch.save`` does, its storages apart.

    An object with a tensor that spans only a part of its storage is pickled twice.

    Args:
        obj: Anything that ``torch.save`` takes.
        stubs: Whether a storage's bytes will lie elsewhere: the pickle then gives it the size of a stub, unless it is
            empty. ``None``: of none.

    Returns:
        The pickle and the stretches. They refer to the tensors' own memory.

    Raises:
        UnstreamableError: A storage has no memory whose bytes could be written.
        RuntimeError: Tensors of different dtypes share a storage, which torch cannot save.

    Peak memory: that of the pickle, twice.
    """
    whole = _Pickler({}, stubs)
    pickled = whole.pickle(obj)
    windows = whole.windows()
    if windows:
        # ``whole`` keeps its storages alive, so no new one can take the identity of one of them.
        narrowed = _Pickler(windows, stubs)
        smaller = narrowed.pickle(obj)
        # An object whose parts differ from one pickling to the next is saved whole, as torch does.
        if narrowed.fits():
            return smaller
    return pickled


@dataclass(slots=True)
class _Use:
    """What an object wants of one storage, in bytes."""

    storage: torch.UntypedStorage
    key: str
    nbytes: int
    start: int
    end: int = 0
    is_whole: bool = False


class _Reference:
    """Stands in a tensor's pickle for its storage, so that a storage met by itself can be told from it."""

    __slots__ = ("words",)

    def __init__(self, words: tuple[Any, ...]) -> None:
        self.words = words


class _Pickler(pickle.Pickler):
    """One pass over an object.

    Args:
        windows: First byte and one past the last to save of a storage, by its identity. Others are saved whole.
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
        stretches = []
        for identity, use in self._uses.items():
            start, end = self._windows.get(identity, (0, use.storage.nbytes()))
            stretches.append(Stretch(use.storage, start, end - start))
        return Pickled(self._stream.getvalue(), tuple(stretches))

    def windows(self) -> dict[int, tuple[int, int]]:
        """The storages of which less than the whole is used, and what of them."""
        found = {}
        for identity, use in self._uses.items():
            start = min(use.start, use.end) // _WINDOW_ALIGNMENT_BYTES * _WINDOW_ALIGNMENT_BYTES
            if not use.is_whole and use.end - start < use.storage.nbytes():
                found[identity] = (start, use.end)
        return found

    def fits(self) -> bool:
        """Whether no storage was used beyond its window."""
        for identity, (start, end) in self._windows.items():
            use = self._uses.get(identity)
            if use is not None and (use.is_whole or use.end > end or min(use.start, use.end) < start):
                return False
        return True

    # What pickle asks -----------------------------------------------------------------------------------------------

    def reducer_override(self, obj: Any) -> Any:
        """Tensors are reduced by torch; what that says of their storage is noted, and its place in the window."""
        if not isinstance(obj, torch.Tensor) or type(obj) in copyreg.dispatch_table:
            return NotImplemented
        reduced = obj.__reduce_ex__(_PROTOCOL)
        if not isinstance(reduced, tuple) or len(reduced) != 2:
            return reduced
        function, arguments = reduced
        if function is torch._tensor._rebuild_from_type_v2:
            # A tensor with attributes, or of a subclass: the way to rebuild it is the first argument.
            inner, kind, inner_arguments, state = arguments
            return function, (inner, kind, self._narrow(inner, inner_arguments), state)
        return function, self._narrow(function, arguments)

    def persistent_id(self, obj: Any) -> Any:
        """What the pickle holds for a storage. Asked for every object, twenty times a tensor."""
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
        """The arguments of a strided tensor's rebuilding with its offset in the window; any others as they are."""
        if function not in (torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor_v3):
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
            # A storage that was freed under its tensor has fewer bytes than the tensor spans.
            use.is_whole = use.is_whole or end > use.nbytes
        window = self._windows.get(use.storage._cdata) if self._windows else None
        if window is not None:
            offset = max(0, offset - window[0] // itemsize)
        return (_Reference(words), offset, shape, stride, *rest)

    def _refer_to(self, storage: Any) -> tuple[_Use, tuple[Any, ...], int]:
        """The use of a storage, the words by which the pickle refers to it, torch's own, and bytes of an element."""
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
        use = self._use_of(untyped, dtype, has_memory=location != "meta")
        numel = use.nbytes // itemsize
        window = self._windows.get(untyped._cdata) if self._windows else None
        if window is not None:
            numel = (window[1] - window[0]) // itemsize
        if numel and self._stubs is not None and self._stubs(untyped):
            numel = STUB_BYTES // itemsize
        return use, ("storage", kind, use.key, location, numel), itemsize

    def _use_of(self, storage: torch.UntypedStorage, dtype: torch.dtype, *, has_memory: bool) -> _Use:
        nbytes = storage.nbytes()
        if nbytes:
            address = storage.data_ptr() if has_memory else 0
            if not address:
                raise UnstreamableError(f"a storage of {nbytes} bytes on {storage.device} has no memory")
            # Loading cannot view one storage as two types, so torch refuses to save it.
            if self._dtypes.setdefault(address, dtype) != dtype:
                raise RuntimeError(
                    "Cannot save multiple tensors or storages that view the same data as different types"
                )
        use = self._uses.get(storage._cdata)
        if use is None:
            use = self._uses[storage._cdata] = _Use(storage, str(len(self._uses)), nbytes, nbytes)
        use.nbytes = nbytes
        return use
