"""Every error this package raises on purpose, in one tree.

Each class also derives the builtin it resembles, so that code written against plain Python or torch keeps
working. The values a caller may want to act on are fields of the exception, not only words in its message.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping

__all__ = [
    "CheckpointFormatError",
    "CheckpointReadError",
    "CheckpointWriteError",
    "ChecksumError",
    "IncompatibleWeightsError",
    "IncompleteCheckpointError",
    "InsufficientMemoryError",
    "MemloadError",
    "MetaTensorError",
    "OptimizerMismatchError",
    "UnsafeGlobalsError",
    "listed",
]


class MemloadError(Exception):
    """Base of all errors of lightning_memload."""


class CheckpointFormatError(MemloadError, ValueError):
    """The file is not a checkpoint that can be indexed: truncated, inconsistent, or of another format.

    Attributes:
        path: The file.
        intact_sibling: Another checkpoint in its directory that is intact, ``None`` if none is known.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path
        self.intact_sibling: str | None = None


class CheckpointReadError(MemloadError, OSError):
    """Reading a tensor's bytes failed or ended early.

    Attributes:
        path: The file.
        key: The tensor whose bytes were being read, ``None`` when no tensor is known.
        offset: Where in the file, in bytes.
        intact_sibling: Another checkpoint in its directory that is intact, ``None`` if none is known.
    """

    def __init__(self, message: str, *, path: str, key: str | None, offset: int, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.key = key
        self.offset = offset
        self.errno = errno
        self.intact_sibling: str | None = None


class ChecksumError(CheckpointReadError):
    """The bytes of a tensor do not have the CRC-32 that the file records for them.

    Attributes:
        expected: The CRC-32 in the file's directory.
        actual: The CRC-32 of the bytes that were read.
    """

    def __init__(self, message: str, *, path: str, key: str | None, offset: int, expected: int, actual: int) -> None:
        super().__init__(message, path=path, key=key, offset=offset)
        self.expected = expected
        self.actual = actual


class CheckpointWriteError(MemloadError, OSError):
    """Writing a checkpoint failed, or was refused for want of space. What was there before is untouched.

    Attributes:
        path: The file that was to be written.
        needed_bytes: The size it would have, ``None`` when it is not known.
        free_bytes: What is free on its file system, ``None`` when it is not known.
    """

    def __init__(
        self, message: str, *, path: str, needed_bytes: int | None, free_bytes: int | None, errno: int | None
    ) -> None:
        super().__init__(message)
        self.path = path
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.errno = errno


class IncompatibleWeightsError(MemloadError, RuntimeError):
    """The weights of a checkpoint do not fit the module.

    Attributes:
        path: The checkpoint.
        missing_keys: Keys of the module that the checkpoint lacks.
        unexpected_keys: Keys of the checkpoint that the module lacks.
        mismatched_shapes: For each key whose shapes differ, the shape on disk and the one in the module.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str,
        missing_keys: tuple[str, ...],
        unexpected_keys: tuple[str, ...],
        mismatched_shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        super().__init__(message)
        self.path = path
        self.missing_keys = missing_keys
        self.unexpected_keys = unexpected_keys
        self.mismatched_shapes = mismatched_shapes


class IncompleteCheckpointError(MemloadError, KeyError):
    """The checkpoint lacks a part that shall be restored.

    Attributes:
        path: The checkpoint.
        missing: The parts it lacks, as ``MemoryEfficientRestore(restore=...)`` names them.
    """

    def __init__(self, message: str, *, path: str, missing: tuple[str, ...]) -> None:
        super().__init__(message)
        self.path = path
        self.missing = missing

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows its repr


class InsufficientMemoryError(MemloadError, MemoryError):
    """The restore cannot fit, found before the first byte was moved.

    Attributes:
        device: Where the memory is short, for example ``"cpu"`` or ``"cuda:0"``.
        needed_bytes: What the restore would allocate there.
        free_bytes: What is free there.
    """

    def __init__(self, message: str, *, device: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(message)
        self.device = device
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class MetaTensorError(MemloadError, RuntimeError):
    """Tensors are still on the meta device where values are needed, and nothing can supply them.

    Attributes:
        names: The parameters and buffers concerned.
        module_class: The class that cannot be built under ``meta_init``, ``None`` where that is not the matter.
    """

    def __init__(self, message: str, *, names: tuple[str, ...], module_class: type | None = None) -> None:
        super().__init__(message)
        self.names = names
        self.module_class = module_class


class OptimizerMismatchError(MemloadError, ValueError):
    """A checkpoint that keeps optimizer states by name has other names than the optimizer's parameters.

    Attributes:
        missing: Parameters of the optimizer that the checkpoint has no place for.
        unexpected: Parameters of the checkpoint that the optimizer does not update.
    """

    def __init__(self, message: str, *, missing: tuple[str, ...], unexpected: tuple[str, ...]) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected


class UnsafeGlobalsError(MemloadError, pickle.UnpicklingError):
    """``weights_only`` refuses classes or functions that a checkpoint names. None of them was imported.

    Attributes:
        path: The checkpoint.
        places: The full name of each refused class, and where in the checkpoint the first object of it stands.
    """

    def __init__(self, message: str, *, path: str, places: Mapping[str, str]) -> None:
        super().__init__(message)
        self.path = path
        self.places = dict(places)


def listed(items: Iterable[object], *, separator: str = ", ", most: int = 10) -> str:
    """Items as messages list them: the first ones, and how many more there are."""
    shown = [str(item) for item in items]
    more = f"{separator}and {len(shown) - most} more" if len(shown) > most else ""
    return separator.join(shown[:most]) + more
