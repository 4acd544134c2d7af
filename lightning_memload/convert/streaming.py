"""Replaces tensors of a loaded checkpoint by tensors without memory, and gives their bytes when they are written.

A tensor without memory has the shape, strides, ties and dtype that are saved, so pickling sees an ordinary object. Its
address is reserved and cannot be read: code that tried would end the process instead of saving zeros. The bytes come
from the files with ``pread``, one part at a time. Tensors on the mapping of the files keep their place there, and their
bytes are read in the same way.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_memload.bytes import Record
from lightning_memload.checkpoint import ChunkedTensor, FileChunk, MappedCheckpoint, StorageInfo
from lightning_memload.checkpoint.elements import ElementReader
from lightning_memload.convert.file_bytes import FileBytes, WholeRecord
from lightning_memload.errors import CheckpointReadError
from lightning_memload.pickles.pickling import SavedStorage
from lightning_memload.storage.kernel import reserve_addresses, unmap_memory
from lightning_memload.transfer.compare import compare_records
from lightning_memload.transfer.contents import Content, GatheredBytes

__all__ = ["StreamedTensors"]

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
# Tensors in deeper containers are read into memory one after the other. Only a hostile file has them.
_MAX_DEPTH = 100
# An error names the file and the position.
_UNNAMED = "a tensor"


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the elements of a storage without memory come from.

    Attributes:
        reader: The elements.
        dtype: The dtype in which they are written.
        offset: Position of the first element in the files, ``None`` if they are in several parts.
    """

    reader: ElementReader
    dtype: torch.dtype
    offset: int | None


class StreamedTensors:
    """The tensors of one loaded checkpoint, on their way from the files to a writer.

    Args:
        mapped: The checkpoint.
        progress: Called after every part with the bytes done and all bytes, one call at a time.
    """

    def __init__(self, mapped: MappedCheckpoint, progress: Callable[[int, int], None] | None) -> None:
        self._mapped = mapped
        self._source = mapped.source
        self._progress = progress
        self._lock = threading.Lock()
        self._origins: dict[int, _Origin] = {}
        # Old and new objects, by the identity of the old one. Both are kept: an identity could be used again.
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._storages: dict[tuple[int, int, torch.dtype, torch.dtype], torch.Tensor] = {}
        self._on_disk = sorted((info for info in mapped.index.storages if info.nbytes), key=lambda info: info.offset)
        self._starts = [info.offset for info in self._on_disk]
        self._unchecked: dict[int, StorageInfo] = {}
        self._names: dict[int, str] = {}
        for tensor in mapped.index:
            for info in tensor.storages:
                self._names.setdefault(info.offset, tensor.name)
        self.total_bytes = self._done_bytes = 0

    # Tensors -------------------------------------------------------------------------------------------------------

    def replaced(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor that is saved in the place of another one: itself, or one without memory.

        Args:
            tensor: A tensor of the loaded checkpoint.
            dtype: The dtype of floating-point tensors. ``None``: their own.
        """
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = tensor, self._replace(tensor, dtype)
        return self._tensors[id(tensor)][1]

    def replace_all(self, root: Any, depth: int = 0) -> Any:
        """An object with all tensors in dicts, lists and tuples replaced. Dicts and lists are changed in place."""
        if isinstance(root, torch.Tensor):
            return self.replaced(root)
        if depth == _MAX_DEPTH:
            return root
        if isinstance(root, (dict, list)):
            for key, value in list(root.items() if isinstance(root, dict) else enumerate(root)):
                new = self.replace_all(value, depth + 1)
                if new is not value:
                    root[key] = new
        elif type(root) is tuple:
            items = tuple(self.replace_all(item, depth + 1) for item in root)
            return items if any(new is not old for new, old in zip(items, root, strict=True)) else root
        return root

    def _replace(self, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if isinstance(tensor, ChunkedTensor):
            return _like(tensor, self._unchunked(tensor, wanted))
        if wanted == tensor.dtype:
            return tensor
        if type(tensor) not in _PLAIN_TYPES or tensor.layout is not torch.strided:
            return tensor.detach().to(wanted)  # As torch does it, in memory.
        if not tensor.numel() or not self._mapped.holds(tensor):
            return _like(tensor, tensor.detach().to(wanted))
        storage = tensor.untyped_storage()
        return _like(tensor, self._on_new_storage(tensor, wanted, self._offset_of(storage), storage.nbytes()))

    def _unchunked(self, tensor: ChunkedTensor, dtype: torch.dtype) -> torch.Tensor:
        if tensor.is_read or not tensor.numel():
            return tensor.read().to(dtype)
        if tensor.storage_in_files is not None:
            return self._on_new_storage(tensor, dtype, *tensor.storage_in_files)
        reader = ElementReader(self._source, tensor.dtype, tensor.shape, tensor.chunks, _UNNAMED)
        return self._reserve(tensor.numel(), dtype, _Origin(reader, dtype, None)).view(tensor.shape)

    def _on_new_storage(self, tensor: torch.Tensor, dtype: torch.dtype, offset: int, nbytes: int) -> torch.Tensor:
        """The tensor on a storage without memory. Tensors that share a storage share the new one too."""
        key = offset, nbytes, tensor.dtype, dtype
        if key not in self._storages:
            numel = nbytes // tensor.dtype.itemsize
            reader = ElementReader(self._source, tensor.dtype, (numel,), [_run(offset, numel)], _UNNAMED)
            self._storages[key] = self._reserve(numel, dtype, _Origin(reader, dtype, offset))
        return self._storages[key].as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _reserve(self, numel: int, dtype: torch.dtype, origin: _Origin) -> torch.Tensor:
        """A 1-D tensor without memory."""
        nbytes = numel * dtype.itemsize
        address = reserve_addresses(nbytes)
        # A new class each time: plain ctypes arrays do not support weak references.
        region: Any = type("_ReservedBytes", (ctypes.c_char * nbytes,), {}).from_address(address)  # type: ignore[attr-defined]
        weakref.finalize(region, unmap_memory, address, nbytes).atexit = False
        self._origins[address] = origin
        return torch.frombuffer(memoryview(region).cast("B"), dtype=dtype)

    def _offset_of(self, storage: torch.UntypedStorage) -> int:
        mapping = self._mapped.mapping
        assert mapping is not None
        offset = mapping.offset_of(torch.empty(0, dtype=torch.uint8).set_(storage))
        assert offset is not None
        return offset

    # Bytes ---------------------------------------------------------------------------------------------------------

    def content_of(self, content: Content) -> Content:
        """The bytes of a record: from the files, or unchanged if they are in memory."""
        if isinstance(content, bytes) or not content.nbytes:
            return content
        if isinstance(content, GatheredBytes):
            return self._gathered(content)
        origin = self._origins.get(content.storage.data_ptr())
        if origin is not None:
            return self._from_origin(content, origin)
        if not self._is_mapped(content.storage):
            return content
        offset = self._offset_of(content.storage) + content.start
        reader = ElementReader(self._source, torch.uint8, (content.nbytes,), [_run(offset, content.nbytes)], _UNNAMED)
        whole = self._whole_at(offset, content.nbytes)
        return self._file_bytes(reader, torch.uint8, 0, content.nbytes, content.storage, whole)

    def _from_origin(self, content: SavedStorage, origin: _Origin) -> Content:
        start, numel = content.start // origin.dtype.itemsize, content.nbytes // origin.dtype.itemsize
        whole = None
        if origin.offset is None:
            self._note_unchecked(origin.reader)
        else:
            itemsize = origin.reader.dtype.itemsize
            whole = self._whole_at(origin.offset + start * itemsize, numel * itemsize)
        return self._file_bytes(origin.reader, origin.dtype, start, content.nbytes, content.storage, whole)

    def _gathered(self, content: GatheredBytes) -> Content:
        """The elements of a tensor that is not contiguous, in their order."""
        tensor = content.tensor
        origin = self._origins.get(content.storage.data_ptr())
        if origin is not None:
            assert origin.offset is not None  # Tensors in several parts are contiguous.
            source_dtype, offset = origin.reader.dtype, origin.offset
        elif self._is_mapped(content.storage):
            source_dtype, offset = tensor.dtype, self._offset_of(content.storage)
        else:
            return content
        start = offset + int(tensor.storage_offset()) * source_dtype.itemsize
        chunk = FileChunk(start, tensor.stride(), (0,) * tensor.dim(), tuple(tensor.shape))
        reader = ElementReader(self._source, source_dtype, tensor.shape, [chunk], _UNNAMED)
        self._note_unchecked(reader)
        return self._file_bytes(reader, tensor.dtype, 0, content.nbytes, content.storage, None)

    def _file_bytes(
        self,
        reader: ElementReader,
        dtype: torch.dtype,
        start: int,
        nbytes: int,
        storage: torch.UntypedStorage,
        whole: WholeRecord | None,
    ) -> FileBytes:
        self.total_bytes += nbytes
        return FileBytes(reader, dtype, start, nbytes, storage, self._count, whole)

    def _is_mapped(self, storage: torch.UntypedStorage) -> bool:
        return self._mapped.holds(torch.empty(0, dtype=torch.uint8).set_(storage))

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._done_bytes += nbytes
            if self._progress is not None:
                self._progress(self._done_bytes, self.total_bytes)

    # Checks --------------------------------------------------------------------------------------------------------

    def _whole_at(self, offset: int, nbytes: int) -> WholeRecord | None:
        """The check for bytes that are exactly one storage. Other storages are compared before anything is written."""
        info = self._on_disk[bisect_right(self._starts, offset) - 1]
        if info.crc32 is None:
            return None
        if (info.offset, info.nbytes) == (offset, nbytes):
            return WholeRecord(self._source, self._record(info))
        self._unchecked[info.offset] = info
        return None

    def _note_unchecked(self, reader: ElementReader) -> None:
        for chunk in reader.chunks:
            info = self._on_disk[bisect_right(self._starts, chunk.offset) - 1]
            if info.crc32 is not None:
                self._unchecked[info.offset] = info

    def _record(self, info: StorageInfo) -> Record:
        return Record(self._names.get(info.offset, ""), info.offset, info.nbytes, info.crc32)

    def check_storages(self, num_threads: int) -> None:
        """Compares the checksums of the storages whose bytes are not written as they are.

        Raises:
            ChecksumError: The source is damaged.
        """
        records = [self._record(info) for info in self._unchecked.values()]
        compare_records(self._source, records, num_threads=num_threads)

    def check_unchanged(self) -> None:
        """Checks that no file was changed since it was opened.

        Raises:
            CheckpointReadError: A file was changed.
        """
        changed = self._source.changed_files()
        if changed:
            raise CheckpointReadError(
                f"{changed[0]} was changed while it was read. Convert it again.", path=changed[0], key=None, offset=0
            )


def _run(offset: int, numel: int) -> FileChunk:
    return FileChunk(offset, (1,), (0,), (numel,))


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """A new tensor as the same kind of tensor as an old one: parameter, gradient, attributes."""
    if isinstance(old, torch.nn.Parameter):
        new = torch.nn.Parameter(new, old.requires_grad)
    else:
        new.requires_grad_(old.requires_grad)
    attributes = {name: value for name, value in vars(old).items() if not name.startswith("_held")}
    vars(new).update(attributes)
    return new
