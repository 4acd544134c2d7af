"""The formats that a checkpoint may have, behind one protocol and one registry.

A format is told by its content, never by a suffix. Each can do three things: index a checkpoint without reading tensor
data or running code from it, load it as an ordinary object whose tensors still lie in its files, and list all of its
bytes, sound or not, for whoever verifies them.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from lightning_memload.checkpoint.dcp import DcpDirectory
from lightning_memload.checkpoint.foreign import describe_directory, describe_file
from lightning_memload.checkpoint.index import Checkpoint
from lightning_memload.checkpoint.inventory import Inventory
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint
from lightning_memload.checkpoint.mapping import FileMapping
from lightning_memload.checkpoint.missing import require_exists
from lightning_memload.checkpoint.safetensors import Safetensors
from lightning_memload.checkpoint.tensor_directory import TensorDirectory
from lightning_memload.checkpoint.torch_shards import TorchShards
from lightning_memload.checkpoint.torch_zip import TorchZip
from lightning_memload.collector import paused_collector
from lightning_memload.errors import CheckpointFormatError

__all__ = [
    "FORMATS",
    "CheckpointFormat",
    "checkpoints_in",
    "find_format",
    "is_checkpoint",
    "load_mapped",
    "local_path",
    "open_checkpoint",
]

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


class CheckpointFormat(Protocol):
    """What one format can do. Three readings of the same bytes, so three methods; writing is no part of it."""

    @property
    def name(self) -> str:
        """What an index calls the format."""
        ...

    def recognizes(self, path: str) -> bool:
        """Whether an existing file or directory has this format, from its first bytes or the names in it.

        A damaged checkpoint of this format is recognised as well, so that the error can say what is wrong with it.
        """
        ...

    def read_index(self, path: str) -> Checkpoint:
        """Indexes a checkpoint that was recognised, without reading tensor data or running code from it.

        Raises:
            CheckpointFormatError: It is truncated or damaged. Found before anything is allocated for a tensor.
        """
        ...

    def load(self, path: str, *, weights_only: bool | None, erases: bool = False) -> tuple[Any, MappedCheckpoint]:
        """Loads a checkpoint that was recognised, without reading tensor data.

        Args:
            path: The checkpoint.
            weights_only: Passed to ``torch.load`` exactly as given where the format holds pickled objects.
            erases: Leave out what ``weights_only`` refuses instead of raising an error, see :func:`load_mapped`.

        Returns:
            The saved object with its tensors in the files, and the mapping under them.

        Raises:
            CheckpointFormatError: It is truncated or damaged.
            UnmappableCheckpoint: It is sound but its tensors cannot stay in the files.
        """
        ...

    def take_inventory(self, path: str) -> Inventory:
        """Lists what a checkpoint that was recognised consists of, and all that is wrong with it.

        Damage is no error here: it is in the inventory. No tensor data is read, no code from the files is run.

        Raises:
            CheckpointFormatError: It is sound, but no checkpoint: another kind of archive.
            UnmappableCheckpoint: Its bytes are not there as they were checksummed: compressed.
            OSError: Reading failed.
        """
        ...


FORMATS: tuple[CheckpointFormat, ...] = (TorchZip(), TorchShards(), Safetensors(), TensorDirectory(), DcpDirectory())


def local_path(path: str | os.PathLike[str]) -> str:
    """The path of a local file or directory, given as a path or as a ``file://`` URL.

    Raises:
        TypeError: It is no path: an open file, say.
        FileNotFoundError: It is the URL of another place.
    """
    try:
        name = os.fsdecode(os.fspath(path))
    except TypeError as error:
        advice = " Give its path, or save what it holds to a file." if hasattr(path, "read") else ""
        raise TypeError(
            f"A checkpoint is given by its path, a str or an os.PathLike, got a {type(path).__name__}.{advice}"
        ) from error
    if not _URL.match(name):
        return name
    parts = urlsplit(name)
    if parts.scheme.lower() in ("file", "local") and parts.netloc in ("", "localhost"):
        return unquote(parts.path)
    if os.path.lexists(name):
        return name
    raise FileNotFoundError(errno.ENOENT, "Not a local file; copy it to a local disk first", name)


def find_format(path: str | os.PathLike[str]) -> CheckpointFormat:
    """The format of a checkpoint, by its content.

    Raises:
        FileNotFoundError: There is nothing at this path.
        CheckpointFormatError: It is a directory of no known format, or a file that ``torch.load`` does not know either.
        UnmappableCheckpoint: It is a file of no known format, which ``torch.load`` may know all the same.
    """
    name = local_path(path)
    require_exists(name)
    candidate = _recognize(name)
    if candidate is not None:
        return candidate
    known = ", ".join(candidate.name for candidate in FORMATS)
    if os.path.isdir(name):
        found = describe_directory(name, lambda path: _recognize(path) is not None)
        raise CheckpointFormatError(
            f"{name} is a directory, but no checkpoint of a known format ({known}). {found}", path=name
        )
    if not os.path.isfile(name):
        raise CheckpointFormatError(f"{name} is no regular file, and so no checkpoint.", path=name)
    size = os.path.getsize(name)
    if _may_be_legacy(name):
        raise UnmappableCheckpoint(
            f"{name} has none of the known formats ({known}): either it is a file of torch < 1.6 or "
            "_use_new_zipfile_serialization=False, or no checkpoint at all. Load it with torch.load and save it again.",
            path=name,
        )
    found = describe_file(name) or f"It is damaged, or of another program: these are known: {known}."
    raise CheckpointFormatError(
        f"{name} ({size} bytes) is no checkpoint at all: it has none of the known formats. {found}", path=name
    )


def _recognize(name: str) -> CheckpointFormat | None:
    return next((candidate for candidate in FORMATS if candidate.recognizes(name)), None)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file or directory has a known format, sound or damaged. ``False`` also if it cannot be read."""
    name = os.fspath(path)
    try:
        # Opening a pipe waits for one who writes.
        looks = os.path.isdir(name) or os.path.isfile(name)
        return looks and _recognize(name) is not None
    except OSError:
        return False


def checkpoints_in(folder: str | os.PathLike[str]) -> list[str]:
    """The paths of the checkpoints in a directory, by their names, without hidden ones.

    Raises:
        OSError: It cannot be listed.
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return [path for path in (os.path.join(folder, name) for name in names) if is_checkpoint(path)]


def _may_be_legacy(name: str) -> bool:
    """Whether a file starts as one of torch < 1.6: with a pickle, of its magic number if it is old, or a tar."""
    if not os.path.isfile(name):
        return False
    with open(name, "rb") as file:
        start = file.read(512)
    return start.startswith((b"\x80", b"L119547037146038801333356")) or start[257:262] == b"ustar"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Indexes a checkpoint: names, shapes, dtypes, ties and the bytes of every tensor, without reading tensor data.

    Runs no code from the file, whoever made it. Works for files of any size, larger than the machine's memory too.

    Args:
        path: A checkpoint of any known format: a file of ``torch.save`` (torch >= 1.6), such as a Lightning ``.ckpt``
            or a bare state dict; a ``.safetensors`` file, a directory of such files, or the
            ``.safetensors.index.json`` that lists them, and the same with ``pytorch_model.bin``; a directory of
            ``save_directory`` or of ``torch.distributed.checkpoint``. A ``file://`` URL will do.

    Returns:
        The index.

    Raises:
        TypeError: It is no path.
        FileNotFoundError: There is nothing at this path.
        CheckpointFormatError: It is no such checkpoint, or it is truncated, damaged or not complete.
    """
    name = local_path(path)
    with paused_collector():
        return find_format(name).read_index(name)


def load_mapped(
    path: str | os.PathLike[str], *, weights_only: bool | None = None, erases: bool = False
) -> tuple[Any, MappedCheckpoint]:
    """Loads a checkpoint without reading its tensors.

    Args:
        path: A local checkpoint of any known format.
        weights_only: Passed to ``torch.load`` exactly as given.
        erases: If ``weights_only`` refuses classes of the checkpoint, load all else. Tuples that hold
            ``RefusedGlobal`` are then in the place of their objects, and the mapping's ``refusal`` is the error that
            would have been raised: for callers who need another part.

    Returns:
        The saved object, an ordinary one with ordinary CPU tensors that lie in the mapped files, and the mapping.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointFormatError: The file is truncated or damaged.
        UnmappableCheckpoint: The file is sound but cannot be mapped; ``torch.load`` reads it the ordinary way.
        InsufficientMemoryError: A single tensor is larger than this machine's memory.
        MemloadError: The whole file is, and torch is older than 2.7.
        UnsafeGlobalsError: ``weights_only`` forbids classes that the file names.
        pickle.UnpicklingError: ``weights_only`` forbids what the file holds for another reason; torch's own message.

    Peak memory: that of the object without its tensors.
    """
    if not FileMapping.supported:
        raise UnmappableCheckpoint(f"Mapping {path} needs Linux.", path=os.fspath(path))
    name = local_path(path)
    return find_format(name).load(name, weights_only=weights_only, erases=erases)
