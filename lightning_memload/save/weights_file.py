"""The weights of a checkpoint as one safetensors file, laid out over the memory in which they lie.

The format knows neither views nor ties nor strides: every tensor in it is one run of bytes under one name. A weight
that has its storage for itself is such a run, and those bytes need to be saved nowhere else. Tied weights are written
once, and the file's metadata says which name has them, as safetensors does. What shares a storage otherwise, or is not
contiguous, is put in order on the way; a checkpoint that has to keep it as it is needs its storage as well.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from lightning_memload.checkpoint import SAFETENSORS_DTYPES, span_elements
from lightning_memload.save.layout import Piece
from lightning_memload.save.pickling import Stretch
from lightning_memload.save.writing import Content, Gathered, Sink, size_of

__all__ = ["RunTarget", "WeightsFile", "find_weights"]

# Values begin where vector instructions like them to.
_ALIGNMENT_BYTES = 64
_METADATA = "__metadata__"
# An entry of the metadata that readers want; the others there name ties.
_FORMAT = "format"
_LENGTH = struct.Struct("<Q")


def find_weights(obj: object) -> dict[str, torch.Tensor]:
    """The tensors by name in ``obj["state_dict"]``, or in ``obj`` if it has no such entry; empty if there are none."""
    if not isinstance(obj, Mapping):
        return {}
    weights = obj.get("state_dict", obj)
    if not isinstance(weights, Mapping):
        return {}
    return {name: value for name, value in weights.items() if type(name) is str and isinstance(value, torch.Tensor)}


@dataclass
class WeightsFile:
    """A safetensors file that is to be written.

    Attributes:
        contents: The bytes of its header and of each tensor, in the order of the file.
        offsets: Where each begins.
        nbytes: Size of the file.
        places: Where a stretch lies whose bytes are a tensor of the file, by its storage (``_cdata``): position in
            these lists.
        left_out: Weights that the format cannot hold: of other dtypes, sparse, nested, without memory, or not plain
            tensors.
    """

    contents: list[Content] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    nbytes: int = 0
    places: dict[int, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], stretches: Sequence[Stretch]) -> WeightsFile:
        """Lays out the file.

        Args:
            weights: The tensors by name.
            stretches: What the checkpoint needs of each storage.
        """
        file = cls()
        needed = {stretch.storage._cdata: (stretch.start, stretch.nbytes) for stretch in stretches}
        first_names: dict[object, str] = {}
        ties: dict[str, str] = {}
        held: list[tuple[str, torch.Tensor]] = []
        for name, tensor in weights.items():
            if name == _METADATA or not _fits(tensor):
                file.left_out.append(name)
                continue
            storage, start, _ = _place(tensor)
            identity = storage._cdata, start, tensor.dtype, tensor.shape, tensor.stride()
            if tensor.numel() and name != _FORMAT and first_names.setdefault(identity, name) != name:
                ties[name] = first_names[identity]
            else:
                held.append((name, tensor))
        # The widest first: each then begins at a multiple of its width.
        held.sort(key=lambda entry: -entry[1].dtype.itemsize)
        file.contents.append(_header(held, ties))
        for _, tensor in held:
            storage, start, nbytes = _place(tensor)
            if tensor.numel() and tensor.is_contiguous() and needed.get(storage._cdata) == (start, nbytes):
                file.places[storage._cdata] = len(file.contents)
            file.contents.append(Stretch(storage, start, nbytes) if tensor.is_contiguous() else Gathered(tensor))
        *file.offsets, file.nbytes = accumulate(map(size_of, file.contents), initial=0)
        return file


class RunTarget:
    """A file whose records follow one another without anything between, as a target.

    Args:
        sink: The file.
        offsets: Where each record begins.
    """

    def __init__(self, sink: Sink, offsets: Sequence[int]) -> None:
        self._sink = sink
        self._offsets = offsets

    def write(self, pieces: Sequence[Piece], data: Sequence[memoryview], crc32s: Sequence[int | None]) -> None:
        """Writes neighbours with one call, see :class:`Target`."""
        self._sink.write(data, self._offsets[pieces[0].record] + pieces[0].start)


def _header(held: Sequence[tuple[str, torch.Tensor]], ties: Mapping[str, str]) -> bytes:
    """The length and the header of a file with these tensors, one behind the other."""
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
    """Where a tensor lies if it is contiguous: its storage, first byte and size."""
    return tensor.untyped_storage(), int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor.nbytes


def _fits(tensor: torch.Tensor) -> bool:
    """Whether safetensors can hold the values, and they lie in memory as they are."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    if tensor.is_meta or tensor.is_nested:
        return False
    if tensor.dtype not in SAFETENSORS_DTYPES or tensor.is_conj() or tensor.is_neg():
        return False
    # A storage may have been freed under its tensor.
    end = int(tensor.storage_offset()) + span_elements(tensor.shape, tensor.stride())
    return not tensor.numel() or end * tensor.dtype.itemsize <= tensor.untyped_storage().nbytes()
