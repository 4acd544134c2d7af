"""Finds the tensors in which two checkpoints differ. Reads both files once, part by part, with several threads.

The formats of the checkpoints may differ. Weights are compared under the names that a module gives them, so
``state_dict.layer.weight`` of a ``.ckpt`` is ``layer.weight`` of a safetensors file. Objects that are no tensors are
not compared, and neither are checksums.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch

from lightning_memload.checkpoint import Checkpoint, TensorInfo
from lightning_memload.checkpoint.elements import ElementReader
from lightning_memload.checkpoint.index import format_path
from lightning_memload.collector import paused_collector
from lightning_memload.diff.values import TensorDiff, add_up, compare_values
from lightning_memload.errors import CheckpointFormatError, CheckpointReadError
from lightning_memload.formats import open_checkpoint
from lightning_memload.storage import FileSet
from lightning_memload.transfer.threads import check_num_threads, default_threads, run_threads

__all__ = ["DiffReport", "diff_checkpoints"]

# Elements that a thread reads and compares at a time.
_BLOCK_ELEMENTS = 128 << 10


@dataclass(frozen=True, slots=True)
class DiffReport:
    """The result of a comparison of two checkpoints.

    Attributes:
        first: Path of the first checkpoint.
        second: Path of the second checkpoint.
        num_compared: Number of tensors whose elements were compared.
        bytes_compared: Bytes of these tensors in each checkpoint.
        different: The tensors whose elements differ in value or in bits, in the order of the first checkpoint.
        only_in_first: Names of the tensors that the second checkpoint lacks.
        only_in_second: Names of the tensors that the first checkpoint lacks.
        shapes: For each tensor whose shapes differ: both shapes. Their elements are not compared.
        dtypes: For each other tensor whose dtypes differ: both dtypes. Their elements are not compared.
    """

    first: str
    second: str
    num_compared: int
    bytes_compared: int
    different: tuple[TensorDiff, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: Mapping[str, tuple[torch.dtype, torch.dtype]]

    @property
    def is_equal(self) -> bool:
        """Whether both checkpoints have the same tensors, bit for bit."""
        return not (self.different or self.only_in_first or self.only_in_second or self.shapes or self.dtypes)


def diff_checkpoints(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    optimizer: bool = False,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DiffReport:
    """Compares the weights of two checkpoints, and on demand the optimizer states.

    Args:
        first: A checkpoint of any format that ``open_checkpoint`` reads.
        second: Another one. Its format may be a different one.
        optimizer: Compare the tensors of the optimizers too.
        num_threads: Number of threads that read and compare. ``None`` means one per CPU, at most 4.
        progress: Called after every part with the bytes compared so far and all bytes, one call at a time.

    Returns:
        The differences. Equal values with different bits (0.0 and -0.0) are among them.

    Raises:
        FileNotFoundError: A path does not exist.
        CheckpointFormatError: A path is not a checkpoint, or has no such tensors, or a tensor repeats its elements to
            more bytes than the checkpoint has.
        CheckpointReadError: Reading failed, or a checkpoint was replaced meanwhile.
        ValueError: ``num_threads`` is below 1.

    Peak memory: both indexes, and some 16 MiB for each thread, for tensors of any size.
    """
    check_num_threads(num_threads)
    with paused_collector():
        indexes = [open_checkpoint(path) for path in (first, second)]
        tensors = [_by_name(index, optimizer=optimizer) for index in indexes]
    a, b = tensors
    common = [name for name in a if name in b]
    shapes = {name: (a[name].shape, b[name].shape) for name in common if a[name].shape != b[name].shape}
    same_shape = [name for name in common if name not in shapes]
    dtypes = {name: (a[name].dtype, b[name].dtype) for name in same_shape if a[name].dtype != b[name].dtype}
    names = [name for name in same_shape if name not in dtypes]
    for index, side in zip(indexes, tensors, strict=True):
        _refuse_expanded(index, [side[name] for name in names])
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(_open_files(index))) for index in indexes]
        pairs = {name: (ElementReader.of(a[name], sources[0]), ElementReader.of(b[name], sources[1])) for name in names}
        run = _DiffRun(pairs, progress)
        run_threads(run.work, num_threads or default_threads(torch.device("cpu")), run.stop)
    return DiffReport(
        first=indexes[0].path,
        second=indexes[1].path,
        num_compared=len(names),
        bytes_compared=run.total_bytes,
        different=tuple(found for name in names if (found := run.found[name]).num_different_bits),
        only_in_first=tuple(name for name in a if name not in b),
        only_in_second=tuple(name for name in b if name not in a),
        shapes=shapes,
        dtypes=dtypes,
    )


def _by_name(index: Checkpoint, *, optimizer: bool) -> dict[str, TensorInfo]:
    """The tensors to compare. Weights have the names that a module gives them."""
    found: dict[str, TensorInfo] = {}
    for group in index.sections:
        if group.name == "weights":
            keys = {tensor.path[:1] for tensor in group.tensors}
            skip = int(len(keys) == 1 and all(len(tensor.path) > 1 for tensor in group.tensors))
            found.update((format_path(tensor.path[skip:]), tensor) for tensor in group.tensors)
        elif optimizer and group.name.startswith("optimizer"):
            found.update((tensor.name, tensor) for tensor in group.tensors)
    if not found:
        raise CheckpointFormatError(f"{index.path} has no weights to compare.", path=index.path)
    return found


def _refuse_expanded(index: Checkpoint, tensors: Iterable[TensorInfo]) -> None:
    """Refuses tensors with more elements than the files can hold: views that repeat elements, of a hostile file."""
    for tensor in tensors:
        if tensor.nbytes > index.file_size:
            raise CheckpointFormatError(
                f"{index.path}: {tensor.name} repeats its elements to {tensor.nbytes} bytes, but the checkpoint has "
                f"only {index.file_size} bytes. It is not compared.",
                path=index.path,
            )


def _open_files(index: Checkpoint) -> FileSet:
    source = FileSet([span.path for span in index.files])
    if source.spans != index.files:
        source.close()
        raise CheckpointReadError(
            f"{index.path} was replaced while it was read. Compare again.", path=index.path, key=None, offset=0
        )
    return source


class _DiffRun:
    """The blocks of all pairs of tensors. Each thread takes the next one."""

    def __init__(
        self, pairs: Mapping[str, tuple[ElementReader, ElementReader]], progress: Callable[[int, int], None] | None
    ) -> None:
        self._pairs = pairs
        self._progress = progress
        self.found = {name: TensorDiff(name, 0) for name in pairs}
        self.total_bytes = sum(reader.numel * reader.dtype.itemsize for reader, _ in pairs.values())
        self._done_bytes = 0
        self._lock = threading.Lock()
        self._stopped = False
        self._blocks = self._cut()

    def _cut(self) -> Iterator[tuple[str, int, int]]:
        for name, (reader, _) in self._pairs.items():
            for start in range(0, reader.numel, _BLOCK_ELEMENTS):
                yield name, start, min(_BLOCK_ELEMENTS, reader.numel - start)

    def stop(self) -> None:
        self._stopped = True

    def work(self) -> None:
        while not self._stopped:
            with self._lock:
                block = next(self._blocks, None)
            if block is None:
                return
            name, start, count = block
            first, second = (reader.read(start, count) for reader in self._pairs[name])
            found = compare_values(name, first, second)
            with self._lock:
                self.found[name] = add_up(self.found[name], found)
                self._done_bytes += count * first.dtype.itemsize
                if self._progress is not None:
                    self._progress(self._done_bytes, self.total_bytes)
