"""A ``CheckpointIO`` that loads checkpoints without reading their tensors.

What Lightning gets is an ordinary dict of ordinary tensors that lie in the mapped file, so every hook of a user works
unchanged. On its own the plugin saves the memory of the loaded copy; together with ``MemoryEfficientRestore`` the
values are streamed. Saving is Lightning's.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_memload.checkpoint import MappedCheckpoint, UnmappableCheckpoint, load_mapped

__all__ = ["LoadObserver", "StreamingCheckpointIO"]

# Lightning 2.6 added the argument and passes None on to torch; Lightning 2.5 always loaded with False.
_STOCK_TAKES_WEIGHTS_ONLY = "weights_only" in inspect.signature(TorchCheckpointIO.load_checkpoint).parameters
_STOCK_WEIGHTS_ONLY = None if _STOCK_TAKES_WEIGHTS_ONLY else False


class LoadObserver(Protocol):
    """Who is told when a checkpoint is loaded."""

    def on_load_start(self, path: str) -> None:
        """Called before anything is read."""
        ...

    def on_load_end(self, path: str, checkpoint: Any, mapped: MappedCheckpoint | None) -> None:
        """Called with what Lightning is going to get; ``mapped`` is ``None`` if it was loaded the ordinary way."""
        ...


class StreamingCheckpointIO(TorchCheckpointIO):
    """Loads local checkpoints, files and distributed directories, without their tensors; all else as Lightning does.

    Files that cannot be mapped (the format of torch < 1.6, compressed, remote) are loaded the ordinary way, with one
    warning that says what it costs.

    Example:
        >>> trainer = L.Trainer(plugins=[AsyncCheckpointIO(StreamingCheckpointIO())])
    """

    def __init__(self) -> None:
        super().__init__()
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
            CheckpointFormatError: The file is truncated or damaged.
            pickle.UnpicklingError: ``weights_only`` forbids what the file holds.

        Peak memory: that of the checkpoint without its tensors.
        """
        filesystem, local_path = url_to_fs(str(path))
        if not filesystem.exists(local_path):
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        for observer in self._observers:
            observer.on_load_start(str(path))
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
                raise  # torch.load takes no directory
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
        return super().load_checkpoint(path, **options)


def _is_cpu(map_location: Any) -> bool:
    return map_location is None or (
        isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == "cpu"
    )
