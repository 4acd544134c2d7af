"""A ``CheckpointIO`` that loads checkpoints without reading their tensors, and saves them without a copy of them.

What Lightning gets is an ordinary dict of ordinary tensors that lie in the mapped file, so every hook of a user works
unchanged. On its own the plugin saves the memory of the loaded copy; together with ``MemoryEfficientRestore`` the
values are streamed. What it saves is the file that Lightning would save.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_memload.checkpoint import MappedCheckpoint, UnmappableCheckpoint, load_mapped
from lightning_memload.save import SaveStats, save_torch, write_torch

__all__ = ["LoadObserver", "StreamingCheckpointIO"]

# Lightning 2.6 added the argument and passes None on to torch; Lightning 2.5 always loaded with False.
_STOCK_TAKES_WEIGHTS_ONLY = "weights_only" in inspect.signature(TorchCheckpointIO.load_checkpoint).parameters
_STOCK_WEIGHTS_ONLY = None if _STOCK_TAKES_WEIGHTS_ONLY else False


class LoadObserver(Protocol):
    """Who is told when a checkpoint is loaded."""

    def on_load_start(self, path: str) -> str:
        """Called before anything is read.

        Returns:
            The path to load: this one, or another one in its place. On every rank the same.
        """
        ...

    def on_load_end(self, path: str, checkpoint: Any, mapped: MappedCheckpoint | None) -> None:
        """Called with what Lightning is going to get; ``mapped`` is ``None`` if it was loaded the ordinary way."""
        ...


class StreamingCheckpointIO(TorchCheckpointIO):
    """Loads local checkpoints of every known format as mapped files, everything else as Lightning does.

    Saves in bounded host memory.

    Files that cannot be mapped (the format of torch < 1.6, compressed, remote) are loaded the ordinary way, with one
    warning that says what it costs.

    Args:
        host_budget_mib: The most host memory, in MiB, for tensors on their way from a device to a file that is saved.
            At least 1.

    Attributes:
        last_save: What the last save of this process cost, ``None`` before the first.

    Raises:
        ValueError: The budget is below 1 MiB.

    Example:
        >>> trainer = L.Trainer(plugins=[AsyncCheckpointIO(StreamingCheckpointIO())])
    """

    def __init__(self, *, host_budget_mib: int = 128) -> None:
        super().__init__()
        if host_budget_mib < 1:
            raise ValueError(f"host_budget_mib must be at least 1, got {host_budget_mib}.")
        self.last_save: SaveStats | None = None
        self._host_budget_bytes = host_budget_mib << 20
        self._observers: list[LoadObserver] = []

    def observe(self, observer: LoadObserver) -> Callable[[], None]:
        """Registers who is told of every load.

        Args:
            observer: The observer.

        Returns:
            A function that removes it again; calling it twice is fine.
        """
        self._observers.append(observer)

        def remove() -> None:
            if observer in self._observers:
                self._observers.remove(observer)

        return remove

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves a checkpoint: a local file is replaced in one step when all of it is on the disk.

        A remote file is written in order, through fsspec, in a transaction of the file system as Lightning does it.

        Args:
            checkpoint: What to save.
            path: Path or URL. Missing directories are made.
            storage_options: Must be ``None``, as with Lightning's own plugin.

        Raises:
            TypeError: ``storage_options`` were given.
            CheckpointWriteError: There is not enough space, or writing failed; what was there before is untouched.
            Exception: Whatever pickling the checkpoint, or a remote file system, raises.

        Peak memory: ``host_budget_mib`` if tensors are on devices, and the pickle, which holds no tensors; for a remote
        file also what its file system buffers.
        """
        if storage_options is not None or sys.platform != "linux":
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        filesystem, target = url_to_fs(str(path))
        filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(filesystem, LocalFileSystem):
            self.last_save = save_torch(checkpoint, target, host_budget_bytes=self._host_budget_bytes)
            return
        with filesystem.transaction, filesystem.open(target, "wb") as file:
            self.last_save = write_torch(checkpoint, file, name=str(path), host_budget_bytes=self._host_budget_bytes)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = _STOCK_WEIGHTS_ONLY,
    ) -> dict[str, Any]:
        """Loads a checkpoint.

        Args:
            path: Path or URL.
            map_location: As in ``torch.load``. Anything but the CPU means an ordinary load.
            weights_only: Passed to ``torch.load`` exactly as given.

        Returns:
            The checkpoint. Its tensors lie in the file: reading one maps its pages, writing to one copies them.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointFormatError: The file is truncated or damaged, or it is a directory that cannot be mapped.
            pickle.UnpicklingError: ``weights_only`` forbids what the file holds.

        Peak memory: that of the checkpoint without its tensors.
        """
        filesystem, local_path = url_to_fs(str(path))
        if not filesystem.exists(local_path):
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        for observer in self._observers:
            chosen = observer.on_load_start(str(path))
            if chosen != str(path):
                path = chosen
                filesystem, local_path = url_to_fs(chosen)
        checkpoint: Any
        mapped: MappedCheckpoint | None = None
        try:
            if not _is_cpu(map_location):
                raise UnmappableCheckpoint(f"map_location={map_location!r} moves the tensors.", path=str(path))
            if not isinstance(filesystem, LocalFileSystem):
                raise UnmappableCheckpoint(f"{path} is not a local file.", path=str(path))
            checkpoint, mapped = load_mapped(local_path, weights_only=weights_only)
        except UnmappableCheckpoint as reason:
            if filesystem.isdir(local_path):
                raise  # there is no ordinary way: torch.load knows files only
            rank_zero_warn(
                f"{reason} It is loaded the ordinary way: the whole checkpoint in host memory, on every rank."
            )
            checkpoint = self._load_ordinarily(path, map_location, weights_only)
        for observer in self._observers:
            observer.on_load_end(str(path), checkpoint, mapped)
        return checkpoint  # type: ignore[no-any-return]

    def _load_ordinarily(self, path: Any, map_location: Any, weights_only: bool | None) -> Any:
        options: dict[str, Any] = {"weights_only": weights_only} if _STOCK_TAKES_WEIGHTS_ONLY else {}
        if map_location is not None:
            options["map_location"] = map_location
        with _without_mmap():
            return super().load_checkpoint(path, **options)


def _without_mmap() -> contextlib.AbstractContextManager[Any]:
    """Within, ``torch.load`` takes open files, whatever ``torch.utils.serialization.config.load.mmap`` says.

    Lightning (2.6) passes open files, and torch cannot map them.
    """
    settings = sys.modules.get("torch.utils.serialization")  # torch >= 2.7; nobody can have set what is not imported
    return settings.config.patch("load.mmap", False) if settings is not None else contextlib.nullcontext()


def _is_cpu(map_location: Any) -> bool:
    return map_location is None or (
        isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == "cpu"
    )
