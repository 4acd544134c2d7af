"""The registry of checkpoint formats, and the protocol that each format implements.

A format is recognised by content, never by a suffix. Each format does four things: it recognises a checkpoint; it
indexes it without reading tensor data or running code from it; it loads it as an ordinary object whose tensors stay in
the files; and it lists all records and all damage for verification.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from lightning_memload.checkpoint.foreign import describe_directory, describe_file
from lightning_memload.checkpoint.index import Checkpoint
from lightning_memload.checkpoint.inventory import Inventory
from lightning_memload.checkpoint.mapped import MappedCheckpoint
from lightning_memload.checkpoint.missing import require_exists
from lightning_memload.collector import paused_collector
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError
from lightning_memload.formats.dcp.reader import DcpDirectory
from lightning_memload.formats.safetensors.reader import Safetensors
from lightning_memload.formats.tensor_directory.reader import TensorDirectory
from lightning_memload.formats.torch_zip.reader import TorchZip
from lightning_memload.formats.torch_zip.shards import TorchShards
from lightning_memload.storage.file_mapping import FileMapping
from lightning_memload.storage.options import use_storage_options
from lightning_memload.storage.places import is_file, is_folder, names_in, path_of, read_start, size_of

__all__ = [
    "FORMATS",
    "CheckpointFormat",
    "checkpoints_in",
    "find_format",
    "is_checkpoint",
    "load_mapped",
    "open_checkpoint",
]


class CheckpointFormat(Protocol):
    """One format: a name and four methods. One recognises a checkpoint, three read it. Writing is not part of it."""

    @property
    def name(self) -> str:
        """The name of the format in an index."""
        ...

    def recognizes(self, path: str) -> bool:
        """Whether an existing file or directory has this format, judged by its first bytes or the names in it.

        ``True`` for a damaged checkpoint of this format too, so that the error can describe the damage.
        """
        ...

    def read_index(self, path: str) -> Checkpoint:
        """Indexes a recognised checkpoint, without reading tensor data or running code from it.

        Raises:
            CheckpointFormatError: It is truncated or damaged. Raised before memory is allocated for any tensor.
        """
        ...

    def load(self, path: str, *, weights_only: bool | None, erases: bool = False) -> tuple[Any, MappedCheckpoint]:
        """Loads a recognised checkpoint, without reading tensor data.

        Args:
            path: The checkpoint.
            weights_only: Passed to ``torch.load`` unchanged if the format holds pickled objects.
            erases: Replace objects that ``weights_only`` refuses instead of raising, see :func:`load_mapped`.

        Returns:
            The saved object with its tensors in the files, and the mapping of the files.

        Raises:
            CheckpointFormatError: It is truncated or damaged.
            UnmappableCheckpointError: It is sound but its tensors cannot stay in the files.
        """
        ...

    def take_inventory(self, path: str) -> Inventory:
        """Lists the records and the damage of a recognised checkpoint.

        Damage is returned in the inventory, not raised. No tensor data is read, and no code from the files runs.

        Raises:
            CheckpointFormatError: It is a sound archive of another kind, not a checkpoint.
            UnmappableCheckpointError: It is compressed, so its bytes cannot be verified in place.
            OSError: Reading failed.
        """
        ...


# The first that recognises a checkpoint has it: a directory of ours may hold safetensors files, and one of
# safetensors files the same weights as files of torch.save.
FORMATS: tuple[CheckpointFormat, ...] = (TorchZip(), TensorDirectory(), TorchShards(), Safetensors(), DcpDirectory())


def find_format(path: str | os.PathLike[str]) -> CheckpointFormat:
    """The format of a checkpoint, recognised by its content.

    Raises:
        FileNotFoundError: The path does not exist.
        CheckpointFormatError: It is a directory of no known format, or a file that ``torch.load`` cannot read either.
        UnmappableCheckpointError: It is a file of no known format that ``torch.load`` may be able to read.
    """
    name = path_of(path)
    require_exists(name)
    candidate = _recognize(name)
    if candidate is not None:
        return candidate
    known = ", ".join(candidate.name for candidate in FORMATS)
    if is_folder(name):
        found = describe_directory(name, lambda path: _recognize(path) is not None)
        raise CheckpointFormatError(
            f"{name} is a directory, but no checkpoint of a known format ({known}). {found}", path=name
        )
    if not is_file(name):
        raise CheckpointFormatError(f"{name} is no regular file, and so no checkpoint.", path=name)
    size = size_of(name)
    if _may_be_legacy(name):
        raise UnmappableCheckpointError(
            f"{name} has none of the known formats ({known}): either it is a file of torch < 1.6 or "
            "_use_new_zipfile_serialization=False, or no checkpoint at all. Load it with torch.load and save it again.",
            path=name,
        )
    found = describe_file(name) or f"It is damaged, or of another program. Known formats: {known}."
    raise CheckpointFormatError(
        f"{name} ({size} bytes) is no checkpoint at all: it has none of the known formats. {found}", path=name
    )


def _recognize(name: str) -> CheckpointFormat | None:
    return next((candidate for candidate in FORMATS if candidate.recognizes(name)), None)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file or directory has a known format, even if it is damaged. ``False`` if it cannot be read."""
    name = os.fspath(path)
    try:
        # Pipes are skipped: opening one blocks until a process writes to it.
        looks = is_folder(name) or is_file(name)
        return looks and _recognize(name) is not None
    except OSError:
        return False


def checkpoints_in(folder: str | os.PathLike[str]) -> list[str]:
    """The paths of the checkpoints in a directory, sorted by name, without hidden ones.

    Raises:
        OSError: It cannot be listed.
    """
    names = sorted(name for name in names_in(os.fspath(folder)) if not name.startswith("."))
    return [path for path in (os.path.join(folder, name) for name in names) if is_checkpoint(path)]


def _may_be_legacy(name: str) -> bool:
    """Whether a file starts like one of torch < 1.6: a pickle (of torch's magic number if very old), or a tar."""
    if not is_file(name):
        return False
    start = read_start(name, 512)
    return start.startswith((b"\x80", b"L119547037146038801333356")) or start[257:262] == b"ustar"


def open_checkpoint(path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> Checkpoint:
    """Indexes a checkpoint: name, shape, dtype, ties and byte range of every tensor. Reads no tensor data.

    Runs no code from the file, so it is safe for files of unknown origin. The file may be larger than the memory.

    Args:
        path: A checkpoint of any known format: a file of ``torch.save`` (torch >= 1.6), such as a Lightning ``.ckpt``
            or a bare state dict; a ``.safetensors`` file, a directory of such files, or the
            ``.safetensors.index.json`` that lists them, and the same with ``pytorch_model.bin``; a directory of
            ``save_directory`` or of ``torch.distributed.checkpoint``. Or a URL of one: in a bucket,
            behind a web server, at any place that fsspec knows, or ``file://``.
        storage_options: For a remote path: keyword arguments of ``obstore.store.from_url`` (``s3://``, ``gs://``,
            ``az://``, ``http(s)://``), or of the fsspec file system of any other scheme. ``None``: the library finds
            credentials, region and endpoint itself, as its documentation says.

    Returns:
        The index.

    Raises:
        TypeError: ``path`` is not a path.
        FileNotFoundError: The path does not exist.
        CheckpointFormatError: It is not such a checkpoint, or it is truncated, damaged or incomplete.
        UnmappableCheckpointError: It is sound, but compressed, byte-swapped, or of torch < 1.6.
    """
    with use_storage_options(storage_options), paused_collector():
        name = path_of(path)
        return find_format(name).read_index(name)


def load_mapped(
    path: str | os.PathLike[str], *, weights_only: bool | None = None, erases: bool = False
) -> tuple[Any, MappedCheckpoint]:
    """Loads a checkpoint without reading its tensors.

    Args:
        path: A checkpoint of any known format, on the local disk or at another known place.
        weights_only: Passed to ``torch.load`` unchanged.
        erases: If ``weights_only`` refuses classes of the checkpoint, load everything else. Refused objects are
            replaced by tuples that hold ``RefusedGlobal``, and the mapping's ``refusal`` is the error that would
            have been raised. For callers that need other parts of the checkpoint.

    Returns:
        The saved object with ordinary CPU tensors in the mapped files, and the mapping.

    Raises:
        FileNotFoundError: The path does not exist.
        CheckpointFormatError: The file is truncated or damaged.
        UnmappableCheckpointError: The file is sound but cannot be mapped. ``torch.load`` can read it.
        InsufficientMemoryError: A single tensor is larger than this machine's memory.
        MemloadError: The whole file is larger than this machine's memory, and torch is older than 2.7.
        UnsafeGlobalsError: ``weights_only`` refuses classes that the file names.
        pickle.UnpicklingError: ``weights_only`` refuses the file for another reason. The message is torch's.

    Peak memory: the object without its tensors.
    """
    if not FileMapping.supported:
        raise UnmappableCheckpointError(f"Mapping {path} needs Linux.", path=os.fspath(path))
    name = path_of(path)
    return find_format(name).load(name, weights_only=weights_only, erases=erases)
