"""Loading a checkpoint as an ordinary object whose tensors still lie in the file.

``torch.load`` builds the object, so every rule of ``weights_only`` is torch's own; only the storages under its tensors
are ours. They are handed over through ``map_location``, torch's public way to say where a storage goes, in the order in
which the index found them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightning_memload.checkpoint.index import Checkpoint, StorageInfo, span_elements
from lightning_memload.checkpoint.mapping import FileMapping
from lightning_memload.checkpoint.source import LocalFile
from lightning_memload.checkpoint.torch_zip import UnmappableCheckpoint, is_zip, read_index
from lightning_memload.errors import CheckpointFormatError, InsufficientMemoryError, MemloadError

__all__ = ["MappedCheckpoint", "UnmappableCheckpoint", "load_mapped", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Indexes a checkpoint: names, shapes, dtypes, ties and the bytes of every tensor, without reading tensor data.

    Runs no code from the file, whoever made it. Works for files of any size, larger than the machine's memory too.

    Args:
        path: A file written by ``torch.save`` (torch >= 1.6): a Lightning ``.ckpt``, a bare state dict, any nesting.

    Returns:
        The index.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointFormatError: It is no such file, or it is truncated or damaged.
    """
    if not is_zip(path):
        raise UnmappableCheckpoint(
            f"{os.fspath(path)} is not a zip archive: either a file of torch < 1.6 or "
            "_use_new_zipfile_serialization=False, or no checkpoint at all. Load it with torch.load and save it again.",
            path=os.fspath(path),
        )
    with LocalFile(path) as file:
        return read_index(file)


class MappedCheckpoint:
    """A loaded object together with the mapping under its tensors.

    Attributes:
        index: The index of the file.
        mapping: The mapping. It, and the open file, live as long as this object or any tensor on top of it.
    """

    def __init__(self, index: Checkpoint, mapping: FileMapping) -> None:
        self.index = index
        self.mapping = mapping

    def locate(self, tensor: torch.Tensor) -> int | None:
        """Absolute file offset of the tensor's first element, if reading the file there gives the tensor's values.

        Args:
            tensor: Any tensor.

        Returns:
            ``None`` for a tensor that does not lie in the file, that somebody wrote to since, whose bytes are not its
            values (conjugate or negative views, subclasses), or that is empty.
        """
        return self.locate_all([tensor])[0]

    def locate_all(self, tensors: Sequence[torch.Tensor]) -> list[int | None]:
        """Locates many tensors at once, which asks the kernel once instead of for each; see :meth:`locate`."""
        offsets = [self._offset_of_values(tensor) for tensor in tensors]
        ranges = [
            None if offset is None else (offset, offset + span_bytes(tensor))
            for offset, tensor in zip(offsets, tensors, strict=True)
        ]
        pristine = self.mapping.are_pristine([span for span in ranges if span is not None])
        answers = iter(pristine)
        return [offset if offset is not None and next(answers) else None for offset in offsets]

    def _offset_of_values(self, tensor: torch.Tensor) -> int | None:
        # The exact types: a subclass may give its bytes another meaning.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() == 0:
            return None
        if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return None
        return self.mapping.offset_of(tensor)


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's first element to the end of its last, 0 for an empty tensor."""
    return span_elements(tensor.shape, tensor.stride()) * tensor.element_size()


def load_mapped(path: str | os.PathLike[str], *, weights_only: bool | None = None) -> tuple[Any, MappedCheckpoint]:
    """Loads a checkpoint without reading its tensors.

    Args:
        path: A local file in the format of ``torch.save``.
        weights_only: Passed to ``torch.load`` exactly as given.

    Returns:
        The saved object, an ordinary one with ordinary CPU tensors that lie in the mapped file, and the mapping.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointFormatError: The file is truncated or damaged.
        UnmappableCheckpoint: The file is sound but cannot be mapped; ``torch.load`` reads it the ordinary way.
        InsufficientMemoryError: A single tensor is larger than this machine's memory.
        MemloadError: The whole file is, and torch is older than 2.7.
        pickle.UnpicklingError: ``weights_only`` forbids what the file holds; torch's own message.

    Peak memory: that of the object without its tensors.
    """
    if not FileMapping.supported:
        raise UnmappableCheckpoint(f"Mapping {os.fspath(path)} needs Linux.", path=os.fspath(path))
    if not is_zip(path):
        raise UnmappableCheckpoint(f"{os.fspath(path)} is not in torch's zip format.", path=os.fspath(path))
    file = LocalFile(path)
    try:
        index = read_index(file)
        mapping = FileMapping(file)
    except BaseException:
        file.close()
        raise
    handover: Any = _Handover(index, mapping)
    try:
        with _without_reading(index) as mmap:
            loaded = torch.load(path, map_location=handover, weights_only=weights_only, mmap=mmap)
    finally:
        # torch (2.13) keeps the map_location of a load that failed until the next load: not the file with it.
        handover.end()
    return loaded, MappedCheckpoint(index, mapping)


class _Handover:
    """A ``map_location`` that replaces each storage torch brings by the mapped one of the same record."""

    def __init__(self, index: Checkpoint, mapping: FileMapping) -> None:
        self._path = index.path
        self._mapping: FileMapping | None = mapping
        # torch asks once for each storage, in pickle order, but again and again for empty ones.
        self._expected: Iterator[StorageInfo] = iter(storage for storage in index.storages if storage.nbytes)

    def __call__(self, storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        if storage.nbytes() == 0:
            return torch.UntypedStorage(0)  # torch's own empty slice would keep torch's mapping alive
        info = next(self._expected, None)
        if self._mapping is None or info is None or info.nbytes != storage.nbytes():
            raise CheckpointFormatError(
                f"{self._path}: torch loads a storage of {storage.nbytes()} bytes where the index has {info}. The file "
                "changed while it was read, or holds objects that the index does not understand.",
                path=self._path,
            )
        return self._mapping.storage(info.offset, info.nbytes)

    def end(self) -> None:
        """Lets go of the mapping."""
        self._mapping = None


@contextlib.contextmanager
def _without_reading(index: Checkpoint) -> Iterator[bool]:
    """Within, ``torch.load`` reads no tensor data; the value is its ``mmap`` argument.

    A mapping by torch reserves memory for the whole file, which the kernel refuses beyond RAM and swap under its
    default overcommit. Larger files go through ``skip_data``, whose storages are allocated one at a time and never
    touched. (torch 2.13; an early prototype there, and torch 2.6 has it for saving only, hence not the first choice.)
    """
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if index.file_size < memory_bytes:
        yield True
        return
    try:
        with torch.serialization.skip_data():
            yield False
    except RuntimeError as error:
        if "skip_data" in str(error):
            raise MemloadError(
                f"{index.path} ({index.file_size} bytes) is larger than this machine's memory; torch "
                f"{torch.__version__} cannot open such a file. Use torch >= 2.7."
            ) from error
        if "allocate memory" in str(error):
            largest = max(storage.nbytes for storage in index.storages)
            raise InsufficientMemoryError(
                f"{index.path} holds a tensor of {largest} bytes, and this machine has {memory_bytes} bytes of memory: "
                "torch cannot make an object with such a tensor, although no byte of it would be read. "
                "open_checkpoint() tells what the file holds.",
                device="cpu",
                needed_bytes=largest,
                free_bytes=memory_bytes,
            ) from error
        raise
