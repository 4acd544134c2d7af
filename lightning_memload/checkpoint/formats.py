"""The formats that a checkpoint may have, behind one protocol and one registry.

A format is told by its content, never by a suffix. Each can do three things: index a checkpoint without reading tensor
data or running code from it, load it as an ordinary object whose tensors still lie in its files, and list all of its
bytes, sound or not, for whoever verifies them.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from lightning_memload.checkpoint.dcp import DcpDirectory
from lightning_memload.checkpoint.index import Checkpoint
from lightning_memload.checkpoint.inventory import Inventory
from lightning_memload.checkpoint.mapped import MappedCheckpoint, UnmappableCheckpoint
from lightning_memload.checkpoint.mapping import FileMapping
from lightning_memload.checkpoint.safetensors import Safetensors
from lightning_memload.checkpoint.tensor_directory import TensorDirectory
from lightning_memload.checkpoint.torch_zip import TorchZip
from lightning_memload.errors import CheckpointFormatError

__all__ = ["FORMATS", "CheckpointFormat", "find_format", "load_mapped", "open_checkpoint"]


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

    def load(self, path: str, *, weights_only: bool | None) -> tuple[Any, MappedCheckpoint]:
        """Loads a checkpoint that was recognised, without reading tensor data.

        Args:
            path: The checkpoint.
            weights_only: Passed to ``torch.load`` exactly as given where the format holds pickled objects.

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
            UnmappableCheckpoint: Its bytes are not there as they were checksummed: compressed.
            OSError: Reading failed.
        """
        ...


FORMATS: tuple[CheckpointFormat, ...] = (TorchZip(), Safetensors(), TensorDirectory(), DcpDirectory())


def find_format(path: str | os.PathLike[str]) -> CheckpointFormat:
    """The format of a checkpoint, by its content.

    Raises:
        FileNotFoundError: There is nothing at this path.
        CheckpointFormatError: It is a directory of no known format, or a file that ``torch.load`` does not know either.
        UnmappableCheckpoint: It is a file of no known format, which ``torch.load`` may know all the same.
    """
    name = os.fspath(path)
    os.stat(name)
    for candidate in FORMATS:
        if candidate.recognizes(name):
            return candidate
    known = ", ".join(candidate.name for candidate in FORMATS)
    if os.path.isdir(name):
        raise CheckpointFormatError(f"{name} is a directory, but no checkpoint of a known format ({known}).", path=name)
    if not _may_be_legacy(name):
        raise CheckpointFormatError(
            f"{name} ({os.path.getsize(name)} bytes) has none of the known formats ({known}), and does not start like "
            "a file of torch < 1.6 either: it is damaged, truncated, or no checkpoint at all.",
            path=name,
        )
    raise UnmappableCheckpoint(
        f"{name} has none of the known formats ({known}): either it is a file of torch < 1.6 or "
        "_use_new_zipfile_serialization=False, or no checkpoint at all. Load it with torch.load and save it again.",
        path=name,
    )


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
            ``.safetensors.index.json`` that lists them; a directory of ``save_directory`` or of
            ``torch.distributed.checkpoint``.

    Returns:
        The index.

    Raises:
        FileNotFoundError: There is nothing at this path.
        CheckpointFormatError: It is no such checkpoint, or it is truncated, damaged or not complete.
    """
    return find_format(path).read_index(os.fspath(path))


def load_mapped(path: str | os.PathLike[str], *, weights_only: bool | None = None) -> tuple[Any, MappedCheckpoint]:
    """Loads a checkpoint without reading its tensors.

    Args:
        path: A local checkpoint of any known format.
        weights_only: Passed to ``torch.load`` exactly as given.

    Returns:
        The saved object, an ordinary one with ordinary CPU tensors that lie in the mapped files, and the mapping.

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
    return find_format(path).load(os.fspath(path), weights_only=weights_only)
