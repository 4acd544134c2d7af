"""Plans a safetensors file with the weights of a checkpoint. The bytes come directly from the tensors' memory.

A safetensors file has no views, ties or strides: every tensor is one contiguous run of bytes under one name. A weight
that fills its storage is written as it is, and ``state.pt`` does not need its bytes. Tied weights are written once, and
the file's metadata maps the other names to the first one, as safetensors does. A weight that shares its storage in
another way, or is not contiguous, is made contiguous on the way. ``state.pt`` then holds its storage too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from lightning_memload.bytes import RecordPart
from lightning_memload.checkpoint import span_elements
from lightning_memload.formats.safetensors.header import SAFETENSORS_DTYPES
from lightning_memload.pickles.pickling import SavedStorage
from lightning_memload.transfer.contents import Content, GatheredBytes, size_of
from lightning_memload.transfer.sinks import Sink

__all__ = ["ContiguousWriter", "WeightsFile", "find_weights"]

# The header is padded to this, so that the values start aligned for vector instructions.
_ALIGNMENT_BYTES = 64
_METADATA = "__metadata__"
# The entry of the metadata that readers expect. All other entries name tied weights.
_FORMAT = "format"
_LENGTH = struct.Struct("<Q")


def find_weights(obj: object) -> dict[str, torch.Tensor]:
    """The tensors in ``obj["state_dict"]``, or in ``obj`` if it has no such entry, by name. May be empty."""
    if not isinstance(obj, Mapping):
        return {}
    weights = obj.get("state_dict", obj)
    if not isinstance(weights, Mapping):
        return {}
    return {name: value for name, value in weights.items() if type(name) is str and isinstance(value, torch.Tensor)}


@dataclass
class WeightsFile:
    """The layout of a safetensors file before it is written.

    Attributes:
        contents: The bytes of the header and of each tensor, in the order of the file.
        offsets: The position of each content in the file.
        nbytes: Size of the file.
        places: For each storage whose bytes are exactly one tensor of the file: its index in ``contents``. The key is
            ``_cdata``.
        left_out: Weights that the format cannot hold: of other dtypes, sparse, nested, without memory, or not plain
            tensors.
        ties: For each name that the metadata maps to another one: that name.
    """

    contents: list[Content] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    nbytes: int = 0
    places: dict[int, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], saved_storages: Sequence[SavedStorage]) -> WeightsFile:
        """Lays out the file.

        Args:
            weights: The tensors by name.
            saved_storages: The part of each storage that the checkpoint needs.
        """
        file = cls()
        needed = {saved.storage._cdata: (saved.start, saved.nbytes) for saved in saved_storages}
        first_names: dict[object, str] = {}
        held: list[tuple[str, torch.Tensor]] = []
        for name, tensor in weights.items():
            if name == _METADATA or not _fits(tensor):
                file.left_out.append(name)
                continue
            storage, start, _ = _place(tensor)
            identity = storage._cdata, start, tensor.dtype, tensor.shape, tensor.stride()
            if tensor.numel() and name != _FORMAT and first_names.setdefault(identity, name) != name:
                file.ties[name] = first_names[identity]
            else:
                held.append((name, tensor))
        # Wide elements first, so that each tensor starts at a multiple of its element size.
        held.sort(key=lambda entry: -entry[1].dtype.itemsize)
        file.contents.append(_header(held, file.ties))
        for _, tensor in held:
            storage, start, nbytes = _place(tensor)
            if tensor.numel() and tensor.is_contiguous() and needed.get(storage._cdata) == (start, nbytes):
                file.places[storage._cdata] = len(file.contents)
            file.contents.append(
                SavedStorage(storage, start, nbytes) if tensor.is_contiguous() else GatheredBytes(tensor)
            )
        *file.offsets, file.nbytes = accumulate(map(size_of, file.contents), initial=0)
        return file

    def take_contents(self) -> list[Content]:
        """The contents. This object no longer refers to them. Call it once."""
        contents, self.contents = self.contents, []
        return contents


class ContiguousWriter:
    """A target for one file in which the records follow one another without gaps.

    Args:
        sink: The file.
        offsets: The position of each record.
    """

    def __init__(self, sink: Sink, offsets: Sequence[int]) -> None:
        self._sink = sink
        self._offsets = offsets

    def write(self, parts: Sequence[RecordPart], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Writes adjacent parts with one call, see :class:`RecordWriter`."""
        self._sink.write(data, self._offsets[parts[0].record] + parts[0].start)


def _header(held: Sequence[tuple[str, torch.Tensor]], ties: Mapping[str, str]) -> bytes:
    """The length and the header of a file that holds these tensors in this order."""
    described: dict[str, object] = {_METADATA: {**ties, _FORMAT: "pt"}}
    end = 0
    for name, tensor in held:
        start, end = end, end + tensor.nbytes
        described[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(described).encode()
    header += b" " * (-(_LENGTH.size + len(header)) % _ALIGNMENT_BYTES)
    return _LENGTH.pack(len(header)) + header


def _place(tensor: torch.Tensor) -> tuple[torch.UntypedStorage, int, int]:
    """The place of a contiguous tensor: its storage, first byte and size in bytes."""
    return tensor.untyped_storage(), int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor.nbytes


def _fits(tensor: torch.Tensor) -> bool:
    """Whether safetensors can hold the tensor, and its memory holds its values."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    if tensor.is_meta or tensor.is_nested:
        return False
    if tensor.dtype not in SAFETENSORS_DTYPES or tensor.is_conj() or tensor.is_neg():
        return False
    # A storage may have been freed while its tensor lives.
    end = int(tensor.storage_offset()) + span_elements(tensor.shape, tensor.stride())
    return not tensor.numel() or end * tensor.dtype.itemsize <= tensor.untyped_storage().nbytes()
