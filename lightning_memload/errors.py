"""The hierarchy of all errors that this package raises on purpose.

Each class also derives the builtin error that it resembles, so code written for plain Python or torch keeps working.
Values that a caller may need are fields of the exception, and not only part of its message.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "ChangedMeanwhileError",
    "CheckpointFormatError",
    "CheckpointReadError",
    "CheckpointWriteError",
    "ChecksumError",
    "DetachedError",
    "IncompatibleWeightsError",
    "IncompleteCheckpointError",
    "InsufficientMemoryError",
    "MemloadError",
    "MetaTensorError",
    "OptimizerMismatchError",
    "UnmappableCheckpointError",
    "UnsafeGlobalsError",
    "UnstreamableError",
    "listed",
]


class MemloadError(Exception):
    """Base of all errors of lightning_memload. They can be pickled and copied, so they pass from process to process."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is built again from its positional arguments, and these constructors need keywords.
        fields = dict(vars(self))
        if isinstance(self, OSError):
            fields["errno"] = self.errno  # OSError keeps it outside of the instance's dict.
        return _build_again, (type(self), self.args), fields


def _build_again(kind: type[MemloadError], args: tuple[object, ...]) -> MemloadError:
    # With two base classes kind.__new__ may be that of the builtin error, which Python refuses to call here.
    base: Any = kind.__base__
    error: MemloadError = base.__new__(kind)
    error.args = args
    return error


class CheckpointFormatError(MemloadError, ValueError):
    """The file is not a checkpoint that can be indexed: it is truncated, inconsistent, or of an unknown format.

    Also raised if its pickle does not have the CRC-32 that the file records.

    Attributes:
        path: The file.
        intact_sibling: An intact checkpoint in the same directory, ``None`` if none is known.
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
        offset: The position in the file, in bytes.
        intact_sibling: An intact checkpoint in the same directory, ``None`` if none is known.
        rank: The rank that has read the bytes, if ranks share what they read, else ``None``. ``path`` is its file.
    """

    def __init__(self, message: str, *, path: str, key: str | None, offset: int, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.key = key
        self.offset = offset
        self.errno = errno
        self.intact_sibling: str | None = None
        self.rank: int | None = None


class ChecksumError(CheckpointReadError):
    """The CRC-32 of a tensor's bytes differs from the one that the file records.

    Attributes:
        expected: The CRC-32 recorded in the file.
        actual: The CRC-32 of the bytes that were read.
    """

    def __init__(self, message: str, *, path: str, key: str | None, offset: int, expected: int, actual: int) -> None:
        super().__init__(message, path=path, key=key, offset=offset)
        self.expected = expected
        self.actual = actual


class CheckpointWriteError(MemloadError, OSError):
    """Writing a checkpoint failed, or there is not enough space for it. A previous checkpoint there is unchanged.

    Attributes:
        path: The file that was to be written.
        needed_bytes: The size of the new checkpoint, ``None`` if it is unknown.
        free_bytes: The free space of the file system, ``None`` if it is unknown.
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
        mismatched_shapes: For each key whose shapes differ: the shape on disk and the shape in the module.
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
    """The checkpoint lacks a part that is to be restored.

    Attributes:
        path: The checkpoint.
        missing: The missing parts, named as in ``MemoryEfficientRestore(restore=...)``.
    """

    def __init__(self, message: str, *, path: str, missing: tuple[str, ...]) -> None:
        super().__init__(message)
        self.path = path
        self.missing = missing

    def __str__(self) -> str:
        return str(self.args[0])  # str() of a KeyError is the repr of its message.


class InsufficientMemoryError(MemloadError, MemoryError):
    """The restore needs more memory than is free. Raised before the first byte is moved.

    Attributes:
        device: The device that lacks memory, for example ``"cpu"`` or ``"cuda:0"``.
        needed_bytes: The memory that the restore would allocate there.
        free_bytes: The memory that is free there.
    """

    def __init__(self, message: str, *, device: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(message)
        self.device = device
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class MetaTensorError(MemloadError, RuntimeError):
    """Tensors that need values are still on the meta device, and no source has values for them.

    Attributes:
        names: The names of these parameters and buffers.
        module_class: The class that cannot be built under ``meta_init``, ``None`` if the cause is another one.
    """

    def __init__(self, message: str, *, names: tuple[str, ...], module_class: type | None = None) -> None:
        super().__init__(message)
        self.names = names
        self.module_class = module_class


class OptimizerMismatchError(MemloadError, ValueError):
    """A checkpoint stores optimizer states by name, and its names are not those of the optimizer's parameters.

    Attributes:
        missing: Parameters of the optimizer that the checkpoint lacks.
        unexpected: Parameters of the checkpoint that the optimizer lacks.
    """

    def __init__(self, message: str, *, missing: tuple[str, ...], unexpected: tuple[str, ...]) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected


class UnsafeGlobalsError(MemloadError, pickle.UnpicklingError):
    """``weights_only`` refuses classes or functions of a checkpoint. None of them has been imported.

    Attributes:
        path: The checkpoint.
        places: The full name of each refused class or function, and the place of its first object in the checkpoint.
    """

    def __init__(self, message: str, *, path: str, places: Mapping[str, str]) -> None:
        super().__init__(message)
        self.path = path
        self.places = dict(places)


class UnmappableCheckpointError(MemloadError, ValueError):
    """The checkpoint is sound, but the file does not hold its tensors in usable form: compressed or byte-swapped.

    It is no :class:`CheckpointFormatError`, because nothing is damaged.

    Attributes:
        path: The file.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class DetachedError(RuntimeError):
    """The mapping has already released the file."""


class ChangedMeanwhileError(CheckpointWriteError):
    """A tensor was modified outside an optimizer's step before it was written, so nothing was published."""


class UnstreamableError(NotImplementedError):
    """The object holds a storage whose bytes cannot be read from memory. Only ``torch.save`` can save it."""


def listed(items: Iterable[object], *, separator: str = ", ", most: int = 10) -> str:
    """Return items as a list for a message: the first ``most`` of them and the number of the others."""
    shown = [str(item) for item in items]
    more = f"{separator}and {len(shown) - most} more" if len(shown) > most else ""
    return separator.join(shown[:most]) + more
