"""Tensors on the pages of a checkpoint, for parameters that become pages of the file."""

from __future__ import annotations

import errno
from bisect import bisect_left

import torch

from lightning_memload.checkpoint import span_bytes
from lightning_memload.errors import DetachedError
from lightning_memload.storage import FileMapping, FileSet, FileWatch

__all__ = ["GivenPages"]


class GivenPages:
    """A second mapping of a checkpoint. Its tensors outlive the restore.

    Writing to a tensor of the loaded checkpoint does not change a tensor of this mapping. No two of its tensors share a
    byte.

    Args:
        source: The open files.
    """

    def __init__(self, source: FileSet) -> None:
        self._source = source
        self._watch: FileWatch | None = None
        self._mapping: FileMapping | None = None
        self._is_refused = False
        # Start and end of each range that was given, in order.
        self._given: list[tuple[int, int]] = []

    def watch(self) -> str | None:
        """Makes the tensors ordinary memory before another program changes a file. Call it before :meth:`give`.

        Returns:
            Why that is not possible, ``None`` if it is.
        """
        watch = FileWatch(self._source)
        refusal = watch.begin()
        if refusal is None:
            self._watch = watch
        return refusal

    def give(self, tensor: torch.Tensor, start: int) -> torch.Tensor | None:
        """Creates a tensor on the pages of the file.

        Args:
            tensor: A tensor with the wanted shape, dtype and strides.
            start: Offset of its first byte in the files.

        Returns:
            The tensor. ``None`` if another one has some of its bytes, or if the files cannot be mapped: they are being
            changed, or they are more than Linux maps for one process.

        Raises:
            OSError: The kernel refuses the mapping for another reason.
        """
        end = start + span_bytes(tensor)
        position = bisect_left(self._given, (start, end))
        neighbours = self._given[max(0, position - 1) : position + 1]
        if any(other_start < end and start < other_end for other_start, other_end in neighbours):
            return None
        if self._mapping is None and not self._is_refused:
            self._mapping = self._map()
        if self._mapping is None:
            return None
        try:
            storage = self._mapping.storage(start, end - start)
        except DetachedError:
            return None
        self._given.insert(position, (start, end))
        return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(storage, 0, tensor.shape, tensor.stride())

    def end(self) -> None:
        """Creates no further tensors. Mapping and watch end with the last tensor. A second call does nothing."""
        mapping, watch = self._mapping, self._watch
        self._mapping = self._watch = None
        self._is_refused = True
        if mapping is not None:
            mapping.leave_to_storages()
        elif watch is not None:
            watch.end()

    def _map(self) -> FileMapping | None:
        try:
            return FileMapping(self._source, self._watch)
        except DetachedError:
            pass
        except OSError as error:
            # A second mapping of tens of thousands of files is more than Linux gives a process. They are copied.
            if error.errno != errno.ENOMEM:
                raise
        self._is_refused = True
        return None
