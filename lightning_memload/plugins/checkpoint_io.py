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
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.checkpoint import (
    MappedCheckpoint,
    SafeGlobal,
    UnmappableCheckpoint,
    allow_globals,
    hub_advice,
    load_mapped,
)
from lightning_memload.errors import MemloadError
from lightning_memload.plugins.compat import TorchCheckpointIO, classes
from lightning_memload.plugins.saves import register
from lightning_memload.plugins.saving_io import Asynchronous, SaveFormat, SavingIO

__all__ = ["Allowance", "LoadObserver", "StreamingCheckpointIO"]


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a load may do beyond ``weights_only``.

    Attributes:
        safe_globals: Classes, functions or their names that ``weights_only`` allows for this load.
        erases: Load all else where it refuses others; ``MappedCheckpoint.refusal`` then tells.
    """

    safe_globals: Sequence[SafeGlobal] = ()
    erases: bool = False


class LoadObserver(Protocol):
    """Who is told when a checkpoint is loaded."""

    def on_load_start(self, path: str) -> str:
        """Called before anything is read.

        Returns:
            The path to load: this one, or another one in its place. On every rank the same.
        """
        ...

    def on_load_end(self, path: str, checkpoint: Any, mapped: MappedCheckpoint | None) -> bool | None:
        """Called with what Lightning is going to get; ``mapped`` is ``None`` if it was loaded the ordinary way.

        Returns:
            Whether this observer lets go of the mapped files.
        """
        ...


class StreamingCheckpointIO(SavingIO):
    """Loads local checkpoints of every known format as mapped files, everything else as Lightning does.

    Saves in bounded host memory.

    Files that cannot be mapped (the format of torch < 1.6, compressed, remote) are loaded the ordinary way, with one
    warning that says what it costs.

    Args:
        host_budget_mib: The most host memory, in MiB, for tensors on their way from a device to a file that is saved.
            At least 1.
        asynchronous: ``True``: a save of a local checkpoint returns when all of it is written and has its name, and
            does not wait for the disk. ``"until_step"``: nor for what only optimizers' steps change, see
            :meth:`save_checkpoint` for what you promise. Neither copies the model, as Lightning's
            ``AsyncCheckpointIO`` does.
        format: ``"torch"`` saves ordinary files, ``"directory"`` what ``save_directory`` writes, on local disks only:
            of storages that have not changed since the checkpoint that was saved or loaded before, such as those of
            frozen layers, the files are hard-linked instead of written. ``"safetensors+state"`` saves such directories
            with the weights in one ``model.safetensors``. All are loaded, whatever this says.

    Attributes:
        asynchronous: As given.
        format: As given.
        last_save: What the last save that ended in this process cost, ``None`` before the first.

    Raises:
        TypeError: The budget is no number.
        ValueError: The budget is below 1 MiB, or there is no such format or way to save asynchronously.

    Example:
        >>> trainer = L.Trainer(plugins=[AsyncCheckpointIO(StreamingCheckpointIO())])
    """

    def __init__(
        self, *, host_budget_mib: int = 128, asynchronous: Asynchronous = False, format: SaveFormat = "torch"
    ) -> None:
        super().__init__(host_budget_mib=host_budget_mib, asynchronous=asynchronous, format=format)
        self._observers: list[LoadObserver] = []
        self._allowances: list[Callable[[str], Allowance]] = []

    def observe(self, observer: LoadObserver) -> Callable[[], None]:
        """Registers who is told of every load.

        Args:
            observer: The observer.

        Returns:
            A function that removes it again; calling it twice is fine.
        """
        return register(self._observers, observer)

    def allow(self, allowance: Callable[[str], Allowance]) -> Callable[[], None]:
        """Registers who says what a load may do beyond ``weights_only``, asked with the path that is loaded.

        Returns:
            A function that removes it again; calling it twice is fine.
        """
        return register(self._allowances, allowance)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | Literal["stock"] | None = "stock",
    ) -> dict[str, Any]:
        """Loads a checkpoint.

        Args:
            path: Path or URL.
            map_location: As in ``torch.load``. Anything but the CPU means an ordinary load.
            weights_only: Passed to ``torch.load`` exactly as given. ``"stock"``: what Lightning's own plugin passes,
                ``None`` from 2.6 on, and ``False`` before.

        Returns:
            The checkpoint. Its tensors lie in the file: reading one maps its pages, writing to one copies them. What is
            still referred to when the checkpoint itself is let go of (Lightning does so before training starts)
            becomes ordinary memory, and so does all of it before another program changes the file in place. The latter
            needs a lease of Linux: on network file systems, and files of other users, such a change reaches tensors
            that are still in the file, and cutting it short ends the process. For this a ``dict`` comes as a kind of
            ``OrderedDict``.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointWriteError: A save in the background failed.
            CheckpointFormatError: The file is truncated or damaged, or it is a directory that cannot be mapped.
            pickle.UnpicklingError: ``weights_only`` forbids what the file holds.

        Peak memory: that of the checkpoint without its tensors.
        """
        self.teardown()
        if weights_only == "stock":
            # Only a Trainer of 2.5 gives no such argument, which it does not know.
            weights_only = None if all(map(_takes_weights_only, _stock())) else False
        for observer in self._observers:
            path = observer.on_load_start(str(path))
        filesystem, local_path = url_to_fs(str(path))
        if not filesystem.exists(local_path):
            advice = hub_advice(str(path))
            raise FileNotFoundError(f"Checkpoint file not found: {path}" + (f". {advice}" if advice else ""))
        allowances = [allowance(str(path)) for allowance in self._allowances]
        checkpoint: Any
        mapped: MappedCheckpoint | None = None
        with allow_globals([item for allowance in allowances for item in allowance.safe_globals]):
            try:
                if not _is_cpu(map_location):
                    raise UnmappableCheckpoint(f"map_location={map_location!r} moves the tensors.", path=str(path))
                if not isinstance(filesystem, LocalFileSystem):
                    raise UnmappableCheckpoint(f"{path} is not a local file.", path=str(path))
                erases = any(allowance.erases for allowance in allowances)
                checkpoint, mapped = load_mapped(local_path, weights_only=weights_only, erases=erases)
                self._before = local_path
            except UnmappableCheckpoint as reason:
                if filesystem.isdir(local_path):
                    raise  # there is no ordinary way: torch.load knows files only
                rank_zero_warn(
                    f"{reason} It is loaded the ordinary way: the whole checkpoint in host memory, on every rank."
                )
                checkpoint = self._load_ordinarily(path, map_location, weights_only)
        is_taken = [observer.on_load_end(str(path), checkpoint, mapped) for observer in self._observers]
        if mapped is not None and not any(is_taken):
            checkpoint = _detach_at_end(checkpoint, mapped)
        return checkpoint  # type: ignore[no-any-return]

    def _load_ordinarily(self, path: Any, map_location: Any, weights_only: bool | None) -> Any:
        stock = next((kind for kind in _stock() if _takes_weights_only(kind)), TorchCheckpointIO)
        options: dict[str, Any] = {"weights_only": weights_only} if _takes_weights_only(stock) else {}
        if map_location is not None:
            options["map_location"] = map_location
        with _without_mmap():
            return stock.load_checkpoint(self, path, **options)


def _stock() -> tuple[type[TorchCheckpointIO], ...]:
    """Lightning's own plugins: two, perhaps of two versions, where both of its packages are imported."""
    return classes("lightning.fabric.plugins.io.torch_io.TorchCheckpointIO")


def _takes_weights_only(stock: type[TorchCheckpointIO]) -> bool:
    """Whether a plugin has the argument, which Lightning 2.6 added."""
    return "weights_only" in inspect.signature(stock.load_checkpoint).parameters


class _Loaded(OrderedDict[Any, Any]):
    """A loaded checkpoint that lets go of its files when it is let go of itself.

    Copies and pickles of it are plain ``OrderedDict``, which is loaded everywhere, also with ``weights_only=True``.
    """

    __slots__ = ("mapped",)
    mapped: MappedCheckpoint | None

    def __del__(self) -> None:
        # Not at exit: what others' exit handlers read may lie in the files.
        if getattr(self, "mapped", None) is not None and not sys.is_finalizing():
            # What only this refers to goes first, and is not read.
            self.clear()
            _detach(self.mapped)

    def __reduce__(self) -> Any:
        return OrderedDict, (), vars(self) or None, None, iter(self.items())

    def copy(self) -> Any:
        return OrderedDict(self)


def _detach_at_end(checkpoint: Any, mapped: MappedCheckpoint) -> Any:
    """Lets go of the files when a loaded checkpoint is let go of, or somebody is about to change them.

    CheckpointIOs are told of no end of a restore (Lightning 2.5, 2.6).

    Returns:
        The checkpoint to hand out.
    """
    mapped.watch()
    if type(checkpoint) in (dict, OrderedDict):
        whole = _Loaded(checkpoint)
        vars(whole).update(getattr(checkpoint, "__dict__", {}))  # a state dict has its _metadata there
        whole.mapped = mapped
        return whole
    try:
        weakref.finalize(checkpoint, _detach, mapped).atexit = False
    except TypeError:
        mapped.detach()  # a list, say
    return checkpoint


def _detach(mapped: MappedCheckpoint | None) -> None:
    try:
        if mapped is not None:
            mapped.detach()
    except (MemloadError, OSError) as error:
        warnings.warn(f"{error} Tensors of the checkpoint that are still in use may be wrong.", stacklevel=2)


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
