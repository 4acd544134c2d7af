"""A ``CheckpointIO`` that loads checkpoints without reading their tensors, and saves them without copying the tensors.

Lightning receives an ordinary dict of ordinary tensors in the mapped file, so every hook of a user works unchanged. On
its own the plugin avoids the memory of the loaded copy. Together with ``MemoryEfficientRestore`` the values are
streamed. A saved file is the same as Lightning's.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.checkpoint import MappedCheckpoint, hub_advice
from lightning_memload.errors import MemloadError, UnmappableCheckpointError
from lightning_memload.formats import explain_torch_refusal, load_mapped
from lightning_memload.pickles import SafeGlobal, allow_globals
from lightning_memload.plugins.choices import SnapshotSize
from lightning_memload.plugins.compat import TorchCheckpointIO, classes
from lightning_memload.plugins.save_log import register
from lightning_memload.plugins.saving_io import Asynchronous, SaveFormat, SavingIO
from lightning_memload.storage.options import use_storage_options
from lightning_memload.storage.places import identity_of, is_folder, is_local
from lightning_memload.storage.stream import path_or_stream

__all__ = ["Allowance", "LoadObserver", "StreamingCheckpointIO"]


@dataclass(frozen=True, slots=True)
class Allowance:
    """Exceptions from ``weights_only`` for one load.

    Attributes:
        safe_globals: Classes, functions or their names that ``weights_only`` allows for this load.
        erases: Load the rest of the checkpoint if ``weights_only`` refuses objects in it.
            ``MappedCheckpoint.refusal`` is then the error.
    """

    safe_globals: Sequence[SafeGlobal] = ()
    erases: bool = False


class LoadObserver(Protocol):
    """An object that is called before and after each load of a checkpoint."""

    def on_load_start(self, path: str) -> str:
        """Called before anything is read.

        Returns:
            The path to load: this one, or another one instead. It is the same on every rank.
        """
        ...

    def on_load_end(self, path: str, checkpoint: Any, mapped: MappedCheckpoint | None) -> bool | None:
        """Called before Lightning receives the checkpoint. ``mapped`` is ``None`` if Lightning's own plugin loaded it.

        Returns:
            Whether this observer releases the mapped files.
        """
        ...


class StreamingCheckpointIO(SavingIO):
    """Loads checkpoints of every known format without reading their tensors, and saves with bounded host memory.

    Local checkpoints are mapped. Tensors at a URL are read when they are used, and streamed by
    ``MemoryEfficientRestore``. Lightning's own plugin loads files that can be neither mapped nor read in parts (the
    format of torch < 1.6, compressed). One warning then names the memory that this takes.

    Args:
        host_budget_mib: The most host memory, in MiB, that a save takes to copy tensors from a device. At least 1.
        asynchronous: ``True``: a save of a local checkpoint returns when all of it is written and has its name, without
            waiting for the disk. ``"until_step"``: in addition, it does not wait until tensors are written that only
            optimizer steps change, see :meth:`save_checkpoint` for the conditions. Neither copies the model, unlike
            Lightning's ``AsyncCheckpointIO``.
        snapshot: ``"auto"``, or a size in bytes or such as ``"8GiB"``: copy the state of a save into free host memory,
            and write it from there, see :meth:`save_checkpoint`. A size limits all snapshots together. Needs
            ``asynchronous``.
        format: ``"torch"`` saves ordinary files. ``"directory"`` saves the directories of ``save_directory``, on local
            disks only. Files of storages that have not changed since the last saved or loaded checkpoint, such as
            those of frozen layers, are hard-linked instead of written. ``"safetensors+state"`` saves such directories
            with the weights in one ``model.safetensors``. Loading accepts every format.
        storage_options: For checkpoints at a URL that are loaded, see ``open_checkpoint``.

    Attributes:
        asynchronous: The argument.
        snapshot: The argument.
        format: The argument.
        last_save: The figures of the last save that ended in this process, ``None`` before the first.

    Raises:
        TypeError: The budget is not a number.
        ValueError: The budget is below 1 MiB, or ``asynchronous``, ``snapshot`` or ``format`` is not one of the values
            above.

    Example:
        >>> trainer = L.Trainer(plugins=[AsyncCheckpointIO(StreamingCheckpointIO())])
    """

    def __init__(
        self,
        *,
        host_budget_mib: int = 128,
        asynchronous: Asynchronous = False,
        snapshot: SnapshotSize = False,
        format: SaveFormat = "torch",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.storage_options = storage_options
        super().__init__(host_budget_mib=host_budget_mib, asynchronous=asynchronous, format=format, snapshot=snapshot)
        self._observers: list[LoadObserver] = []
        self._allowances: list[Callable[[str], Allowance]] = []

    def observe(self, observer: LoadObserver) -> Callable[[], None]:
        """Registers an observer of every load.

        Args:
            observer: The observer.

        Returns:
            A function that removes the observer. A second call does nothing.
        """
        return register(self._observers, observer)

    def allow(self, allowance: Callable[[str], Allowance]) -> Callable[[], None]:
        """Registers a function that returns the exceptions from ``weights_only`` for a path that is loaded.

        Returns:
            A function that removes it. A second call does nothing.
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
            map_location: As in ``torch.load``. With another location than the CPU, Lightning's plugin loads the file.
            weights_only: Passed to ``torch.load`` exactly as given. ``"stock"``: the value of Lightning's own plugin,
                ``None`` from 2.6 on, and ``False`` before.

        Returns:
            The checkpoint. Its tensors are in the mapped file: reading a tensor maps its pages, writing to it copies
            them. When the checkpoint is deleted (Lightning does so before training starts), tensors that are still in
            use become ordinary memory. All tensors become ordinary memory before another program changes the file in
            place. This needs a lease of Linux, which network file systems and files of other users do not have. There,
            such a change alters tensors in the file, and truncating the file ends the process. To notice the deletion,
            a ``dict`` is returned as a subclass of ``OrderedDict``.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointWriteError: A save in the background failed.
            CheckpointFormatError: The file is truncated or damaged, or it is a directory that cannot be mapped.
            pickle.UnpicklingError: ``weights_only`` refuses objects in the file.

        Peak memory: the checkpoint without its tensors.
        """
        with use_storage_options(self.storage_options):
            return self._load_checkpoint(path, map_location, weights_only)

    def _load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any, weights_only: bool | Literal["stock"] | None
    ) -> dict[str, Any]:
        self.teardown()
        if weights_only == "stock":
            # A Trainer of Lightning 2.5 does not pass this argument, which that version does not have.
            weights_only = None if all(map(_takes_weights_only, _stock())) else False
        for observer in self._observers:
            path = observer.on_load_start(str(path))
        _require_file(str(path))
        allowances = [allowance(str(path)) for allowance in self._allowances]
        with allow_globals([item for allowance in allowances for item in allowance.safe_globals]):
            erases = any(allowance.erases for allowance in allowances)
            checkpoint, mapped = self._load(path, map_location, weights_only, erases=erases)
        is_taken = [observer.on_load_end(str(path), checkpoint, mapped) for observer in self._observers]
        if mapped is not None and not any(is_taken):
            checkpoint = _detach_at_end(checkpoint, mapped)
        return checkpoint  # type: ignore[no-any-return]

    def _load(
        self, path: str | os.PathLike[str], map_location: Any, weights_only: bool | None, *, erases: bool
    ) -> tuple[Any, MappedCheckpoint | None]:
        """Maps a checkpoint, or loads it as Lightning does if it cannot be mapped. There is no mapping then."""
        name = str(path)
        if is_local(name):
            filesystem, local_path = url_to_fs(name)
            is_readable, is_directory = isinstance(filesystem, LocalFileSystem), filesystem.isdir
        else:
            local_path, is_readable, is_directory = name, True, is_folder
        try:
            if not _is_cpu(map_location):
                raise UnmappableCheckpointError(f"map_location={map_location!r} moves the tensors.", path=name)
            if not is_readable:
                raise UnmappableCheckpointError(f"{path} is not a local file.", path=name)
            checkpoint, mapped = load_mapped(local_path, weights_only=weights_only, erases=erases)
            self._before = local_path if is_local(name) else None
        except UnmappableCheckpointError as reason:
            if is_directory(local_path):
                raise  # torch.load cannot load a directory.
            rank_zero_warn(
                f"{reason} It is loaded the ordinary way: the whole checkpoint in host memory, on every rank."
            )
            return self._load_ordinarily(path, map_location, weights_only), None
        return checkpoint, mapped

    def _load_ordinarily(self, path: Any, map_location: Any, weights_only: bool | None) -> Any:
        stock = next((kind for kind in _stock() if _takes_weights_only(kind)), TorchCheckpointIO)
        options: dict[str, Any] = {"weights_only": weights_only} if _takes_weights_only(stock) else {}
        if map_location is not None:
            options["map_location"] = map_location
        with _without_mmap():
            try:
                if is_local(str(path)):
                    return stock.load_checkpoint(self, path, **options)
                # The installed fsspec may not know the place.
                options = {"map_location": "cpu", **options, "weights_only": weights_only}
                try:
                    stream = path_or_stream(str(path))
                except UnmappableCheckpointError:  # A server without ranges. fsspec reads the whole of it.
                    return stock.load_checkpoint(self, path, **options)
                return torch.load(stream, **options)
            except pickle.UnpicklingError as error:
                raise explain_torch_refusal(str(path), error) from error


def _stock() -> tuple[type[TorchCheckpointIO], ...]:
    """Lightning's own plugin. Two, perhaps of two versions, if both packages of Lightning are imported."""
    return classes("lightning.fabric.plugins.io.torch_io.TorchCheckpointIO")


def _require_file(path: str) -> None:
    """Raises ``FileNotFoundError`` if there is no such file, with advice if the path looks like a model on a hub."""
    if not is_local(path):
        identity_of(path)
        return
    filesystem, local_path = url_to_fs(path)
    if not filesystem.exists(local_path):
        advice = hub_advice(path)
        raise FileNotFoundError(f"Checkpoint file not found: {path}" + (f". {advice}" if advice else ""))


def _takes_weights_only(stock: type[TorchCheckpointIO]) -> bool:
    """Whether a plugin has the argument, which Lightning 2.6 added."""
    return "weights_only" in inspect.signature(stock.load_checkpoint).parameters


class _LoadedDict(OrderedDict[Any, Any]):
    """A loaded checkpoint that releases its files when it is deleted.

    Copies and pickles of it are plain ``OrderedDict``, which can be loaded everywhere, also with ``weights_only=True``.
    """

    __slots__ = ("mapped",)
    mapped: MappedCheckpoint | None

    def __del__(self) -> None:
        # Not at exit: exit handlers may still read tensors in the files.
        if getattr(self, "mapped", None) is not None and not sys.is_finalizing():
            # Tensors that only this dict refers to are deleted first, so their values are not read.
            self.clear()
            _detach(self.mapped)

    def __reduce__(self) -> Any:
        return OrderedDict, (), vars(self) or None, None, iter(self.items())

    def copy(self) -> Any:
        return OrderedDict(self)


def _detach_at_end(checkpoint: Any, mapped: MappedCheckpoint) -> Any:
    """Releases the files when the checkpoint is deleted, or before another program changes them.

    Lightning (2.5, 2.6) does not tell a CheckpointIO when a restore ends.

    Returns:
        The checkpoint to return.
    """
    mapped.watch()
    if type(checkpoint) in (dict, OrderedDict):
        whole = _LoadedDict(checkpoint)
        vars(whole).update(getattr(checkpoint, "__dict__", {}))  # A state dict keeps its _metadata there.
        whole.mapped = mapped
        return whole
    try:
        weakref.finalize(checkpoint, _detach, mapped).atexit = False
    except TypeError:
        mapped.detach()  # It cannot be weakly referenced, such as a list.
    return checkpoint


def _detach(mapped: MappedCheckpoint | None) -> None:
    try:
        if mapped is not None:
            mapped.detach()
    except (MemloadError, OSError) as error:
        warnings.warn(f"{error} Tensors of the checkpoint that are still in use may be wrong.", stacklevel=2)


def _without_mmap() -> contextlib.AbstractContextManager[Any]:
    """Makes ``torch.load`` ignore ``torch.utils.serialization.config.load.mmap`` for a ``with`` block.

    Lightning (2.6) passes open files, and torch cannot map them.
    """
    # torch >= 2.7. If it is not imported, it has its defaults.
    settings = sys.modules.get("torch.utils.serialization")
    return settings.config.patch("load.mmap", False) if settings is not None else contextlib.nullcontext()


def _is_cpu(map_location: Any) -> bool:
    return map_location is None or (
        isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == "cpu"
    )
